"""Publishing: what is held back, what a full disk or an absent store leaves, and what a crash left unaccounted."""

from __future__ import annotations

import errno
import json
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from feature_store.errors import StoreUnavailableError
from feature_store.records import PublishedSnapshot
from feature_store.store import FeatureStore
from model.disk import Disk
from model.errors import SnapshotStorageError
from model.pinning import pin_snapshot, unpin_snapshot
from model.recommender import Recommender
from model.row_precision import as_published
from model.snapshot import chain, list_versions, load_snapshot, read_manifest, read_pointer
from model.storage import LocalStorage, SnapshotRoot
from model.swap import apply_snapshot
from online_trainer.ages import PendingAges
from online_trainer.config import TrainerConfig
from online_trainer.gate import read_held
from online_trainer.learner import OnlineLearner
from online_trainer.publisher import CapturedSnapshot, Publisher
from online_trainer.steps import LearnedSteps, bounded
from stream.clock import ManualClock
from stream.freshness import AgeHistogram
from tests.online_trainer.conftest import record_stream, walks


@dataclass
class Desk:
    """A learner that can be trained a batch at a time, and its publisher."""

    store: FeatureStore
    root: SnapshotRoot
    settings: dict[str, Any] = field(default_factory=dict)
    num_events: int = 400

    def __post_init__(self) -> None:
        self.stream = record_stream(self.store, walks(self.num_events))
        self.learner: OnlineLearner = self.stream.learner(**self.settings)
        self.batcher = self.stream.batcher(self.learner)
        self.clock = ManualClock(1_700_001_000_000)
        self.publisher = self.open()

    def open(self, store: FeatureStore | None = None, *, config_hash: str | None = None) -> Publisher:
        config = TrainerConfig(metrics_window=100, **self.settings)
        return Publisher(
            self.root,
            "default",
            config,
            store=store or self.store,
            clock=self.clock,
            mode="live",
            config_hash=config_hash or self.learner.model.config.config_hash(),
        )

    def start_over(self, *, num_expired: int = 0, config_hash: str | None = None) -> None:
        """A trainer without checkpoints, on a log whose first batches have expired."""
        self.learner = self.stream.learner(**self.settings)
        self.batcher = self.stream.batcher(self.learner)
        self.publisher = self.open(config_hash=config_hash)
        for _ in range(num_expired):
            self.batcher.take()

    def learn(self) -> None:
        batch = self.batcher.take()
        assert batch is not None
        self.learner.step(batch)
        ledger = self.learner.ledger
        step = LearnedSteps.of_batch(batch, ledger, at_ms=self.clock.now_ms(), is_set_aside=False)
        self.publisher.learned(
            batch.interactions.event_time_ms, batch.append_ms, ledger.num_interactions, len(batch.dropped), step
        )

    def capture(self) -> CapturedSnapshot:
        captured = self.publisher.capture(self.learner, traceparent=None)
        assert captured is not None
        return captured

    def publish(self) -> None:
        self.learn()
        self.publisher.write(self.capture())

    def versions(self) -> list[int]:
        return list_versions(self.root, "default")


@pytest.fixture
def desk(store: FeatureStore, tmp_path: Path) -> Desk:
    return Desk(store, tmp_path / "snapshots")


def a_step(number: int, *, is_set_aside: bool = False) -> LearnedSteps:
    return LearnedSteps(
        first_step=number,
        last_step=number,
        at_ms=10 * number,
        positions={0: number},
        is_set_aside=is_set_aside,
    )


def steps_of(store: FeatureStore) -> list[list[tuple[int, int]]]:
    """Of each published version, its steps and where they had come to."""
    told = [[LearnedSteps.of_dict(one) for one in row.steps or ()] for row in store.published_snapshots("default")]
    return [[(step.first_step, step.positions[0]) for step in of_version] for of_version in told]


