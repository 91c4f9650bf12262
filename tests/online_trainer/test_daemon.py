"""The trainer daemon on a log: learns everything once, publishes a chain, and continues after any stop."""

from __future__ import annotations

import asyncio
import shutil
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
import torch

from feature_store.config import FeatureStoreConfig
from feature_store.store import FeatureStore
from model.config import LossConfig, OptimizerConfig
from model.recommender import Recommender
from model.snapshot import chain, list_versions, load_snapshot, read_manifest, read_pointer
from model.swap import apply_snapshot
from online_trainer.config import ItemsConfig, TrainerConfig
from online_trainer.daemon import TrainerDaemon
from online_trainer.drift_config import DriftConfig
from online_trainer.gate import read_held
from online_trainer.parts import TrainerParts
from stream.clock import WallClock
from stream.errors import LogResetError
from stream.freshness import AgeHistogram
from stream.memory_log import MemoryLog
from stream.messages import HistoryUpdate, SnapshotPointer, decode_message
from tests.online_trainer.conftest import HOT, MODEL, record_stream, walks


@dataclass
class Site:
    """A log, a store and the folders of one installation; daemons come and go."""

    log: MemoryLog
    store: FeatureStore
    root: Path

    def daemon(
        self, drift: DriftConfig | None = None, items: ItemsConfig | None = None, **trainer: Any
    ) -> TrainerDaemon:
        settings = {"batch_interactions": 16, "publish_interval_ms": 30, "checkpoint_interval_s": 0.1} | trainer
        return TrainerDaemon(
            TrainerParts(
                config=TrainerConfig(batch_wait_ms=20, metrics_window=100, **settings),
                items_config=items or ItemsConfig(),
                model_config=MODEL,
                loss_config=LossConfig(),
                optimizer_config=OptimizerConfig(),
                model_name="default",
                log=self.log,
                store=self.store,
                hot_config=HOT,
                snapshot_root=self.root / "snapshots",
                checkpoint_root=self.root / "checkpoints",
                quarantine_root=self.root / "quarantine",
                metrics_root=self.root / "metrics",
                clock=WallClock(),
                drift_config=drift or DriftConfig(),
            )
        )

    def send(self, updates: list[HistoryUpdate]) -> None:
        for update in updates:
            self.log.append(self.log.topics.history_updates, 0, None, update.encode(), ())


@pytest.fixture
async def site(store: FeatureStore, tmp_path: Path) -> Site:
    log = MemoryLog(WallClock(), log_id="main")
    await log.create_topics()
    return Site(log, store, tmp_path)


@asynccontextmanager
async def running(daemon: TrainerDaemon) -> AsyncIterator[TrainerDaemon]:
    stopping = asyncio.Event()
    task = asyncio.create_task(daemon.run(stopping))
    try:
        yield daemon
    finally:
        stopping.set()
        await asyncio.wait_for(task, 30)


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(30):
        while not condition():  # noqa: ASYNC110 - the daemon is watched from outside
            await asyncio.sleep(0.01)


async def learn(daemon: TrainerDaemon, num_interactions: int) -> dict[str, Any]:
    async with running(daemon):
        await until(lambda: daemon.status()["interactions"] == num_interactions)
    status: dict[str, Any] = daemon.status()
    return status


async def test_everything_is_learned_once_and_the_last_snapshot_contains_it(site: Site) -> None:
    site.send(record_stream(site.store, walks(300)).updates)
    status = await learn(site.daemon(), 300)
    totals = site.store.totals()
    pointer = read_pointer(site.root / "snapshots", "default")
    assert pointer is not None
    lineage = read_manifest(site.root / "snapshots", "default", pointer.version).lineage
    assert (lineage.num_interactions, lineage.fingerprint) == (totals.num_interactions, totals.fingerprint)
    assert status["fingerprint"] == str(totals.fingerprint)
    assert lineage.positions == {0: 300}


