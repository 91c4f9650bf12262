"""Where snapshots are kept: a folder of this machine, or an object store that fsspec reaches.

A name is relative to the root, its parts joined by "/". Both kinds give what publishing rests on: a small file that
is replaced as a whole (`publish`), and files that are durable before the next one is begun.
"""

from __future__ import annotations

import errno
import os
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TypeAlias

import fsspec
from fsspec import AbstractFileSystem

from model.disk import Disk
from model.errors import SnapshotStorageError

BUILDING = ".building-"
"""Put before the name of a folder that is not complete yet."""


class SnapshotStorage(ABC):
    """Files under a root. Methods raise OSError, or SnapshotStorageError where the client has errors of its own."""

    @abstractmethod
    def place(self, name: str) -> str:
        """Where a name is, for messages."""

    @abstractmethod
    def read(self, name: str, *, size_max: int) -> bytes:
        """A file's content, cut after ``size_max + 1`` bytes so that a larger one shows; FileNotFoundError."""

    @abstractmethod
    def find(self, folder: str) -> list[str]:
        """Names of all files in a folder and its folders, ascending; none if it does not exist.

        An empty folder, where there is such a thing, is named with a "/" at its end.
        """

    @abstractmethod
    def publish(self, name: str, content: bytes) -> None:
        """Write a small file at once: whoever reads sees what was there before, or all of it."""

    @abstractmethod
    def write_folder(self, folder: str, files: Mapping[str, bytes]) -> None:
        """Write the files of a folder, replacing it; durable on return. A crash may leave some of them."""

    @abstractmethod
    def remove_file(self, name: str) -> None:
        """Delete a file; it may be absent."""

    @abstractmethod
    def remove_folder(self, folder: str) -> None:
        """Delete a folder and everything in it; it may be absent."""


SnapshotRoot: TypeAlias = SnapshotStorage | Path | str
"""An open storage, a folder, or a URL: ``file:///srv/snapshots``, ``s3://bucket/prefix``, ``gs://…``, ``memory://…``."""


def open_storage(root: SnapshotRoot) -> SnapshotStorage:
    """The storage at a root; ValueError for a URL that cannot be used here. Does not reach for it yet."""
    if isinstance(root, SnapshotStorage):
        return root
    if isinstance(root, Path) or "://" not in root:
        return LocalStorage(Path(root))
    if root.startswith("file://"):
        if not root.startswith("file:///"):
            raise ValueError(f"{root!r} names a machine; write file:///folder, with three slashes")
        return LocalStorage(Path(root.removeprefix("file://")))
    try:
        # What another process has written must be seen at once.
        file_system, path = fsspec.url_to_fs(root, use_listings_cache=False)
    except ImportError as error:
        scheme = root.partition(":")[0]
        extra = {"s3": "s3", "gs": "gcs", "gcs": "gcs"}.get(scheme)
        remedy = "install its package" if extra is None else f"pip install 'headrace[{extra}]'"
        raise ValueError(f"{root!r} needs a package that is not installed ({error}): {remedy}") from error
    except ValueError as error:
        raise ValueError(f"{root!r} cannot be used: {error}") from error
    return ObjectStorage(file_system, path)


class LocalStorage(SnapshotStorage):
    """A folder; what is written has been synced to the disk, and its name too."""

    def __init__(self, root: Path, disk: Disk | None = None) -> None:
        self.root = root
        self._disk = Disk() if disk is None else disk

    def place(self, name: str) -> str:
        """The path."""
        return str(self.root / name)

    def read(self, name: str, *, size_max: int) -> bytes:
        """See SnapshotStorage."""
        with (self.root / name).open("rb") as file:
            return file.read(size_max + 1)

    def find(self, folder: str) -> list[str]:
        """See SnapshotStorage."""
        found = []
        for at, folders, files in os.walk(self.root / folder):
            inside = Path(at).relative_to(self.root).as_posix()
            found += [f"{inside}/{name}" for name in files or ([] if folders else [""])]
        return sorted(found)

    def publish(self, name: str, content: bytes) -> None:
        """Write aside, then rename."""
        path = self.root / name
        # Of this process alone: an operator's command may move the pointer while a trainer does.
        aside = path.with_name(f".{path.name}.{os.getpid()}")
        if not path.parent.is_dir():
            self._disk.make_dir(path.parent)
        try:
            self._disk.write(aside, content)
        except OSError:
            self._disk.remove_file(aside)
            raise
        self._disk.rename(aside, path)
        self._disk.sync_dir(path.parent)

    def write_folder(self, folder: str, files: Mapping[str, bytes]) -> None:
        """Write aside, then rename: the folder appears with all its files."""
        final = self.root / folder
        building = final.with_name(BUILDING + final.name)
        self._disk.remove_dir(building)
        self._disk.remove_dir(final)
        self._disk.make_dir(building)
        try:
            for name, content in files.items():
                self._disk.write(building / name, content)
        except OSError:
            # A full disk should not stay full because of what could not be finished.
            self._disk.remove_dir(building)
            raise
        self._disk.sync_dir(building)
        self._disk.rename(building, final)
        self._disk.sync_dir(final.parent)

    def remove_file(self, name: str) -> None:
        """See SnapshotStorage."""
        self._disk.remove_file(self.root / name)

    def remove_folder(self, folder: str) -> None:
        """See SnapshotStorage."""
        self._disk.remove_dir(self.root / folder)


class ObjectStorage(SnapshotStorage):
    """An object store, or whatever else fsspec reaches: a put replaces an object as a whole, and is durable."""

    def __init__(self, file_system: AbstractFileSystem, path: str) -> None:
        self._fs, self._path = file_system, path.rstrip("/")

    def place(self, name: str) -> str:
        """The URL."""
        url: str = self._fs.unstrip_protocol(f"{self._path}/{name}")
        return url

    def read(self, name: str, *, size_max: int) -> bytes:
        """See SnapshotStorage."""
        with self._errors_of(name):
            try:
                content: bytes = self._fs.cat_file(f"{self._path}/{name}", start=0, end=size_max + 1)
            except OSError as error:
                if error.errno == errno.EINVAL:
                    return b""  # S3's answer to a range of an object without bytes
                raise
            return content

    def find(self, folder: str) -> list[str]:
        """See SnapshotStorage."""
        with self._errors_of(folder):
            found = self._fs.find(f"{self._path}/{folder}")
        return sorted(path.removeprefix(f"{self._path}/") for path in found)

    def publish(self, name: str, content: bytes) -> None:
        """One put."""
        with self._errors_of(name):
            self._fs.pipe_file(f"{self._path}/{name}", content)

    def write_folder(self, folder: str, files: Mapping[str, bytes]) -> None:
        """Put one file after the other; there are no folders to rename."""
        self.remove_folder(folder)
        for name, content in files.items():
            self.publish(f"{folder}/{name}", content)

    def remove_file(self, name: str) -> None:
        """See SnapshotStorage."""
        with self._errors_of(name):
            try:
                self._fs.rm_file(f"{self._path}/{name}")
            except FileNotFoundError:
                return

    def remove_folder(self, folder: str) -> None:
        """See SnapshotStorage."""
        for name in self.find(folder):
            self.remove_file(name)

    @contextmanager
    def _errors_of(self, name: str) -> Iterator[None]:
        try:
            yield
        except OSError:
            raise
        except Exception as error:  # every client has errors of its own, with no root in common
            raise SnapshotStorageError(f"{self.place(name)}: {type(error).__name__}: {error}") from error
