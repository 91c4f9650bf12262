"""The model thread's work: from a micro-batch of requests to ranked items.

Everything here runs in the one thread that owns the weights and the hot histories.

Shapes: B users of a batch, T interactions of their histories, L positions the model reads, P users it scores,
V rows of the catalogue, D embedding width.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from model.batch import HistoryBatch
from serving.history_reader import HISTORY_BEHIND, HISTORY_UNREADABLE, STORE_UNAVAILABLE, HistoryReader, UserHistory
from serving.popularity import LivePopularity, PopularItems
from serving.weights import ServedWeights, WeightsInfo

Int64s = NDArray[np.int64]

NO_WEIGHTS: Final = "no_weights"
NO_HISTORY: Final = "no_history"
HISTORY_UNKNOWN_TO_WEIGHTS: Final = "history_unknown_to_weights"
FALLBACK_REASONS: Final = {
    NO_WEIGHTS: "no snapshot is loaded yet",
    NO_HISTORY: "nothing is known about this user",
    HISTORY_UNKNOWN_TO_WEIGHTS: "the weights know none of the items in this user's history",
    STORE_UNAVAILABLE: "the history is not in memory, and the store is away",
    HISTORY_BEHIND: "the store does not hold interactions yet that the log has announced",
    HISTORY_UNREADABLE: "the stored history is damaged, or the schema is not the one this code needs",
}
"""Why an answer is ordered by popularity."""

_SCORES_MAX: Final = 8_000_000
"""Scores that exist at once (32 MB); larger batches over large catalogues are scored in parts."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RecommendQuery:
    """The k best items for a user."""

    user_id: int
    k: int
    exclude_seen: bool
    exclude: Int64s
    """Item ids that must not be in the answer."""

    @property
    def item_ids(self) -> Int64s:
        """Items that the request names."""
        return self.exclude


@dataclass(frozen=True, kw_only=True, slots=True)
class RankQuery:
    """Candidates (item ids) to put in order."""

    user_id: int
    candidates: Int64s

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


@dataclass(frozen=True, slots=True)
class _FoundRows:
    """Rows of the item table, -1 for items it does not hold."""

    of_history: dict[int, Int64s]
    """By user: of the whole history."""
    of_query: list[Int64s]
    """Of the items that each request names."""


@dataclass(frozen=True, slots=True)
class _QueryRows:
    of_history: Int64s
    of_query: Int64s