async def test_updates_sent_again_are_not_learned_again(site: Site) -> None:
    updates = record_stream(site.store, walks(200)).updates
    site.send(updates[:3] + updates[1:3] + updates[2:])
    status = await learn(site.daemon(), 200)
    assert status["repeated"] == 150
    assert status["fingerprint"] == str(site.store.totals().fingerprint)


async def test_after_a_change_of_log_nothing_of_the_old_one_is_learned_again(site: Site) -> None:
    updates = record_stream(site.store, walks(200)).updates
    site.send(updates)
    await learn(site.daemon(), 200)
    site.log.log_id = "the log after"
    site.send(record_stream(site.store, walks(50, seed=1), log_id="the log after").updates)
    status = await learn(site.daemon(), 250)
    assert status["fingerprint"] == str(site.store.totals().fingerprint)


async def test_after_a_change_of_log_what_the_old_one_left_is_learned_too(site: Site) -> None:
    updates = record_stream(site.store, walks(200)).updates
    site.send(updates[:2])
    await learn(site.daemon(), 100)
    site.send(updates[2:])
    site.log.log_id = "main~1"
    site.send(record_stream(site.store, walks(50, seed=1), log_id="main~1").updates)
    status = await learn(site.daemon(), 250)
    assert status["fingerprint"] == str(site.store.totals().fingerprint)
    assert status["positions"] == {0: 50}


async def test_updates_deleted_before_they_were_read_stop_the_trainer_until_they_are_given_up(site: Site) -> None:
    topic = site.log.topics.history_updates
    updates = record_stream(site.store, walks(250)).updates
    site.send(updates[:2])
    await learn(site.daemon(), 100)
    site.send(updates[2:])
    site.log.delete_before((topic, 0), 4)
    with pytest.raises(LogResetError, match="2 records, offsets 2 to 3.*headrace log accept --truncated"):
        await asyncio.wait_for(site.daemon().run(asyncio.Event()), 20)
    with site.store.transaction() as transaction:
        transaction.lock_position("main", topic, 0)
        transaction.set_position("main", topic, 0, 4)
    assert (await learn(site.daemon(), 150))["positions"] == {0: 250}
    # What is done and then deleted is not missing.
    site.log.delete_before((topic, 0), 5)
    assert (await learn(site.daemon(), 150))["positions"] == {0: 250}


async def test_the_chain_of_snapshots_leads_to_the_trainers_weights(site: Site) -> None:
    stream = record_stream(site.store, walks(300))
    daemon = site.daemon(publish_interval_ms=0, anchor_every=4, keep_anchors=100)
    async with running(daemon):
        for update in stream.updates:
            site.send([update])
            await asyncio.sleep(0.1)
        await until(lambda: daemon.status()["interactions"] == 300)
    root, versions = site.root / "snapshots", list_versions(site.root / "snapshots", "default")
    kinds = [read_manifest(root, "default", version).kind for version in versions]
    assert kinds[0] == "anchor"
    assert "delta" in kinds
    recommender = Recommender(MODEL)
    for version in versions:
        apply_snapshot(recommender, load_snapshot(root, "default", version))
    fresh = Recommender(MODEL)
    for version in chain(root, "default", have=None, want=versions[-1]):
        apply_snapshot(fresh, load_snapshot(root, "default", version))
    for each in (recommender, fresh):
        np.testing.assert_array_equal(each.items.ids(), daemon._learner.model.items.ids())
        n = each.items.num_items
        assert torch.equal(each.items.weight[:n], daemon._learner.model.items.weight[:n])
        for name, tensor in each.dense_state().items():
            assert torch.equal(tensor, daemon._learner.model.dense_state()[name]), name


async def test_every_learned_event_is_in_exactly_one_freshness_histogram(site: Site) -> None:
    site.send(record_stream(site.store, walks(250)).updates)
    await learn(site.daemon(publish_interval_ms=0), 250)
    published = site.store.published_snapshots("default")
    assert sum(AgeHistogram.from_dict(snapshot.append_age).count for snapshot in published) == 250
    assert all(snapshot.published_at_ms >= snapshot.created_at_ms for snapshot in published)


