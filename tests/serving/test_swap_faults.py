"""What can happen to a snapshot on its way to a worker: nothing but whole versions is ever served."""

from __future__ import annotations

import asyncio
import errno
import json
import logging
import os
import random
import re
import shutil
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import InMemoryMetricReader, NumberDataPoint

from model.file_cache import FileCache
from model.manifest import FileEntry
from model.snapshot import load_snapshot, move_pointer
from model.storage import LocalStorage
from serving.instruments import ServingInstruments
from serving.swap import SnapshotReader
from tests.serving.building import MODEL, NAME, SERVING, Publisher, Town, eventually, redeclare, scores_of

FILES = ("manifest.json", "dense.safetensors", "rows.safetensors", "READY")


def reader(publisher: Publisher) -> SnapshotReader:
    return SnapshotReader(publisher.root, NAME, MODEL, ServingInstruments())


@pytest.fixture
def published(town_publisher: Publisher) -> Publisher:
    """An anchor and a delta."""
    town_publisher.learn(range(20))
    town_publisher.publish("anchor")
    town_publisher.learn([1, 2, 30])
    town_publisher.publish()
    return town_publisher


@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize("name", FILES)
def test_no_flipped_bit_gets_through(published: Publisher, version: int, name: str) -> None:
    path, choose = published.folder(version) / name, random.Random(f"{version} {name}")
    whole = path.read_bytes()
    for _ in range(40):
        place, bit = choose.randrange(len(whole)), choose.randrange(8)
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 1 << bit]) + whole[place + 1 :])
        prepared = reader(published).prepare(have=None, want=2)
        assert prepared is None or prepared.newest.version < version, (place, bit)
    path.write_bytes(whole)
    prepared = reader(published).prepare(have=None, want=2)
    assert prepared is not None
    assert prepared.newest.version == 2


@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize("name", FILES)
def test_no_torn_or_lengthened_file_gets_through(published: Publisher, version: int, name: str) -> None:
    path, choose = published.folder(version) / name, random.Random(f"{version} {name}")
    whole = path.read_bytes()
    for content in [b"", whole[:-1], whole + b"\0", *(whole[: choose.randrange(len(whole))] for _ in range(20))]:
        path.write_bytes(content)
        prepared = reader(published).prepare(have=None, want=2)
        assert prepared is None or prepared.newest.version < version, len(content)


