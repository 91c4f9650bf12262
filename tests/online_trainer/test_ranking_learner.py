"""The ranking head in training: each label learned once, from what was known when its items were shown."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from feature_store.errors import StoreUnavailableError
from feature_store.hot import HotHistories
from feature_store.interactions import Interactions
from feature_store.store import FeatureStore
from model.ranking_model import with_ranking_head
from model.ranking_settings import RankingSettings
from online_trainer.checkpoint import Checkpoint, read_newest_checkpoint, write_checkpoint
from online_trainer.label_queue import LabelBatch, LabelPosition, label_keys
from online_trainer.labelled_items import LabelledItems
from online_trainer.learner import OnlineLearner
from online_trainer.value_metrics import ValueMetrics
from tests.online_trainer.conftest import HOT, MODEL, RecordedStream, record_stream, walks

ACTIONS = ("click", "like")
NEVER = np.iinfo(np.int64).max
SETTINGS = RankingSettings(
    tasks=("click",), max_candidates=4, task_hidden_dim=8, batch_items=16, row_learning_rate=1e-2, min_labels=0
)

FORMS: list[dict[str, Any]] = [{"tokens": "merged"}, {"tokens": "interleaved"}, {"kind": "llatte"}]
every_form = pytest.mark.parametrize("form", FORMS, ids=["merged", "interleaved", "llatte"])


def learner_of(
    stream: RecordedStream,
    settings: RankingSettings = SETTINGS,
    **trainer: Any,
) -> OnlineLearner:
    config = replace(
        stream.config(**trainer), model=with_ranking_head(MODEL, settings, ACTIONS), ranking=settings, actions=ACTIONS
    )
    return OnlineLearner(config, HotHistories(stream.store, HOT), log_id="main")


@dataclass
class Shown:
    """Labels as the trainer gets them: after the interactions of a stream, two items for each of some of them."""

    stream: RecordedStream

    def batches(self, size: int = 8, *, num: int = 120, offset_by: int = 0) -> Iterator[LabelBatch]:
        """The item that its user took next, and one that was not taken, shown right before it was taken."""
        rows = Interactions.concat([update.interactions for update in self.stream.updates])
        rng = np.random.default_rng(5)
        for first in range(0, num, size):
            part = [self._one(rows, row, rng) for row in range(first, first + size)]
            items = LabelledItems.concat(part)
            keys = [label_keys(f"r{row}", "x", one.item_id) for row, one in enumerate(part, first)]
            yield LabelBatch(
                items=items,
                keys=np.concatenate(keys),
                is_late=np.zeros(len(items), np.bool_),
                positions={0: LabelPosition(offset_by + first + size)},
            )

    def _one(self, rows: Interactions, row: int, rng: np.random.Generator) -> LabelledItems:
        other = (int(rows.item_id[row]) + 1 + int(rng.integers(39))) % 40
        return LabelledItems(
            user_id=rows.user_id[row : row + 1],
            shown_at_ms=rows.event_time_ms[row : row + 1],
            known_before_ms=np.array([NEVER]),
            written_before_ms=np.array([NEVER]),
            below_seq=np.array([NEVER]),
            surface=np.zeros(1, np.uint8),
            offsets=np.array([0, 2]),
            item_id=np.array([rows.item_id[row], other]),
            action=np.array([1, 0], np.uint32),
            value=np.full(2, np.nan, np.float32),
            is_measured=np.ones(2, np.bool_),
        )


def run(learner: OnlineLearner, stream: RecordedStream, *, from_step: int = 0, to_step: int = 10**9) -> OnlineLearner:
    """Steps of interactions and of labels in turn, some of them already done."""
    batcher, labels = stream.batcher(learner), Shown(stream).batches()
    done = learner.ranking.account.num_steps if learner.ranking else 0
    for number, batch in enumerate(labels):
        if number >= to_step:
            break
        if number < done:
            continue
        if (interactions := batcher.take()) is not None:
            learner.step(interactions)
        learner.learn_labels(batch)
    return learner


def assert_equal(left: Checkpoint, right: Checkpoint) -> None:
    """Bit by bit: NaN stands for what is not there yet."""
    assert left.state == right.state
    assert left.tensors.keys() == right.tensors.keys()
    for name, tensor in left.tensors.items():
        assert tensor.shape == right.tensors[name].shape, name
        assert tensor.numpy().tobytes() == right.tensors[name].numpy().tobytes(), name


@pytest.fixture
def stream(store: FeatureStore) -> RecordedStream:
    return record_stream(store, walks(300))


@pytest.mark.parametrize("steps", [1, 6, 14])
@every_form
def test_a_run_continued_from_a_checkpoint_equals_an_unbroken_one(
    stream: RecordedStream, tmp_path: Path, steps: int, form: dict[str, Any]
) -> None:
    settings = replace(SETTINGS, **form)
    unbroken = run(learner_of(stream, settings), stream)
    write_checkpoint(tmp_path, run(learner_of(stream, settings), stream, to_step=steps).capture_checkpoint(), keep=1)
    continued = learner_of(stream, settings)
    checkpoint = read_newest_checkpoint(tmp_path, config_hash=continued.model.config.config_hash())
    assert checkpoint is not None
    continued.load_checkpoint(checkpoint)
    run(continued, stream)
    assert_equal(unbroken.capture_checkpoint(), continued.capture_checkpoint())
    assert unbroken.ranking is not None
    assert unbroken.ranking.account.num_learned == 240 - unbroken.ranking.account.num_unlisted


def test_every_label_is_learned_once_however_often_it_comes(stream: RecordedStream) -> None:
    once, twice = run(learner_of(stream), stream), learner_of(stream)
    batcher = stream.batcher(twice)
    for batch in Shown(stream).batches():
        if (interactions := batcher.take()) is not None:
            twice.step(interactions)
        twice.learn_labels(batch)
        twice.learn_labels(batch)
    assert once.ranking is not None
    assert twice.ranking is not None
    assert twice.ranking.account.num_repeated == 240
    assert twice.ranking.account.num_learned == once.ranking.account.num_learned
    for name, tensor in once.model.dense_state().items():
        assert torch.equal(tensor, twice.model.dense_state()[name]), name


def test_before_the_first_label_retrieval_is_what_it_is_without_a_head(stream: RecordedStream) -> None:
    with_head, without = learner_of(stream), stream.learner()
    for learner in (with_head, without):
        batcher = stream.batcher(learner)
        while batch := batcher.take():
            learner.step(batch)
    state = with_head.model.dense_state()
    for name, tensor in without.model.dense_state().items():
        assert torch.equal(tensor, state[name]), name
    num_items = without.num_items
    assert torch.equal(with_head.model.items.weight[:num_items], without.model.items.weight[:num_items])


def test_what_was_shown_is_told_from_what_was_not_taken_better_than_by_guessing(stream: RecordedStream) -> None:
    learner = learner_of(stream, replace(SETTINGS, row_learning_rate=2e-2))
    batcher = stream.batcher(learner)
    while batch := batcher.take():
        learner.step(batch)
    for round_ in range(6):
        for labels in Shown(stream).batches(num=240):
            learner.learn_labels(replace(labels, keys=labels.keys + np.uint64(round_)))
    metrics = learner.metrics_summary()
    assert metrics["ranking.click.window.count"] == 100
    assert metrics["ranking.click.window.ne"] < 0.9
    assert metrics["ranking.click.window.auc"] > 0.8


def test_corrections_are_learned_from_and_not_measured(stream: RecordedStream) -> None:
    learner = learner_of(stream)
    while batch := (batcher := stream.batcher(learner)).take():
        learner.step(batch)
    del batcher
    first, second = list(Shown(stream).batches(num=16))
    learner.learn_labels(first)
    late = replace(
        second,
        items=replace(second.items, is_measured=np.zeros(16, np.bool_)),
        is_late=np.ones(16, np.bool_),
    )
    before = learner.model.dense_state()
    learner.learn_labels(late)
    assert learner.ranking is not None
    assert (learner.ranking.account.num_late, learner.ranking.account.num_learned) == (16, 32)
    assert learner.metrics_summary()["ranking.click.lifetime.count"] == 16
    after = learner.model.dense_state()
    assert any(not torch.equal(before[name], after[name]) for name in before)


def test_items_without_a_row_are_counted_and_passed_over(stream: RecordedStream) -> None:
    learner = learner_of(stream)
    learner.learn_labels(next(Shown(stream).batches()))
    assert learner.ranking is not None
    assert (learner.ranking.account.num_unlisted, learner.ranking.account.num_steps) == (16, 0)
    assert learner.ranking.account.positions == {0: LabelPosition(8)}


def test_a_poisoned_batch_is_set_aside_and_the_weights_stay(stream: RecordedStream) -> None:
    learner = learner_of(stream, replace(SETTINGS, tasks=("value>=1",)))
    run(learner, stream, to_step=10)
    before = learner.model.dense_state()
    learner.model.items.weight[3] = torch.nan
    labels = next(iter(Shown(stream).batches(num=120)))
    items = replace(labels.items, item_id=np.full(16, int(learner.model.items.ids()[3])))
    learner.learn_labels(replace(labels, items=items, keys=labels.keys + np.uint64(1)))
    ((why, rows),) = learner.set_aside
    assert (why.reason, why.num_interactions, why.is_of_ranking) == ("ranking_loss", 16, True)
    assert rows.item_id.tolist() == items.item_id.tolist()
    assert learner.ranking is not None
    assert learner.ranking.account.num_quarantined == 16
    for name, tensor in before.items():
        assert torch.equal(tensor, learner.model.dense_state()[name]), name


def test_a_store_that_is_away_leaves_everything_as_it_was(
    stream: RecordedStream, monkeypatch: pytest.MonkeyPatch
) -> None:
    learner = run(learner_of(stream), stream, to_step=4)
    before = learner.capture_checkpoint()

    def away(*_arguments: object, **_options: object) -> None:
        raise StoreUnavailableError("away")

    labels = list(Shown(stream).batches())[4]
    with monkeypatch.context() as patched:
        patched.setattr(HotHistories, "gather", away)
        with pytest.raises(StoreUnavailableError):
            learner.learn_labels(labels)
    assert_equal(before, learner.capture_checkpoint())
    learner.learn_labels(labels)
    assert learner.ledger.num_steps == before.step + 1


def test_the_account_of_labels_begins_anew_with_a_new_log(stream: RecordedStream) -> None:
    checkpoint = run(learner_of(stream), stream, to_step=5).capture_checkpoint()
    config = replace(
        stream.config(), model=with_ranking_head(MODEL, SETTINGS, ACTIONS), ranking=SETTINGS, actions=ACTIONS
    )
    other = OnlineLearner(config, HotHistories(stream.store, HOT), log_id="another")
    other.load_checkpoint(checkpoint)
    assert other.ranking is not None
    assert other.ranking.account.positions == {}
    assert other.ranking.account.num_learned > 0


SERVED = replace(SETTINGS, tasks=("click", "value"), value_center=5.0, value_scale=2.0)


def served_batches(stream: RecordedStream) -> list[LabelBatch]:
    """With values of what was taken, and predictions of all but every fifth answer."""
    rng = np.random.default_rng(2)
    found = []
    for number, batch in enumerate(Shown(stream).batches()):
        num = len(batch.items)
        value = np.where(batch.items.action > 0, rng.uniform(1, 9, num), np.nan).astype(np.float32)
        served_CK = np.column_stack([rng.uniform(0.05, 0.95, num), rng.uniform(1, 9, num)]).astype(np.float32)
        served_CK[number % 5 == 0] = np.nan
        served_CK[:, 0][served_CK[:, 0] < 0.1] = np.nan
        found.append(replace(batch, items=replace(batch.items, value=value), served_CK=served_CK))
    return found


def test_predictions_as_served_are_measured_on_each_label_once_and_continue_from_a_checkpoint(
    stream: RecordedStream, tmp_path: Path
) -> None:
    learner, continued = (learner_of(stream, SERVED, metrics_window=40) for _ in range(2))
    batcher, batches = stream.batcher(learner), served_batches(stream)
    while batch := batcher.take():
        learner.step(batch)
    assert not any(name.startswith("ranking.served") for name in learner.metrics_summary())
    late = replace(
        batches[3],
        items=replace(batches[3].items, is_measured=np.zeros(16, np.bool_)),
        is_late=np.ones(16, np.bool_),
        keys=batches[3].keys + np.uint64(1),
    )
    shown = [*batches[:6], late, batches[2], *batches[6:]]
    for number, labels in enumerate(shown):
        learner.learn_labels(labels)
        if number == 5:
            write_checkpoint(tmp_path, learner.capture_checkpoint(), keep=1)
    checkpoint = read_newest_checkpoint(tmp_path, config_hash=continued.model.config.config_hash())
    assert checkpoint is not None
    continued.load_checkpoint(checkpoint)
    for labels in shown[6:]:
        continued.learn_labels(labels)
    assert_equal(learner.capture_checkpoint(), continued.capture_checkpoint())
    # By hand, of the labels of items that have a row.
    kept = [learner.model.items.lookup(batch.items.item_id) >= 0 for batch in batches]
    served_CK = np.concatenate([b.served_CK[k] for b, k in zip(batches, kept, strict=True) if b.served_CK is not None])
    action, value = (
        np.concatenate([getattr(b.items, name)[k] for b, k in zip(batches, kept, strict=True)])
        for name in ("action", "value")
    )
    rows = np.isfinite(served_CK[:, 0])
    p, y = served_CK[rows, 0].astype(np.float64), action[rows] > 0
    found = learner.metrics_summary()
    assert found["ranking.served.click.lifetime.count"] == rows.sum() < found["ranking.click.lifetime.count"]
    assert found["ranking.served.click.lifetime.calibration"] == pytest.approx(p.sum() / y.sum())
    log_loss, mean = -np.log(np.where(y, p, 1 - p)).mean(), y.mean()
    entropy = -(mean * np.log(mean) + (1 - mean) * np.log(1 - mean))
    assert found["ranking.served.click.lifetime.ne"] == pytest.approx(log_loss / entropy)
    rows = np.isfinite(served_CK[:, 1]) & np.isfinite(value)
    error = served_CK[rows, 1].astype(np.float64) - value[rows]
    assert found["ranking.served.value.lifetime.count"] == rows.sum()
    assert found["ranking.served.value.lifetime.rmse"] == pytest.approx(np.sqrt(np.mean(error**2)))
    assert "ranking.served.value.lifetime.rmse_item_mean" not in found


def test_a_checkpoint_of_an_earlier_version_knows_nothing_of_what_was_served(stream: RecordedStream) -> None:
    checkpoint = run(learner_of(stream), stream, to_step=5).capture_checkpoint()
    tensors = {name: one for name, one in checkpoint.tensors.items() if not name.startswith("ranking.served.")}
    assert len(tensors) < len(checkpoint.tensors)
    continued = learner_of(stream)
    continued.load_checkpoint(replace(checkpoint, tensors=tensors))
    assert_equal(continued.capture_checkpoint(), checkpoint)


# From interactions


VALUED = replace(SETTINGS, learn_from="interactions", tasks=("value>=5", "like"))


def valued_stream(store: FeatureStore) -> RecordedStream:
    """Items with an even number are valued 9 and liked, the others 1 and not."""
    interactions = walks(600)
    is_even = interactions.item_id % 2 == 0
    interactions.value[:] = np.where(is_even, 9, 1)
    interactions.action[:] = np.where(is_even, 0b11, 0b01)
    return record_stream(store, interactions)


@every_form
def test_from_interactions_alone_the_head_learns_what_is_done_and_valued(
    store: FeatureStore, form: dict[str, Any]
) -> None:
    stream = valued_stream(store)
    learner = learner_of(stream, replace(VALUED, **form, row_learning_rate=2e-2))
    batcher = stream.batcher(learner)
    while batch := batcher.take():
        learner.step(batch)
    metrics = learner.metrics_summary()
    for task in VALUED.tasks:
        assert metrics[f"ranking.{task}.window.ne"] < 0.8
        assert metrics[f"ranking.{task}.window.auc"] > 0.85
    assert learner.ranking is not None
    assert learner.ranking.account.num_learned + learner.ranking.account.num_unlisted == 600


def test_from_interactions_a_broken_run_continues_bit_by_bit(store: FeatureStore) -> None:
    stream = valued_stream(store)
    unbroken, first, continued = learner_of(stream, VALUED), learner_of(stream, VALUED), learner_of(stream, VALUED)
    for learner, steps in ((unbroken, 10**9), (first, 9)):
        batcher = stream.batcher(learner)
        while learner.ledger.num_steps < steps and (batch := batcher.take()):
            learner.step(batch)
    continued.load_checkpoint(first.capture_checkpoint())
    batcher = stream.batcher(continued)
    while batch := batcher.take():
        continued.step(batch)
    assert_equal(unbroken.capture_checkpoint(), continued.capture_checkpoint())


def test_the_only_action_is_nothing_to_learn_from_interactions() -> None:
    with pytest.raises(ValueError, match="the only action of events.actions"):
        with_ranking_head(MODEL, RankingSettings(tasks=("click",), learn_from="interactions"), ("click",))


VALUE = replace(SETTINGS, tasks=("click", "value"), learn_from="interactions", value_center=50.0, value_scale=20.0)


def valued(store: FeatureStore, num: int = 900) -> RecordedStream:
    """Half of the users give high values, half low ones, whatever the item; every third interaction has none."""
    plain = walks(num)
    rng = np.random.default_rng(3)
    of_user = np.where(plain.user_id % 2 == 0, 25.0, -25.0)
    value = (50.0 + of_user + rng.normal(0, 2.0, len(plain))).astype(np.float32)
    value[rng.random(len(plain)) < 1 / 3] = np.nan
    return record_stream(store, replace(plain, value=value))


def test_a_value_is_learned_and_measured_against_the_mean_of_its_item(store: FeatureStore, tmp_path: Path) -> None:
    stream = valued(store)
    settings = replace(VALUE, value_thresholds=(50.0,), dense_learning_rate=1e-2)
    learner, batcher = learner_of(stream, settings, metrics_window=200), stream.batcher(learner_of(stream, settings))
    while (batch := batcher.take()) is not None:
        learner.step(batch)
    assert learner.ranking is not None
    found = learner.ranking.measured()
    whole, newest = found["value", "lifetime"], found["value", "window"]
    assert isinstance(whole, ValueMetrics)
    assert isinstance(newest, ValueMetrics)
    # A value is predicted where there is one, of items that have a row.
    num_values = int(np.isfinite(batch_values(stream)).sum())
    assert num_values - learner.ranking.account.num_unlisted <= whole.count <= num_values
    # Who gives it decides, and the item says nothing: its mean is off by the difference between people.
    assert newest.rmse_item_mean == pytest.approx(25.0, rel=0.15)
    assert newest.rmse_to_item_mean is not None
    assert newest.rmse_to_item_mean < 0.7
    assert learner.metrics_summary()["ranking.value.window.rmse"] == newest.rmse
    assert "ranking.value.lifetime.rmse_item_mean" in learner.metrics_summary()
    write_checkpoint(tmp_path, learner.capture_checkpoint(), keep=1)
    continued = learner_of(stream, settings, metrics_window=200)
    checkpoint = read_newest_checkpoint(tmp_path, config_hash=continued.model.config.config_hash())
    assert checkpoint is not None
    continued.load_checkpoint(checkpoint)
    assert continued.ranking is not None
    assert continued.ranking.measured() == found
    assert_equal(learner.capture_checkpoint(), continued.capture_checkpoint())


def batch_values(stream: RecordedStream) -> np.ndarray:
    return np.concatenate([update.interactions.value for update in stream.updates])