async def test_each_snapshot_is_announced_on_its_topic(site: Site) -> None:
    site.send(record_stream(site.store, walks(100)).updates)
    await learn(site.daemon(), 100)
    announced = [
        decode_message(SnapshotPointer, record.value).version
        for record in site.log.records((site.log.topics.snapshots, 0))
    ]
    assert announced == list_versions(site.root / "snapshots", "default")


async def test_what_the_gate_holds_back_is_said_and_not_announced(site: Site) -> None:
    updates = record_stream(site.store, walks(300)).updates
    # No model is a thousand times as good as popularity; the window of 100 is full after a while.
    daemon = site.daemon(gate_baseline_min=1_000.0, publish_interval_ms=0)
    async with running(daemon):
        for update in updates:
            site.send([update])
            await asyncio.sleep(0.05)
        await until(lambda: daemon.status()["interactions"] == 300)
        await until(lambda: daemon.status()["held"] is not None)
        assert daemon.ready()[0]
    (episode,) = read_held(site.root / "snapshots", "default")
    assert (episode.reason, episode.ended_by) == ("baseline", None)
    versions = list_versions(site.root / "snapshots", "default")
    assert episode.version == versions[-1] + 1
    assert len(site.log.records((site.log.topics.snapshots, 0))) == len(versions)
    # Relaxed, it goes on with all that was held back, in a chain that leads on from the last good one.
    relaxed = site.daemon()
    async with running(relaxed):
        await until(lambda: relaxed.status()["held"] is None)
    published = site.store.published_snapshots("default")
    assert sum(AgeHistogram.from_dict(snapshot.append_age).count for snapshot in published) == 300
    assert published[-1].lineage["num_interactions"] == 300


async def test_a_stopped_daemon_continues_where_it_stood(site: Site) -> None:
    updates = record_stream(site.store, walks(300)).updates
    site.send(updates[:3])
    await learn(site.daemon(), 150)
    site.send(updates[3:])
    status = await learn(site.daemon(), 300)
    assert status["repeated"] <= 50  # the message it stopped in is read again
    assert status["fingerprint"] == str(site.store.totals().fingerprint)
    # The weights are those of a trainer that never stopped.
    unbroken = Site(site.log, site.store, site.root / "other")
    again = unbroken.daemon()
    await learn(again, 300)
    assert status["supervised"] == again.status()["supervised"]


async def test_after_a_crash_it_publishes_only_what_is_ahead_of_the_last_snapshot(site: Site) -> None:
    updates = record_stream(site.store, walks(200)).updates
    site.send(updates[:2])
    await learn(site.daemon(checkpoint_interval_s=3_600), 100)
    # A crash that loses the checkpoint but not the snapshots: the trainer starts over behind its own publications.
    for path in sorted((site.root / "checkpoints").rglob("*"), reverse=True):
        path.rmdir() if path.is_dir() else path.unlink()
    before = list_versions(site.root / "snapshots", "default")
    site.send(updates[2:])
    await learn(site.daemon(publish_interval_ms=0), 200)
    manifests = [
        read_manifest(site.root / "snapshots", "default", v) for v in list_versions(site.root / "snapshots", "default")
    ]
    learned = [manifest.lineage.num_interactions for manifest in manifests]
    assert learned == sorted(learned)
    first_new = manifests[len(before)]
    assert first_new.kind == "anchor"
    assert first_new.lineage.num_interactions > 100
    published = site.store.published_snapshots("default")
    assert sum(AgeHistogram.from_dict(snapshot.append_age).count for snapshot in published) == 200


async def test_forgetting_a_user_does_not_stop_training(site: Site) -> None:
    updates = record_stream(site.store, walks(200, num_users=5)).updates
    site.send(updates[:2])
    daemon = site.daemon()
    async with running(daemon):
        await until(lambda: daemon.status()["interactions"] == 100)
        with site.store.transaction() as transaction:
            transaction.forget_users(np.array([3], np.int64))
        site.send([HistoryUpdate.forgetting("main", 0, (3,)), *updates[2:]])
        await until(lambda: daemon.status()["interactions"] == 200)
    assert int(str(daemon.status()["out_of_reach"])) > 0


