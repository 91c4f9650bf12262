"""Moving workers to a version on purpose: back to an older one for now, to one where they stay, or some of them to a
candidate that the others may follow later.

A trainer may publish at the same time. Whoever writes the pointer last wins, but for a pin: a trainer that sees one
leaves the pointer alone, and puts it back if it was faster.
"""

from __future__ import annotations

from model.errors import SnapshotError, SnapshotMissingError, SnapshotPinnedError
from model.manifest import Manifest, SnapshotPointer
from model.snapshot import (
    CANDIDATE_NAME,
    PIN_NAME,
    chain,
    list_versions,
    load_snapshot,
    model_folder,
    move_pointer,
    pointer_to,
    read_candidate,
    read_manifest,
    read_pin,
)
from model.storage import SnapshotRoot, SnapshotStorage, open_storage


def roll_back(root: SnapshotRoot, model: str, version: int) -> Manifest:
    """Point at a version until the trainer publishes the next one.

    One of the SnapshotError tree, with the pointer where it was, if the version or what it builds on is not whole or
    if workers are pinned to another one.
    """
    storage = open_storage(root)
    pin = read_pin(storage, model)
    if pin is not None and pin.version != version:
        raise SnapshotPinnedError(f"workers are pinned to version {pin.version}: pin them to {version}, or unpin first")
    manifest = verify_chain(storage, model, version)
    move_pointer(storage, manifest)
    return manifest


def pin_snapshot(root: SnapshotRoot, model: str, version: int) -> Manifest:
    """Point at a version and stay there until `unpin_snapshot`, whatever is published meanwhile.

    One of the SnapshotError tree, with nothing changed, if the version or what it builds on is not whole.
    """
    storage = open_storage(root)
    manifest = _hold(storage, model, version, PIN_NAME, read_pin(storage, model))
    move_pointer(storage, manifest)
    return manifest


def unpin_snapshot(root: SnapshotRoot, model: str) -> Manifest | None:
    """Let workers follow the trainer again, from the newest version on; None if they were not pinned."""
    storage = open_storage(root)
    if read_pin(storage, model) is None:
        return None
    storage.remove_file(f"{model_folder(model)}/{PIN_NAME}")
    # After the pin is gone: what was finished before that is seen here, what is finished later moves the pointer.
    versions = list_versions(storage, model)
    if not versions:
        raise SnapshotMissingError(f"no version of {model!r} is left")
    newest = read_manifest(storage, model, versions[-1])
    move_pointer(storage, newest)
    return newest


def offer_candidate(root: SnapshotRoot, model: str, version: int) -> Manifest:
    """Have canary workers serve a version, and stay there until it is promoted or withdrawn.

    One of the SnapshotError tree, with nothing changed, if the version or what it builds on is not whole.
    """
    storage = open_storage(root)
    return _hold(storage, model, version, CANDIDATE_NAME, read_candidate(storage, model))


def withdraw_candidate(root: SnapshotRoot, model: str) -> int | None:
    """Have canary workers follow the others again; the version that was the candidate, None if there was none."""
    storage = open_storage(root)
    candidate = read_candidate(storage, model)
    storage.remove_file(f"{model_folder(model)}/{CANDIDATE_NAME}")
    return None if candidate is None else candidate.version


def promote_candidate(root: SnapshotRoot, model: str) -> Manifest:
    """Have all workers serve the candidate: a pin moves there, without one the pointer.

    One of the SnapshotError tree, with nothing changed, if there is none or it is not whole.
    """
    storage = open_storage(root)
    candidate = read_candidate(storage, model)
    if candidate is None:
        raise SnapshotMissingError(f"{model!r} has no candidate to promote: offer one first")
    pinned = read_pin(storage, model) is not None
    manifest = (pin_snapshot if pinned else roll_back)(storage, model, candidate.version)
    storage.remove_file(f"{model_folder(model)}/{CANDIDATE_NAME}")
    return manifest


def _hold(
    storage: SnapshotStorage, model: str, version: int, pointer_name: str, before: SnapshotPointer | None
) -> Manifest:
    """Write a pointer that keeps a version from being deleted, once the version is known to be whole."""
    manifest, name = verify_chain(storage, model, version), f"{model_folder(model)}/{pointer_name}"
    storage.publish(name, pointer_to(manifest).encode())
    try:
        # From here on nothing of the chain is deleted; a trainer may just have done so.
        chain(storage, model, have=None, want=version)
    except SnapshotError:
        if before is None:
            storage.remove_file(name)
        else:
            storage.publish(name, before.encode())
        raise
    return manifest


def verify_chain(root: SnapshotRoot, model: str, version: int) -> Manifest:
    """Read a version and everything it builds on, every byte; SnapshotError or OSError if anything is off."""
    for one in chain(root, model, have=None, want=version):
        manifest = load_snapshot(root, model, one).manifest
    assert manifest.version == version
    return manifest