class Ranker:
    """Answers micro-batches with the weights and histories of the moment."""

    def __init__(self, weights: ServedWeights, histories: HistoryReader, live_popularity: LivePopularity) -> None:
        self._weights = weights
        self._histories = histories
        self._live_popularity = live_popularity

    @torch.inference_mode()
    def answer(self, queries: Sequence[Query], now_ms: int) -> list[Ranking]:
        """One ranking per query, all from the same weights. `now_ms`: time of the requests."""
        histories = self._histories.read([query.user_id for query in queries])
        found = self._look_up(histories, queries)
        places: dict[int, list[int]] = {}
        for place, query in enumerate(queries):
            places.setdefault(query.user_id, []).append(place)
        rankings: dict[int, Ranking] = {}
        for history, scores_V in self._scored(histories, found, now_ms):
            for place in places[history.user_id]:
                rows = _QueryRows(found.of_history[history.user_id], found.of_query[place])
                rankings[place] = self._by_model(queries[place], history, rows, scores_V)
        unscored = [place for place in range(len(queries)) if place not in rankings]
        if unscored:
            popular = self._live_popularity.items() if self._weights.info is None else self._weights.popular()
            for place in unscored:
                query = queries[place]
                rankings[place] = self._by_popularity(query, histories[query.user_id], popular)
        return [rankings[place] for place in range(len(queries))]

    def _look_up(self, histories: dict[int, UserHistory], queries: Sequence[Query]) -> _FoundRows:
        """Table rows of all items that the batch is about, in one call."""
        ids = [*(history.item_ids for history in histories.values()), *(query.item_ids for query in queries)]
        rows = self._weights.items.lookup(np.concatenate(ids))
        bounds = np.cumsum([len(part) for part in ids])[:-1]
        split = np.split(rows, bounds)
        return _FoundRows(dict(zip(histories, split, strict=False)), split[len(histories) :])

    def _scored(
        self, histories: dict[int, UserHistory], found: _FoundRows, now_ms: int
    ) -> Iterator[tuple[UserHistory, Tensor]]:
        """float32[V] for every user whose history the loaded weights can read."""
        if self._weights.info is None:
            return
        rows = {user_id: own[-self._weights.max_len :] for user_id, own in found.of_history.items()}
        readable = [history for history in histories.values() if (rows[history.user_id] >= 0).any()]
        if not readable:
            return
        batch = _history_batch(readable, [rows[history.user_id] for history in readable], now_ms)
        u_PD = self._weights.recommender.encode(batch)[batch.last_positions()]
        step = max(1, _SCORES_MAX // self._weights.items.num_items)
        for start in range(0, len(readable), step):
            part = slice(start, start + step)
            yield from zip(readable[part], self._weights.score(u_PD[part]), strict=True)

    def _by_model(self, query: Query, history: UserHistory, rows: _QueryRows, scores_V: Tensor) -> Ranking:
        named = torch.from_numpy(rows.of_query[rows.of_query >= 0])
        if isinstance(query, RankQuery):
            scores = np.full(len(rows.of_query), np.nan, np.float32)
            scores[rows.of_query >= 0] = scores_V[named].numpy()
            return self._ranked_candidates(query, history, scores, None)
        allowed_V = scores_V.clone() if self._weights.mask_V is None else scores_V + self._weights.mask_V
        allowed_V[named] = -torch.inf
        if query.exclude_seen:
            allowed_V[torch.from_numpy(rows.of_history[rows.of_history >= 0])] = -torch.inf
        best = torch.topk(allowed_V, min(query.k, len(allowed_V)))
        kept = best.values.isfinite()
        return Ranking(
            weights=self._weights.info,
            history_time_ms=history.newest_ms,
            fallback_reason=None,
            item_ids=self._weights.items.ids_of(best.indices[kept].numpy()),
            scores=best.values[kept].numpy(),
            places=np.empty(0, np.int64),
        )

    def _by_popularity(self, query: Query, history: UserHistory, popular: PopularItems) -> Ranking:
        reason = self._fallback_reason(history)
        if isinstance(query, RankQuery):
            return self._ranked_candidates(query, history, popular.scores_of(query.candidates), reason)
        left_out = [self._weights.withheld.item_ids, query.exclude]
        if query.exclude_seen:
            left_out.append(history.item_ids)
        item_ids, scores = popular.first(query.k, without=np.unique(np.concatenate(left_out)))
        return Ranking(
            weights=self._weights.info,
            history_time_ms=history.newest_ms,
            fallback_reason=reason,
            item_ids=item_ids,
            scores=scores,
            places=np.empty(0, np.int64),
        )

    def _fallback_reason(self, history: UserHistory) -> str:
        if self._weights.info is None:
            return NO_WEIGHTS
        if history.missing_because is not None:
            return history.missing_because
        return HISTORY_UNKNOWN_TO_WEIGHTS if len(history.item_ids) else NO_HISTORY

    def _ranked_candidates(
        self, query: RankQuery, history: UserHistory, scores: NDArray[np.float32], reason: str | None
    ) -> Ranking:
        # NaN (unknown) sorts last; equal scores keep the order of the request.
        places = np.argsort(-scores, kind="stable")
        return Ranking(
            weights=self._weights.info,
            history_time_ms=history.newest_ms,
            fallback_reason=reason,
            item_ids=query.candidates[places],
            scores=scores[places],
            places=places,
        )


def _history_batch(histories: Sequence[UserHistory], rows: Sequence[Int64s], now_ms: int) -> HistoryBatch:
    """What the model reads: at each position the time of the next interaction, at the newest that of the request."""
    times = [history.event_time_ms[-len(own) :] for history, own in zip(histories, rows, strict=True)]
    lengths = np.array([len(own) for own in rows], np.int64)
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    times_L = np.concatenate(times)
    next_L = np.empty_like(times_L)
    next_L[:-1] = times_L[1:]
    # A producer's clock may run ahead of ours: the request still comes after everything it knows of.
    next_L[offsets[1:] - 1] = np.maximum(times_L[offsets[1:] - 1], now_ms)
    return HistoryBatch(
        rows_L=torch.from_numpy(np.concatenate(rows)),
        timestamps_ms_L=torch.from_numpy(times_L),
        query_times_ms_L=torch.from_numpy(next_L),
        offsets=torch.from_numpy(offsets),
    )
