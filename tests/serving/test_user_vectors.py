"""The ranker reads a user's vector as old as it is, and answers say how old that is."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
import torch

from model.config import ModelConfig
from model.ranking_model import with_ranking_head
from model.ranking_settings import RankingSettings
from serving.history_reader import UserHistory
from serving.item_names import ItemNames, WithheldItems
from serving.ranking_head import RankingHead, ToRank
from serving.user_vectors import UserVector, vectors_of
from serving.weights import ServedWeights
from tests.model.weights import far_from_start

NOW_MS, WIDTH = 1_700_000_000_000, 5
SETTINGS = RankingSettings(kind="llatte", tasks=("like",), max_candidates=3)
MODEL = ModelConfig(embedding_dim=8, max_len=6)


def head_of(settings: RankingSettings = SETTINGS) -> RankingHead:
    config = with_ranking_head(MODEL, settings, ("view", "like"), upstream_width=WIDTH)
    weights = ServedWeights(config, WithheldItems(ItemNames(lambda _: {})))
    weights.items.admit(np.arange(10))
    ranker = weights.recommender.ranking
    assert ranker is not None
    far_from_start(ranker).float()
    return RankingHead(weights, settings)


def request(user_id: int, vector: UserVector | None, *, newest_ms: int = NOW_MS - 60_000) -> ToRank:
    history = UserHistory(
        user_id=user_id,
        item_ids=np.array([1, 2]),
        event_time_ms=np.array([newest_ms - 1_000, newest_ms]),
        action=np.array([1, 2], np.uint32),
        acts=np.array([1, 2]),
        value=np.full(2, np.nan, np.float32),
    )
    return ToRank(history, np.array([1, 2]), np.array([3, -1, 4, 5, 6]), vector)


def vector(value: float = 0.5, *, age_ms: int = 90_000, width: int = WIDTH) -> UserVector:
    return UserVector(np.full(width, value, np.float32), NOW_MS - age_ms)


@torch.inference_mode()
def test_a_request_with_a_vector_scores_alike_alone_and_among_others() -> None:
    head = head_of()
    requests = [request(1, vector()), request(2, None), request(3, vector(-0.5, age_ms=0))]
    together = head.score(requests, NOW_MS)
    assert [one.upstream_age_s for one in together] == [90.0, None, 0.0]
    for one, found in zip(requests, together, strict=True):
        alone = head.score([one], NOW_MS)[0]
        np.testing.assert_allclose(alone.scores, found.scores, atol=1e-5)
        assert np.isnan(found.scores).tolist() == [False, True, False, False, False]
    assert abs(together[0].scores[0] - together[1].scores[0]) > 1e-4


@torch.inference_mode()
@pytest.mark.parametrize("bad", [vector(float("nan")), vector(width=WIDTH + 1)], ids=["not a number", "another width"])
def test_a_vector_that_cannot_be_read_is_answered_without(bad: UserVector) -> None:
    head = head_of()
    without = head.score([request(1, None)], NOW_MS)[0]
    found = head.score([request(1, bad)], NOW_MS)[0]
    assert found.upstream_age_s is None
    np.testing.assert_array_equal(found.scores, without.scores)


@torch.inference_mode()
def test_an_age_counts_to_the_request_even_if_a_producers_clock_runs_ahead() -> None:
    ahead = request(1, vector(age_ms=-5_000), newest_ms=NOW_MS + 10_000)
    assert head_of().score([ahead], NOW_MS)[0].upstream_age_s == 5.0


@torch.inference_mode()
def test_the_other_ranker_reads_no_vectors() -> None:
    head = head_of(replace(SETTINGS, kind="hstu"))
    assert not head.reads_vectors
    assert head.score([request(1, vector())], NOW_MS)[0].upstream_age_s is None


def test_vectors_are_told_row_by_row() -> None:
    held: Sequence[UserVector | None] = [None, vector(2.0, age_ms=1_500)]
    found, ages = vectors_of(held, [NOW_MS, NOW_MS], WIDTH)
    assert ages == [None, 1.5]
    assert found.is_there().tolist() == [False, True]
    assert found.vector_BW[1].tolist() == [2.0] * WIDTH
