"""From a request to its answer: limits, ids, the micro-batcher, and what is noted about the answer afterwards."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from feature_store.ids import stable_id
from serving.batcher import MicroBatcher
from serving.config import ServingConfig
from serving.errors import InvalidRequestError
from serving.first_answers import FirstAnswers
from serving.impressions import ImpressionLog
from serving.item_categories import ItemCategories
from serving.item_names import ItemNames
from serving.messages import (
    RankedCandidates,
    RankedItem,
    RankRequest,
    Recommendation,
    RecommendRequest,
    ScoredItem,
    rfc3339,
)
from serving.queries import Query, Ranking, RankQuery, RecommendQuery
from stream.clock import Clock
from stream.events import EventRules
from stream.messages import Impression


@dataclass(frozen=True, kw_only=True, slots=True)
class AnswerParts:
    """What answering needs."""

    batcher: MicroBatcher[Query, Ranking]
    names: ItemNames
    categories: ItemCategories
    first_answers: FirstAnswers
    impressions: ImpressionLog | None
    """None: impressions are not written."""
    clock: Clock
    task_names: tuple[str, ...]
    """Tasks of the ranking head."""
    rules: EventRules
    """What surfaces are called."""
    query_now_ms: Callable[[], int]
    """Time of a request: the clock, or the event time of a replayed stream."""


class Answering:
    """Answers `recommend` and `rank`."""

    def __init__(self, config: ServingConfig, parts: AnswerParts) -> None:
        self._config = config
        self._parts = parts
        self._surface_numbers = parts.rules.surface_numbers()

    async def recommend(self, request: RecommendRequest, request_id: str) -> Recommendation:
        """The best items for a user. Raises RequestError."""
        _at_most(request.k, self._config.k_max, "k", "serving.k_max")
        _at_most(len(request.exclude), self._config.exclude_max, "exclude", "serving.exclude_max")
        _at_most(len(request.session), self._config.session_max, "session", "serving.session_max")
        for field in ("categories", "exclude_categories"):
            _at_most(len(getattr(request, field)), self._config.categories_max, field, "serving.categories_max")
        if request.categories or request.exclude_categories:
            self._parts.categories.require_known()
        ranking = await self._parts.batcher.submit(
            RecommendQuery(
                user_id=_to_id(request.user_id),
                k=request.k,
                exclude_seen=request.exclude_seen,
                exclude=_to_ids(request.exclude),
                categories=tuple(request.categories),
                exclude_categories=tuple(request.exclude_categories),
                session=_to_ids(request.session),
                diversity=request.diversity,
            )
        )
        items = [
            ScoredItem(item_id=self._parts.names.original(item_id), score=score)
            for item_id, score in zip(ranking.item_ids.tolist(), ranking.scores.tolist(), strict=True)
        ]
        self._note(request.user_id, request_id, ranking, items, surface=self._surface(request.surface))
        return Recommendation(**_origin(request_id, ranking), items=items, from_session=ranking.from_session)

    async def rank(self, request: RankRequest, request_id: str) -> RankedCandidates:
        """The candidates in order of preference. Raises RequestError."""
        _at_most(len(request.candidates), self._config.candidates_max, "candidates", "serving.candidates_max")
        surface = self._surface(request.surface)
        ranking = await self._parts.batcher.submit(
            RankQuery(user_id=_to_id(request.user_id), candidates=_to_ids(request.candidates), surface=surface)
        )
        predictions = self._predictions(ranking)
        items = [
            RankedItem(
                item_id=request.candidates[place],
                score=None if math.isnan(score) else score,
                known=not math.isnan(score),
                predictions=of_item,
            )
            for place, score, of_item in zip(ranking.places.tolist(), ranking.scores.tolist(), predictions, strict=True)
        ]
        by_task = None if ranking.predictions is None else self._by_task(predictions)
        self._note(request.user_id, request_id, ranking, items, by_task, surface=surface)
        assert ranking.ranked_by is not None, "the answer to a RankQuery"
        return RankedCandidates(
            **_origin(request_id, ranking),
            items=items,
            ranked_by=ranking.ranked_by,
            upstream_age=ranking.upstream_age_s,
        )

    def _surface(self, told: str | int | None) -> int:
        """Its number; 0 where none is told, or one that is not declared."""
        return 0 if told is None else self._surface_numbers.get(told, 0)

    def _predictions(self, ranking: Ranking) -> list[dict[str, float] | None]:
        """Of each item; None where the ranking head says nothing of it."""
        if ranking.predictions is None:
            return [None] * len(ranking.item_ids)
        names = self._parts.task_names
        return [
            None if math.isnan(score) else dict(zip(names, row, strict=True))
            for score, row in zip(ranking.scores.tolist(), ranking.predictions.tolist(), strict=True)
        ]

    def _by_task(self, predictions: Sequence[dict[str, float] | None]) -> dict[str, list[float | None]]:
        """As impressions carry them."""
        return {
            task: [None if of_item is None else of_item[task] for of_item in predictions]
            for task in self._parts.task_names
        }

    def _note(
        self,
        user_id: int | str,
        request_id: str,
        ranking: Ranking,
        items: Sequence[ScoredItem],
        predictions: dict[str, list[float | None]] | None = None,
        *,
        surface: int,
    ) -> None:
        """What is recorded about an answer, none of it in its way."""
        weights = ranking.weights
        if weights is not None and ranking.fallback_reason is None:
            self._parts.first_answers.answered(weights.version, self._parts.clock.now_ms())
        if self._parts.impressions is not None:
            self._parts.impressions.add(
                Impression(
                    request_id=request_id,
                    user_id=user_id,
                    items=[item.item_id for item in items],
                    scores=[item.score for item in items],
                    snapshot_version=None if weights is None else weights.version,
                    shown_at_ms=self._parts.query_now_ms(),
                    predictions=predictions,
                    surface=surface,
                )
            )


def _origin(request_id: str, ranking: Ranking) -> dict[str, Any]:
    """The fields of `Answer`."""
    weights = ranking.weights
    return {
        "request_id": request_id,
        "snapshot_version": None if weights is None else weights.version,
        "weights_event_time": None if weights is None else rfc3339(weights.watermark_ms),
        "history_event_time": rfc3339(ranking.history_time_ms),
        "fallback": ranking.fallback_reason is not None,
        "fallback_reason": ranking.fallback_reason,
    }


def _to_id(raw: int | str) -> int:
    return stable_id(raw) if isinstance(raw, str) else raw


def _to_ids(raw: Sequence[int | str]) -> NDArray[np.int64]:
    return np.fromiter(map(_to_id, raw), np.int64, len(raw))


def _at_most(value: int, limit: int, field: str, setting: str) -> None:
    if value > limit:
        raise InvalidRequestError(f"{field} asks for {value}; {setting} is {limit}", field=field, code="too_many_items")
