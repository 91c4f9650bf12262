"""The model thread's work: from a micro-batch of requests to ranked items.

Everything here runs in the one thread that owns the weights and the hot histories.

Shapes: T interactions of all histories, U users that the model scores, V rows of the catalogue, D embedding width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from serving.history_reader import HISTORY_BEHIND, HISTORY_UNREADABLE, STORE_UNAVAILABLE, HistoryReader, UserHistory
from serving.item_search import ItemSearch
from serving.popularity import LivePopularity, PopularItems
from serving.queries import Query, Ranking, RankQuery, RecommendQuery
from serving.user_states import Reading, UserEncoder
from serving.weights import ServedWeights

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


@dataclass(frozen=True, slots=True)
class _Asked:
    """One query of a micro-batch with all that is known for it."""

    query: Query
    history: UserHistory
    history_rows: Int64s
    """Rows of the item table, -1 for items it does not hold: of the whole history."""
    named_rows: Int64s
    """Of the items that the request names."""


class Ranker:
    """Answers micro-batches with the weights and histories of the moment."""

    def __init__(
        self,
        weights: ServedWeights,
        histories: HistoryReader,
        live_popularity: LivePopularity,
        encoder: UserEncoder,
        search: ItemSearch,
    ) -> None:
        self._weights = weights
        self._histories = histories
        self._live_popularity = live_popularity
        self._encoder = encoder
        self._search = search

    @torch.inference_mode()
    def answer(self, queries: Sequence[Query], now_ms: int) -> list[Ranking]:
        """One ranking per query, all from the same weights. `now_ms`: time of the requests."""
        batch = self._look_up(queries, self._histories.read([query.user_id for query in queries]))
        rankings: dict[int, Ranking] = {}
        if self._weights.info is not None:
            rankings = self._by_model(batch, now_ms)
        unscored = [place for place in range(len(batch)) if place not in rankings]
        if unscored:
            popular = self._live_popularity.items() if self._weights.info is None else self._weights.popular()
            rankings |= {place: self._by_popularity(batch[place], popular) for place in unscored}
        return [rankings[place] for place in range(len(batch))]

    def _look_up(self, queries: Sequence[Query], histories: dict[int, UserHistory]) -> list[_Asked]:
        """Table rows of all items that the batch is about, in one call."""
        ids = [*(history.item_ids for history in histories.values()), *(query.item_ids for query in queries)]
        split = np.split(self._weights.items.lookup(np.concatenate(ids)), np.cumsum([len(part) for part in ids])[:-1])
        of_history = dict(zip(histories, split, strict=False))
        return [
            _Asked(query, histories[query.user_id], of_history[query.user_id], named_rows)
            for query, named_rows in zip(queries, split[len(histories) :], strict=True)
        ]

    def _by_model(self, batch: Sequence[_Asked], now_ms: int) -> dict[int, Ranking]:
        """By place in the batch: answers to all whose history the loaded weights can read."""
        readings: dict[int, Reading] = {}
        for asked in batch:
            user_id, history = asked.history.user_id, asked.history
            newest = slice(-self._encoder.window_len(history.num_arrived), None)
            if user_id not in readings and (asked.history_rows[newest] >= 0).any():
                readings[user_id] = Reading(
                    user_id=user_id, rows=asked.history_rows[newest], times_ms=history.event_time_ms[newest]
                )
        if not readings:
            return {}
        states = dict(zip(readings, self._encoder.encode(list(readings.values()), now_ms), strict=True))
        scored = [place for place, asked in enumerate(batch) if asked.history.user_id in states]
        u_UD = torch.stack([states[batch[place].history.user_id] for place in scored])
        best = [place for place in scored if isinstance(batch[place].query, RecommendQuery)]
        found = self._recommended([batch[place] for place in best], u_UD[[place in best for place in scored]])
        rankings = dict(zip(best, found, strict=True))
        for place, u_D in zip(scored, u_UD, strict=True):
            if place not in rankings:
                rankings[place] = self._ranked(batch[place], u_D)
        return rankings

    def _recommended(self, batch: Sequence[_Asked], u_UD: Tensor) -> list[Ranking]:
        if not batch:
            return []
        queries = [asked.query for asked in batch if isinstance(asked.query, RecommendQuery)]
        left_out = [
            np.concatenate([asked.named_rows, asked.history_rows]) if query.exclude_seen else asked.named_rows
            for asked, query in zip(batch, queries, strict=True)
        ]
        best = self._search.best(u_UD, max(query.k for query in queries), left_out=left_out)
        rankings = []
        for asked, query, scores_K, rows_K in zip(batch, queries, best.scores_BK, best.rows_BK, strict=True):
            kept = scores_K[: query.k].isfinite()
            rankings.append(
                self._ranking(
                    asked,
                    item_ids=self._weights.items.ids_of(rows_K[: query.k][kept].numpy()),
                    scores=scores_K[: query.k][kept].numpy(),
                )
            )
        return rankings

    def _ranked(self, asked: _Asked, u_D: Tensor) -> Ranking:
        known = asked.named_rows >= 0
        scores = np.full(len(known), np.nan, np.float32)
        rows = torch.from_numpy(asked.named_rows[known])
        scores[known] = self._weights.recommender.scores(u_D[None], rows, catalogue=self._weights.catalogue())[
            0
        ].numpy()
        return self._in_order(asked, scores, None)

    def _by_popularity(self, asked: _Asked, popular: PopularItems) -> Ranking:
        query, history = asked.query, asked.history
        reason = self._fallback_reason(history)
        if isinstance(query, RankQuery):
            return self._in_order(asked, popular.scores_of(query.candidates), reason)
        left_out = [self._weights.withheld.item_ids, query.exclude]
        if query.exclude_seen:
            left_out.append(history.item_ids)
        item_ids, scores = popular.first(query.k, without=np.unique(np.concatenate(left_out)))
        return self._ranking(asked, item_ids=item_ids, scores=scores, reason=reason)

    def _fallback_reason(self, history: UserHistory) -> str:
        if self._weights.info is None:
            return NO_WEIGHTS
        if history.missing_because is not None:
            return history.missing_because
        return HISTORY_UNKNOWN_TO_WEIGHTS if len(history.item_ids) else NO_HISTORY

    def _in_order(self, asked: _Asked, scores: NDArray[np.float32], reason: str | None) -> Ranking:
        """The candidates of a RankQuery by their scores."""
        # NaN (unknown) sorts last; equal scores keep the order of the request.
        places = np.argsort(-scores, kind="stable")
        return self._ranking(
            asked, item_ids=asked.query.item_ids[places], scores=scores[places], places=places, reason=reason
        )

    def _ranking(
        self,
        asked: _Asked,
        *,
        item_ids: Int64s,
        scores: NDArray[np.float32],
        places: Int64s | None = None,
        reason: str | None = None,
    ) -> Ranking:
        return Ranking(
            weights=self._weights.info,
            history_time_ms=asked.history.newest_ms,
            fallback_reason=reason,
            item_ids=item_ids,
            scores=scores,
            places=np.empty(0, np.int64) if places is None else places,
        )
