"""The model thread's work: from a micro-batch of requests to ranked items.

Everything here runs in the one thread that owns the weights and the hot histories.

Shapes: T interactions of all histories, U users that the model scores, V rows of the catalogue, D embedding width.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from serving.history_reader import HISTORY_BEHIND, HISTORY_UNREADABLE, STORE_UNAVAILABLE, HistoryReader, UserHistory
from serving.item_categories import ItemCategories
from serving.popularity import LivePopularity, PopularItems
from serving.queries import NOT_FINITE, Query, RankedBy, Ranking, RankQuery, RecommendQuery
from serving.ranking_head import RankingHead, ToRank
from serving.recommending import ItemChooser, Recommending
from serving.user_states import Reading, UserEncoder
from serving.user_vectors import UserVector, VectorReader
from serving.weights import ServedWeights

Int64s = NDArray[np.int64]

NO_WEIGHTS: Final = "no_weights"
NO_HISTORY: Final = "no_history"
HISTORY_UNKNOWN_TO_WEIGHTS: Final = "history_unknown_to_weights"
FALLBACK_REASONS: Final = {
    NO_WEIGHTS: "no snapshot is loaded yet",
    NO_HISTORY: "nothing is known about this user",
    HISTORY_UNKNOWN_TO_WEIGHTS: "the weights know none of the items in this user's history",
    NOT_FINITE: "the weights, though finite themselves, give no finite numbers for this user",
    STORE_UNAVAILABLE: "the history is not in memory, and the store is away",
    HISTORY_BEHIND: "the store does not hold interactions yet that the log has announced",
    HISTORY_UNREADABLE: "the stored history is damaged, or the schema is not the one this code needs",
}
"""Why an answer is ordered by popularity."""

_NO_ITEMS: Final = np.empty(0, np.int64)


@dataclass(frozen=True, kw_only=True, slots=True)
class RankerParts:
    """What answers are computed from; all of it belongs to the model thread."""

    weights: ServedWeights
    histories: HistoryReader
    live_popularity: LivePopularity
    encoder: UserEncoder
    chooser: ItemChooser
    categories: ItemCategories
    head: RankingHead
    blocking_actions: int
    """Bitmask of the actions after which a user does not want to see an item again."""
    vectors: VectorReader | None = None
    """Users' vectors from upstream; None: nobody has one."""


@dataclass(frozen=True, slots=True)
class _Asked:
    """One query of a micro-batch with all that is known for it."""

    query: Query
    history: UserHistory
    history_rows: Int64s
    """Rows of the item table, -1 for items it does not hold: of the whole history."""
    named_rows: Int64s
    """Of the items that the request names."""
    session_rows: Int64s


@dataclass(frozen=True, slots=True)
class _Scored:
    """A query that the model answers."""

    place: int
    """In the batch."""
    reading: Reading


