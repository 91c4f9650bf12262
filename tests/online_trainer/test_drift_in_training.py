"""A change in the stream: noticed, answered, published or held back, and the run continued through it bit by bit."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import InMemoryMetricReader, NumberDataPoint
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider

from feature_store.hot import HotHistories
from feature_store.interactions import Interactions
from feature_store.store import FeatureStore
from online_trainer.checkpoint import read_newest_checkpoint, write_checkpoint
from online_trainer.drift_config import DriftConfig, Reaction
from online_trainer.learner import OnlineLearner
from online_trainer.publisher import Publisher
from online_trainer.steps import LearnedSteps
from stream.clock import WallClock
from stream.memory_log import MemoryLog
from tests.online_trainer.conftest import HOT, MODEL, RecordedStream, record_stream, walks
from tests.online_trainer.test_daemon import Site, learn
from tests.online_trainer.test_learner import assert_equal, run

NUM_EVENTS, CHANGE, BATCH = 960, 640, 16
EVERYTHING: tuple[Reaction, ...] = ("boost", "rehearse", "replay", "hold", "rollback")
DRIFT = DriftConfig(
    adwin_loss=("alert",),
    adwin_calibration=("alert",),
    page_hinkley_loss=("alert",),
    page_hinkley_threshold=6.0,
    warm_up_interactions=200,
    boost_row_factor=3.0,
    boost_dense_factor=2.0,
    boost_interactions=200,
    rehearse_steps=2,
    rehearse_interactions=200,
    rollback_interval=200,
)


def turning_walks() -> Interactions:
    """Users walk through 20 items in a circle, and from the change on the other way round in longer strides."""
    one_way = walks(NUM_EVENTS, num_users=20, num_items=20)
    position: dict[int, int] = {}
    items = one_way.item_id.copy()
    for at, user in enumerate(one_way.user_id.tolist()):
        if at >= CHANGE:
            items[at] = (position[user] - 3) % 20
        position[user] = int(items[at])
    return replace(one_way, item_id=items)


@pytest.fixture
def stream(store: FeatureStore) -> RecordedStream:
    return record_stream(store, turning_walks())


def learner_of(stream: RecordedStream, *reactions: Reaction) -> OnlineLearner:
    config = replace(stream.config(), drift=replace(DRIFT, page_hinkley_loss=reactions))
    return OnlineLearner(config, HotHistories(stream.store, HOT), log_id="main")


def test_a_change_is_noticed_where_it_is_and_nowhere_else(stream: RecordedStream) -> None:
    learner = run(stream, learner_of(stream, "alert"))
    (decision,) = [one for one in learner.take_drift_decisions() if one.detector == "page_hinkley"]
    assert CHANGE < decision.step * BATCH < CHANGE + 200
    assert decision.mean_after > 1.2 * decision.mean_before
    assert not learner.take_drift_decisions()


def test_reactions_change_what_is_learned_and_an_alert_does_not(stream: RecordedStream) -> None:
    off = DriftConfig(adwin_loss=(), adwin_calibration=(), page_hinkley_loss=())
    without = OnlineLearner(replace(stream.config(), drift=off), HotHistories(stream.store, HOT), log_id="main")
    reactions: tuple[Reaction, ...] = ("alert", "boost", "rehearse", "rollback")
    learners = {"off": without} | {name: learner_of(stream, name) for name in reactions}
    weights = {name: run(stream, one).model.items.weight[: one.num_items] for name, one in learners.items()}
    assert torch.equal(weights["alert"], weights["off"])
    assert {one.ledger.num_supervised for one in learners.values()} == {NUM_EVENTS - 20}
    different = {tuple(weights[name].flatten().tolist()) for name in reactions}
    assert len(different) == len(reactions)


def test_after_a_rollback_the_weights_are_those_of_before_the_change(stream: RecordedStream) -> None:
    learner = learner_of(stream, "rollback")
    batcher = stream.batcher(learner)
    copies: dict[int, torch.Tensor] = {}
    has_rolled_back = False
    while not has_rolled_back:
        batch = batcher.take()
        assert batch is not None
        before = learner.drift.num_tested
        learner.step(batch)
        has_rolled_back = any("rollback" in one.reactions for one in learner.take_drift_decisions())
        if learner.drift.num_tested // 200 > before // 200:
            copies[learner.drift.num_tested // 200] = learner.model.items.weight[:20].clone()
    assert CHANGE < learner.ledger.num_interactions < CHANGE + 200
    assert max(copies) == 3
    assert torch.equal(learner.model.items.weight[:20], copies[2])


@pytest.mark.parametrize("num_steps", [-1, 3])
def test_a_run_broken_off_around_a_drift_continues_bit_by_bit(
    stream: RecordedStream, tmp_path: Path, num_steps: int
) -> None:
    unbroken = run(stream, learner_of(stream, *EVERYTHING))
    decided = next(one for one in unbroken.drift.decisions if one.reactions == EVERYTHING)
    first = run(stream, learner_of(stream, *EVERYTHING), steps=decided.step + num_steps)
    write_checkpoint(tmp_path, first.capture_checkpoint(), keep=1)
    checkpoint = read_newest_checkpoint(tmp_path, config_hash=MODEL.config_hash())
    assert checkpoint is not None
    continued = learner_of(stream, *EVERYTHING)
    continued.load_checkpoint(checkpoint)
    assert continued.drift.summary() == first.drift.summary()
    assert (continued.drift.learning_rate_factors != (1.0, 1.0)) == (num_steps >= 0)
    run(stream, continued)
    assert_equal(unbroken.capture_checkpoint(), continued.capture_checkpoint())


def test_nothing_is_published_while_it_is_held_back(stream: RecordedStream, tmp_path: Path) -> None:
    learner = learner_of(stream, "hold")
    publisher = Publisher(
        tmp_path, "default", stream.config().trainer, store=stream.store, clock=WallClock(), mode="live"
    )

    def capture() -> bool:
        new = np.zeros(5, np.int64)
        ledger = learner.ledger
        step = LearnedSteps(first_step=ledger.num_steps, last_step=ledger.num_steps, at_ms=0, positions={})
        publisher.learned(new, new, ledger.num_interactions, 0, step)
        return publisher.capture(learner, traceparent=None) is not None

    run(stream, learner, steps=CHANGE // BATCH)
    assert capture()
    run(stream, learner, steps=12)
    assert learner.drift.holds_publishing
    changed = learner.model.items.dirty_rows()
    assert len(changed)
    assert not capture()
    # What changed meanwhile is not lost to the next snapshot.
    assert publisher.has_unpublished()
    assert torch.equal(learner.model.items.dirty_rows(), changed)


async def test_the_daemon_logs_counts_and_traces_every_decision(
    stream: RecordedStream, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    log = MemoryLog(WallClock(), log_id="main")
    await log.create_topics()
    site = Site(log, stream.store, tmp_path)
    site.send(stream.updates)
    daemon = site.daemon(drift=replace(DRIFT, page_hinkley_loss=("boost",)))
    reader = InMemoryMetricReader()
    daemon._drift_decisions = MeterProvider([reader]).get_meter("test").create_counter("headrace.trainer.drift")
    status = await learn(daemon, NUM_EVENTS)
    decisions = list(daemon._learner.drift.decisions)
    assert status["drift"]["decisions"] == len(decisions) > 0
    assert [one.sentence() in caplog.text for one in decisions] == [True] * len(decisions)
    data = reader.get_metrics_data()
    assert data is not None
    metric = data.resource_metrics[0].scope_metrics[0].metrics[0]
    points = [point for point in metric.data.data_points if isinstance(point, NumberDataPoint)]
    assert sum(int(point.value) for point in points) == len(decisions)
    assert {(point.attributes or {})["headrace.drift.detector"] for point in points} == {d.detector for d in decisions}

    span = TracerProvider().get_tracer("test").start_span("step")
    daemon._learner._unreported = decisions
    daemon._report_drift(span)
    assert isinstance(span, ReadableSpan)
    assert [event.name for event in span.events] == ["headrace.drift"] * len(decisions)
    told = span.events[0].attributes or {}
    assert told["headrace.drift.mean_before"] == decisions[0].mean_before
    assert told["headrace.drift.step"] == decisions[0].step
