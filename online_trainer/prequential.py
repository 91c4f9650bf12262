"""Prequential metrics: every interaction is predicted before it is learned from (test, then train).

The candidate pool is the whole live catalogue as known at the start of the micro-batch, without the items already
in the user's history. An item that is not in the catalogue yet, or was already in the history, cannot be
recommended: a miss for every arm. Ties count as worse.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True, slots=True)
class RankMetrics:
    """Means over `count` evaluated interactions; None when there are none."""

    count: int
    hr_at_10: float | None
    ndcg_at_20: float | None
    mrr: float | None

    @classmethod
    def of_ranks(cls, ranks: NDArray[np.int64]) -> RankMetrics:
        """Metrics of 1-based ranks, any number of them."""
        if ranks.size == 0:
            return cls(0, None, None, None)
        ndcg = np.where(ranks <= 20, 1.0 / np.log2(np.minimum(ranks, 20) + 1.0), 0.0)
        return cls(int(ranks.size), float((ranks <= 10).mean()), float(ndcg.mean()), float((1.0 / ranks).mean()))


class PrequentialMeter:
    """Lifetime means and a window of the newest ranks for one arm."""

    def __init__(self, window: int) -> None:
        self._window = np.zeros(window, np.int64)
        self._num_seen = 0
        self._sums = np.zeros(3, np.float64)

    def add(self, ranks: NDArray[np.int64]) -> None:
        """Add 1-based ranks in stream order."""
        if ranks.size == 0:
            return
        metrics = RankMetrics.of_ranks(ranks)
        self._sums += np.array([metrics.hr_at_10, metrics.ndcg_at_20, metrics.mrr], np.float64) * ranks.size
        size = len(self._window)
        newest = ranks[-size:]
        slots = (self._num_seen + ranks.size - newest.size + np.arange(newest.size)) % size
        self._window[slots] = newest
        self._num_seen += int(ranks.size)

    def lifetime(self) -> RankMetrics:
        """Means over everything evaluated so far."""
        if self._num_seen == 0:
            return RankMetrics(0, None, None, None)
        hr, ndcg, mrr = (self._sums / self._num_seen).tolist()
        return RankMetrics(self._num_seen, hr, ndcg, mrr)

    def windowed(self) -> RankMetrics:
        """Means over the newest `window` evaluated interactions."""
        return RankMetrics.of_ranks(self._window[: min(self._num_seen, len(self._window))])

    def state(self) -> dict[str, NDArray[np.generic]]:
        """Arrays that `load_state` reads back."""
        return {"window": self._window, "num_seen": np.array([self._num_seen]), "sums": self._sums}

    def load_state(self, state: Mapping[str, NDArray[np.generic]]) -> None:
        """Continue from `state()`; raises ValueError when the window has another size."""
        if len(state["window"]) != len(self._window):
            raise ValueError(f"metrics window of {len(state['window'])}, configured {len(self._window)}")
        self._window = state["window"].astype(np.int64)
        self._num_seen = int(state["num_seen"][0])
        self._sums = state["sums"].astype(np.float64)
