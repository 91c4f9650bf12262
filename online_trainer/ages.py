"""How old the events are that no snapshot contains yet, and which steps learned them: bounded in memory, and carried
over a restart.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from online_trainer.steps import LearnedSteps, bounded
from stream.freshness import AgeHistogram

_FOLD_EVENTS: Final = 100_000
"""Events not published yet whose times are kept; beyond it they become histograms ..."""
_FOLDED_MAX: Final = 64
"""... and so many histograms become half as many."""


class PendingAges:
    """Ages of events not published yet; many of them are kept as histograms, so that memory is bounded."""

    def __init__(self) -> None:
        self._times_ms: list[NDArray[np.int64]] = []
        self._num_times = 0
        self._folded: list[tuple[AgeHistogram, int]] = []
        """Ages, and the time (epoch ms) they are as of."""

    def add(self, times_ms: NDArray[np.int64], now_ms: int) -> None:
        """Note events by their time (epoch ms)."""
        self._times_ms.append(times_ms)
        self._num_times += len(times_ms)
        if self._num_times < _FOLD_EVENTS:
            return
        self._folded.append((self._recent(now_ms), now_ms))
        self._times_ms, self._num_times = [], 0
        if len(self._folded) > _FOLDED_MAX:
            # In pairs of neighbours: a histogram is moved, and so rounded, as few times as can be.
            pairs = zip(self._folded[0::2], self._folded[1::2], strict=False)
            odd = self._folded[len(self._folded) // 2 * 2 :]
            self._folded = [_joined(pair, pair[1][1]) for pair in pairs] + odd

    def _recent(self, now_ms: int) -> AgeHistogram:
        recent = AgeHistogram()
        for times_ms in self._times_ms:
            recent.add(now_ms - times_ms)
        return recent

    def as_of(self, now_ms: int) -> AgeHistogram:
        """Ages of everything noted."""
        return _joined([*self._folded, (self._recent(now_ms), now_ms)], now_ms)[0]

    def take(self, now_ms: int) -> AgeHistogram:
        """Ages of everything noted, which is then forgotten."""
        taken = self.as_of(now_ms)
        self._folded, self._times_ms, self._num_times = [], [], 0
        return taken


def _joined(parts: Iterable[tuple[AgeHistogram, int]], now_ms: int) -> tuple[AgeHistogram, int]:
    joined = AgeHistogram()
    for ages, as_of_ms in parts:
        joined.merge(ages if as_of_ms == now_ms else ages.shifted(now_ms - as_of_ms))
    return joined, now_ms


@dataclass(frozen=True, slots=True)
class AgesUpTo:
    """Ages as of a time (epoch ms) of events that were learned up to `num_interactions` of the ledger."""

    num_interactions: int
    as_of_ms: int
    event_age: AgeHistogram
    append_age: AgeHistogram
    steps: tuple[LearnedSteps, ...] = ()
    """The steps that learned them."""

    def with_earlier(self, earlier: AgesUpTo) -> AgesUpTo:
        """These and those of events before them, as of this time."""
        event_age, append_age = (
            _joined([(before, earlier.as_of_ms), (own, self.as_of_ms)], self.as_of_ms)[0]
            for before, own in ((earlier.event_age, self.event_age), (earlier.append_age, self.append_age))
        )
        steps = bounded(earlier.steps + self.steps)
        return AgesUpTo(self.num_interactions, self.as_of_ms, event_age, append_age, steps)

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return {
            "num_interactions": self.num_interactions,
            "as_of_ms": self.as_of_ms,
            "event_age": self.event_age.to_dict(),
            "append_age": self.append_age.to_dict(),
            "steps": [step.to_dict() for step in self.steps],
        }

    @classmethod
    def of_dict(cls, stored: dict[str, Any]) -> AgesUpTo:
        """From `to_dict()`."""
        return cls(
            stored["num_interactions"],
            stored["as_of_ms"],
            AgeHistogram.from_dict(stored["event_age"]),
            AgeHistogram.from_dict(stored["append_age"]),
            tuple(LearnedSteps.of_dict(step) for step in stored.get("steps", ())),
        )
