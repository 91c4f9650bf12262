"""Actions count as much as they are told to: in the loss, not at all at 0, and none more than another by default."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
import torch

from feature_store.hot import HotHistories
from feature_store.store import FeatureStore
from model.batch import HistoryBatch, Targets
from model.config import LossConfig
from model.learning import supervised_pass
from model.recommender import Recommender
from online_trainer.action_weights import ActionWeights
from online_trainer.learner import OnlineLearner
from online_trainer.rehearsal import rehearsal_targets
from tests.online_trainer.conftest import HOT, MODEL, RecordedStream, record_stream, walks

ACTIONS = ("view", "click", "purchase")
VIEW, PURCHASE = 0b001, 0b100


def stream_of(store: FeatureStore) -> RecordedStream:
    """Every third interaction is a purchase, the others are views."""
    interactions = walks(300)
    interactions.action[:] = np.where(np.arange(300) % 3 == 0, PURCHASE, VIEW)
    return record_stream(store, interactions)


def trained(stream: RecordedStream, **weights: float) -> OnlineLearner:
    config = dataclasses.replace(stream.config(), loss=LossConfig(action_weights=weights), actions=ACTIONS)
    learner = OnlineLearner(config, HotHistories(stream.store, HOT), log_id="main")
    batcher = stream.batcher(learner)
    while batch := batcher.take():
        learner.step(batch)
    return learner


def test_an_interaction_counts_as_the_weightiest_of_its_actions() -> None:
    weights = ActionWeights({"purchase": 3.0, "view": 0.5}, ACTIONS)
    action = np.array([VIEW, 0b010, PURCHASE, VIEW | PURCHASE, 0b011], np.uint32)
    assert weights.of(action).tolist() == [0.5, 1.0, 3.0, 3.0, 1.0]


def test_an_action_that_is_not_declared_is_refused_by_name() -> None:
    with pytest.raises(ValueError, match=r"loss.action_weights names buy; declared .* view, click, purchase"):
        ActionWeights({"buy": 1.0}, ACTIONS)


def test_a_negative_weight_is_refused() -> None:
    with pytest.raises(ValueError, match="action_weights gives 'view' -1"):
        LossConfig(action_weights={"view": -1})


def test_what_counts_nothing_is_read_but_neither_measured_nor_learned_from(store: FeatureStore) -> None:
    stream = stream_of(store)
    learner = trained(stream, view=0.0)
    ledger, all_count = learner.ledger, trained(stream).ledger
    assert ledger.num_weightless > 150
    assert ledger.num_supervised + ledger.num_weightless == all_count.num_supervised
    assert learner.metrics_summary()["model.lifetime.count"] == ledger.num_supervised
    assert (ledger.num_interactions, ledger.fingerprint) == (all_count.num_interactions, all_count.fingerprint)
    assert learner.num_items == 40


def test_weights_of_one_change_nothing_and_others_do(store: FeatureStore) -> None:
    stream = stream_of(store)
    plain = trained(stream).model.dense_state()
    ones = trained(stream, view=1.0).model.dense_state()
    assert all(torch.allclose(plain[name], ones[name], atol=1e-5) for name in plain)
    heavy = trained(stream, purchase=10.0).model.dense_state()
    assert not all(torch.allclose(plain[name], heavy[name], atol=1e-5) for name in plain)


@pytest.mark.parametrize("kind", ["full", "sampled"])
def test_a_weight_of_three_weighs_like_three_of_the_same(kind: Any) -> None:
    model = Recommender(MODEL)
    model.items.admit(np.arange(20))
    targets = [(0, 3), (2, 5), (2, 5), (2, 5), (4, 7)]
    repeated = _loss(model, targets, None, kind)
    weighted = _loss(model, [(0, 3), (2, 5), (4, 7)], [1.0, 3.0, 1.0], kind)
    if kind == "full":
        assert weighted == pytest.approx(repeated, rel=1e-6)
    assert weighted != pytest.approx(_loss(model, [(0, 3), (2, 5), (4, 7)], None, kind), rel=1e-6)


def _loss(model: Recommender, targets: list[tuple[int, int]], weights: list[float] | None, kind: Any) -> float:
    history = HistoryBatch(
        rows_L=torch.arange(6),
        timestamps_ms_L=torch.arange(6) * 1_000,
        query_times_ms_L=torch.arange(1, 7) * 1_000,
        offsets=torch.tensor([0, 6]),
    )
    positions, rows = torch.tensor(targets).T.contiguous()
    learned = supervised_pass(
        model,
        history,
        Targets(positions_P=positions, rows_P=rows, weights_P=None if weights is None else torch.tensor(weights)),
        LossConfig(kind=kind, num_negatives=50),
        generator=torch.Generator().manual_seed(1),
    )
    return float(learned.loss.detach())


def test_a_rehearsal_leaves_out_what_counts_nothing() -> None:
    history = HistoryBatch(
        rows_L=torch.arange(5),
        timestamps_ms_L=torch.arange(5),
        query_times_ms_L=torch.arange(1, 6),
        offsets=torch.tensor([0, 5]),
    )
    targets = Targets(positions_P=torch.tensor([4]), rows_P=torch.tensor([9]), weights_P=torch.tensor([2.0]))
    again = rehearsal_targets(
        history, targets, torch.ones(5, dtype=torch.bool), since_ms=1, weight_L=torch.tensor([1.0, 0, 3, 0, 2])
    )
    assert again.positions_P.tolist() == [2, 4]
    assert again.weights_P is not None
    assert again.weights_P.tolist() == [3, 2]
