"""What the model thread is asked, and what it answers.

Shapes: K items of an answer.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Final, Literal

import numpy as np
from numpy.typing import NDArray

from serving.weights import WeightsInfo

Int64s = NDArray[np.int64]
RankedBy = Literal["head", "retrieval", "popularity"]


@dataclass(frozen=True, kw_only=True, slots=True)
class RecommendQuery:
    """The k best items for a user."""

    user_id: int
    k: int
    exclude_seen: bool
    exclude: Int64s
    """Item ids that must not be in the answer."""
    categories: tuple[str, ...] = ()
    """Only items of these categories; empty: of any."""
    exclude_categories: tuple[str, ...] = ()
    session: Int64s = field(default_factory=lambda: np.empty(0, np.int64))
    """Item ids, oldest first, that stand in for a history that cannot be read."""
    diversity: float = 0.0

    @property
    def item_ids(self) -> Int64s:
        """Items that the request names."""
        return self.exclude


NOT_FINITE: Final = "not_finite"
"""`fallback_reason` of an answer for which the weights gave no numbers: to the guards, one that failed."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RankQuery:
    """Candidates (item ids) to put in order."""

    user_id: int
    candidates: Int64s
    surface: int = 0
    """Number of the surface that the request names; 0: none."""

    @property
    def item_ids(self) -> Int64s:
        """Items that the request names."""
        return self.candidates


Query = RecommendQuery | RankQuery


@dataclass(frozen=True, kw_only=True, slots=True)
class Ranking:
    """The answer to one query, and what it was computed from."""

    weights: WeightsInfo | None
    history_time_ms: int | None
    """Newest interaction of the user that was used."""
    fallback_reason: str | None
    item_ids: Int64s
    """int64[K], best first."""
    scores: NDArray[np.float32]
    """float32[K]; NaN: this candidate is unknown."""
    places: Int64s
    """int64[K], for RankQuery: where each item stands in `candidates`. Empty for RecommendQuery."""
    from_session: bool = False
    """Computed from the items of the query's session."""
    ranked_by: RankedBy | None = None
    """What gave the scores of a RankQuery."""
    predictions: NDArray[np.float32] | None = None
    """float32[K, tasks], of each item, where the ranking head gave the scores."""
    upstream_age_s: float | None = None
    """Of a RankQuery: seconds from the newest interaction that the user's vector from upstream knows to the request;
    None: no vector was read."""
