"""Ingest on SQLite when the disk is full: it says so, waits, and goes on by itself when there is room."""

from __future__ import annotations

import resource
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from ops.local_broker import LocalBroker
from tests.faults.installation import Daemon, Installation
from tests.faults.load import Load
from tests.faults.observing import PositionSampler, assert_exactly_once
from tests.feature_store.databases import migrated_database

pytestmark = pytest.mark.timeout(600)

SEED = 20_260_806
FULL_S = 4.0


def goes_on_when_there_is_room(
    root: Path,
    database: Path,
    broker: LocalBroker,
    *,
    fill: Callable[[Daemon], None],
    make_room: Callable[[Daemon], None],
    seed: int,
) -> None:
    with (
        migrated_database("sqlite", database) as url,
        Installation(root, broker.bootstrap_servers, url) as installation,
        PositionSampler(installation) as sampler,
        Load(broker.bootstrap_servers, seed=seed, num_applied=sampler.num_applied) as load,
    ):
        ingest = installation.start_ready("ingest")
        installation.wait_for_a_batch(ingest)
        fill(ingest)
        installation.wait(lambda: not ingest.readiness()[0], "the full disk")
        time.sleep(FULL_S)
        is_ready, why = ingest.readiness()
        assert not is_ready
        assert "has free space" in why
        assert url in why
        make_room(ingest)
        installation.wait(lambda: ingest.readiness()[0], "readiness with room again")
        load.stop()
        assert_exactly_once(installation, load.truth, sampler, seed=seed)
        ingest.stop()
    complaints = [line for line in ingest.said().splitlines() if "trying again in" in line]
    assert all("has free space" in line for line in complaints), complaints
    # It waits longer each time, and says one sentence a time.
    assert 2 <= len(complaints) <= 15, complaints
    assert "Traceback" not in ingest.said()


def test_a_file_that_cannot_grow_is_waited_for(tmp_path: Path, fresh_broker: LocalBroker) -> None:
    """By RLIMIT_FSIZE, which needs no privileges: a write beyond it fails (EFBIG), like one to a full disk."""

    def fill(ingest: Daemon) -> None:
        longest = max(path.stat().st_size for path in tmp_path.glob("store.db*"))
        resource.prlimit(ingest.process.pid, resource.RLIMIT_FSIZE, (longest + 100_000, resource.RLIM_INFINITY))

    def make_room(ingest: Daemon) -> None:
        resource.prlimit(ingest.process.pid, resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))

    goes_on_when_there_is_room(tmp_path, tmp_path, fresh_broker, fill=fill, make_room=make_room, seed=SEED)


@contextmanager
def small_disk(directory: Path, *, num_mib: int) -> Iterator[Path]:
    directory.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={num_mib}m", "tmpfs", str(directory)],
        capture_output=True,
        text=True,
        check=False,
    )
    if mounted.returncode != 0:
        pytest.skip(f"a file system of a few MiB cannot be mounted here: {mounted.stderr.strip()}")
    try:
        yield directory
    finally:
        subprocess.run(["umount", "-l", str(directory)], check=True)


def test_a_file_system_without_room_is_waited_for(tmp_path: Path, fresh_broker: LocalBroker) -> None:
    """The real thing (ENOSPC), where a small file system may be mounted."""
    with small_disk(tmp_path / "disk", num_mib=64) as disk:
        ballast = disk / "ballast"

        def fill(_ingest: Daemon) -> None:
            with ballast.open("wb", buffering=0) as file:
                for size in (1 << 20, 1 << 12):
                    try:
                        while file.write(b"\0" * size) == size:
                            pass
                    except OSError:
                        continue

        def make_room(_ingest: Daemon) -> None:
            ballast.unlink()

        goes_on_when_there_is_room(tmp_path, disk, fresh_broker, fill=fill, make_room=make_room, seed=SEED + 1)
