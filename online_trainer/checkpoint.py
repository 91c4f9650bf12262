"""Checkpoints: everything needed to continue as if nothing had happened, in one directory that appears at once.

`<root>/c0000000042/` holds `tensors.safetensors` and `state.json` (with the sha256 of the tensors); the directory
is written under another name, synced and renamed, so a checkpoint either exists whole or not at all.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from online_trainer.errors import CheckpointCorruptError, CheckpointError, CheckpointMismatchError
from stream.failpoints import fail_point

logger = logging.getLogger(__name__)

_FORMAT: Final = 1
_TENSORS: Final = "tensors.safetensors"
_STATE: Final = "state.json"
_UNFINISHED: Final = "unfinished-"
_DAMAGED: Final = "damaged-"


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """What a checkpoint holds: named tensors, and a JSON-ready state beside them."""

    step: int
    config_hash: str
    tensors: dict[str, Tensor]
    state: dict[str, Any]


def write_checkpoint(root: Path, checkpoint: Checkpoint, *, keep: int) -> Path:
    """Write a checkpoint durably and delete all but the newest `keep`. Raises CheckpointError (disk full, say)."""
    final = root / f"c{checkpoint.step:010d}"
    unfinished = root / f"{_UNFINISHED}{final.name}"
    try:
        shutil.rmtree(unfinished, ignore_errors=True)
        unfinished.mkdir(parents=True)
        save_file(checkpoint.tensors, unfinished / _TENSORS)
        fail_point("trainer.checkpoint_tensors")
        state = {
            "format": _FORMAT,
            "step": checkpoint.step,
            "config_hash": checkpoint.config_hash,
            "sha256": _sha256(unfinished / _TENSORS),
            "state": checkpoint.state,
        }
        (unfinished / _STATE).write_text(json.dumps(state))
        for path in (unfinished / _TENSORS, unfinished / _STATE, unfinished):
            _sync(path)
        fail_point("trainer.checkpoint_synced")
        if final.exists():
            shutil.rmtree(final)
        unfinished.rename(final)
        _sync(root)
    except (OSError, SafetensorError) as error:  # safetensors tells of a full disk by an error of its own
        shutil.rmtree(unfinished, ignore_errors=True)
        raise CheckpointError(f"checkpoint {final} could not be written: {error}") from error
    fail_point("trainer.checkpoint_written")
    for old in _directories(root)[:-keep]:
        shutil.rmtree(old, ignore_errors=True)
    fail_point("trainer.checkpoints_pruned")
    return final


def read_newest_checkpoint(root: Path, *, config_hash: str) -> Checkpoint | None:
    """The newest checkpoint that is whole; older ones are tried, loudly, when the newest is corrupt.

    Corrupt ones are then renamed, so that they take no whole one's place among those kept. None without any
    checkpoint. Raises CheckpointError when there are some and none can be read, and CheckpointMismatchError when it was
    written for another model configuration.
    """
    directories, corrupt = _directories(root), []
    for directory in reversed(directories):
        try:
            checkpoint = _read(directory)
        except CheckpointCorruptError as error:
            logger.error("%s; trying the checkpoint before it", error)  # noqa: TRY400 - the sentence says it all
            corrupt.append(directory)
            continue
        if checkpoint.config_hash != config_hash:
            raise CheckpointMismatchError(
                f"checkpoint {directory} belongs to another [model] configuration; restore that configuration, "
                f"or start a new model by changing headrace.model or removing {root}"
            )
        for damaged in corrupt:
            _set_aside(damaged)
        return checkpoint
    if directories:
        raise CheckpointError(f"none of the {len(directories)} checkpoints in {root} can be read")
    return None


def _set_aside(directory: Path) -> None:
    aside = directory.with_name(f"{_DAMAGED}{directory.name}")
    try:
        shutil.rmtree(aside, ignore_errors=True)
        directory.rename(aside)
    except OSError as error:
        logger.warning("%s could not be renamed to %s: %s", directory, aside.name, error)


def _read(directory: Path) -> Checkpoint:
    try:
        stored = json.loads((directory / _STATE).read_text())
        if stored["format"] != _FORMAT:
            raise CheckpointError(f"{directory} has format {stored['format']}; this headrace reads {_FORMAT}")
        if _sha256(directory / _TENSORS) != stored["sha256"]:
            raise CheckpointCorruptError(f"{directory}: {_TENSORS} is not what was written (sha256 differs)")
        tensors = load_file(directory / _TENSORS)
        return Checkpoint(stored["step"], stored["config_hash"], tensors, stored["state"])
    except (OSError, ValueError, KeyError, TypeError, RecursionError, SafetensorError) as error:
        raise CheckpointCorruptError(f"{directory} cannot be read: {error}") from error


def _directories(root: Path) -> list[Path]:
    return sorted(path for path in root.glob("c*") if path.is_dir())


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
