"""Versions that a worker's guards have turned away, so that no other worker takes them.

Each has a file of its own: <root>/<model>/rejected/v00000042.json
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass

from model.errors import SnapshotFormatError
from model.small_records import read_record
from model.snapshot import model_folder
from model.storage import SnapshotRoot, SnapshotStorage, open_storage

_MAX_BYTES = 65_536


@dataclass(frozen=True, kw_only=True, slots=True)
class Rejection:
    """Why a version is not to be served.

    back_to: the version that the worker went back to. replica, at_ms (epoch ms): who turned it away, when. guard: which
    of the guards. evidence: the figures that it decided by.
    """

    version: int
    back_to: int
    replica: str
    at_ms: int
    guard: str
    sentence: str
    evidence: dict[str, float]


def write_rejection(root: SnapshotRoot, model: str, rejection: Rejection) -> None:
    """Tell every worker. Raises SnapshotStorageError or OSError."""
    content = json.dumps(asdict(rejection), indent=1, sort_keys=True).encode()
    open_storage(root).publish(_name(model, rejection.version), content)


def read_rejection(root: SnapshotRoot, model: str, version: int) -> Rejection | None:
    """Why a version is not to be served, None if nobody has turned it away; SnapshotFormatError for a torn file."""
    return _read(open_storage(root), _name(model, version))


def read_rejections(root: SnapshotRoot, model: str) -> list[Rejection]:
    """All of them, by version."""
    storage = open_storage(root)
    found = [_read(storage, name) for name in storage.find(f"{model_folder(model)}/rejected") if name.endswith(".json")]
    return [rejection for rejection in found if rejection is not None]


def remove_rejection(root: SnapshotRoot, model: str, version: int) -> None:
    """A version may be served again, or is gone."""
    open_storage(root).remove_file(_name(model, version))


def _read(storage: SnapshotStorage, name: str) -> Rejection | None:
    try:
        return read_record(Rejection, storage.read(name, size_max=_MAX_BYTES))
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise SnapshotFormatError(f"{storage.place(name)} cannot be read ({error}): delete it") from error


def _name(model: str, version: int) -> str:
    return f"{model_folder(model)}/rejected/v{version:08d}.json"
