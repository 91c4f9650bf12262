"""Workers on an object store: snapshots are fetched once, kept within bounds, and the trainer hears who runs what."""

from __future__ import annotations

import dataclasses
import uuid
from pathlib import Path
from typing import Any

import pytest

from model.pinning import pin_snapshot, roll_back, unpin_snapshot
from model.retention import ReplicaLease, SnapshotRetention, read_leases
from model.storage import SnapshotStorage, open_storage
from tests.model.storages import truncate
from tests.serving.building import NAME, SERVING, Publisher, Town, eventually

FAST = dataclasses.replace(SERVING, lease_interval_ms=20)


@pytest.fixture
def remote(town: Town) -> SnapshotStorage:
    """The town's snapshots in an object store: an anchor."""
    storage = open_storage(f"memory://{uuid.uuid4().hex}")
    town.root = storage  # type: ignore[assignment]
    town.publisher = Publisher(storage)  # type: ignore[arg-type]
    town.publisher.learn([*range(10)])
    town.publisher.publish("anchor")
    return storage


def publish(town: Town, kind: Any = "delta") -> None:
    town.publisher.learn([1, 2, 3])
    town.publisher.publish(kind)


async def test_a_worker_follows_an_object_store_and_a_restarted_one_reads_its_copies(
    town: Town, remote: SnapshotStorage, tmp_path: Path
) -> None:
    cache = tmp_path / "cache"
    async with town.worker(version=1, snapshot_cache=cache) as served:
        publish(town)
        await served.until_version(2)
        answer = await served.recommend(7, k=5)
    copies = {path.name: path.stat().st_mtime_ns for path in cache.iterdir()}
    assert len(copies) == 4
    for name in remote.find(NAME):
        if name.endswith(".safetensors"):
            remote.remove_file(name)
    async with town.worker(version=2, snapshot_cache=cache) as again:
        found = await again.recommend(7, k=5)
    assert found["items"] == answer["items"]


async def test_copies_are_bounded(town: Town, remote: SnapshotStorage, tmp_path: Path) -> None:
    config = dataclasses.replace(FAST, snapshot_cache_bytes=30_000)
    async with town.worker(config, version=1, snapshot_cache=tmp_path / "cache") as served:
        for version in range(2, 8):
            publish(town)
            await served.until_version(version)
        assert 0 < sum(path.stat().st_size for path in (tmp_path / "cache").iterdir()) <= 30_000


async def test_a_damaged_object_is_refused_and_the_next_anchor_is_served(
    town: Town, remote: SnapshotStorage, tmp_path: Path
) -> None:
    async with town.worker(version=1, snapshot_cache=tmp_path / "cache") as served:
        town.publisher.learn([1])
        town.publisher.publish()
        # The worker may have been faster; then it is served, whole.
        truncate(remote, f"{NAME}/v00000002/rows.safetensors")
        publish(town)
        publish(town, "anchor")
        await served.until_version(4)
        assert served.worker.status()["errors"] == 0


async def test_workers_go_back_with_the_pointer_and_follow_what_is_published_next(
    town: Town, remote: SnapshotStorage
) -> None:
    publish(town)
    publish(town)
    async with town.worker(version=3) as served, town.worker(version=3, replica="other") as other:
        answers = [(await served.recommend(7, k=5))["items"]]
        roll_back(remote, NAME, 2)
        for one in (served, other):
            await one.until_version(2)
            assert (await one.recommend(7, k=5))["snapshot_version"] == 2
        publish(town)
        for one in (served, other):
            await one.until_version(4)
        async with town.worker(version=4, replica="fresh") as fresh:
            answers = [(await one.recommend(7, k=5))["items"] for one in (served, other, fresh)]
        assert [item["item_id"] for item in answers[0]] == [item["item_id"] for item in answers[2]]
        assert served.worker.status()["errors"] == 0


async def test_pinned_workers_stay_while_the_trainer_publishes_on(town: Town, remote: SnapshotStorage) -> None:
    publish(town)
    async with town.worker(version=2) as served:
        pin_snapshot(remote, NAME, 1)
        await served.until_version(1)
        for _ in range(3):
            publish(town)
        town.announce_snapshot(town.publisher.publish("anchor"))
        async with town.worker(version=1, replica="late"):
            assert served.worker.snapshot_version == 1
        unpin_snapshot(remote, NAME)
        await served.until_version(6)


async def test_what_a_worker_runs_is_not_deleted_until_it_stops(town: Town, remote: SnapshotStorage) -> None:
    publish(town)
    retention = SnapshotRetention(remote, NAME, anchors_kept=1, replica_timeout_ms=60_000)
    slow = dataclasses.replace(FAST, snapshot_poll_ms=60_000, snapshot_retry_max_ms=60_000)
    async with town.worker(slow, version=2, replica="host:8080") as served:
        at_ms = town.clock.now_ms()
        says = ReplicaLease(replica="host:8080", version=2, loading=None, at_ms=at_ms)
        await eventually(lambda: read_leases(remote, NAME) == [says])
        publish(town, "anchor")
        assert retention.prune(at_ms) == []
        assert served.worker.snapshot_version == 2
    assert read_leases(remote, NAME) == []
    assert retention.prune(at_ms) == [1, 2]


async def test_a_worker_that_cannot_say_what_it_runs_serves_and_says_that(
    town: Town, remote: SnapshotStorage, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(name: str, content: bytes) -> None:
        raise PermissionError(f"{name} is not yours to write")

    monkeypatch.setattr(remote, "publish", refuse)
    async with town.worker(FAST, version=1) as served:
        problem = "not yours to write"
        await eventually(lambda: problem in str(served.worker.status()["snapshot"]))
        assert (await served.client.get("/readyz")).status_code == 200
    warnings = [record.message for record in caplog.records if "which version this worker runs" in record.message]
    assert len(warnings) == 1
