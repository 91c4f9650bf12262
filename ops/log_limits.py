"""Keeps a library from filling the log with one complaint: in an outage, aiokafka repeats itself 100 times a second."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from typing import Final

INTERVAL_S: Final = 10.0
_MESSAGES_MAX: Final = 1_000


class RepetitionFilter(logging.Filter):
    """Lets each message of a library pass once per interval, and then says how often it was held back."""

    def __init__(
        self, library: str, *, interval_s: float = INTERVAL_S, clock_s: Callable[[], float] = time.monotonic
    ) -> None:
        super().__init__(library)
        self._interval_s, self._clock_s = interval_s, clock_s
        self._passed: dict[tuple[str, str], tuple[float, int]] = {}
        """(logger, message before its arguments) → when it last passed, how often it was held back since."""

    def filter(self, record: logging.LogRecord) -> bool:
        """Whether to log the record; what is not of the library always is."""
        if not super().filter(record):
            return True
        key, now_s = (record.name, str(record.msg)), self._clock_s()
        passed_s, num_held_back = self._passed.get(key, (now_s - self._interval_s, 0))
        if now_s - passed_s < self._interval_s:
            self._passed[key] = (passed_s, num_held_back + 1)
            return False
        if len(self._passed) >= _MESSAGES_MAX:
            self._passed.clear()  # messages that are never the same twice: forget them all, rather than grow
        self._passed[key] = (now_s, 0)
        if num_held_back:
            record.msg = f"{record.msg} [{num_held_back} more like this in {now_s - passed_s:.0f} s]"
        return True
