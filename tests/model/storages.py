"""The same tests on a folder and on an object store."""

from __future__ import annotations

import uuid
from pathlib import Path

from model.storage import SnapshotStorage, open_storage

KINDS = ("file", "memory")


def new_storage(kind: str, folder: Path) -> SnapshotStorage:
    """An empty storage; two of kind memory share nothing."""
    return open_storage(f"file://{folder}" if kind == "file" else f"memory://{uuid.uuid4().hex}/snapshots")


def flip_one_bit(storage: SnapshotStorage, name: str) -> None:
    content = bytearray(storage.read(name, size_max=1 << 30))
    content[len(content) // 2] ^= 4
    storage.publish(name, bytes(content))


def truncate(storage: SnapshotStorage, name: str) -> None:
    storage.publish(name, storage.read(name, size_max=1 << 30)[:-7])


def empty(storage: SnapshotStorage, name: str) -> None:
    storage.publish(name, b"")


def lengthen(storage: SnapshotStorage, name: str) -> None:
    storage.publish(name, storage.read(name, size_max=1 << 30) + b"x")


def remove(storage: SnapshotStorage, name: str) -> None:
    storage.remove_file(name)
