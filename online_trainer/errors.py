"""What can go wrong in `online_trainer`.

TrainerError
├── CheckpointError            no checkpoint can be used
│   └── CheckpointCorruptError   one checkpoint's files are not what was written; older ones are tried
├── CheckpointMismatchError    the checkpoint belongs to another model configuration
└── UpstreamFencedError        another upstream daemon writes the same model's vectors
"""

from __future__ import annotations


class TrainerError(Exception):
    """Root of this room's errors."""


class CheckpointError(TrainerError):
    """A checkpoint cannot be read or written."""


class CheckpointCorruptError(CheckpointError):
    """A checkpoint's files are not what was written."""


class CheckpointMismatchError(TrainerError):
    """The checkpoint was written for another model configuration."""


class UpstreamFencedError(TrainerError):
    """Another upstream daemon has moved the positions that this one left."""