async def test_a_trainer_that_comes_late_learns_nothing_of_a_forgotten_user_but_everything_of_the_new_history(
    site: Site,
) -> None:
    before = walks(200, num_users=5)
    updates = record_stream(site.store, before, poll=5).updates  # too many for one read
    learned_and_dropped = site.store.totals().fingerprint
    num_forgotten = int((before.user_id == 3).sum())
    with site.store.transaction() as transaction:
        transaction.forget_users(np.array([3], np.int64))
    # The user comes back, and has fewer interactions by now than were announced before: numbers mean others now.
    back = walks(40, num_users=5, seed=1)
    back = back.take(back.user_id == 3)
    back = replace(back, event_time_ms=back.event_time_ms + 1_000_000)
    with site.store.transaction() as transaction:
        result = transaction.append(back)
    assert 2 <= len(back) < num_forgotten
    new_history = replace(
        updates[-1],
        first_offset=200,
        last_offset=199 + len(back),
        offsets=np.arange(200, 200 + len(back)),
        append_ms=np.arange(len(back)) + 2_000_000,
        interactions=result.accepted_from(back),
    )
    site.send([*updates, HistoryUpdate.forgetting("main", 0, (3,)), new_history])
    daemon = site.daemon()
    status = await learn(daemon, 200 + len(back))
    assert status["forgotten"] == num_forgotten
    assert status["out_of_reach"] == 0
    assert status["supervised"] == 200 - num_forgotten - 4 + len(back) - 1
    keys = int(np.add.reduce(back.event_key, dtype=np.uint64))
    assert status["fingerprint"] == str((learned_and_dropped + keys) % 2**64)
    assert site.store.totals().num_interactions == 200 - num_forgotten + len(back)


async def test_readiness_says_what_it_waits_for(site: Site) -> None:
    daemon = site.daemon()
    assert daemon.ready() == (False, "starting")
    async with running(daemon):
        await until(lambda: daemon.ready()[0])
    assert daemon.ready() == (False, "stopped")


async def test_told_to_stop_while_the_store_is_away_it_stops_and_the_batch_is_read_again(site: Site) -> None:
    # The first updates are missing, so that histories must be read from a store that is not there.
    updates = record_stream(site.store, walks(200)).updates
    site.send(updates[2:])
    missing = FeatureStore(FeatureStoreConfig(url=f"sqlite:///{site.root}/missing/store.db"))
    away = Site(site.log, missing, site.root).daemon()
    async with running(away):
        await until(lambda: "missing" in away.ready()[1])
    missing.close()
    assert away.status()["interactions"] == 0
    assert (await learn(site.daemon(), 100))["repeated"] == 0


async def test_the_metrics_of_a_run_go_on_through_stops_and_crashes(site: Site) -> None:
    updates = record_stream(site.store, walks(300)).updates
    site.send(updates[:3])
    await learn(site.daemon(metrics_every_steps=2), 150)
    site.send(updates[3:])
    # This one is killed: none of its steps is in a checkpoint, some of its rows are on disk.
    daemon = site.daemon(metrics_every_steps=1, checkpoint_interval_s=3_600)
    async with running(daemon):
        await until(lambda: daemon.status()["interactions"] == 300)
        daemon._metrics_file.flush()
        checkpoints = {path.name for path in (site.root / "checkpoints").iterdir()}
    for path in (site.root / "checkpoints").iterdir():
        if path.name not in checkpoints:
            shutil.rmtree(path)
    status = await learn(site.daemon(metrics_every_steps=2), 300)
    rows = pl.read_parquet(site.root / "metrics" / "r0001" / "*.parquet")
    assert rows["step"].unique().to_list() == list(range(2, status["steps"] + 1, 2))
    assert not rows.select("step", "name").is_duplicated().any()
    if status["steps"] % 2 == 0:
        last = rows.filter(step=status["steps"])
        assert dict(zip(last["name"], last["value"], strict=True)).items() >= status["metrics"].items()
