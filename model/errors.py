"""What can go wrong in model.

    ModelError
    ├── ItemTableFullError          more items than ModelConfig.max_items
    ├── StateMismatchError          a saved state does not fit the model it is loaded into
    └── SnapshotError
        ├── SnapshotExistsError     that version is already published
        ├── SnapshotMissingError    the snapshot, or one of its files, is not there
        │   └── SnapshotNotReadyError   it was never finished: READY is absent
        ├── SnapshotCorruptError    its bytes are not the ones that were published
        │   ├── SnapshotTruncatedError  a file has another size than the manifest says
        │   └── SnapshotHashError       a file has the right size and the wrong sha256
        ├── SnapshotFormatError     written in a format this version cannot read
        ├── SnapshotStorageError    the storage did not answer, or refused
        ├── SnapshotPinnedError     workers are pinned to another version
        ├── SnapshotConfigError     made for a model of another shape
        └── SnapshotParentError     a delta on another version than the one loaded, or no chain leads there

A wrong setting, shape or dtype is the caller's mistake and raises ValueError.
"""

from __future__ import annotations


class ModelError(Exception):
    """Root of the errors this room raises."""


class ItemTableFullError(ModelError):
    """Admitting the items would exceed ModelConfig.max_items."""


class StateMismatchError(ModelError):
    """A saved state has other names, shapes or dtypes than the model it is loaded into."""


class SnapshotError(ModelError):
    """Root of what can go wrong with a snapshot."""


class SnapshotExistsError(SnapshotError):
    """The version to write is already published; versions are never rewritten."""


class SnapshotMissingError(SnapshotError):
    """The snapshot, or a file its manifest names, is not there."""


class SnapshotNotReadyError(SnapshotMissingError):
    """The snapshot was not finished: its READY file is absent."""


class SnapshotCorruptError(SnapshotError):
    """The bytes read are not the bytes published."""


class SnapshotTruncatedError(SnapshotCorruptError):
    """A file is shorter or longer than its manifest says."""


class SnapshotHashError(SnapshotCorruptError):
    """A file has the size its manifest says and another sha256."""


class SnapshotFormatError(SnapshotError):
    """The manifest is of a format version, or a structure, that this program does not read."""


class SnapshotStorageError(SnapshotError):
    """The storage could not be reached, or refused; what failed on this machine's own disk is an OSError."""


class SnapshotPinnedError(SnapshotError):
    """The pointer cannot be moved: workers are pinned to another version."""


class SnapshotConfigError(SnapshotError):
    """The snapshot was made by a model of another configuration."""


class SnapshotParentError(SnapshotError):
    """A delta does not apply to the version loaded, or no chain of published snapshots leads to the wanted one."""
