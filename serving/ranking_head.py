"""Ranking candidates by the ranking head of the weights in service: a prediction of each task, and one score of them.

Shapes: U requests, L interactions of their histories, C candidates the model knows, K tasks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from model.llatte_ranker import LlatteRanker
from model.ranker import rank_candidates
from model.ranking_network import Engagements
from model.ranking_settings import RankingSettings
from model.sequence import Candidates
from model.upstream_input import UpstreamVectors
from serving.history_reader import UserHistory
from serving.user_vectors import UserVector, vectors_of
from serving.weights import ServedWeights

Int64s = NDArray[np.int64]
Float32s = NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class ToRank:
    """Candidates of one request, and its user's history."""

    history: UserHistory
    history_rows: Int64s
    """Rows of the item table, -1 for items it does not hold."""
    candidate_rows: Int64s
    """The same of the candidates."""
    vector: UserVector | None = None
    """The user's from upstream, where there is one."""
    surface: int = 0
    """Number of the surface that the request names; 0: none."""


@dataclass(frozen=True, slots=True)
class HeadScores:
    """What the head says of one request's candidates, in their order; NaN for those the model does not know."""

    scores: Float32s
    predictions: Float32s
    """[candidates, K] probabilities, and values in their own unit"""
    upstream_age_s: float | None
    """Of the vector that was read; None: none was."""


class RankingHead:
    """Reads the weights in service; for the model thread."""

    def __init__(self, weights: ServedWeights, settings: RankingSettings) -> None:
        self._weights, self.settings = weights, settings
        self.task_names = settings.tasks
        self._weight_K = np.array([settings.score_weights.get(task, 1.0) for task in settings.tasks], np.float32)

    @property
    def reads_vectors(self) -> bool:
        """Whether it reads users' vectors from upstream."""
        return isinstance(self._weights.recommender.ranking, LlatteRanker)

    @property
    def is_in_use(self) -> bool:
        """Whether the weights in service have a head that has learned enough to rank by."""
        info = self._weights.info
        return (
            self._weights.recommender.ranking is not None
            and info is not None
            and info.num_labels >= self.settings.min_labels
        )

    def score(self, requests: Sequence[ToRank], now_ms: int) -> list[HeadScores]:
        """The candidates of every request, as if each were asked for alone. now_ms: time of the requests."""
        network = self._weights.recommender.ranking
        assert network is not None, "checked by is_in_use"
        # A producer's clock may run ahead of ours: the request still comes after everything it knows of.
        asked_at_ms = [max(now_ms, one.history.newest_ms or 0) for one in requests]
        upstream: UpstreamVectors | None = None
        ages: list[float | None] = [None] * len(requests)
        if isinstance(network, LlatteRanker):
            upstream, ages = vectors_of([one.vector for one in requests], asked_at_ms, network.config.upstream_width)
        logits_CK = rank_candidates(
            network, self._engagements(requests), self._candidates(requests, asked_at_ms), upstream
        )
        prediction_CK = network.heads.answers(logits_CK).numpy()
        known = [one.candidate_rows >= 0 for one in requests]
        bounds = np.cumsum([mask.sum() for mask in known])[:-1]
        parts = np.split(prediction_CK, bounds)
        return [self._spread(mask, part, age) for mask, part, age in zip(known, parts, ages, strict=True)]

    def _spread(self, is_known: NDArray[np.bool_], prediction_CK: Float32s, age_s: float | None) -> HeadScores:
        scores = np.full(len(is_known), np.nan, np.float32)
        predictions = np.full((len(is_known), len(self.task_names)), np.nan, np.float32)
        scores[is_known], predictions[is_known] = prediction_CK @ self._weight_K, prediction_CK
        return HeadScores(scores, predictions, age_s)

    def _engagements(self, requests: Sequence[ToRank]) -> Engagements:
        newest = slice(-self._weights.max_len, None)
        rows_L = np.concatenate([one.history_rows[newest] for one in requests])
        lengths = [len(one.history_rows[newest]) for one in requests]
        return Engagements(
            item_LD=self._embeddings(rows_L),
            actions_L=torch.from_numpy(np.concatenate([one.history.acts[newest] for one in requests])),
            timestamps_ms_L=torch.from_numpy(np.concatenate([one.history.event_time_ms[newest] for one in requests])),
            offsets=_offsets(lengths),
            values_L=torch.from_numpy(np.concatenate([one.history.value[newest] for one in requests])),
            content_LF=self._weights.items.content_of(torch.from_numpy(rows_L)),
        )

    def _candidates(self, requests: Sequence[ToRank], asked_at_ms: Sequence[int]) -> Candidates:
        known = [one.candidate_rows[one.candidate_rows >= 0] for one in requests]
        return Candidates(
            item_CD=self._embeddings(np.concatenate(known)),
            content_CF=self._weights.items.content_of(torch.from_numpy(np.concatenate(known))),
            request_times_ms_B=torch.tensor(asked_at_ms),
            request_surfaces_B=torch.tensor([one.surface for one in requests]),
            offsets=_offsets([len(rows) for rows in known]),
        )

    def _embeddings(self, rows: Int64s) -> torch.Tensor:
        """float32[N, D], zeros where the row is -1: as in training."""
        found = torch.from_numpy(rows)
        return self._weights.items.weight[found.clamp(min=0)] * (found >= 0)[:, None]


def _offsets(lengths: Sequence[int]) -> torch.Tensor:
    return torch.tensor([0, *np.cumsum(lengths)])
