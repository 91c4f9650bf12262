"""SIGKILL of trainer and worker at each fail point, with a real broker, a real database and real processes.

Ingest has a suite of its own, tests/faults. Here the check is arithmetic: each event was learned from once, and the
trainer that was killed ends with the same bits as one that was not.
"""

from __future__ import annotations

import asyncio
import json
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import polars as pl
import pytest
import torch

from feature_store.records import PublishedSnapshot
from model.config import ModelConfig
from model.pinning import verify_chain
from model.snapshot import list_versions, read_manifest, read_pointer
from online_trainer.checkpoint import Checkpoint, read_newest_checkpoint
from online_trainer.metrics_file import parts
from online_trainer.quarantine import list_set_aside, read_interactions
from ops.local_broker import LocalBroker
from ops.snapshot_report import verify_snapshots
from stream.events import Event, encode_event
from stream.freshness import AgeHistogram
from stream.kafka import KafkaLog
from stream.log import acknowledged
from tests.faults.installation import Daemon, Installation
from tests.feature_store.databases import migrated_database

pytestmark = [pytest.mark.kill, pytest.mark.timeout(600)]

BASE_MS = 1_700_000_000_000
MODEL = {"EMBEDDING_DIM": "16", "NUM_HEADS": "1", "ATTENTION_DIM": "8", "HIDDEN_DIM": "8", "MAX_LEN": "16"}


class LearningInstallation(Installation):
    """An installation whose stream is learned from by the smallest network that still learns something."""

    def __init__(self, root: Path, broker: LocalBroker, url: str) -> None:
        super().__init__(
            root,
            broker.bootstrap_servers,
            url,
            settings={
                "HEADRACE_HOT__MAX_LEN": "32",
                # Batches close by count alone, so that what is learned does not depend on when.
                "HEADRACE_TRAINER__BATCH_INTERACTIONS": "50",
                "HEADRACE_TRAINER__BATCH_WAIT_MS": "3600000",
                "HEADRACE_TRAINER__CHECKPOINT_INTERVAL_S": "0.3",
                "HEADRACE_TRAINER__PUBLISH_INTERVAL_MS": "100",
                **{f"HEADRACE_MODEL__{name}": value for name, value in MODEL.items()},
            },
        )
        self.sent: dict[str, Event] = {}

    def send(self, num_events: int, *, num_items: int = 60) -> None:
        """Send fresh events of 40 users on so many items, and every tenth of them twice."""
        rng = np.random.default_rng(len(self.sent))
        events = []
        for _ in range(num_events):
            number = len(self.sent)
            event = Event(
                event_id=f"e{number}",
                user_id=int(rng.integers(40)),
                item_id=int(rng.integers(num_items)),
                action="rating",
                event_time=BASE_MS + 1_000 * number + int(rng.integers(-5_000, 5_000)),
            )
            self.sent[event.event_id] = event
            events += [event, event] if number % 10 == 0 else [event]

        async def produce() -> None:
            log = KafkaLog(self.kafka)
            await log.create_topics()
            writer = log.writer()
            await writer.start()
            sends = [await writer.send(log.topics.interactions, encode_event(event)) for event in events]
            await acknowledged(sends)
            await writer.stop()

        asyncio.run(produce())

    def checkpoint(self, data_dir: Path) -> Checkpoint:
        sizes: dict[str, Any] = {name.lower(): int(value) for name, value in MODEL.items()}
        config = ModelConfig(**sizes)
        found = read_newest_checkpoint(data_dir / "checkpoints" / "default", config_hash=config.config_hash())
        assert found is not None
        return found


@pytest.fixture
def installation(tmp_path: Path, fresh_broker: LocalBroker) -> Iterator[LearningInstallation]:
    with migrated_database("sqlite", tmp_path) as url, LearningInstallation(tmp_path, fresh_broker, url) as made:
        yield made


def ingest_everything(installation: LearningInstallation) -> None:
    process = installation.start("ingest")
    installation.wait(
        lambda: installation.store.totals().num_interactions == len(installation.sent), "ingesting everything"
    )
    process.stop()


def assert_same_bits(killed: Checkpoint, unbroken: Checkpoint) -> None:
    # What waits for the next snapshot depends on when snapshots were taken, not on what was learned.
    for checkpoint in (killed, unbroken):
        del checkpoint.state["unpublished"]
    assert killed.state == unbroken.state
    assert killed.tensors.keys() == unbroken.tensors.keys()
    for name, tensor in killed.tensors.items():
        # Rows that wait for the next snapshot: the same.
        if name != "items.dirty":
            assert torch.equal(tensor, unbroken.tensors[name]), name


