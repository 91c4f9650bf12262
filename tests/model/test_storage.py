"""Storage: whole files or none, on a folder and on an object store; what cannot be used is said in one sentence."""

from __future__ import annotations

import errno
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from fsspec.implementations.memory import MemoryFileSystem

from model.disk import Disk
from model.errors import SnapshotStorageError
from model.storage import LocalStorage, ObjectStorage, SnapshotStorage, open_storage
from tests.model.storages import KINDS, new_storage


@pytest.fixture(params=KINDS)
def storage(request: pytest.FixtureRequest, tmp_path: Path) -> SnapshotStorage:
    return new_storage(request.param, tmp_path / "root")


def test_what_is_published_is_read_back_and_replaced_as_a_whole(storage: SnapshotStorage) -> None:
    storage.publish("m/current.json", b"one")
    assert storage.read("m/current.json", size_max=100) == b"one"
    storage.publish("m/current.json", b"another")
    assert storage.read("m/current.json", size_max=100) == b"another"
    assert storage.find("m") == ["m/current.json"]


def test_reading_stops_one_byte_behind_the_limit(storage: SnapshotStorage) -> None:
    storage.publish("a", b"0123456789")
    assert storage.read("a", size_max=10) == b"0123456789"
    assert storage.read("a", size_max=9) == b"0123456789"
    assert storage.read("a", size_max=3) == b"0123"


def test_what_is_not_there_is_not_found(storage: SnapshotStorage) -> None:
    with pytest.raises(FileNotFoundError):
        storage.read("m/none", size_max=10)
    assert storage.find("m") == []
    storage.remove_file("m/none")
    storage.remove_folder("m")


def test_a_folder_is_replaced_listed_and_removed(storage: SnapshotStorage) -> None:
    storage.write_folder("m/v1", {"a": b"1", "b": b"2"})
    storage.write_folder("m/v1", {"b": b"3"})
    storage.publish("m/v1/READY", b"r")
    storage.publish("m/other", b"o")
    assert storage.find("m/v1") == ["m/v1/READY", "m/v1/b"]
    assert storage.find("m") == ["m/other", "m/v1/READY", "m/v1/b"]
    assert storage.read("m/v1/b", size_max=10) == b"3"
    storage.remove_folder("m/v1")
    assert storage.find("m") == ["m/other"]


def test_a_root_is_a_folder_or_a_url(tmp_path: Path) -> None:
    for root in (tmp_path, str(tmp_path), f"file://{tmp_path}"):
        opened = open_storage(root)
        assert isinstance(opened, LocalStorage)
        assert opened.root == tmp_path
    memory = open_storage("memory://somewhere")
    assert isinstance(memory, ObjectStorage)
    assert memory.place("m/v1") == "memory:///somewhere/m/v1"
    assert open_storage(memory) is memory


@pytest.mark.parametrize(
    ("url", "says"),
    [
        ("file://machine/folder", "three slashes"),
        ("nonsense://bucket", "'nonsense://bucket' cannot be used"),
        pytest.param(
            "gs://bucket/prefix",
            r"pip install 'headrace\[gcs\]'",
            marks=pytest.mark.skipif(find_spec("gcsfs") is not None, reason="gcsfs is installed here"),
        ),
    ],
)
def test_a_url_that_cannot_be_used_is_refused_with_the_remedy(url: str, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        open_storage(url)


class FullDisk(Disk):
    """A disk with room for so many bytes more."""

    def __init__(self, room: int) -> None:
        self.room = room

    def write(self, path: Path, content: bytes) -> None:
        path.write_bytes(content[: self.room])
        self.room -= len(content)
        if self.room < 0:
            raise OSError(errno.ENOSPC, "No space left on device", str(path))


@pytest.mark.parametrize("room", [0, 5, 15])
def test_a_full_disk_is_not_left_fuller(tmp_path: Path, room: int) -> None:
    LocalStorage(tmp_path).publish("m/current.json", b"old")
    storage = LocalStorage(tmp_path, FullDisk(room))
    with pytest.raises(OSError, match="No space left"):
        storage.write_folder("m/v1", {"a": b"0" * 10, "b": b"1" * 10})
    with pytest.raises(OSError, match="No space left"):
        storage.publish("m/current.json", b"0" * 20)
    assert [path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*") if path.is_file()] == [
        "m/current.json"
    ]
    assert storage.read("m/current.json", size_max=10) == b"old"


class AwayError(Exception):
    """What a client of an object store raises: no OSError."""


class AwayFileSystem(MemoryFileSystem):  # type: ignore[misc]
    cachable = False  # codespell:ignore cachable

    def cat_file(self, *_arguments: Any, **_options: Any) -> bytes:
        raise AwayError("no route")

    pipe_file = find = rm_file = cat_file


def test_an_object_store_that_is_away_is_one_error_whatever_its_client_raises() -> None:
    away = ObjectStorage(AwayFileSystem(), "/bucket")
    for call in (
        lambda: away.read("a", size_max=1),
        lambda: away.find("a"),
        lambda: away.publish("a", b""),
        lambda: away.remove_file("a"),
        lambda: away.write_folder("a", {"b": b""}),
    ):
        with pytest.raises(SnapshotStorageError, match="bucket/a.*AwayError: no route"):
            call()
