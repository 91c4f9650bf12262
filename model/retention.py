"""Which snapshots are kept: the newest anchors and what follows them, and whatever somebody still needs.

A replica says in the storage which version it runs, is loading and would go back to, in a lease it renews:

    <root>/<model>/replicas/<replica>.json       {"replica": …, "version": …, "loading": …, "back_to": …, "at_ms": …}
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from urllib.parse import quote

from model.errors import SnapshotCorruptError, SnapshotFormatError, SnapshotMissingError
from model.small_records import read_record
from model.snapshot import (
    READY_NAME,
    model_folder,
    names_in,
    read_candidate,
    read_manifest,
    read_pin,
    read_pointer,
    snapshot_folder,
)
from model.storage import BUILDING, SnapshotRoot, open_storage

_MAX_LEASE_BYTES = 4_096


@dataclass(frozen=True, kw_only=True, slots=True)
class ReplicaLease:
    """What a replica runs, is loading and would go back to (None: nothing), and when it said so (epoch ms)."""

    replica: str
    version: int | None
    loading: int | None
    at_ms: int
    back_to: int | None = None


def write_lease(root: SnapshotRoot, model: str, lease: ReplicaLease) -> None:
    """Renew a replica's lease."""
    open_storage(root).publish(_lease_name(model, lease.replica), json.dumps(asdict(lease)).encode())


def end_lease(root: SnapshotRoot, model: str, replica: str) -> None:
    """A replica stops: nothing is kept for it any more."""
    open_storage(root).remove_file(_lease_name(model, replica))


def read_leases(root: SnapshotRoot, model: str) -> list[ReplicaLease]:
    """Every lease, expired ones among them; SnapshotCorruptError for a file that is none."""
    storage, folder, leases = open_storage(root), f"{model_folder(model)}/replicas", []
    for name in storage.find(folder):
        if not name.endswith(".json"):
            continue
        try:
            lease = read_record(ReplicaLease, storage.read(name, size_max=_MAX_LEASE_BYTES))
        except FileNotFoundError:
            continue  # ended since it was listed
        except ValueError as error:
            raise SnapshotCorruptError(f"{storage.place(name)} is no lease ({error}): delete it") from error
        leases.append(lease)
    return leases


def valid_leases(root: SnapshotRoot, model: str, *, since_ms: int) -> list[ReplicaLease]:
    """Leases that were renewed at or after a time: of the replicas that run. Raises what `read_leases` does."""
    return [lease for lease in read_leases(root, model) if lease.at_ms >= since_ms]


def _lease_name(model: str, replica: str) -> str:
    return f"{model_folder(model)}/replicas/{quote(replica, safe='')}.json"


class SnapshotRetention:
    """Deletes what nobody needs, for the one process that publishes.

    Kept are the newest ``anchors_kept`` anchors and everything after them, and the chains of the pointer, of the pin,
    of the candidate and of every version that a replica runs, loads or would go back to whose lease is younger than
    ``replica_timeout_ms``.
    """

    def __init__(self, root: SnapshotRoot, model: str, *, anchors_kept: int, replica_timeout_ms: int) -> None:
        if anchors_kept < 1:
            raise ValueError(f"anchors_kept is {anchors_kept}; keep at least 1, or nothing could be loaded")
        self._storage, self._model = open_storage(root), model
        self._anchors_kept, self._replica_timeout_ms = anchors_kept, replica_timeout_ms
        self._parents: dict[int, int | None] = {}
        """Of finished versions; a manifest never changes, so it is read once."""

    def prune(self, now_ms: int) -> list[int]:
        """Delete the rest, and unfinished leftovers of versions before the newest; returns the versions deleted."""
        names = names_in(self._storage, self._model)
        folders = _folders(names)
        finished = sorted(v for v, found in folders.items() if any(name == READY_NAME for _, name in found))
        if not finished:
            return []
        self._learn_parents(finished)
        kept = self._kept(finished, self._needed(now_ms))
        removed = [version for version in finished if version not in kept]
        for version in reversed(removed):
            # Step 1: no snapshot any more, deltas before what they build on. A folder is deleted file by file, and a
            # crash in between would leave a snapshot without its manifest.
            self._storage.remove_file(f"{snapshot_folder(self._model, version)}/{READY_NAME}")
        for version in sorted(folders):
            if version not in kept and version < finished[-1]:
                # Step 2: its files, and what earlier crashes left.
                for folder in sorted({folder for folder, _ in folders[version]}):
                    self._storage.remove_folder(f"{model_folder(self._model)}/{folder}")
        for name in names:
            # Step 3: what was said about versions that are gone; their numbers never come again.
            rejected = re.fullmatch(r"rejected/v(\d{8,})\.json", name)
            if rejected and int(rejected[1]) not in kept and int(rejected[1]) < finished[-1]:
                self._storage.remove_file(f"{model_folder(self._model)}/{name}")
        return removed

    def _learn_parents(self, finished: list[int]) -> None:
        self._parents = {version: parent for version, parent in self._parents.items() if version in finished}
        for version in finished:
            if version not in self._parents:
                try:
                    self._parents[version] = read_manifest(self._storage, self._model, version).parent
                except (SnapshotCorruptError, SnapshotFormatError, SnapshotMissingError):
                    continue  # of no use to anybody: it goes when it is old

    def _needed(self, now_ms: int) -> set[int]:
        needed: set[int] = set()
        for read in (read_pointer, read_pin, read_candidate):
            pointer = read(self._storage, self._model)
            if pointer is not None:
                needed.add(pointer.version)
        for lease in read_leases(self._storage, self._model):
            if lease.at_ms < now_ms - self._replica_timeout_ms:
                end_lease(self._storage, self._model, lease.replica)
                continue
            named = (lease.version, lease.loading, lease.back_to)
            needed |= {version for version in named if version is not None}
        return needed

    def _kept(self, finished: list[int], needed: set[int]) -> set[int]:
        anchors = [version for version in finished if self._parents.get(version, 0) is None]
        first_kept = anchors[-self._anchors_kept :][0] if anchors else finished[0]
        kept = {version for version in finished if version >= first_kept}
        for version in needed:
            kept |= _line(self._parents, version)
        return kept


def _folders(names: Iterable[str]) -> dict[int, list[tuple[str, str]]]:
    """Per version, finished or not: its files as (folder, name)."""
    folders: dict[int, list[tuple[str, str]]] = {}
    for path in names:
        match = re.fullmatch(rf"((?:{re.escape(BUILDING)})?v(\d{{8,}}))/([^/]*)", path)
        if match:
            folders.setdefault(int(match[2]), []).append((match[1], match[3]))
    return folders


def _line(parents: Mapping[int, int | None], version: int) -> set[int]:
    """A version and what it builds on, as far as it is there."""
    line: set[int] = set()
    step: int | None = version
    while step is not None and step in parents:
        line.add(step)
        step = parents[step]
    return line