def test_a_trainer_killed_anywhere_ends_with_the_same_bits_as_one_that_was_not(
    installation: LearningInstallation,
) -> None:
    installation.send(1_500)
    ingest_everything(installation)
    fail_points = (
        "trainer.trained:7",
        "trainer.checkpoint_written:1",
        "trainer.snapshot_written:2",
        "trainer.trained:5",
    )
    for fail_point in fail_points:
        installation.start("train", fail_point=fail_point).expect_kill(fail_point)
    killed = train_everything(installation, installation.root)
    unbroken = train_everything(installation, installation.root / "unbroken")
    totals = installation.store.totals()
    ledger = killed.state["ledger"]
    assert (ledger["num_interactions"], ledger["fingerprint"]) == (1_500, str(totals.fingerprint))
    assert ledger["num_supervised"] + ledger["num_first"] + ledger["num_out_of_reach"] == 1_500
    assert_same_bits(killed, unbroken)
    learned = [
        read_manifest(installation.root / "snapshots", "default", version).lineage.num_interactions
        for version in list_versions(installation.root / "snapshots", "default")
    ]
    assert learned == sorted(learned)
    assert learned[-1] == 1_500
    verified = headrace(installation, "verify")
    assert verified.returncode == 0, verified.stderr
    assert "each of the 1,500 stored interactions exactly once" in verified.stdout


KEEPING_STAGES = (
    "trainer.set_aside_rows:2",
    "trainer.set_aside_written:3",
    "trainer.metrics_part:1",
    "trainer.metrics_written:2",
    "trainer.checkpoint_tensors:1",
    "trainer.checkpoint_tensors:2",
    "trainer.checkpoint_synced:2",
    "trainer.checkpoint_written:2",
    "trainer.checkpoints_pruned:2",
)
"""What is written besides snapshots, as many times as it takes to have something to lose."""


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_trainer_killed_at_each_stage_of_what_it_keeps_ends_with_the_same_bits_and_files(
    installation: LearningInstallation,
) -> None:
    # Small steps, of which some are set aside: in the end hardly any item has been seen before.
    installation.environment |= {
        "HEADRACE_TRAINER__BATCH_INTERACTIONS": "10",
        "HEADRACE_TRAINER__SPIKE_DEVIATIONS": "1",
        "HEADRACE_TRAINER__MAX_SPIKES_IN_A_ROW": "1000",
        "HEADRACE_TRAINER__METRICS_EVERY_STEPS": "3",
    }
    installation.send(900)
    installation.send(600, num_items=1_000_000)
    ingest_everything(installation)
    for fail_point in KEEPING_STAGES:
        installation.start("train", fail_point=fail_point).expect_kill(fail_point)
    killed = train_everything(installation, installation.root)
    unbroken = train_everything(installation, installation.root / "unbroken")
    assert_same_bits(killed, unbroken)
    assert killed.state["ledger"]["num_quarantined"] > 0
    assert headrace(installation, "verify").returncode == 0
    of_killed, of_unbroken = (
        [(one, read_interactions(root, one)) for one in list_set_aside(root)]
        for root in (base / "quarantine" / "default" for base in (installation.root, installation.root / "unbroken"))
    )
    assert [one for one, _ in of_killed] == [one for one, _ in of_unbroken]
    assert all(rows.equals(others) for (_, rows), (_, others) in zip(of_killed, of_unbroken, strict=True))
    rows, others = (
        pl.concat([pl.read_parquet(part) for part in parts(base / "metrics" / "default" / "r0001")])
        for base in (installation.root, installation.root / "unbroken")
    )
    assert rows.equals(others)


