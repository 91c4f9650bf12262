"""One step after another: each interaction tested, then learned from, once; continued bit by bit after a stop."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from feature_store.hot import HotHistories
from feature_store.store import FeatureStore
from model.config import LossConfig
from online_trainer.checkpoint import Checkpoint, read_newest_checkpoint, write_checkpoint
from online_trainer.learner import MeasuredStep, OnlineLearner
from tests.online_trainer.conftest import HOT, MODEL, RecordedStream, record_stream, walks


def run(stream: RecordedStream, learner: OnlineLearner, *, steps: int | None = None) -> OnlineLearner:
    batcher = stream.batcher(learner)
    done = 0
    while (steps is None or done < steps) and (batch := batcher.take()):
        learner.step(batch)
        done += 1
    return learner


def assert_equal(left: Checkpoint, right: Checkpoint) -> None:
    assert left.state == right.state
    assert left.step == right.step
    assert left.tensors.keys() == right.tensors.keys()
    for name, tensor in left.tensors.items():
        assert torch.equal(tensor, right.tensors[name]), name


def test_the_account_equals_the_store(store: FeatureStore) -> None:
    stream = record_stream(store, walks(400))
    ledger = run(stream, stream.learner()).ledger
    totals = store.totals()
    assert (ledger.num_interactions, ledger.fingerprint) == (totals.num_interactions, totals.fingerprint)
    assert ledger.num_first == totals.num_users
    assert ledger.num_supervised == 400 - totals.num_users
    assert (ledger.num_out_of_reach, ledger.num_quarantined) == (0, 0)
    assert ledger.positions["main", 0].source_offset == 400
    assert ledger.watermark_ms == 1_700_000_399_000


def test_two_runs_are_equal_bit_by_bit(store: FeatureStore) -> None:
    stream = record_stream(store, walks(300))
    assert_equal(run(stream, stream.learner()).capture_checkpoint(), run(stream, stream.learner()).capture_checkpoint())


@pytest.mark.parametrize("steps", [1, 7, 13])
def test_a_run_continued_from_a_checkpoint_equals_an_unbroken_one(
    store: FeatureStore, tmp_path: Path, steps: int
) -> None:
    # The store already holds what comes after the checkpoint, as it does when a trainer comes back late.
    stream = record_stream(store, walks(300))
    unbroken = run(stream, stream.learner())
    first = run(stream, stream.learner(), steps=steps)
    write_checkpoint(tmp_path, first.capture_checkpoint(), keep=1)
    checkpoint = read_newest_checkpoint(tmp_path, config_hash=MODEL.config_hash())
    assert checkpoint is not None
    continued = stream.learner()
    continued.load_checkpoint(checkpoint)
    run(stream, continued)
    assert_equal(unbroken.capture_checkpoint(), continued.capture_checkpoint())


@pytest.mark.parametrize("steps", [20, 57])
def test_a_run_with_balanced_lengths_continues_bit_by_bit_within_its_warm_up_and_after_it(
    store: FeatureStore, steps: int
) -> None:
    loss = LossConfig(stochastic_length_alpha=1.2, stochastic_length_balance=True)
    stream = record_stream(store, walks(1_000))
    unbroken = run(stream, stream.learner(loss=loss)).capture_checkpoint()
    continued = stream.learner(loss=loss)
    continued.load_checkpoint(run(stream, stream.learner(loss=loss), steps=steps).capture_checkpoint())
    assert_equal(unbroken, run(stream, continued).capture_checkpoint())
    plain = run(stream, stream.learner(loss=LossConfig(stochastic_length_alpha=1.2))).capture_checkpoint()
    assert not torch.equal(plain.tensors["dense.log_scale"], unbroken.tensors["dense.log_scale"])


def test_late_events_do_not_break_the_continuation(store: FeatureStore) -> None:
    interactions = walks(200)
    order = np.random.default_rng(1).permutation(200)
    stream = record_stream(store, interactions.take(order))
    unbroken = run(stream, stream.learner())
    checkpoint = run(stream, stream.learner(), steps=5).capture_checkpoint()
    continued = stream.learner()
    continued.load_checkpoint(checkpoint)
    run(stream, continued)
    assert_equal(unbroken.capture_checkpoint(), continued.capture_checkpoint())
    assert unbroken.ledger.num_interactions == 200


def test_a_learnable_stream_is_learned(store: FeatureStore) -> None:
    stream = record_stream(store, walks(3_000))
    metrics = run(stream, stream.learner()).metrics_summary()
    assert metrics["model.window.hr_at_10"] > 0.9
    assert metrics["model.window.hr_at_10"] > 2 * metrics["popularity.window.hr_at_10"]
    assert metrics["model.lifetime.count"] == metrics["popularity.lifetime.count"]


def test_items_are_tested_before_they_are_known(store: FeatureStore) -> None:
    # Every interaction is with a new item: nothing can be predicted, whatever training on the batch would reveal.
    interactions = walks(200, num_items=1_000_000)
    stream = record_stream(store, interactions)
    metrics = run(stream, stream.learner()).metrics_summary()
    assert metrics["model.lifetime.hr_at_10"] < 0.02
    assert metrics["popularity.lifetime.hr_at_10"] < 0.02


def test_a_batch_with_a_loss_that_is_not_finite_leaves_the_weights_alone(
    store: FeatureStore, caplog: pytest.LogCaptureFixture
) -> None:
    stream = record_stream(store, walks(100))
    learner = run(stream, stream.learner(), steps=3)
    good = learner.model.dense_state()
    with torch.no_grad():
        learner.model.log_scale.fill_(torch.inf)
    spoiled = learner.model.dense_state()
    batch = stream.batcher(learner).take()
    assert batch is not None
    learner.step(batch)
    assert learner.ledger.num_quarantined > 0
    assert "not learned from" in caplog.text
    assert not learner.weights_are_finite()
    for name, tensor in learner.model.dense_state().items():
        assert torch.equal(tensor, spoiled[name]), name
    learner.model.load_dense_state(good)
    assert learner.weights_are_finite()


def test_a_log_that_was_made_anew_keeps_the_weights_and_knows_what_was_learned_of_the_one_before(
    store: FeatureStore,
) -> None:
    stream = record_stream(store, walks(100))
    learner = run(stream, stream.learner())
    before = learner.ledger.positions
    for log_id in ("main~1", "main~2"):
        checkpoint = learner.capture_checkpoint()
        learner = OnlineLearner(stream.config(), HotHistories(store, HOT), log_id=log_id)
        learner.load_checkpoint(checkpoint)
        assert learner.ledger.lineage().positions == {}
        assert learner.ledger.num_interactions == 100
        # Only of the log just before: of older ones nothing can be on its way any more.
        assert learner.ledger.positions == (before if log_id == "main~1" else {})


def test_a_test_is_told_with_the_weights_that_were_tested(store: FeatureStore) -> None:
    stream = record_stream(store, walks(200))
    learner = stream.learner()
    heard: list[int] = []
    batcher = stream.batcher(learner)

    def on_tested(step: MeasuredStep) -> None:
        examples = step.examples
        assert np.array_equal(step.new.item_id[examples.target_rows], examples.target_item_id)
        assert np.array_equal(step.new.event_time_ms[examples.target_rows], examples.query_time_ms[examples.positions])
        assert torch.equal(learner.model.encoder.state_dict()[name], before)
        heard.append(len(step.ranks["model"]))

    learner.on_tested = on_tested
    name = next(iter(learner.model.encoder.state_dict()))
    while batch := batcher.take():
        before = learner.model.encoder.state_dict()[name].clone()
        learner.step(batch)
    assert sum(heard) == learner.metrics_summary()["model.lifetime.count"]
