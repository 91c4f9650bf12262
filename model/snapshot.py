"""Stored snapshots: written so that a crash at any point leaves the older ones intact, read so that nothing torn or
changed is ever used.

    <root>/<model>/current.json                  pointer to the one to serve: the newest, unless it was moved or pinned
                  /pin.json                      while it exists, the pointer stays there
    <root>/<model>/v00000042/manifest.json       what it is, and size and sha256 of its files
                            /dense.safetensors   every dense parameter
                            /rows.safetensors    item rows: all of an anchor, the changed ones of a delta
                            /READY               sha256 of manifest.json; written last

Shapes: R rows carried, K items removed, D width.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable
from dataclasses import dataclass, replace

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from model.config import RowPrecision
from model.errors import (
    SnapshotCorruptError,
    SnapshotExistsError,
    SnapshotFormatError,
    SnapshotHashError,
    SnapshotMissingError,
    SnapshotNotReadyError,
    SnapshotParentError,
    SnapshotTruncatedError,
)
from model.file_cache import FileCache
from model.manifest import FileEntry, Lineage, Manifest, SnapshotPointer
from model.row_precision import RoundedRows, rounded_rows
from model.storage import SnapshotRoot, SnapshotStorage, open_storage

__all__ = [
    "Lineage",
    "Manifest",
    "RowBlock",
    "Snapshot",
    "SnapshotPointer",
    "chain",
    "list_versions",
    "load_snapshot",
    "model_folder",
    "move_pointer",
    "names_in",
    "pointer_to",
    "read_manifest",
    "read_pin",
    "read_pointer",
    "snapshot_folder",
    "write_snapshot",
]

POINTER_NAME = "current.json"
PIN_NAME = "pin.json"
CANDIDATE_NAME = "candidate.json"
READY_NAME = "READY"
MANIFEST_NAME = "manifest.json"
DENSE_NAME = "dense.safetensors"
ROWS_NAME = "rows.safetensors"
MAX_MANIFEST_BYTES = 16 << 20
"""A larger manifest is refused unread."""


_WEIGHT_DTYPES: dict[RowPrecision, dict[str, torch.dtype]] = {
    "float32": {"weight": torch.float32},
    "int8": {"weight_codes": torch.int8, "weight_scale": torch.float32, "weight_width": torch.int64},
    "int4": {"weight_codes": torch.uint8, "weight_scale": torch.float32, "weight_width": torch.int64},
}


@dataclass(frozen=True, kw_only=True, slots=True)
class RowBlock:
    """Item rows in the table's order, new items last.

    ids int64[R], weight float32[R, D], bias float32[R], trend float64[R] (see model.trend), removed_ids int64[K]
    (removed before the rows are put in place), trend_as_of_ms: newest interaction the trend contains. content:
    float16[R, C], what is known about the items besides their interactions; None of models that do not read it.
    """

    ids: Tensor
    weight: Tensor
    bias: Tensor
    trend: Tensor
    removed_ids: Tensor
    trend_as_of_ms: int
    content: Tensor | None = None

    def tensors(self, precision: RowPrecision = "float32") -> dict[str, Tensor]:
        """The content of rows.safetensors; embeddings other than float32 as codes and a scale a row."""
        weight = {"weight": self.weight}
        if precision != "float32":
            rounded = rounded_rows(self.weight, precision)
            width = torch.tensor([rounded.width], dtype=torch.int64)
            weight = {"weight_codes": rounded.codes, "weight_scale": rounded.scale, "weight_width": width}
        content = {} if self.content is None else {"content": self.content}
        return content | {
            "ids": self.ids,
            **weight,
            "bias": self.bias,
            "trend": self.trend,
            "removed_ids": self.removed_ids,
            "trend_as_of_ms": torch.tensor([self.trend_as_of_ms], dtype=torch.int64),
        }

    @staticmethod
    def of_tensors(tensors: dict[str, Tensor], precision: RowPrecision = "float32") -> RowBlock:
        """From ``tensors(precision)``; SnapshotCorruptError if names, shapes or dtypes are not those of a row block."""
        dtypes = {
            "ids": torch.int64,
            **_WEIGHT_DTYPES[precision],
            "bias": torch.float32,
            "trend": torch.float64,
            "removed_ids": torch.int64,
            "trend_as_of_ms": torch.int64,
        }
        if "content" in tensors:
            dtypes["content"] = torch.float16
        if {name: tensor.dtype for name, tensor in tensors.items()} != dtypes:
            raise SnapshotCorruptError(f"{ROWS_NAME} must hold exactly {dtypes}")
        if precision != "float32":
            tensors = {**_without_codes(tensors), "weight": _weight_of_codes(tensors, precision)}
        num_rows = tensors["ids"].shape[0]
        by_row = [name for name in ("weight", "bias", "trend", "content") if name in tensors]
        if tensors["weight"].dim() != 2 or any(tensors[name].shape[0] != num_rows for name in by_row):
            raise SnapshotCorruptError(f"{ROWS_NAME} holds columns of different lengths")
        as_of_ms = int(tensors.pop("trend_as_of_ms"))
        return RowBlock(**tensors, trend_as_of_ms=as_of_ms)


def _weight_of_codes(tensors: dict[str, Tensor], precision: RowPrecision) -> Tensor:
    codes, scale, width = (tensors[f"weight_{name}"] for name in ("codes", "scale", "width"))
    num_bytes = -1 if width.shape != (1,) else int(width) if precision == "int8" else (int(width) + 1) // 2
    if codes.shape != (scale.shape[0], num_bytes):
        raise SnapshotCorruptError(f"{ROWS_NAME} holds {tuple(codes.shape)} codes, not those of {precision} rows")
    return RoundedRows(precision=precision, codes=codes, scale=scale, width=int(width)).weight()


def _without_codes(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in tensors.items() if not name.startswith("weight_")}


@dataclass(frozen=True, kw_only=True, slots=True)
class Snapshot:
    """A verified snapshot in memory."""

    manifest: Manifest
    dense: dict[str, Tensor]
    rows: RowBlock
    merged_hash: str | None = None
    """Of deltas merged into one, the content hash of the last: the manifest names the parent of the first."""

    @property
    def content_hash(self) -> str:
        """Which weights it leads to."""
        return self.merged_hash or self.manifest.content_hash()


def model_folder(model: str) -> str:
    """The folder of a model under the root; ValueError for a name that cannot be one."""
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_-]{0,63}", model):
        raise ValueError(f"model is {model!r}; a name is 1 to 64 letters, digits, '-' or '_'")
    return model


def snapshot_folder(model: str, version: int) -> str:
    """The folder of a version under the root, e.g. ``hstu/v00000042``."""
    return f"{model_folder(model)}/v{version:08d}"


def write_snapshot(
    root: SnapshotRoot,
    manifest: Manifest,
    dense: dict[str, Tensor],
    rows: RowBlock,
    *,
    reached: Callable[[str], None] = lambda _stage: None,
) -> Manifest:
    """Publish a snapshot and move the pointer to it, unless pinned; returns the manifest with sizes and hashes.

    Embeddings are written with the manifest's row_precision.

    SnapshotExistsError if the version is already published. What a crashed attempt left behind is overwritten.
    reached: called after each stage with its name: ``encoded``, ``files``, ``ready``.
    """
    storage, folder = open_storage(root), snapshot_folder(manifest.model, manifest.version)
    if _is_finished(storage, folder):
        raise SnapshotExistsError(f"{storage.place(folder)} is already published; take the next version")
    contents = {DENSE_NAME: _encoded(dense), ROWS_NAME: _encoded(rows.tensors(manifest.row_precision))}
    manifest = replace(manifest, files={name: _entry(content) for name, content in contents.items()})
    described = manifest.encode()
    reached("encoded")
    # Step 1: write every file. It is not a snapshot yet: readers refuse it without READY.
    storage.write_folder(folder, {**contents, MANIFEST_NAME: described})
    reached("files")
    # Step 2: declare it finished, naming the manifest it is finished with; at once, so READY is never torn.
    storage.publish(f"{folder}/{READY_NAME}", hashlib.sha256(described).hexdigest().encode())
    reached("ready")
    # Step 3: point at it.
    _advance_pointer(storage, manifest)
    return manifest


def _advance_pointer(storage: SnapshotStorage, manifest: Manifest) -> None:
    if read_pin(storage, manifest.model) is not None:
        return
    move_pointer(storage, manifest)
    # Pinning writes the pin, then the pointer. Either it moves the pointer after us, or we see the pin here.
    pin = read_pin(storage, manifest.model)
    if pin is not None:
        storage.publish(f"{model_folder(manifest.model)}/{POINTER_NAME}", pin.encode())


def move_pointer(root: SnapshotRoot, manifest: Manifest) -> SnapshotPointer:
    """Point current.json at a published snapshot, atomically; also how to go back to an older one."""
    pointer = pointer_to(manifest)
    open_storage(root).publish(f"{model_folder(manifest.model)}/{POINTER_NAME}", pointer.encode())
    return pointer


def pointer_to(manifest: Manifest) -> SnapshotPointer:
    """What current.json, pin.json or candidate.json say of a version."""
    return SnapshotPointer(
        model=manifest.model,
        version=manifest.version,
        kind=manifest.kind,
        parent=manifest.parent,
        path=snapshot_folder(manifest.model, manifest.version),
        created_at_ms=manifest.created_at_ms,
    )


def read_pointer(root: SnapshotRoot, model: str) -> SnapshotPointer | None:
    """What current.json points at, None before the first snapshot."""
    return _read_pointer(open_storage(root), f"{model_folder(model)}/{POINTER_NAME}")


def read_pin(root: SnapshotRoot, model: str) -> SnapshotPointer | None:
    """The version that workers are pinned to, if they are."""
    return _read_pointer(open_storage(root), f"{model_folder(model)}/{PIN_NAME}")


def read_candidate(root: SnapshotRoot, model: str) -> SnapshotPointer | None:
    """The version that canary workers serve instead of the current one, if there is one."""
    return _read_pointer(open_storage(root), f"{model_folder(model)}/{CANDIDATE_NAME}")


def _read_pointer(storage: SnapshotStorage, name: str) -> SnapshotPointer | None:
    try:
        return SnapshotPointer.decode(storage.read(name, size_max=MAX_MANIFEST_BYTES))
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise SnapshotFormatError(f"{storage.place(name)} cannot be read ({error})") from error


def read_manifest(root: SnapshotRoot, model: str, version: int) -> Manifest:
    """The verified manifest of a finished snapshot."""
    storage, folder = open_storage(root), snapshot_folder(model, version)
    try:
        promised = storage.read(f"{folder}/{READY_NAME}", size_max=MAX_MANIFEST_BYTES)
    except FileNotFoundError as error:
        if storage.find(folder):
            raise SnapshotNotReadyError(f"{storage.place(folder)} was not finished: it has no {READY_NAME}") from error
        raise SnapshotMissingError(f"there is no snapshot {storage.place(folder)}") from error
    place = storage.place(f"{folder}/{MANIFEST_NAME}")
    content = _read(storage, f"{folder}/{MANIFEST_NAME}", size_max=MAX_MANIFEST_BYTES)
    if len(content) > MAX_MANIFEST_BYTES:
        raise SnapshotCorruptError(f"{place} has over {MAX_MANIFEST_BYTES} bytes; no manifest has")
    if hashlib.sha256(content).hexdigest().encode() != promised:
        raise SnapshotHashError(f"{place} is not the manifest that {READY_NAME} names")
    manifest = Manifest.decode(content)
    if (manifest.model, manifest.version) != (model, version):
        raise SnapshotCorruptError(f"{storage.place(folder)} holds version {manifest.version} of {manifest.model!r}")
    return manifest


def load_snapshot(root: SnapshotRoot, model: str, version: int, *, cache: FileCache | None = None) -> Snapshot:
    """Read a snapshot into memory, every byte verified; one of the SnapshotError tree if anything is off.

    cache: where files of a remote storage are kept, and looked for first.
    """
    storage, folder = open_storage(root), snapshot_folder(model, version)
    manifest = read_manifest(storage, model, version)
    if manifest.files.keys() != {DENSE_NAME, ROWS_NAME}:
        raise SnapshotCorruptError(f"{storage.place(folder)} lists the files {sorted(manifest.files)}")
    tensors = {}
    for name, entry in manifest.files.items():
        content = None if cache is None else cache.get(entry)
        if content is None:
            content = _read_verified(storage, f"{folder}/{name}", entry)
            if cache is not None:
                cache.put(entry, content)
        try:
            tensors[name] = safetensors.torch.load(content)
        except safetensors.SafetensorError as error:
            raise SnapshotCorruptError(f"{storage.place(folder)}/{name} is no safetensors file: {error}") from error
    return Snapshot(
        manifest=manifest,
        dense=tensors[DENSE_NAME],
        rows=RowBlock.of_tensors(tensors[ROWS_NAME], manifest.row_precision),
    )


def list_versions(root: SnapshotRoot, model: str) -> list[int]:
    """Versions of finished snapshots, ascending."""
    found = (re.fullmatch(rf"v(\d{{8,}})/{READY_NAME}", name) for name in names_in(root, model))
    return sorted(int(match[1]) for match in found if match)


def names_in(root: SnapshotRoot, model: str) -> list[str]:
    """Every file of a model, relative to the model's folder, ascending."""
    folder = model_folder(model)
    return [name.removeprefix(f"{folder}/") for name in open_storage(root).find(folder)]


