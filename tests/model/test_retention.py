"""Retention: what a live replica, a pin or the pointer needs is never deleted, and nothing else is kept for long."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import pytest

from model.errors import (
    SnapshotCorruptError,
    SnapshotFormatError,
    SnapshotMissingError,
    SnapshotPinnedError,
    SnapshotTruncatedError,
)
from model.pinning import (
    offer_candidate,
    pin_snapshot,
    promote_candidate,
    roll_back,
    unpin_snapshot,
    withdraw_candidate,
)
from model.rejection import Rejection, read_rejection, read_rejections, write_rejection
from model.retention import ReplicaLease, SnapshotRetention, end_lease, read_leases, write_lease
from model.snapshot import chain, list_versions, load_snapshot, read_candidate, read_pin, read_pointer
from model.storage import LocalStorage, SnapshotStorage
from tests.model.storages import KINDS, new_storage, truncate
from tests.model.study import Study
from tests.model.test_snapshot_storage import publish

TIMEOUT_MS = 1_000


@pytest.fixture(params=KINDS)
def storage(request: pytest.FixtureRequest, tmp_path: Path, study: Study) -> SnapshotStorage:
    """Versions 1 to 9, of which 1, 4 and 7 are anchors."""
    storage = new_storage(request.param, tmp_path / "root")
    study.learn()
    for version in range(1, 10):
        publish(storage, study, version, "anchor" if version % 3 == 1 else "delta")
    return storage


def prune(storage: SnapshotStorage, *, now_ms: int = 0, anchors_kept: int = 1) -> list[int]:
    retention = SnapshotRetention(storage, "hstu", anchors_kept=anchors_kept, replica_timeout_ms=TIMEOUT_MS)
    return retention.prune(now_ms)


def lease(storage: SnapshotStorage, replica: str, at_ms: int, version: int | None, loading: int | None = None) -> None:
    write_lease(storage, "hstu", ReplicaLease(replica=replica, version=version, loading=loading, at_ms=at_ms))


def test_the_newest_anchors_and_what_follows_them_are_kept(storage: SnapshotStorage) -> None:
    assert prune(storage, anchors_kept=3) == []
    assert prune(storage, anchors_kept=2) == [1, 2, 3]
    assert prune(storage) == [4, 5, 6]
    assert list_versions(storage, "hstu") == [7, 8, 9]


def test_what_a_live_replica_runs_or_loads_is_kept_with_its_chain_and_nothing_around_it(
    storage: SnapshotStorage,
) -> None:
    lease(storage, "host:8080", 5_000, 2)
    lease(storage, "host:8081", 5_500, None, loading=5)
    assert prune(storage, now_ms=5_800) == [3, 6]
    for version in (2, 5, 9):
        for one in chain(storage, "hstu", have=None, want=version):
            load_snapshot(storage, "hstu", one)


def test_a_replica_that_is_gone_keeps_nothing(storage: SnapshotStorage) -> None:
    lease(storage, "host:8080", 5_000, 2)
    lease(storage, "host:8081", 5_500, 5)
    assert prune(storage, now_ms=5_000 + TIMEOUT_MS + 1) == [1, 2, 3, 6]
    assert [one.replica for one in read_leases(storage, "hstu")] == ["host:8081"]
    end_lease(storage, "hstu", "host:8081")
    assert prune(storage, now_ms=5_500) == [4, 5]


def test_a_file_that_is_no_lease_stops_pruning_rather_than_a_replica(storage: SnapshotStorage) -> None:
    storage.publish("hstu/replicas/host.json", b'{"replica": "host", "version": "two", "loading": null, "at_ms": 1}')
    with pytest.raises(SnapshotCorruptError, match="is no lease"):
        prune(storage)
    assert list_versions(storage, "hstu") == [*range(1, 10)]


def test_a_pin_is_kept_and_publishing_leaves_the_pointer_there(storage: SnapshotStorage, study: Study) -> None:
    assert pin_snapshot(storage, "hstu", 5).version == 5
    publish(storage, study, 10, "anchor")
    publish(storage, study, 11, "delta")
    pointer, pin = read_pointer(storage, "hstu"), read_pin(storage, "hstu")
    assert pointer is not None
    assert pointer == pin
    assert pointer.version == 5
    assert prune(storage) == [1, 2, 3, 6, 7, 8, 9]
    newest = unpin_snapshot(storage, "hstu")
    assert newest is not None
    assert newest.version == 11
    pointer = read_pointer(storage, "hstu")
    assert pointer is not None
    assert pointer.version == 11
    assert unpin_snapshot(storage, "hstu") is None
    assert prune(storage) == [4, 5]


def test_a_candidate_is_kept_until_it_is_withdrawn(storage: SnapshotStorage) -> None:
    assert offer_candidate(storage, "hstu", 2).version == 2
    assert prune(storage) == [3, 4, 5, 6]
    assert withdraw_candidate(storage, "hstu") == 2
    assert prune(storage) == [1, 2]


def test_a_candidate_is_promoted_with_the_pin_if_there_is_one(storage: SnapshotStorage, study: Study) -> None:
    pin_snapshot(storage, "hstu", 8)
    offer_candidate(storage, "hstu", 9)
    assert promote_candidate(storage, "hstu").version == 9
    publish(storage, study, 10, "anchor")
    pointers = [read(storage, "hstu") for read in (read_pointer, read_pin, read_candidate)]
    assert [None if one is None else one.version for one in pointers] == [9, 9, None]
    with pytest.raises(SnapshotMissingError, match="no candidate"):
        promote_candidate(storage, "hstu")


def test_what_was_turned_away_is_remembered_for_as_long_as_it_is_there(storage: SnapshotStorage) -> None:
    rejections = [
        Rejection(
            version=version, back_to=1, replica="host", at_ms=5, guard="scores", sentence="far", evidence={"ks": 0.9}
        )
        for version in (2, 8)
    ]
    for rejection in rejections:
        write_rejection(storage, "hstu", rejection)
    assert read_rejections(storage, "hstu") == rejections
    assert read_rejection(storage, "hstu", 8) == rejections[1]
    assert read_rejection(storage, "hstu", 7) is None
    prune(storage)
    assert read_rejections(storage, "hstu") == rejections[1:]
    for damaged in (b"{}", json.dumps(asdict(rejections[1]) | {"back_to": "1"}).encode()):
        storage.publish("hstu/rejected/v00000009.json", damaged)
        with pytest.raises(SnapshotFormatError, match="v00000009.json cannot be read"):
            read_rejection(storage, "hstu", 9)


def test_a_pointer_that_was_moved_back_is_kept_until_the_next_version(storage: SnapshotStorage, study: Study) -> None:
    assert roll_back(storage, "hstu", 2).version == 2
    assert prune(storage) == [3, 4, 5, 6]
    publish(storage, study, 10, "delta")
    pointer = read_pointer(storage, "hstu")
    assert pointer is not None
    assert pointer.version == 10
    assert prune(storage) == [1, 2]


def test_a_pin_set_while_a_version_is_being_published_wins(
    storage: SnapshotStorage, study: Study, monkeypatch: pytest.MonkeyPatch
) -> None:
    publish_before = storage.publish

    def pin_first(name: str, content: bytes) -> None:
        if name == "hstu/current.json" and read_pin(storage, "hstu") is None:
            # The operator is faster by a moment, and the trainer has looked for a pin before that.
            pin_snapshot(storage, "hstu", 5)
        publish_before(name, content)

    monkeypatch.setattr(storage, "publish", pin_first)
    publish(storage, study, 10, "delta")
    pointer = read_pointer(storage, "hstu")
    assert pointer is not None
    assert pointer.version == 5


def test_nobody_is_sent_to_a_version_whose_chain_is_damaged(storage: SnapshotStorage) -> None:
    truncate(storage, "hstu/v00000004/rows.safetensors")
    for go in (roll_back, pin_snapshot):
        with pytest.raises(SnapshotTruncatedError):
            go(storage, "hstu", 5)
    pointer = read_pointer(storage, "hstu")
    assert pointer is not None
    assert pointer.version == 9
    assert read_pin(storage, "hstu") is None


def test_rolling_back_past_a_pin_is_refused(storage: SnapshotStorage) -> None:
    pin_snapshot(storage, "hstu", 5)
    with pytest.raises(SnapshotPinnedError, match="pinned to version 5"):
        roll_back(storage, "hstu", 2)
    assert roll_back(storage, "hstu", 5).version == 5


def test_what_a_crash_left_is_cleaned_up_and_what_is_damaged_goes_when_it_is_old(
    storage: SnapshotStorage, tmp_path: Path
) -> None:
    storage.remove_file("hstu/v00000002/READY")
    storage.write_folder("hstu/.building-v00000003", {"dense.safetensors": b"half"})
    if isinstance(storage, LocalStorage):
        (storage.root / "hstu" / "v00000000").mkdir()
    truncate(storage, "hstu/v00000004/manifest.json")
    prune(storage)
    kept = {"current.json", "v00000007", "v00000008", "v00000009"}
    assert {name.split("/")[1] for name in storage.find("hstu")} == kept
