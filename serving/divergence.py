"""How far the answers of a candidate are from those in service, over many requests; bounded."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

from serving.guards import Ring, ks_distance
from serving.queries import Ranking

_TOP: Final = 10
_SCORES: Final = 4_096


@dataclass(frozen=True, kw_only=True, slots=True)
class DivergenceReport:
    """Means over all requests compared; None where nothing could be compared."""

    num_compared: int
    num_fallback_differs: int
    """Requests that only one of the two answered by the model."""
    overlap_at_10: float | None
    """Share of the first 10 items that both have."""
    same_first: float | None
    """Share of answers with the same first item."""
    rank_correlation: float | None
    """Spearman's, of the items that both answers hold."""
    score_shift: float | None
    """Score of the candidate minus score in service, of the items that both answers hold."""
    score_distance: float | None
    """Kolmogorov-Smirnov distance between the newest scores of both, as the guards compute it."""


class Mean:
    """A running mean, which another thread may look at."""

    def __init__(self) -> None:
        self._sum_and_count = (0.0, 0)

    def add(self, value: float) -> None:
        """Add one value."""
        total, count = self._sum_and_count
        self._sum_and_count = (total + value, count + 1)

    @property
    def value(self) -> float | None:
        """None without any value."""
        total, count = self._sum_and_count
        return total / count if count else None


class Divergence:
    """Compares pairs of answers to the same request."""

    def __init__(self) -> None:
        self.num_compared = 0
        self.num_fallback_differs = 0
        self._overlap, self._same_first, self._correlation, self._shift = Mean(), Mean(), Mean(), Mean()
        self._served, self._candidate = Ring(_SCORES), Ring(_SCORES)

    def add(self, served: Ranking, candidate: Ranking) -> None:
        """Compare two answers; those by popularity say nothing about the weights."""
        self._compare(served, candidate)
        # Last: a report that is read meanwhile counts nothing that its means do not hold.
        self.num_compared += 1

    def _compare(self, served: Ranking, candidate: Ranking) -> None:
        reasons = (served.fallback_reason, candidate.fallback_reason)
        if any(reason is not None for reason in reasons):
            self.num_fallback_differs += (reasons[0] is None) != (reasons[1] is None)
            return
        one, other = _known(served), _known(candidate)
        length = min(_TOP, max(len(one.item_ids), len(other.item_ids)))
        if length:
            self._overlap.add(len(np.intersect1d(one.item_ids[:length], other.item_ids[:length])) / length)
        if len(one.item_ids) and len(other.item_ids):
            self._same_first.add(float(one.item_ids[0] == other.item_ids[0]))
        _, at_one, at_other = np.intersect1d(one.item_ids, other.item_ids, return_indices=True)
        if len(at_one):
            self._shift.add(float((other.scores[at_other] - one.scores[at_one]).mean()))
        if len(at_one) > 1:
            self._correlation.add(_correlation(at_one, at_other))
        self._served.add(one.scores[:_TOP])
        self._candidate.add(other.scores[:_TOP])

    def report(self) -> DivergenceReport:
        """What has been found so far."""
        served, candidate = self._served.values(), self._candidate.values()
        return DivergenceReport(
            num_compared=self.num_compared,
            num_fallback_differs=self.num_fallback_differs,
            overlap_at_10=self._overlap.value,
            same_first=self._same_first.value,
            rank_correlation=self._correlation.value,
            score_shift=self._shift.value,
            score_distance=ks_distance(served, candidate) if len(served) and len(candidate) else None,
        )


@dataclass(frozen=True, slots=True)
class _Known:
    item_ids: NDArray[np.int64]
    scores: NDArray[np.float32]


def _known(ranking: Ranking) -> _Known:
    """Without candidates that the weights do not know."""
    known = np.isfinite(ranking.scores)
    item_ids, first = np.unique(ranking.item_ids[known], return_index=True)
    order = np.sort(first)  # a request may name a candidate twice
    assert len(item_ids) == len(order)
    return _Known(ranking.item_ids[known][order], ranking.scores[known][order])


def _correlation(places: NDArray[np.int64], others: NDArray[np.int64]) -> float:
    """Spearman's, of two orders of the same things; no ties."""
    ranks, other_ranks = places.argsort().argsort(), others.argsort().argsort()
    n = len(places)
    return float(1 - 6 * ((ranks - other_ranks) ** 2).sum() / (n * (n * n - 1)))
