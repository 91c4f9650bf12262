"""The trainer daemon with a ranking head: labels from their topic, each once, behind the interactions before them."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from feature_store.store import FeatureStore
from model.config import LossConfig, OptimizerConfig
from model.ranking_model import with_ranking_head
from model.ranking_settings import RankingSettings
from model.recommender import Recommender
from model.snapshot import chain, list_versions, load_snapshot, read_manifest
from model.swap import apply_snapshot
from online_trainer.config import ItemsConfig, TrainerConfig
from online_trainer.daemon import TrainerDaemon
from online_trainer.parts import TrainerParts
from stream.clock import WallClock
from stream.memory_log import MemoryLog
from stream.messages import HistoryUpdate, Labels, encode_message
from tests.online_trainer.conftest import HOT, MODEL, record_stream, walks
from tests.online_trainer.test_daemon import running, until

ACTIONS = ("click", "like")
RANKING = RankingSettings(tasks=("click", "like"), max_candidates=4, task_hidden_dim=8, batch_items=12)
WITH_HEAD = with_ranking_head(MODEL, RANKING, ACTIONS)


@dataclass
class Site:
    """A log, a store and the folders of one installation; daemons come and go."""

    log: MemoryLog
    store: FeatureStore
    root: Path

    def daemon(self, ranking: RankingSettings = RANKING, **trainer: Any) -> TrainerDaemon:
        settings = {"batch_interactions": 16, "publish_interval_ms": 30, "checkpoint_interval_s": 0.1} | trainer
        return TrainerDaemon(
            TrainerParts(
                config=TrainerConfig(batch_wait_ms=20, metrics_window=100, **settings),
                items_config=ItemsConfig(),
                model_config=with_ranking_head(MODEL, ranking, ACTIONS),
                loss_config=LossConfig(),
                optimizer_config=OptimizerConfig(),
                ranking=ranking,
                actions=ACTIONS,
                model_name="default",
                log=self.log,
                store=self.store,
                hot_config=HOT,
                snapshot_root=self.root / "snapshots",
                checkpoint_root=self.root / "checkpoints",
                quarantine_root=self.root / "quarantine",
                metrics_root=self.root / "metrics",
                clock=WallClock(),
            )
        )

    def send(self, updates: list[HistoryUpdate]) -> None:
        for update in updates:
            self.log.append(self.log.topics.history_updates, 0, None, update.encode(), ())

    def label(self, *labels: Labels) -> None:
        for one in labels:
            self.log.append(self.log.topics.labels, 0, str(one.user_id).encode(), encode_message(one), ())


def labels_of(number: int, *, outcome: Any = "not_taken", items: int = 5, user: int | None = None) -> Labels:
    """Of one answer, at the end of the streams that these tests record."""
    rng = np.random.default_rng(number)
    is_taken = outcome == "taken"
    return Labels(
        request_id=f"r{number}",
        user_id=number % 30 if user is None else user,
        shown_at_ms=1_700_000_150_000,
        snapshot_version=1,
        outcome=outcome,
        late=False,
        items=rng.permutation(40)[:items].tolist(),
        places=list(range(items)),
        scores=[0.5] * items,
        actions=[1] * items if is_taken else [],
        event_times_ms=[1_700_000_160_000] * items if is_taken else [],
        from_ms=2**52,
    )


def learned(daemon: TrainerDaemon) -> int:
    status: Any = daemon.status()["ranking"]
    return int(status["learned"])


@pytest.fixture
async def site(store: FeatureStore, tmp_path: Path) -> Site:
    log = MemoryLog(WallClock(), log_id="main")
    await log.create_topics()
    return Site(log, store, tmp_path)


async def test_labels_are_learned_once_over_stops_crashes_and_repetitions(site: Site) -> None:
    site.send(record_stream(site.store, walks(200)).updates)
    site.label(*(labels_of(number) for number in range(8)))
    first = site.daemon()
    async with running(first):
        await until(lambda: learned(first) == 40)
    site.label(*(labels_of(number) for number in range(4, 16)))
    # This one is killed: what it learned is in no checkpoint.
    killed = site.daemon(checkpoint_interval_s=3_600)
    kept = {path.name for path in (site.root / "checkpoints").iterdir()}
    async with running(killed):
        await until(lambda: learned(killed) == 80)
    for path in (site.root / "checkpoints").iterdir():
        if path.name not in kept:
            shutil.rmtree(path)
    last = site.daemon()
    assert learned(last) == 40
    async with running(last):
        await until(lambda: learned(last) == 80)
    status: Any = last.status()["ranking"]
    assert (status["repeated"], status["quarantined"], status["unlisted"]) == (20, 0, 0)
    assert status["labels"] == {"pending": 0, "unreadable": 0, "forgotten": 0, "lost": 0}
    assert last.status()["fingerprint"] == str(site.store.totals().fingerprint)


async def test_what_the_head_has_learned_is_published_also_while_nobody_does_anything(site: Site) -> None:
    site.send(record_stream(site.store, walks(200)).updates)
    daemon = site.daemon(anchor_every=5)
    root = site.root / "snapshots"
    async with running(daemon):
        await until(lambda: daemon.status()["interactions"] == 200)
        for number in range(4):
            site.label(labels_of(number, outcome="taken" if number % 2 else "not_taken"))
            await until(lambda wanted=5 * (number + 1): learned(daemon) == wanted)  # type: ignore[misc]
            await until(lambda wanted=5 * (number + 1): _published_labels(root) == wanted)  # type: ignore[misc]
    newest = list_versions(root, "default")[-1]
    assert {read_manifest(root, "default", v).kind for v in list_versions(root, "default")} == {"anchor", "delta"}
    served = Recommender(WITH_HEAD)
    for version in chain(root, "default", have=None, want=newest):
        apply_snapshot(served, load_snapshot(root, "default", version))
    own = daemon._learner.model
    for name, tensor in own.dense_state().items():
        assert torch.equal(served.dense_state()[name], tensor), name
    assert torch.equal(served.items.weight[: own.items.num_items], own.items.weight[: own.items.num_items])
    assert "ranking.click.lifetime.count" in read_manifest(root, "default", newest).metrics


def _published_labels(root: Path) -> int:
    versions = list_versions(root, "default")
    return read_manifest(root, "default", versions[-1]).lineage.num_labels if versions else 0


async def test_labels_wait_for_the_interactions_that_were_announced_before_them(site: Site) -> None:
    updates = record_stream(site.store, walks(200)).updates
    site.send(updates)
    site.label(labels_of(1))
    daemon = site.daemon()
    seen: list[tuple[object, int]] = []
    learn_labels = daemon._learner.learn_labels

    def noted(batch: Any) -> None:
        seen.append((daemon._learner.ledger.num_interactions, len(batch.items)))
        learn_labels(batch)

    daemon._learner.learn_labels = noted  # type: ignore[method-assign]
    async with running(daemon):
        await until(lambda: learned(daemon) == 5)
    assert seen == [(200, 5)]


async def test_labels_of_a_forgotten_user_are_not_learned_from(site: Site) -> None:
    updates = record_stream(site.store, walks(200, num_users=5)).updates
    site.send(updates)
    site.label(labels_of(1, user=3), labels_of(2, user=4))
    with site.store.transaction() as transaction:
        transaction.forget_users(np.array([3], np.int64))
    site.send([HistoryUpdate.forgetting("main", 0, (3,))])
    daemon = site.daemon()
    async with running(daemon):
        await until(lambda: learned(daemon) == 5)
    status: Any = daemon.status()["ranking"]
    assert status["labels"]["forgotten"] == 5


async def test_labels_deleted_unread_are_counted_and_do_not_stop_the_trainer(site: Site) -> None:
    site.send(record_stream(site.store, walks(100)).updates)
    site.label(labels_of(1), labels_of(2))
    first = site.daemon()
    async with running(first):
        await until(lambda: learned(first) == 10)
    site.label(*(labels_of(number) for number in range(3, 8)))
    site.log.delete_before((site.log.topics.labels, 0), 5)
    daemon = site.daemon()
    async with running(daemon):
        await until(lambda: learned(daemon) == 20)
        assert daemon.ready()[0]
    status: Any = daemon.status()["ranking"]
    assert status["labels"]["lost"] == 3


async def test_a_head_that_learns_from_interactions_reads_no_labels(site: Site) -> None:
    site.send(record_stream(site.store, walks(100)).updates)
    site.label(labels_of(1))
    settings = RankingSettings(tasks=("like", "value>=3"), learn_from="interactions", max_candidates=4)
    daemon = site.daemon(settings)
    async with running(daemon):
        await until(lambda: daemon.status()["interactions"] == 100)
    status: Any = daemon.status()["ranking"]
    assert status["labels"] is None
    assert status["learned"] + status["unlisted"] == 100
