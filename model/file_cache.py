"""Copies on this machine of the files of remote snapshots, so that a restart need not fetch them again."""

from __future__ import annotations

import hashlib
import logging
import os
import threading
from contextlib import suppress
from pathlib import Path

from model.manifest import FileEntry

logger = logging.getLogger(__name__)


class FileCache:
    """Files by their sha256, at most ``bytes_max`` of them; the least recently used go first.

    Several processes may share the folder. Nothing in it is trusted: what is read is verified.
    """

    def __init__(self, folder: Path, *, bytes_max: int) -> None:
        self.folder, self.bytes_max = folder, bytes_max
        self._has_complained = False

    def get(self, entry: FileEntry) -> bytes | None:
        """The content a manifest names; None if it is not here, or damaged."""
        path = self.folder / entry.sha256
        try:
            content = path.read_bytes()
            if len(content) == entry.size and hashlib.sha256(content).hexdigest() == entry.sha256:
                os.utime(path)
                return content
            path.unlink(missing_ok=True)
        except FileNotFoundError:
            return None
        except OSError as error:
            self._complain(error)
            return None
        logger.warning("%s was damaged, it is fetched again", path)
        return None

    def put(self, entry: FileEntry, content: bytes) -> None:
        """Keep a file that was verified; a disk that does not take it is complained of once."""
        if entry.size > self.bytes_max:
            return
        aside = self.folder / f".{entry.sha256}.{os.getpid()}.{threading.get_ident()}"
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._make_room(entry.size)
            aside.write_bytes(content)
            aside.replace(self.folder / entry.sha256)
        except OSError as error:
            with suppress(OSError):
                aside.unlink(missing_ok=True)
            self._complain(error)

    def _make_room(self, num_bytes: int) -> None:
        files = sorted((found.stat().st_mtime_ns, found.stat().st_size, path) for path, found in _files(self.folder))
        excess = sum(size for _, size, _ in files) + num_bytes - self.bytes_max
        for _, size, path in files:
            if excess <= 0:
                return
            path.unlink(missing_ok=True)
            excess -= size

    def _complain(self, error: OSError) -> None:
        if not self._has_complained:
            logger.warning("snapshots are fetched again after a restart: %s", error)
        self._has_complained = True


def _files(folder: Path) -> list[tuple[Path, os.DirEntry[str]]]:
    with os.scandir(folder) as entries:
        return [(Path(entry.path), entry) for entry in entries if entry.is_file()]
