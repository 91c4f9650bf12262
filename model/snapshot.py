"""Snapshots on disk: written so that a crash at any point leaves the older ones intact, read so that nothing torn
or changed is ever used.

    <root>/<model>/current.json                  pointer to the newest one
    <root>/<model>/v00000042/manifest.json       what it is, and size and sha256 of its files
                            /dense.safetensors   every dense parameter
                            /rows.safetensors    item rows: all of an anchor, the changed ones of a delta
                            /READY               sha256 of manifest.json; written last

Shapes: R rows carried, K items removed, D width.
"""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass, replace
from pathlib import Path

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from model.disk import Disk
from model.errors import (
    SnapshotCorruptError,
    SnapshotExistsError,
    SnapshotHashError,
    SnapshotMissingError,
    SnapshotNotReadyError,
    SnapshotParentError,
    SnapshotTruncatedError,
)
from model.manifest import FileEntry, Lineage, Manifest, SnapshotPointer

__all__ = [
    "Lineage",
    "Manifest",
    "RowBlock",
    "Snapshot",
    "SnapshotPointer",
    "chain",
    "list_versions",
    "load_snapshot",
    "move_pointer",
    "prune_snapshots",
    "read_manifest",
    "read_pointer",
    "snapshot_path",
    "write_snapshot",
]

