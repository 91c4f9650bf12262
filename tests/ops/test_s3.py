"""Snapshots on a server that speaks S3, over the network and through s3fs: run by `make test-s3`."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
import pytest
import torch

from model.errors import SnapshotHashError, SnapshotMissingError, SnapshotStorageError, SnapshotTruncatedError
from model.file_cache import FileCache
from model.pinning import pin_snapshot, roll_back, unpin_snapshot
from model.retention import ReplicaLease, SnapshotRetention, read_leases, write_lease
from model.snapshot import chain, list_versions, load_snapshot, read_pointer
from model.storage import ObjectStorage, SnapshotStorage, open_storage
from ops.ports import free_port
from serving.config import ServingConfig
from tests.model.storages import empty, flip_one_bit, remove, truncate
from tests.serving.building import NAME, SERVING, Publisher, Town, build_town, migrated_database

pytestmark = [pytest.mark.s3, pytest.mark.filterwarnings("ignore::DeprecationWarning:(botocore|aiobotocore|s3fs)")]


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    """The address of a server in a process of its own."""
    port = free_port()
    process = subprocess.Popen(
        [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)], stderr=subprocess.DEVNULL
    )
    try:
        deadline = time.monotonic() + 60
        while True:
            try:
                socket.create_connection(("127.0.0.1", port), timeout=1).close()
                break
            except OSError:
                assert process.poll() is None, "the server did not start"
                assert time.monotonic() < deadline, "the server did not start"
                time.sleep(0.1)
        yield f"http://127.0.0.1:{port}"
    finally:
        process.kill()
        process.wait()


@pytest.fixture
def storage(server: str, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> SnapshotStorage:
    """A fresh bucket, reached as an installation would: by the URL and what the environment says."""
    for name, value in {
        "AWS_ACCESS_KEY_ID": "someone",
        "AWS_SECRET_ACCESS_KEY": "something",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_ENDPOINT_URL_S3": server,
    }.items():
        monkeypatch.setenv(name, value)
    fsspec.get_filesystem_class("s3").clear_instance_cache()
    bucket = f"bucket-{os.getpid()}-{abs(hash(request.node.name)) % 10**8}"
    storage = open_storage(f"s3://{bucket}/installation/snapshots")
    assert isinstance(storage, ObjectStorage)
    storage._fs.mkdir(bucket)
    return storage


@pytest.fixture
def publisher(storage: SnapshotStorage) -> Publisher:
    """Anchor, delta, anchor, delta."""
    publisher = Publisher(storage)  # type: ignore[arg-type]
    for version in range(1, 5):
        publisher.learn([*range(10)])
        publisher.publish("anchor" if version % 2 else "delta")
    return publisher


def test_what_was_published_is_read_back_and_its_place_is_a_url(storage: SnapshotStorage, publisher: Publisher) -> None:
    assert list_versions(storage, NAME) == [1, 2, 3, 4]
    assert chain(storage, NAME, have=None, want=4) == [3, 4]
    loaded = load_snapshot(storage, NAME, 4)
    for name, tensor in publisher.recommender.dense_state().items():
        assert torch.equal(loaded.dense[name], tensor), name
    assert storage.place(NAME).endswith("/installation/snapshots/hstu")
    pointer = read_pointer(storage, NAME)
    assert pointer is not None
    assert pointer.version == 4


@pytest.mark.parametrize(
    ("harm", "error"),
    [
        (truncate, SnapshotTruncatedError),
        (empty, SnapshotTruncatedError),
        (flip_one_bit, SnapshotHashError),
        (remove, SnapshotMissingError),
    ],
)
def test_a_damaged_object_is_refused(storage: SnapshotStorage, publisher: Publisher, harm: Any, error: Any) -> None:
    harm(storage, f"{NAME}/v00000002/rows.safetensors")
    with pytest.raises(error):
        load_snapshot(storage, NAME, 2)


def test_objects_are_pruned_but_for_what_a_replica_or_a_pin_needs(
    storage: SnapshotStorage, publisher: Publisher
) -> None:
    retention = SnapshotRetention(storage, NAME, anchors_kept=1, replica_timeout_ms=1_000)
    write_lease(storage, NAME, ReplicaLease(replica="host:8080", version=1, loading=None, at_ms=5_000))
    assert retention.prune(5_500) == [2]
    assert retention.prune(9_000) == [1]
    assert read_leases(storage, NAME) == []
    pin_snapshot(storage, NAME, 3)
    for kind in ("delta", "anchor"):
        publisher.learn([1])
        publisher.publish(kind)
    assert retention.prune(9_000) == [4, 5]
    unpin_snapshot(storage, NAME)
    assert retention.prune(9_000) == [3]
    assert {name.split("/")[1] for name in storage.find(NAME)} == {"current.json", "v00000006"}


async def test_a_worker_follows_the_bucket_goes_back_and_reads_its_copies(
    storage: SnapshotStorage, publisher: Publisher, tmp_path: Path
) -> None:
    town: Town = build_town(tmp_path, migrated_database(tmp_path))
    town.root, town.publisher = storage, publisher  # type: ignore[assignment]
    config: ServingConfig = SERVING
    async with town.worker(config, version=4, snapshot_cache=tmp_path / "cache") as served:
        publisher.learn([1, 2])
        publisher.publish()
        await served.until_version(5)
        roll_back(storage, NAME, 2)
        await served.until_version(2)
        assert (await served.recommend(7, k=5))["snapshot_version"] == 2
        publisher.learn([1, 2])
        publisher.publish()
        await served.until_version(6)
    assert FileCache(tmp_path / "cache", bytes_max=1 << 30).get(
        load_snapshot(storage, NAME, 5).manifest.files["rows.safetensors"]
    )
    town.store.close()


def test_a_server_that_is_away_is_one_sentence(storage: SnapshotStorage, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", f"http://127.0.0.1:{free_port()}")
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    fsspec.get_filesystem_class("s3").clear_instance_cache()
    away = open_storage("s3://bucket/snapshots")
    with pytest.raises(SnapshotStorageError, match="s3://bucket/snapshots/hstu/current.json: EndpointConnectionError"):
        read_pointer(away, NAME)