def chain(root: SnapshotRoot, model: str, *, have: int | None, want: int, have_hash: str | None = None) -> list[int]:
    """Versions to apply in order to get from ``have`` (None: nothing) to ``want``; empty if they are equal.

    Deltas from ``have`` if there is an unbroken line of them, otherwise the newest anchor at or before ``want`` and
    its deltas: also if the line leads to a version of the same number and another content (have_hash: the content
    hash of ``have``, None: not known). SnapshotParentError if no line of finished snapshots leads to ``want``, each on
    the content that it says it builds on, with rows of its precision.
    """
    if have == want:
        return []
    versions: list[int] = []
    step, child = want, None
    while True:
        manifest = _manifest_in_chain(root, model, step, want)
        if child is not None and not child.builds_on(step, manifest.content_hash()):
            raise SnapshotParentError(
                f"version {child.version} of {model!r} builds on another version {step} than the one that is there"
            )
        if child is not None and child.row_precision != manifest.row_precision:
            raise SnapshotParentError(
                f"version {child.version} of {model!r} has {child.row_precision} rows, version {step}, which it builds"
                f" on, {manifest.row_precision}: a change of precision needs an anchor"
            )
        versions.append(step)
        if manifest.parent is None or manifest.builds_on(have, have_hash):
            return versions[::-1]
        step, child = manifest.parent, manifest


