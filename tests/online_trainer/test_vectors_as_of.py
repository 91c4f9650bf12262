"""Vectors for the ranker's steps: those that an answer could have read, and never one that knows what is predicted."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from feature_store.hot import HotHistories
from feature_store.interactions import Interactions
from feature_store.store import FeatureStore
from feature_store.user_states import NewVectors
from model.config import LossConfig, OptimizerConfig
from model.ranking_learning import RankingPass, ranking_pass
from model.ranking_model import with_ranking_head
from model.ranking_settings import RankingSettings
from online_trainer.config import TrainerConfig
from online_trainer.labelled_items import LabelledItems
from online_trainer.learner import OnlineLearner
from online_trainer.learner_config import LearnerConfig
from online_trainer.vectors_as_of import VectorsAsOf
from tests.online_trainer.conftest import HOT, MODEL, record_stream, walks

WIDTH = 4


def serve_version(store: FeatureStore, from_ms: int) -> None:
    with store.transaction() as transaction:
        transaction.user_states.begin_version("default", 1, created_at_ms=from_ms)
        transaction.user_states.serve_version("default", 1, from_ms=from_ms)


def write(store: FeatureStore, user_id: int, next_seq: int, as_of_ms: int, written_at_ms: int) -> None:
    """A vector that says in every number how many arrivals it was made of."""
    with store.transaction() as transaction:
        transaction.user_states.write(
            "default",
            1,
            NewVectors(
                user_id=np.array([user_id]),
                next_seq=np.array([next_seq]),
                as_of_ms=np.array([as_of_ms]),
                vector=np.full((1, WIDTH), next_seq, np.float32),
            ),
            written_at_ms=written_at_ms,
        )


def arriving(num_events: int, num_users: int = 5) -> Interactions:
    """Each event arrives half a second after it happened."""
    stream = walks(num_events, num_users=num_users)
    return replace(stream, arrival_ms=stream.event_time_ms + 500)


def test_no_vector_knows_the_interaction_that_is_predicted_with_it(store: FeatureStore) -> None:
    """A leak canary: vectors that know an interaction are stamped as if they had been there before it arrived."""
    accepted = Interactions.concat([one.interactions for one in record_stream(store, arriving(100)).updates])
    serve_version(store, 0)
    for user_id, seq, event_ms, arrival_ms in zip(
        accepted.user_id.tolist(),
        accepted.seq.tolist(),
        accepted.event_time_ms.tolist(),
        accepted.arrival_ms.tolist(),
        strict=True,
    ):
        write(store, user_id, seq + 1, event_ms, arrival_ms - 400)
    reader = VectorsAsOf(store, model="default", width=WIDTH)
    found = reader.read(LabelledItems.of_interactions(accepted))
    is_there = found.is_there().numpy()
    # The newest that may be known: everything before, and nothing of the interaction itself.
    np.testing.assert_array_equal(is_there, accepted.seq > 0)
    np.testing.assert_array_equal(found.vector_BW[:, 0].numpy()[is_there], accepted.seq[is_there])
    assert (found.age_s_B[is_there] > 0).all()
    assert reader.status() == {"found": int(is_there.sum()), "missing": int((~is_there).sum()), "damaged": 0}


def test_a_label_is_learned_with_the_vector_that_its_answer_had(store: FeatureStore) -> None:
    serve_version(store, 0)
    write(store, 7, 1, as_of_ms=100, written_at_ms=1_000)
    write(store, 7, 2, as_of_ms=200, written_at_ms=2_000)
    never = np.iinfo(np.int64).max
    shown = LabelledItems(
        user_id=np.full(4, 7),
        shown_at_ms=np.array([500, 500, 500, 150]),
        known_before_ms=np.array([2_001, 2_000, 1_000, 9_999]),
        written_before_ms=np.array([2_001, 2_000, 1_000, 9_999]),
        below_seq=np.full(4, never),
        surface=np.zeros(4, np.uint8),
        offsets=np.arange(5),
        item_id=np.arange(4),
        action=np.zeros(4, np.uint32),
        value=np.zeros(4, np.float32),
        is_measured=np.ones(4, np.bool_),
    )
    found = VectorsAsOf(store, model="default", width=WIDTH).read(shown)
    assert found.vector_BW[:, 0].tolist() == [2, 1, 0, 1]
    np.testing.assert_allclose(found.age_s_B.numpy(), [0.3, 0.4, np.nan, 0.05], rtol=1e-6)


def test_the_rankers_steps_are_handed_vectors_and_learn_without_those_that_are_missing(
    store: FeatureStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    actions = ("click", "like")
    ranking = RankingSettings(tasks=("like",), kind="llatte", learn_from="interactions", task_hidden_dim=8)
    stream = record_stream(store, arriving(200))
    serve_version(store, 0)
    for update in stream.updates:
        new = update.interactions
        for user_id, seq, event_ms, arrival_ms in zip(
            new.user_id.tolist(), new.seq.tolist(), new.event_time_ms.tolist(), new.arrival_ms.tolist(), strict=True
        ):
            if user_id != 0:  # has none
                write(store, user_id, seq + 1, event_ms, arrival_ms + 10)
    config = LearnerConfig(
        trainer=TrainerConfig(metrics_window=100),
        model=with_ranking_head(replace(MODEL, max_items=1_000), ranking, actions, upstream_width=WIDTH),
        loss=LossConfig(),
        optimizer=OptimizerConfig(),
        ranking=ranking,
        actions=actions,
    )
    reader = VectorsAsOf(store, model="default", width=WIDTH)
    learner = OnlineLearner(config, HotHistories(store, HOT), log_id="main", vectors=reader)
    handed: list[tuple[torch.Tensor, torch.Tensor]] = []

    def watched(model: object, batch: object, *arguments: object, **options: object) -> RankingPass:
        upstream = batch.upstream  # type: ignore[attr-defined]
        handed.append((upstream.vector_BW, upstream.is_there()))
        return ranking_pass(model, batch, *arguments, **options)  # type: ignore[arg-type]

    monkeypatch.setattr("online_trainer.ranking_learner.ranking_pass", watched)
    batcher = stream.batcher(learner)
    while (batch := batcher.take()) is not None:
        learner.step(batch)
    assert learner.ranking is not None
    status = learner.ranking.status()
    assert status["learned"] + status["unlisted"] == 200  # type: ignore[operator]
    assert status["vectors"] == reader.status()
    assert reader.num_found > 0
    assert reader.num_missing > 0
    vectors, are_there = torch.cat([one for one, _ in handed]), torch.cat([one for _, one in handed])
    assert (vectors[are_there] > 0).all()
    assert (vectors[~are_there] == 0).all()
