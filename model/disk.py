"""The few durable file operations that publishing a snapshot is made of."""

from __future__ import annotations

import os
import shutil
from pathlib import Path


class Disk:
    """A file system that keeps what it says it has kept. Tests pass one that dies between two operations."""

    def make_dir(self, path: Path) -> None:
        """Create a folder and its parents; it may exist."""
        path.mkdir(parents=True, exist_ok=True)

    def write(self, path: Path, content: bytes) -> None:
        """Write a whole file and wait until its bytes are on disk."""
        with path.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())

    def sync_dir(self, path: Path) -> None:
        """Wait until the names inside a folder are on disk."""
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)

    def rename(self, source: Path, target: Path) -> None:
        """Move atomically within one file system, replacing a file that is there."""
        source.replace(target)

    def remove_dir(self, path: Path) -> None:
        """Delete a folder and everything in it; it may be absent."""
        if path.exists():
            shutil.rmtree(path)

    def remove_file(self, path: Path) -> None:
        """Delete a file; it may be absent."""
        path.unlink(missing_ok=True)