def _manifest_in_chain(root: SnapshotRoot, model: str, version: int, want: int) -> Manifest:
    try:
        return read_manifest(root, model, version)
    except SnapshotMissingError as error:
        if version == want:
            raise
        raise SnapshotParentError(f"version {want} of {model!r} needs version {version}, which is gone") from error


def _encoded(tensors: dict[str, Tensor]) -> bytes:
    return safetensors.torch.save({name: tensor.detach().contiguous() for name, tensor in tensors.items()})


def _entry(content: bytes) -> FileEntry:
    return FileEntry(size=len(content), sha256=hashlib.sha256(content).hexdigest())


def _is_finished(storage: SnapshotStorage, folder: str) -> bool:
    try:
        storage.read(f"{folder}/{READY_NAME}", size_max=0)
    except FileNotFoundError:
        return False
    return True


def _read(storage: SnapshotStorage, name: str, *, size_max: int) -> bytes:
    try:
        return storage.read(name, size_max=size_max)
    except FileNotFoundError as error:
        raise SnapshotMissingError(f"{storage.place(name)} is missing") from error


def _read_verified(storage: SnapshotStorage, name: str, entry: FileEntry) -> bytes:
    content = _read(storage, name, size_max=entry.size)
    if len(content) != entry.size:
        found = f"over {entry.size}" if len(content) > entry.size else len(content)
        raise SnapshotTruncatedError(f"{storage.place(name)} has {found} bytes; its manifest says {entry.size}")
    if hashlib.sha256(content).hexdigest() != entry.sha256:
        raise SnapshotHashError(f"{storage.place(name)} has another sha256 than its manifest says")
    return content