def test_a_snapshot_tells_which_steps_learned_what_is_newly_inside(desk: Desk) -> None:
    desk.learn()
    desk.publish()
    desk.publish()
    per_batch = desk.learner.ledger.num_interactions // 3
    assert steps_of(desk.store) == [[(1, per_batch), (2, 2 * per_batch)], [(3, 3 * per_batch)]]
    assert read_manifest(desk.root, "default", 2).steps == desk.store.published_snapshots("default")[1].steps


def test_steps_that_no_finished_snapshot_tells_are_told_after_a_restart(store: FeatureStore, tmp_path: Path) -> None:
    disk = Disk()
    desk = Desk(store, LocalStorage(tmp_path / "snapshots", disk))
    desk.publish()
    desk.learn()
    write_before = disk.write
    disk.write = _full  # type: ignore[method-assign]
    with pytest.raises(OSError, match="No space left"):
        desk.publisher.write(desk.capture())
    disk.write = write_before  # type: ignore[method-assign]
    desk.learn()
    kept = json.loads(json.dumps(desk.publisher.unpublished()))
    desk.publisher = desk.open()
    desk.publisher.resume(kept, desk.learner.ledger.num_interactions)
    desk.publish()
    assert [step for step, _ in steps_of(desk.store)[-1]] == [2, 3, 4]


def test_many_steps_share_entries_and_none_is_left_out() -> None:
    told: tuple[LearnedSteps, ...] = ()
    for number in range(1, 2_001):
        told = bounded([*told, a_step(number, is_set_aside=number == 5)])
        assert len(told) <= 256
    assert (told[0].first_step, told[-1].last_step, told[-1].positions, told[-1].at_ms) == (
        1,
        2_000,
        {0: 2_000},
        20_000,
    )
    assert all(later.first_step == step.last_step + 1 for step, later in pairwise(told))
    assert [step.is_set_aside for step in told] == [step.first_step <= 5 <= step.last_step for step in told]
    assert told[-1].first_step == 2_000, "the newest are told apart longest"


def _full(path: Path, content: bytes) -> None:
    path.write_bytes(content[:100])
    raise OSError(errno.ENOSPC, "No space left on device")


def recorded(store: FeatureStore) -> list[int]:
    return [one.version for one in store.published_snapshots("default")]


def test_broken_weights_are_held_back_with_evidence_and_good_ones_end_it(
    desk: Desk, caplog: pytest.LogCaptureFixture
) -> None:
    desk.publish()
    weight = next(desk.learner.model.parameters())
    good = weight.detach().clone()
    with torch.no_grad():
        weight.fill_(float("nan"))
    desk.learner.model.items.clear_dirty()
    for _ in range(3):
        assert desk.publisher.capture(desk.learner, traceparent=None) is None
        desk.publisher.record_held()
    (episode,) = read_held(desk.root, "default")
    assert (episode.reason, episode.version, episode.num_attempts, episode.ended_by) == ("weights", 2, 3, None)
    assert desk.publisher.held is not None
    assert desk.versions() == [1]
    with torch.no_grad():
        weight.copy_(good)
    desk.publish()
    assert read_held(desk.root, "default")[0].ended_by == 2
    assert read_manifest(desk.root, "default", 2).kind == "delta"
    says = [record.message for record in caplog.records]
    assert says == [
        "snapshot 2 is held back, the last good one stays: weights are not finite",
        "snapshot 2 has passed the gate after 3 attempts",
    ]


def test_a_model_worse_than_the_guard_allows_is_held_back_and_what_it_learned_comes_later(
    store: FeatureStore, tmp_path: Path
) -> None:
    # No model is a thousand times as good as popularity.
    desk = Desk(store, tmp_path / "snapshots", {"gate_baseline_min": 1_000.0, "publish_interactions": 1})
    desk.publish()
    while desk.learner.metrics_summary().get("model.window.count", 0) < 100:
        desk.learn()
    assert desk.publisher.is_due()
    assert desk.publisher.capture(desk.learner, traceparent=None) is None
    assert not desk.publisher.is_due()  # until something new is learned
    assert desk.publisher.has_unpublished()
    held = desk.publisher.held
    assert held is not None
    assert held.reason == "baseline"
    assert held.evidence["gate_baseline_min"] == 1_000
    desk.publisher.record_held()
    assert desk.open().held == held
    assert desk.versions() == [1]