class Ranker:
    """Answers micro-batches with the weights and histories of the moment."""

    def __init__(self, parts: RankerParts) -> None:
        self._parts = parts
        self._weights = parts.weights

    @torch.inference_mode()
    def answer(self, queries: Sequence[Query], now_ms: int) -> list[Ranking]:
        """One ranking per query, all from the same weights. `now_ms`: time of the requests."""
        parts = self._parts
        batch = self._look_up(queries, parts.histories.read([query.user_id for query in queries]))
        scored = self._readable(batch, now_ms) if self._weights.info is not None else []
        rankings = self._by_model(batch, scored, now_ms)
        unscored = [place for place in range(len(batch)) if place not in rankings]
        if unscored:
            popular = parts.live_popularity.items() if self._weights.info is None else self._weights.popular()
            failed = {one.place for one in scored}
            for place in unscored:
                reason = NOT_FINITE if place in failed else self._fallback_reason(batch[place].history)
                rankings[place] = self._by_popularity(batch[place], popular, reason)
        return [rankings[place] for place in range(len(batch))]

    def _look_up(self, queries: Sequence[Query], histories: dict[int, UserHistory]) -> list[_Asked]:
        """Table rows of all items that the batch is about, in one call."""
        sessions = [query.session if isinstance(query, RecommendQuery) else _NO_ITEMS for query in queries]
        ids = [*(history.item_ids for history in histories.values()), *(query.item_ids for query in queries), *sessions]
        split = np.split(self._weights.items.lookup(np.concatenate(ids)), np.cumsum([len(part) for part in ids])[:-1])
        of_history = dict(zip(histories, split, strict=False))
        named, session = split[len(histories) : -len(queries)], split[-len(queries) :]
        return [
            _Asked(query, histories[query.user_id], of_history[query.user_id], named_rows, session_rows)
            for query, named_rows, session_rows in zip(queries, named, session, strict=True)
        ]

    def _by_model(self, batch: Sequence[_Asked], scored: Sequence[_Scored], now_ms: int) -> dict[int, Ranking]:
        """By place in the batch: answers to those of `scored` for whom the loaded weights give finite numbers."""
        of_head = self._by_head(batch, scored, now_ms)
        by_head = {place: ranking for place, ranking in of_head.items() if ranking is not None}
        scored = [one for one in scored if one.place not in of_head]
        if not scored:
            return by_head
        # Several queries of one user share a reading.
        readings = list({id(one.reading): one.reading for one in scored}.values())
        number = {id(reading): at for at, reading in enumerate(readings)}
        u_UD = self._parts.encoder.encode(readings, now_ms)
        is_finite_U = np.isfinite(u_UD.numpy().sum(axis=1) * float(self._weights.recommender.scale))
        scored = [one for one in scored if is_finite_U[number[id(one.reading)]]]
        places, numbers = [one.place for one in scored], [number[id(one.reading)] for one in scored]
        states = dict(zip(places, u_UD[numbers], strict=True))
        recommending = [one for one in scored if isinstance(batch[one.place].query, RecommendQuery)]
        rankings = by_head | self._recommended(batch, recommending, states)
        for place in places:
            if place not in rankings:
                rankings[place] = self._ranked(batch[place], states[place])
        return rankings

    def _readable(self, batch: Sequence[_Asked], now_ms: int) -> list[_Scored]:
        """What the model reads for each query: the user's history, or else the items of the session."""
        of_user: dict[int, Reading] = {}
        scored = []
        for place, asked in enumerate(batch):
            history = asked.history
            newest = slice(-self._parts.encoder.window_len(history.num_arrived), None)
            if (asked.history_rows[newest] >= 0).any():
                of_user.setdefault(
                    history.user_id,
                    Reading(
                        user_id=history.user_id,
                        rows=asked.history_rows[newest],
                        times_ms=history.event_time_ms[newest],
                        acts=history.acts[newest],
                        values=history.value[newest],
                    ),
                )
                scored.append(_Scored(place, of_user[history.user_id]))
                continue
            session = asked.session_rows[-self._weights.max_len :]
            if (session >= 0).any():
                # When they were looked at, and what was done, is not told: now, and nothing known.
                looked_at = Reading(
                    user_id=None,
                    rows=session,
                    times_ms=np.full(len(session), now_ms),
                    acts=np.zeros(len(session), np.int64),
                    values=np.full(len(session), np.nan, np.float32),
                )
                scored.append(_Scored(place, looked_at))
        return scored

    def _recommended(
        self, batch: Sequence[_Asked], scored: Sequence[_Scored], states: dict[int, Tensor]
    ) -> dict[int, Ranking]:
        """By place in the batch."""
        if not scored:
            return {}
        asked = [self._recommending(batch[one.place]) for one in scored]
        found = self._parts.chooser.choose(asked, torch.stack([states[one.place] for one in scored]))
        return {
            one.place: self._ranking(
                batch[one.place],
                item_ids=self._weights.items.ids_of(best.rows),
                scores=best.scores,
                from_session=one.reading.user_id is None,
            )
            for one, best in zip(scored, found, strict=True)
        }

    def _recommending(self, asked: _Asked) -> Recommending:
        assert isinstance(asked.query, RecommendQuery), "chosen by its kind"
        return Recommending(
            query=asked.query,
            named_rows=asked.named_rows,
            session_rows=asked.session_rows,
            seen_rows=asked.history_rows,
            blocked_rows=asked.history_rows[self._is_blocked(asked.history)],
        )

    def _is_blocked(self, history: UserHistory) -> NDArray[np.bool_]:
        blocked: NDArray[np.bool_] = (history.action & np.uint32(self._parts.blocking_actions)) != 0
        return blocked

    def _by_head(self, batch: Sequence[_Asked], scored: Sequence[_Scored], now_ms: int) -> dict[int, Ranking | None]:
        """By place in the batch: the rankings that the ranking head gives, None where they are not finite; none at all
        where it is not in use.
        """
        places = [one.place for one in scored if isinstance(batch[one.place].query, RankQuery)]
        if not places or not self._parts.head.is_in_use:
            return {}
        vectors = self._vectors([batch[place].query.user_id for place in places])
        requests = [
            ToRank(asked.history, asked.history_rows, asked.named_rows, vectors.get(query.user_id), query.surface)
            for asked in (batch[place] for place in places)
            if isinstance(query := asked.query, RankQuery)
        ]
        found = self._parts.head.score(requests, now_ms)
        return {
            place: replace(
                self._in_order(batch[place], one.scores, None, ranked_by="head", predictions=one.predictions),
                upstream_age_s=one.upstream_age_s,
            )
            if np.isfinite(one.scores[batch[place].named_rows >= 0]).all()
            else None
            for place, one in zip(places, found, strict=True)
        }

    def _vectors(self, user_ids: Sequence[int]) -> Mapping[int, UserVector]:
        vectors = self._parts.vectors
        return {} if vectors is None or not self._parts.head.reads_vectors else vectors.read(user_ids)

    def _ranked(self, asked: _Asked, u_D: Tensor) -> Ranking:
        known = asked.named_rows >= 0
        scores = np.full(len(known), np.nan, np.float32)
        rows = torch.from_numpy(asked.named_rows[known])
        scores[known] = self._weights.recommender.scores(u_D[None], rows, catalogue=self._weights.catalogue())[
            0
        ].numpy()
        return self._in_order(asked, scores, None, ranked_by="retrieval")

    def _by_popularity(self, asked: _Asked, popular: PopularItems, reason: str) -> Ranking:
        query, history, categories = asked.query, asked.history, self._parts.categories
        if isinstance(query, RankQuery):
            return self._in_order(asked, popular.scores_of(query.candidates), reason, ranked_by="popularity")
        left_out = [
            self._weights.withheld.item_ids,
            query.exclude,
            history.item_ids[self._is_blocked(history)],
            categories.ids_of(query.exclude_categories),
        ]
        if query.exclude_seen:
            left_out += [history.item_ids, query.session]
        item_ids, scores = popular.first(
            query.k,
            without=np.unique(np.concatenate(left_out)),
            only=categories.ids_of(query.categories) if query.categories else None,
        )
        return self._ranking(asked, item_ids=item_ids, scores=scores, reason=reason)

    def _fallback_reason(self, history: UserHistory) -> str:
        if self._weights.info is None:
            return NO_WEIGHTS
        if history.missing_because is not None:
            return history.missing_because
        return HISTORY_UNKNOWN_TO_WEIGHTS if len(history.item_ids) else NO_HISTORY

    def _in_order(
        self,
        asked: _Asked,
        scores: NDArray[np.float32],
        reason: str | None,
        *,
        ranked_by: RankedBy,
        predictions: NDArray[np.float32] | None = None,
    ) -> Ranking:
        """The candidates of a RankQuery by their scores."""
        # NaN (unknown) sorts last; equal scores keep the order of the request.
        places = np.argsort(-scores, kind="stable")
        ranking = self._ranking(
            asked, item_ids=asked.query.item_ids[places], scores=scores[places], places=places, reason=reason
        )
        return replace(ranking, ranked_by=ranked_by, predictions=None if predictions is None else predictions[places])

    def _ranking(
        self,
        asked: _Asked,
        *,
        item_ids: Int64s,
        scores: NDArray[np.float32],
        places: Int64s | None = None,
        reason: str | None = None,
        from_session: bool = False,
    ) -> Ranking:
        return Ranking(
            weights=self._weights.info,
            history_time_ms=None if from_session else asked.history.newest_ms,
            from_session=from_session,
            fallback_reason=reason,
            item_ids=item_ids,
            scores=scores,
            places=np.empty(0, np.int64) if places is None else places,
        )