@pytest.mark.parametrize("column", ["weight", "bias", "trend", "log_scale"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
async def test_weights_that_are_not_finite_are_never_served(town: Town, column: str, value: float) -> None:
    async with town.worker(version=1) as served:
        expected = scores_of(await served.recommend(7))
        recommender = town.publisher.recommender
        with torch.no_grad():
            if column == "log_scale":
                recommender.log_scale.fill_(value)
            else:
                getattr(recommender.items, column)[3] = value
        recommender.items.dirty[3] = True
        town.publisher.publish()
        await eventually(lambda: served.worker.status()["snapshot"]["refused"] == 1)  # type: ignore[index]
        assert "not finite" in str(served.worker.status()["snapshot"])
        answer = await served.recommend(7)
        assert answer["snapshot_version"] == 1
        assert scores_of(answer) == pytest.approx(expected, rel=1e-5)


def exchange(publisher: Publisher) -> None:
    """The rows of one version in the folder of the other."""
    one, other = (publisher.folder(version) / "rows.safetensors" for version in (2, 3))
    aside = one.with_name("aside")
    one.rename(aside)
    other.rename(one)
    aside.rename(other)


def exchange_folders(publisher: Publisher) -> None:
    one, other = publisher.folder(2), publisher.folder(3)
    aside = one.with_name("aside")
    one.rename(aside)
    other.rename(one)
    aside.rename(other)


def state_another_hash(publisher: Publisher) -> None:
    """The manifest is whole, and names bytes that are not there."""
    path = publisher.folder(3) / "manifest.json"
    manifest = json.loads(path.read_text())
    manifest["files"]["rows.safetensors"]["sha256"] = "0" * 64
    path.write_text(json.dumps(manifest))
    redeclare(publisher.folder(3))


def state_another_parent_hash(publisher: Publisher) -> None:
    """The number of the parent is right, the weights it was made from are not: those of version 1."""
    lie(publisher.folder(3), parent_hash=publisher.manifests[0].content_hash())


def pass_over_the_parent(publisher: Publisher) -> None:
    """A delta made on version 2 says that it was made on version 1, and leaves the hash as it was."""
    lie(publisher.folder(3), parent=1)


def lie(folder: Path, **fields: Any) -> None:
    """A whole manifest that says something else."""
    path = folder / "manifest.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))
    redeclare(folder)


def state_a_parent(parent: int) -> Callable[[Publisher], None]:
    def change(publisher: Publisher) -> None:
        path = publisher.folder(3) / "manifest.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), "parent": parent}))
        redeclare(publisher.folder(3))

    return change


def lose_the_parent(publisher: Publisher) -> None:
    shutil.rmtree(publisher.folder(2))


@pytest.mark.parametrize(
    ("happen", "words"),
    [
        (exchange, "sha256|size"),
        (exchange_folders, "version"),
        (state_another_hash, "another sha256"),
        (state_another_parent_hash, "version 3 of .* builds on another version 2 than the one that is there"),
        (pass_over_the_parent, "version 3 of .* builds on another version 1 than the one that is there"),
        (state_a_parent(3), "parent"),
        (state_a_parent(4), "parent"),
        (lose_the_parent, "needs version 2, which is gone"),
    ],
)
async def test_what_is_out_of_order_is_refused_with_one_line_and_answers_stay(
    town: Town, happen: Callable[[Publisher], None], words: str, caplog: pytest.LogCaptureFixture
) -> None:
    async with town.worker(version=1) as served:
        before = scores_of(await served.recommend(7))
        # Published elsewhere, so that the worker sees the outcome alone.
        town.publisher.root = town.root.with_name("elsewhere")
        shutil.copytree(town.root, town.publisher.root)
        for _ in range(2):
            town.publisher.learn([1, 2, 30])
            town.publisher.publish()
        happen(town.publisher)
        with caplog.at_level(logging.ERROR):
            for name in ("v00000002", "v00000003", "current.json"):
                if (town.publisher.root / NAME / name).exists():
                    (town.publisher.root / NAME / name).replace(town.root / NAME / name)
            await eventually(lambda: served.worker.status()["snapshot"]["refused"])  # type: ignore[index]
            await asyncio.sleep(0.3)
        assert served.worker.snapshot_version in {1, 2}
        if served.worker.snapshot_version == 1:
            assert scores_of(await served.recommend(7)) == pytest.approx(before, rel=1e-5)
        lines = [one.getMessage() for one in caplog.records]
        # One for each version that cannot be used, however often it was tried.
        assert len(lines) == served.worker.status()["snapshot"]["refused"]  # type: ignore[index]
        assert all("is refused, what is loaded stays" in line for line in lines)
        assert any(re.search(words, line) for line in lines), caplog.text
        assert served.worker.status()["errors"] == 0


@pytest.mark.parametrize("happen", [state_another_parent_hash, pass_over_the_parent])
async def test_after_a_delta_that_lies_about_its_parent_the_next_anchor_is_taken(
    town: Town, happen: Callable[[Publisher], None]
) -> None:
    async with town.worker(version=1) as served:
        away, town.publisher.root = town.root, town.root.with_name("elsewhere")
        shutil.copytree(away, town.publisher.root)
        for kind in ("delta", "delta", "delta", "anchor", "delta"):
            town.publisher.learn([1, 2, 30])
            town.publisher.publish(kind)
        happen(town.publisher)
        for version in (2, 3, 4):
            (town.publisher.folder(version)).replace(away / NAME / f"v{version:08d}")
        move_pointer(away, town.publisher.manifests[3])
        await served.until_version(2)
        await eventually(lambda: served.worker.status()["snapshot"]["refused"])  # type: ignore[index]
        # Neither version 3 nor what was published on it; after the anchor, deltas again.
        assert served.worker.snapshot_version == 2
        for version in (5, 6):
            (town.publisher.folder(version)).replace(away / NAME / f"v{version:08d}")
            move_pointer(away, town.publisher.manifests[version - 1])
            await served.until_version(version)
        town.publisher.root = away
        assert scores_of(await served.recommend(7)) == await fresh_scores(town, version=6)


async def test_a_delta_on_other_weights_of_the_same_number_makes_the_worker_start_over_from_the_anchor(
    town: Town, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Somebody published version 2 anew, with other weights, and goes on from that one."""
    metrics = InMemoryMetricReader()
    monkeypatch.setattr("opentelemetry.metrics.get_meter", MeterProvider([metrics]).get_meter)
    async with town.worker(version=1) as served:
        other = town.publisher.fork(town.root.with_name("elsewhere"))
        town.publisher.learn([1, 2, 30])
        town.publisher.publish()
        await served.until_version(2)
        other.learn([1, 2, 31])
        other.publish()
        other.learn([4, 32])
        other.publish()
        shutil.rmtree(town.publisher.folder(2))
        with caplog.at_level(logging.WARNING):
            for version in (2, 3):
                other.folder(version).replace(town.publisher.folder(version))
            move_pointer(town.root, other.manifests[-1])
            await served.until_version(3)
        assert "version 3 builds on another version 2 than the one that is loaded: starting over from anchor 1" in (
            caplog.text
        )
        assert count_of(metrics, "headrace.serving.snapshots.reanchored") == 1
        assert served.worker.status()["snapshot"]["reanchored"] == 1  # type: ignore[index]
        assert scores_of(await served.recommend(7)) == await fresh_scores(town, version=3)


async def test_deltas_published_before_there_was_a_hash_are_told_by_their_number(town: Town) -> None:
    async with town.worker(version=1) as served:
        town.publisher.learn([1, 2, 30])
        town.publisher.publish(parent_hash=None)
        await served.until_version(2)
        town.publisher.learn([1, 3])
        town.publisher.publish()
        await served.until_version(3)


def count_of(reader: InMemoryMetricReader, name: str) -> float:
    data = reader.get_metrics_data()
    assert data is not None
    found = [one for part in data.resource_metrics[0].scope_metrics for one in part.metrics if one.name == name]
    return sum(point.value for one in found for point in one.data.data_points if isinstance(point, NumberDataPoint))


async def fresh_scores(town: Town, *, version: int) -> dict[int | str, float | None]:
    """What a worker answers that has never served anything else."""
    async with town.worker(version=version, replica="fresh") as fresh:
        return scores_of(await fresh.recommend(7))


async def test_deltas_that_arrive_in_another_order_are_served_once_the_line_is_whole(town: Town) -> None:
    town.publisher.learn([1, 2])
    town.publisher.publish()
    late = town.publisher.folder(2).rename(town.root / "late")
    town.publisher.learn([1, 3])
    town.publisher.publish()
    async with town.worker(version=1) as served:
        await eventually(lambda: served.worker.status()["snapshot"]["refused"])  # type: ignore[index]
        assert served.worker.snapshot_version == 1
        late.rename(town.publisher.folder(2))
        await served.until_version(3)


async def test_announcements_in_another_order_move_nobody_back(town: Town) -> None:
    async with town.worker(version=1) as served:
        for version in (2, 3):
            town.publisher.learn([1, 2])
            town.publisher.publish()
            await served.until_version(version)
        for manifest in reversed(town.publisher.manifests):
            town.announce_snapshot(manifest)
        await asyncio.sleep(0.3)
        assert served.worker.snapshot_version == 3
        assert served.worker.status()["snapshot"]["swaps"] == 3  # type: ignore[index]


class SlowDisk(LocalStorage):
    """Takes its time for every file."""

    delay_s = 0.0

    def read(self, name: str, *, size_max: int) -> bytes:
        time.sleep(self.delay_s)
        return super().read(name, size_max=size_max)


async def test_a_slow_disk_delays_the_swap_and_no_answer(town: Town) -> None:
    disk = SlowDisk(town.root)
    async with town.worker(replace(SERVING, request_timeout_ms=2_000), version=1, snapshot_root=disk) as served:
        disk.delay_s = 0.3
        town.publisher.learn([1, 2, 5])
        town.publisher.publish("anchor")
        versions, slowest_s, started_s = [], 0.0, time.monotonic()
        while served.worker.snapshot_version == 1:
            asked_s = time.monotonic()
            versions.append((await served.recommend(7))["snapshot_version"])
            slowest_s = max(slowest_s, time.monotonic() - asked_s)
            assert time.monotonic() - started_s < 30
        took_s = time.monotonic() - started_s
        disk.delay_s = 0.0
        assert set(versions) <= {1, 2}
        assert took_s > 1.0, "pointer, manifest and two files were slow"
        assert slowest_s < took_s / 2, "nobody waited for the disk"


async def test_a_disk_that_hangs_in_the_middle_of_a_snapshot_leaves_the_old_one_in_service(town: Town) -> None:
    released = threading.Event()

    class HangingDisk(LocalStorage):
        def read(self, name: str, *, size_max: int) -> bytes:
            if "v00000002/rows" in name:
                released.wait(20)
            return super().read(name, size_max=size_max)

    async with town.worker(version=1, snapshot_root=HangingDisk(town.root)) as served:
        town.publisher.learn([1, 2, 5])
        town.publisher.publish()
        for _ in range(20):
            assert (await served.recommend(7))["snapshot_version"] == 1
        assert (await served.client.get("/readyz")).status_code == 200
        released.set()
        await served.until_version(2)


def test_copies_that_a_full_disk_does_not_take_are_done_without(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    if not Path("/dev/full").exists():
        pytest.skip("this system has no /dev/full")
    cache, content = FileCache(tmp_path, bytes_max=1 << 20), b"weights"
    entry = FileEntry(size=len(content), sha256="5" * 64)
    for _ in range(3):
        # What is written there fails as on a full disk.
        (tmp_path / f".{entry.sha256}.{os.getpid()}.{threading.get_ident()}").symlink_to("/dev/full")
        cache.put(entry, content)
    assert os.strerror(errno.ENOSPC) in caplog.text
    assert len(caplog.records) == 1
    assert cache.get(entry) is None
    assert list(tmp_path.iterdir()) == []


async def test_a_worker_whose_lease_cannot_be_written_serves_on_and_says_so(
    town: Town, caplog: pytest.LogCaptureFixture
) -> None:
    class FullDisk(LocalStorage):
        def publish(self, name: str, content: bytes) -> None:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    config = replace(SERVING, lease_interval_ms=20)
    async with town.worker(config, version=1, snapshot_root=FullDisk(town.root)) as served:
        town.publisher.learn([1])
        town.publisher.publish()
        await served.until_version(2)
        snapshot: Any = served.worker.status()["snapshot"]
        assert os.strerror(errno.ENOSPC) in snapshot["lease_problem"]
        await asyncio.sleep(0.2)
    assert len([one for one in caplog.records if "which version this worker runs" in one.getMessage()]) == 1
    assert load_snapshot(town.root, NAME, 2).manifest.version == 2
