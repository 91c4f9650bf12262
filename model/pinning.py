"""Moving workers to a version on purpose: back to an older one for now, or to one where they stay.

A trainer may publish at the same time. Whoever writes the pointer last wins, but for a pin: a trainer that sees one
leaves the pointer alone, and puts it back if it was faster.
"""

from __future__ import annotations

from model.errors import SnapshotError, SnapshotMissingError, SnapshotPinnedError
from model.manifest import Manifest
from model.snapshot import (
    PIN_NAME,
    chain,
    list_versions,
    load_snapshot,
    model_folder,
    move_pointer,
    pointer_to,
    read_manifest,
    read_pin,
)
from model.storage import SnapshotRoot, open_storage


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
    manifest = verify_chain(storage, model, version)
    pin_name, before = f"{model_folder(model)}/{PIN_NAME}", read_pin(storage, model)
    storage.publish(pin_name, pointer_to(manifest).encode())
    try:
        # From here on nothing of the chain is deleted; a trainer may just have done so.
        chain(storage, model, have=None, want=version)
    except SnapshotError:
        if before is None:
            storage.remove_file(pin_name)
        else:
            storage.publish(pin_name, before.encode())
        raise
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


def verify_chain(root: SnapshotRoot, model: str, version: int) -> Manifest:
    """Read a version and everything it builds on, every byte; SnapshotError or OSError if anything is off."""
    for one in chain(root, model, have=None, want=version):
        manifest = load_snapshot(root, model, one).manifest
    assert manifest.version == version
    return manifest
