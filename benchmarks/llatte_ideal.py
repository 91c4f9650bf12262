"""The best that anybody can do on the simulated stream of the LLaTTE study, who reads so much of the history.

Shapes: H ratings of a history.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from backtest.moods import forecast
from benchmarks.llatte_streams import Histories, Stream

Int64s = NDArray[np.int64]
_REQUESTS: Final = 2_000
"""Drawn from the second half."""
_LENGTHS: Final = (0, 8, 32, 64, 128, 256)


def ideal(stream: Stream, *, short: int, long: int, stale_s: dict[str, int]) -> dict[str, Any]:
    """NE by the exact forecast: of the newest ratings alone; and of the newest `short` with the newest `long` of those
    that are so old. What items are worth is known, and values in full, which models read as thresholds.
    """
    histories, late = Histories(stream), np.flatnonzero(stream.offsets[:-1] >= len(stream.user) // 2)
    asked = np.sort(np.random.default_rng(0).choice(late, min(_REQUESTS, len(late)), replace=False))

    def newest(length: int, stale_ms: int = 0) -> Callable[[Int64s], Int64s]:
        return lambda request: histories.of(request, max_len=length, stale_ms=stale_ms)[0]

    def and_short(stale_ms: int) -> Callable[[Int64s], Int64s]:
        old, new = newest(long, stale_ms), newest(short)
        return lambda request: np.union1d(old(request), new(request))

    return {
        "newest": {str(length): _ne(stream, asked, newest(length)) for length in _LENGTHS},
        "short_and_stale": {name: _ne(stream, asked, and_short(1000 * seconds)) for name, seconds in stale_s.items()},
    }


def _ne(stream: Stream, requests: Int64s, read: Callable[[Int64s], Int64s]) -> float:
    assert stream.simulated is not None
    config, made = stream.simulated
    losses, likes = [], []
    for request in requests:
        places, first = read(np.array([request])), stream.offsets[request]
        rows = np.arange(first, stream.offsets[request + 1])
        moods_H = made.value[places] - made.worth_V[stream.item[places]]
        told = forecast(config, stream.time_ms[places], moods_H, int(stream.time_ms[first]))
        scores = (told.mean + made.worth_V[stream.item[rows]]) / math.sqrt(told.variance)
        chances = np.array([0.5 * math.erfc(-score / math.sqrt(2)) for score in scores])
        likes.append(stream.likes[rows])
        losses.append(-np.log(np.where(likes[-1], chances, 1 - chances)))
    share = float(np.concatenate(likes).mean())
    entropy = -share * math.log(share) - (1 - share) * math.log(1 - share)
    return float(np.concatenate(losses).mean() / entropy)
