"""Time as an argument: nothing in headrace reads the wall clock except through a `Clock`."""

from __future__ import annotations

import time
from typing import Protocol


class Clock(Protocol):
    """Where `now` comes from."""

    def now_ms(self) -> int:
        """Current time, epoch milliseconds."""
        ...

    def monotonic_s(self) -> float:
        """Seconds that never run backwards, for measuring durations."""
        ...


class WallClock:
    """The machine's clock."""

    def now_ms(self) -> int:
        """See Clock."""
        return time.time_ns() // 1_000_000

    def monotonic_s(self) -> float:
        """See Clock."""
        return time.monotonic()


class ManualClock:
    """A clock that stands still until it is told to move: tests and backtests."""

    def __init__(self, now_ms: int = 0) -> None:
        self._now_ms = now_ms

    def now_ms(self) -> int:
        """See Clock."""
        return self._now_ms

    def monotonic_s(self) -> float:
        """See Clock."""
        return self._now_ms / 1000.0

    def advance(self, duration_ms: int) -> None:
        """Move forward by `duration_ms`; raises ValueError for a negative duration."""
        if duration_ms < 0:
            raise ValueError(f"duration_ms = {duration_ms}: a clock never runs backwards")
        self._now_ms += duration_ms


class WatermarkClock:
    """Event time of a replayed stream: `now` is the highest event time observed so far.

    Replayed events are months or years old, so the machine's clock says nothing about their recency; what is
    "now" for a model that learns from them is how far the stream has come. Never runs backwards.
    """

    def __init__(self) -> None:
        self._watermark_ms = 0

    def now_ms(self) -> int:
        """See Clock."""
        return self._watermark_ms

    def monotonic_s(self) -> float:
        """See Clock."""
        return time.monotonic()

    def observe(self, event_time_ms: int) -> None:
        """Raise the watermark to `event_time_ms` if it lies ahead."""
        self._watermark_ms = max(self._watermark_ms, event_time_ms)