def test_a_full_disk_leaves_the_last_good_one_and_an_anchor_follows(store: FeatureStore, tmp_path: Path) -> None:
    disk = Disk()
    desk = Desk(store, LocalStorage(tmp_path / "snapshots", disk))
    desk.publish()
    desk.publish()
    write_before = disk.write
    disk.write = _full  # type: ignore[method-assign]
    desk.learn()
    with pytest.raises(OSError, match="No space left"):
        desk.publisher.write(desk.capture())
    pointer = read_pointer(desk.root, "default")
    assert pointer is not None
    assert pointer.version == 2
    assert {path.name for path in (tmp_path / "snapshots" / "default").iterdir()} == {
        "current.json",
        "v00000001",
        "v00000002",
    }
    disk.write = write_before  # type: ignore[method-assign]
    desk.publish()
    assert desk.versions() == [1, 2, 4]
    assert read_manifest(desk.root, "default", 4).kind == "anchor"


def test_what_could_not_be_written_is_tried_again_on_a_quiet_stream(store: FeatureStore, tmp_path: Path) -> None:
    disk = Disk()
    desk = Desk(store, LocalStorage(tmp_path / "snapshots", disk))
    desk.learn()
    write_before = disk.write
    disk.write = _full  # type: ignore[method-assign]
    with pytest.raises(OSError, match="No space left"):
        desk.publisher.write(desk.capture())
    disk.write = write_before  # type: ignore[method-assign]
    assert desk.publisher.has_unpublished(), "also when it is told to stop"
    desk.clock.advance(10_000)
    assert desk.publisher.is_due()
    desk.publisher.write(desk.capture())
    assert not desk.publisher.has_unpublished()
    assert not desk.publisher.is_due()


def test_snapshots_of_another_model_configuration_hold_nothing_back(desk: Desk) -> None:
    for _ in range(3):
        desk.publish()
    desk.start_over(config_hash="another")
    desk.learn()
    assert desk.publisher.has_unpublished()


def test_behind_the_newest_snapshot_all_is_new_also_where_fewer_interactions_were_counted(desk: Desk) -> None:
    for _ in range(3):
        desk.publish()
    desk.start_over(num_expired=1)
    for _ in range(2):
        desk.learn()
        assert not desk.publisher.has_unpublished(), "the newest snapshot contains it"
    desk.publish()
    assert desk.versions() == [1, 2, 3, 4]
    counted = [AgeHistogram.from_dict(one.append_age).count for one in desk.store.published_snapshots("default")]
    assert counted == [16, 16, 16, 16]