POINTER_NAME = "current.json"
READY_NAME = "READY"
MANIFEST_NAME = "manifest.json"
DENSE_NAME = "dense.safetensors"
ROWS_NAME = "rows.safetensors"
MAX_MANIFEST_BYTES = 16 << 20
"""A larger manifest is refused unread."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RowBlock:
    """Item rows in the table's order, new items last.

    ids int64[R], weight float32[R, D], bias float32[R], trend float64[R] (see model.trend), removed_ids int64[K]
    (removed before the rows are put in place), trend_as_of_ms: newest interaction the trend contains.
    """

    ids: Tensor
    weight: Tensor
    bias: Tensor
    trend: Tensor
    removed_ids: Tensor
    trend_as_of_ms: int

    def tensors(self) -> dict[str, Tensor]:
        """The content of rows.safetensors."""
        return {
            "ids": self.ids,
            "weight": self.weight,
            "bias": self.bias,
            "trend": self.trend,
            "removed_ids": self.removed_ids,
            "trend_as_of_ms": torch.tensor([self.trend_as_of_ms], dtype=torch.int64),
        }

    @staticmethod
    def of_tensors(tensors: dict[str, Tensor]) -> RowBlock:
        """From ``tensors()``; SnapshotCorruptError if names, shapes or dtypes are not those of a row block."""
        dtypes = {
            "ids": torch.int64,
            "weight": torch.float32,
            "bias": torch.float32,
            "trend": torch.float64,
            "removed_ids": torch.int64,
            "trend_as_of_ms": torch.int64,
        }
        if {name: tensor.dtype for name, tensor in tensors.items()} != dtypes:
            raise SnapshotCorruptError(f"{ROWS_NAME} must hold exactly {dtypes}")
        num_rows = tensors["ids"].shape[0]
        if tensors["weight"].dim() != 2 or any(tensors[n].shape[0] != num_rows for n in ("weight", "bias", "trend")):
            raise SnapshotCorruptError(f"{ROWS_NAME} holds columns of different lengths")
        as_of_ms = int(tensors.pop("trend_as_of_ms"))
        return RowBlock(**tensors, trend_as_of_ms=as_of_ms)


@dataclass(frozen=True, kw_only=True, slots=True)
class Snapshot:
    """A verified snapshot in memory."""

    manifest: Manifest
    dense: dict[str, Tensor]
    rows: RowBlock


def snapshot_path(root: Path, model: str, version: int) -> Path:
    """The folder of a version, e.g. ``root/hstu/v00000042``."""
    return root / _checked_name(model) / f"v{version:08d}"


def write_snapshot(
    root: Path,
    manifest: Manifest,
    dense: dict[str, Tensor],
    rows: RowBlock,
    *,
    disk: Disk | None = None,
) -> Manifest:
    """Publish a snapshot and move the pointer to it; returns the manifest with sizes and hashes.

    SnapshotExistsError if the version is already published. What a crashed attempt left behind is overwritten.
    """
    disk = Disk() if disk is None else disk
    final = snapshot_path(root, manifest.model, manifest.version)
    if (final / READY_NAME).exists():
        raise SnapshotExistsError(f"{final} is already published; take the next version")
    building = final.with_name(f".building-{final.name}")
    # Step 1: clear what a crashed attempt at this version left behind.
    disk.remove_dir(building)
    disk.remove_dir(final)
    # Step 2: write every file aside, each on disk before the next.
    disk.make_dir(building)
    contents = {DENSE_NAME: _encoded(dense), ROWS_NAME: _encoded(rows.tensors())}
    for name, content in contents.items():
        disk.write(building / name, content)
    manifest = replace(manifest, files={name: _entry(content) for name, content in contents.items()})
    described = manifest.encode()
    disk.write(building / MANIFEST_NAME, described)
    disk.sync_dir(building)
    # Step 3: give the folder its name. It is not a snapshot yet: readers refuse it without READY.
    disk.rename(building, final)
    disk.sync_dir(final.parent)
    # Step 4: declare it finished, naming the manifest it is finished with; by renaming, so READY is never torn.
    disk.write(final / f".{READY_NAME}", hashlib.sha256(described).hexdigest().encode())
    disk.rename(final / f".{READY_NAME}", final / READY_NAME)
    disk.sync_dir(final)
    # Step 5: point at it.
    move_pointer(root, manifest, disk=disk)
    return manifest


def move_pointer(root: Path, manifest: Manifest, *, disk: Disk | None = None) -> SnapshotPointer:
    """Point current.json at a published snapshot, atomically; also how to go back to an older one."""
    disk = Disk() if disk is None else disk
    folder = root / _checked_name(manifest.model)
    pointer = SnapshotPointer(
        model=manifest.model,
        version=manifest.version,
        kind=manifest.kind,
        parent=manifest.parent,
        path=snapshot_path(Path(), manifest.model, manifest.version).as_posix(),
        created_at_ms=manifest.created_at_ms,
    )
    aside = folder / f".{POINTER_NAME}"
    disk.write(aside, pointer.encode())
    disk.rename(aside, folder / POINTER_NAME)
    disk.sync_dir(folder)
    return pointer


def read_pointer(root: Path, model: str) -> SnapshotPointer | None:
    """What current.json points at, None before the first snapshot."""
    path = root / _checked_name(model) / POINTER_NAME
    try:
        return SnapshotPointer.decode(path.read_bytes())
    except FileNotFoundError:
        return None


def read_manifest(root: Path, model: str, version: int) -> Manifest:
    """The verified manifest of a finished snapshot."""
    folder = snapshot_path(root, model, version)
    if not folder.is_dir():
        raise SnapshotMissingError(f"there is no snapshot {folder}")
    if not (folder / READY_NAME).exists():
        raise SnapshotNotReadyError(f"{folder} was not finished: it has no {READY_NAME}")
    content = _read(folder / MANIFEST_NAME, size_max=MAX_MANIFEST_BYTES)
    promised = (folder / READY_NAME).read_text(encoding="utf-8", errors="replace")
    if hashlib.sha256(content).hexdigest() != promised:
        raise SnapshotHashError(f"{folder / MANIFEST_NAME} is not the manifest that {READY_NAME} names")
    manifest = Manifest.decode(content)
    if (manifest.model, manifest.version) != (model, version):
        raise SnapshotCorruptError(f"{folder} holds version {manifest.version} of {manifest.model!r}")
    return manifest


def load_snapshot(root: Path, model: str, version: int) -> Snapshot:
    """Read a snapshot into memory, every byte verified; one of the SnapshotError tree if anything is off."""
    manifest = read_manifest(root, model, version)
    folder = snapshot_path(root, model, version)
    if manifest.files.keys() != {DENSE_NAME, ROWS_NAME}:
        raise SnapshotCorruptError(f"{folder} lists the files {sorted(manifest.files)}")
    tensors = {}
    for name, entry in manifest.files.items():
        content = _read(folder / name, size_max=None)
        if len(content) != entry.size:
            raise SnapshotTruncatedError(f"{folder / name} has {len(content)} bytes; its manifest says {entry.size}")
        if hashlib.sha256(content).hexdigest() != entry.sha256:
            raise SnapshotHashError(f"{folder / name} has another sha256 than its manifest says")
        try:
            tensors[name] = safetensors.torch.load(content)
        except safetensors.SafetensorError as error:
            raise SnapshotCorruptError(f"{folder / name} is no safetensors file: {error}") from error
    return Snapshot(manifest=manifest, dense=tensors[DENSE_NAME], rows=RowBlock.of_tensors(tensors[ROWS_NAME]))


def list_versions(root: Path, model: str) -> list[int]:
    """Versions of finished snapshots, ascending."""
    return sorted(version for version, path in _folders(root, model).items() if (path / READY_NAME).exists())


def _folders(root: Path, model: str) -> dict[int, Path]:
    """Folders by version, finished or not."""
    folder = root / _checked_name(model)
    if not folder.is_dir():
        return {}
    found = ((re.fullmatch(r"v(\d{8,})", path.name), path) for path in folder.iterdir())
    return {int(match[1]): path for match, path in found if match}


def chain(root: Path, model: str, *, have: int | None, want: int) -> list[int]:
    """Versions to apply in order to get from ``have`` (None: nothing) to ``want``; empty if they are equal.

    Deltas from ``have`` if there is an unbroken line of them, otherwise the newest anchor at or before ``want`` and
    its deltas. SnapshotParentError if no line of finished snapshots leads to ``want``.
    """
    if have == want:
        return []
    versions: list[int] = []
    step = want
    while True:
        manifest = _manifest_in_chain(root, model, step, want)
        versions.append(step)
        if manifest.parent is None or manifest.parent == have:
            return versions[::-1]
        step = manifest.parent


def _manifest_in_chain(root: Path, model: str, version: int, want: int) -> Manifest:
    try:
        return read_manifest(root, model, version)
    except SnapshotMissingError as error:
        if version == want:
            raise
        raise SnapshotParentError(f"version {want} of {model!r} needs version {version}, which is gone") from error


def prune_snapshots(root: Path, model: str, *, anchors_kept: int, disk: Disk | None = None) -> list[int]:
    """Delete versions older than the newest ``anchors_kept`` anchors, and unfinished leftovers of older ones.

    Never deletes what current.json points at, nor its chain. Returns the versions deleted.
    """
    if anchors_kept < 1:
        raise ValueError(f"anchors_kept is {anchors_kept}; keep at least 1, or nothing could be loaded")
    disk = Disk() if disk is None else disk
    versions = list_versions(root, model)
    anchors = [v for v in versions if read_manifest(root, model, v).kind == "anchor"]
    pointer = read_pointer(root, model)
    if pointer is None:
        return []
    needed = chain(root, model, have=None, want=pointer.version)
    oldest_kept = min(*anchors[-anchors_kept:], needed[0])
    removed = [v for v in versions if v < oldest_kept]
    for version in reversed(removed):
        # Step 1: no snapshot any more, deltas before what they build on. A folder is deleted file by file, and a crash
        # in between would leave a snapshot without its manifest.
        disk.remove_file(snapshot_path(root, model, version) / READY_NAME)
    for version in sorted(_folders(root, model)):
        if version < oldest_kept:
            # Step 2: its files, and what earlier crashes left.
            disk.remove_dir(snapshot_path(root, model, version))
    return removed


def _encoded(tensors: dict[str, Tensor]) -> bytes:
    return safetensors.torch.save({name: tensor.detach().contiguous() for name, tensor in tensors.items()})


def _entry(content: bytes) -> FileEntry:
    return FileEntry(size=len(content), sha256=hashlib.sha256(content).hexdigest())


def _read(path: Path, *, size_max: int | None) -> bytes:
    try:
        if size_max is not None and path.stat().st_size > size_max:
            raise SnapshotCorruptError(f"{path} has {path.stat().st_size} bytes; at most {size_max} make sense")
        return path.read_bytes()
    except FileNotFoundError as error:
        raise SnapshotMissingError(f"{path} is missing") from error


def _checked_name(model: str) -> str:
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_-]{0,63}", model):
        raise ValueError(f"model is {model!r}; a name is 1 to 64 letters, digits, '-' or '_'")
    return model