@pytest.mark.parametrize(
    "damage",
    ["flipped", pytest.param("truncated", marks=pytest.mark.slow), pytest.param("missing", marks=pytest.mark.slow)],
)
def test_a_trainer_whose_newest_checkpoint_is_damaged_repeats_more_and_loses_nothing(
    installation: LearningInstallation, damage: str
) -> None:
    installation.send(1_500)
    ingest_everything(installation)
    installation.start("train", fail_point="trainer.checkpoint_written:2").expect_kill("trainer.checkpoint_written")
    newest = max((installation.root / "checkpoints" / "default").glob("c*"))
    tensors = newest / "tensors.safetensors"
    content = bytearray(tensors.read_bytes())
    content[len(content) // 2] ^= 1
    match damage:
        case "truncated":
            tensors.write_bytes(content[: len(content) // 2])
        case "flipped":
            tensors.write_bytes(content)
        case "missing":
            tensors.unlink()
    killed = train_everything(installation, installation.root)
    assert f"{newest.name}" in installation.daemons[-1].said()
    assert "trying the checkpoint before it" in installation.daemons[-1].said()
    assert killed.state["ledger"]["num_interactions"] == 1_500
    assert headrace(installation, "verify").returncode == 0


PUBLISH_STAGES = (
    "trainer.snapshot_encoded",
    "trainer.snapshot_files",
    "trainer.snapshot_ready",
    "trainer.snapshot_written",
    "trainer.snapshot_recorded",
    "trainer.snapshots_pruned",
    "trainer.publications_pruned",
    "trainer.snapshot_announced",
)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_trainer_killed_at_each_stage_of_publishing_leaves_whole_snapshots_and_a_whole_account(
    installation: LearningInstallation,
) -> None:
    # Enough for every life to publish twice, however fast it learns.
    installation.send(6_000)
    ingest_everything(installation)
    snapshots = installation.root / "snapshots"
    # One of long ago, whose snapshot is gone.
    forgotten = PublishedSnapshot(
        model="default", version=0, kind="anchor", parent=None, created_at_ms=1, published_at_ms=1, watermark_ms=None
    )
    installation.store.record_published(forgotten)
    installation.store.record_first_served("default", 0, "gone", 2)
    for fail_point in PUBLISH_STAGES:
        # The first snapshot of a life is an anchor; once more for a delta, where there is that stage.
        is_of_anchors = fail_point.endswith("_pruned")
        count = 1 if is_of_anchors or fail_point == "trainer.snapshot_encoded" else 2
        trainer = installation.start(
            "train", fail_point=f"{fail_point}:{count}", HEADRACE_TRAINER__PUBLISH_INTERVAL_MS="10"
        )
        trainer.expect_kill(fail_point)
        pointer = read_pointer(snapshots, "default")
        if pointer is not None:
            verify_chain(snapshots, "default", pointer.version)
        checked = verify_snapshots(snapshots, "default", None)
        assert checked.is_whole, checked.findings
    train_everything(installation, installation.root)
    published = installation.store.published_snapshots("default")
    assert published[0].version > 0
    assert installation.store.first_served("default") == []
    assert installation.store.publication_floor("default").version == 1
    assert [one.version for one in published] == [one.version for one in sorted(published, key=lambda one: one.version)]
    # Each event is in exactly one snapshot's account of how old events were, whatever was cut off where.
    assert sum(AgeHistogram.from_dict(one.append_age).count for one in published) == 6_000
    assert headrace(installation, "verify").returncode == 0
    worker = installation.start_ready("serve")
    versions = list_versions(snapshots, "default")
    installation.wait(lambda: served_version(worker) == versions[-1], "serving the newest version")
    older = versions[len(versions) // 2]
    rolled_back = headrace(installation, "snapshots", "rollback", str(older))
    assert (rolled_back.returncode, rolled_back.stderr) == (0, "")
    installation.wait(lambda: served_version(worker) == older, "going back")
    assert f"run by {socket.gethostname()}" in headrace(installation, "snapshots", "ls").stdout
    worker.stop()
    assert not list((snapshots / "default" / "replicas").iterdir())


def served_version(worker: Daemon) -> int | None:
    version: int | None = worker.status().get("snapshot", {}).get("version")
    return version


def headrace(installation: LearningInstallation, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "ops", *arguments],
        env=installation.environment,
        capture_output=True,
        text=True,
        check=False,
    )


def train_everything(installation: LearningInstallation, data_dir: Path) -> Checkpoint:
    process = installation.start("train", HEADRACE_HEADRACE__DATA_DIR=str(data_dir))
    installation.wait(lambda: process.status().get("interactions") == len(installation.sent), "learning everything")
    process.stop()
    return installation.checkpoint(data_dir)


def test_a_worker_killed_at_a_swap_comes_back_with_the_newest_version(installation: LearningInstallation) -> None:
    installation.send(600)
    ingest_everything(installation)
    trainer = installation.start("train")
    installation.start("serve", fail_point="serving.swapped:1").expect_kill("serving.swapped:1")
    worker = installation.start("serve")
    installation.wait(lambda: trainer.status().get("interactions") == 600, "learning everything")
    trainer.stop()
    newest = list_versions(installation.root / "snapshots", "default")[-1]
    installation.wait(
        lambda: worker.status().get("snapshot", {}).get("version") == newest, "serving the newest version"
    )
    assert httpx.get(f"{worker.address}/readyz").status_code == 200
    answer = httpx.post(f"{worker.address}/v1/recommend", json={"user_id": 1, "k": 5}).json()
    assert answer["snapshot_version"] == newest
    assert answer["fallback"] is False
    assert len(answer["items"]) == 5
    seen = installation.store.read(np.array([1]), max_len=1_000).item_id.tolist()
    assert not {item["item_id"] for item in answer["items"]} & set(seen)
    assert json.dumps(answer)
    worker.stop()