def test_a_storage_that_is_away_at_the_start_is_no_damaged_snapshot(
    desk: Desk, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    desk.publish()
    storage = LocalStorage(tmp_root(desk))

    def away(name: str, *, size_max: int) -> bytes:
        raise SnapshotStorageError(f"{name}: no answer within {size_max} s")

    monkeypatch.setattr(storage, "read", away)
    desk.root = storage
    with pytest.raises(SnapshotStorageError, match="no answer"):
        desk.open()
    monkeypatch.undo()
    (storage.root / "default" / "v00000001" / "manifest.json").write_text("{")
    assert not desk.open().has_unpublished()
    assert "an anchor will replace it" in caplog.text


class AbsentStore:
    """A store whose database is away for its first calls."""

    def __init__(self, store: FeatureStore, *, num_failures: int) -> None:
        self._store, self._left = store, num_failures

    def record_published(self, snapshot: PublishedSnapshot) -> None:
        if self._left:
            self._left -= 1
            raise StoreUnavailableError("away")
        self._store.record_published(snapshot)

    def prune_publications(self, model: str, *, before_ms: int, kept: frozenset[int]) -> int:
        return self._store.prune_publications(model, before_ms=before_ms, kept=kept)

    def published_snapshots(self, model: str, since_version: int = 0) -> list[PublishedSnapshot]:
        return self._store.published_snapshots(model, since_version)


def test_a_delta_names_the_content_that_it_builds_on(desk: Desk) -> None:
    for _ in range(3):
        desk.publish()
    first, second, third = (read_manifest(desk.root, "default", version) for version in (1, 2, 3))
    assert first.parent_hash is None
    assert (second.parent_hash, third.parent_hash) == (first.content_hash(), second.content_hash())
    assert len({one.content_hash() for one in (first, second, third)}) == 3


def test_rows_are_published_with_the_precision_of_the_settings_and_a_change_begins_with_an_anchor(
    store: FeatureStore, tmp_path: Path
) -> None:
    desk = Desk(store, tmp_path / "snapshots", {"row_precision": "int8"})
    desk.publish()
    desk.publish()
    desk.settings = {"row_precision": "int4"}
    desk.publisher = desk.open()
    desk.publish()
    desk.publish()
    told = [read_manifest(desk.root, "default", version) for version in range(1, 5)]
    assert [one.row_precision for one in told] == ["int8", "int8", "int4", "int4"]
    assert [one.kind for one in told] == ["anchor", "delta", "anchor", "delta"]
    replica = Recommender(desk.learner.model.config)
    for version in chain(desk.root, "default", have=None, want=4):
        apply_snapshot(replica, load_snapshot(desk.root, "default", version))
    assert torch.equal(replica.items.weight, as_published(desk.learner.model.items.weight, "int4"))
    assert torch.equal(replica.items.bias, desk.learner.model.items.bias)


def test_an_unknown_precision_is_refused_by_the_settings_by_name() -> None:
    with pytest.raises(ValueError, match=r"trainer.row_precision = 'int2': must be float32 or int8 or int4"):
        TrainerConfig(row_precision="int2")  # type: ignore[arg-type]


def test_what_the_store_was_not_told_is_made_up_for(desk: Desk) -> None:
    desk.publisher = desk.open(AbsentStore(desk.store, num_failures=2))  # type: ignore[arg-type]
    for _ in range(2):
        desk.learn()
        with pytest.raises(StoreUnavailableError):
            desk.publisher.write(desk.capture())
    assert recorded(desk.store) == []
    desk.publish()
    assert recorded(desk.store) == [1, 2, 3]
    # They were published all the same: no need to start over.
    assert [read_manifest(desk.root, "default", version).kind for version in (1, 2, 3)] == ["anchor", "delta", "delta"]


def test_a_snapshot_finished_just_before_a_crash_is_noted_by_the_next_life(desk: Desk) -> None:
    desk.publish()
    desk.publisher = desk.open(AbsentStore(desk.store, num_failures=1))  # type: ignore[arg-type]
    desk.learn()
    with pytest.raises(StoreUnavailableError):
        desk.publisher.write(desk.capture())
    desk.publisher = desk.open()
    desk.publish()
    assert recorded(desk.store) == [1, 2, 3]
    counted = sum(AgeHistogram.from_dict(one.append_age).count for one in desk.store.published_snapshots("default"))
    assert counted == desk.learner.ledger.num_interactions


def test_after_a_pin_the_next_life_goes_on_behind_the_newest_version(desk: Desk) -> None:
    desk.publish()
    desk.publish()
    pin_snapshot(desk.root, "default", 1)
    learned = desk.learner.ledger.num_interactions
    again = desk.open()
    # What version 2 contains is not counted again, although workers are at version 1.
    again.learned(np.zeros(5, np.int64), np.zeros(5, np.int64), learned, 0, a_step(1))
    assert not again.has_unpublished()


def test_old_versions_go_when_an_anchor_comes(store: FeatureStore, tmp_path: Path) -> None:
    desk = Desk(store, tmp_path / "snapshots", {"anchor_every": 3, "keep_anchors": 1})
    for _ in range(8):
        desk.publish()
    assert desk.versions() == [7, 8]


def test_what_the_store_knows_of_old_versions_goes_once_they_are_not_stored_any_more(
    store: FeatureStore, tmp_path: Path
) -> None:
    desk = Desk(store, tmp_path / "snapshots", {"anchor_every": 2, "keep_anchors": 1, "keep_publications_d": 0.1})
    desk.publish()
    desk.publish()
    pin_snapshot(desk.root, "default", 2)
    desk.publish()
    desk.clock.advance(8_640_000 + 1_000)
    desk.publish()
    desk.publish()
    # 1 and 2 are a chain that is pinned; 4 is not stored any more, and young.
    assert desk.versions() == [1, 2, 5]
    assert recorded(store) == [1, 2, 4, 5]
    assert store.publication_floor("default").version == 4
    unpin_snapshot(desk.root, "default")
    desk.publish()
    desk.publish()
    assert desk.versions() == [7]
    assert recorded(store) == [4, 5, 6, 7]


def test_pruning_that_fails_does_not_undo_publishing(desk: Desk, caplog: pytest.LogCaptureFixture) -> None:
    lease = tmp_root(desk) / "default" / "replicas" / "host.json"
    lease.parent.mkdir(parents=True)
    lease.write_text("{}")
    desk.publish()
    assert desk.versions() == [1]
    assert [record.message.split(":")[0] for record in caplog.records] == ["snapshot 1 is published; afterwards"]


def tmp_root(desk: Desk) -> Path:
    assert isinstance(desk.root, Path)
    return desk.root


def test_ages_that_wait_long_are_kept_in_bounded_memory_and_stay_right(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("online_trainer.ages._FOLD_EVENTS", 1_000)
    ages, exact = PendingAges(), AgeHistogram()
    rng = np.random.default_rng(0)
    now_ms, times = 1_700_000_000_000, []
    for _ in range(400):
        now_ms += 60_000
        times.append(now_ms - rng.integers(0, 5_000, 500))
        ages.add(times[-1], now_ms)
        assert len(ages._folded) <= 65
        assert ages._num_times <= 1_000
    exact.add(now_ms - np.concatenate(times))
    taken = ages.take(now_ms)
    assert taken.count == exact.count == 400 * 500
    for q in (0.1, 0.5, 0.99):
        found, true = taken.quantile_ms(q), exact.quantile_ms(q)
        assert found is not None
        assert true is not None
        assert abs(found / true - 1) < 0.1
    assert ages.take(now_ms).count == 0


@pytest.mark.parametrize("finished", [False, True])
def test_what_a_checkpoint_contains_and_no_snapshot_does_is_in_the_next_one(desk: Desk, finished: bool) -> None:
    desk.publish()
    desk.learn()
    captured = desk.capture()
    desk.learn()
    waiting, learned = desk.publisher.unpublished(), desk.learner.ledger.num_interactions
    if finished:
        desk.publisher.write(captured)
    # SIGKILL; the learner goes on from its checkpoint.
    desk.publisher = desk.open()
    desk.publisher.resume(waiting, learned)
    assert desk.publisher.has_unpublished()
    desk.clock.advance(10_000)
    desk.publish()
    counted = [AgeHistogram.from_dict(one.append_age).count for one in desk.store.published_snapshots("default")]
    assert counted == ([16, 16, 32] if finished else [16, 48])
    assert AgeHistogram.from_dict(desk.store.published_snapshots("default")[-1].append_age).num_negative == 0


def test_ages_of_a_snapshot_that_could_not_be_written_are_in_the_next_one(
    desk: Desk, monkeypatch: pytest.MonkeyPatch
) -> None:
    desk.learn()
    with monkeypatch.context() as full:
        full.setattr(Disk, "write", lambda _self, path, content: _full(path, content))
        with pytest.raises(OSError, match="No space left"):
            desk.publisher.write(desk.capture())
    desk.publish()
    assert [AgeHistogram.from_dict(one.append_age).count for one in desk.store.published_snapshots("default")] == [32]
