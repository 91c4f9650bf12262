"""Errors of the feature store.

FeatureStoreError
├── StoreUnavailableError        the database is away, read-only, full or refuses us: retry later
│   └── StoreBusyError           another writer held the write lock longer than busy_timeout_ms: retry
├── ConcurrentAppendError        another writer changed the same user: nothing was written, retry the whole transaction
├── SchemaRevisionError          the schema is missing or not the one this code needs
│   └── SchemaDriftError         the tables differ from what the migrations should have built
├── StoreLayoutError             the store was written with other layout settings (chunk_len)
├── ChunkCorruptError            a stored chunk fails its checksum or contradicts its row
├── IdCollisionError             two strings hash to one id: refused, never merged
├── PositionError                a position was set without being locked, or moved backwards
└── HistoryBehindError           an announced interaction did not appear in SQL before the deadline
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray


class FeatureStoreError(Exception):
    """Root of every error this room raises on purpose (caller mistakes are `ValueError`)."""


class StoreUnavailableError(FeatureStoreError):
    """The database cannot be used now; nothing of the transaction was stored. Worth retrying with back-off."""


class StoreBusyError(StoreUnavailableError):
    """The write lock was held by another writer for longer than the busy timeout."""


class ConcurrentAppendError(FeatureStoreError):
    """Another writer changed a user between our read and our write; roll back and retry the whole transaction."""


class SchemaRevisionError(FeatureStoreError):
    """The schema in the database is not the revision this code was written for."""


class SchemaDriftError(SchemaRevisionError):
    """The database is at the right revision, but its tables differ from `feature_store.tables`."""


class StoreLayoutError(FeatureStoreError):
    """The store's chunks were laid out with a different `chunk_len` than the configured one."""


class ChunkCorruptError(FeatureStoreError):
    """A chunk's bytes are not what was written. `user_id` and `chunk_no` say which row."""

    def __init__(self, user_id: int, chunk_no: int, problem: str) -> None:
        super().__init__(
            f"history chunk {chunk_no} of user {user_id} is corrupt: {problem}; "
            "restore that row from a backup, or forget the user and replay the log"
        )
        self.user_id = user_id
        self.chunk_no = chunk_no
        self.problem = problem


class IdCollisionError(FeatureStoreError):
    """Two different strings of one kind hash to the same 63-bit id."""

    def __init__(self, kind: str, hashed_id: int, stored: str, new: str) -> None:
        super().__init__(
            f"{kind} {new!r} hashes to id {hashed_id}, which already belongs to {stored!r}; "
            f"they would share one history, so {new!r} is refused: rename it"
        )
        self.kind = kind
        self.hashed_id = hashed_id
        self.stored = stored
        self.new = new


class PositionError(FeatureStoreError):
    """A stored log position would be lost or move backwards."""


class HistoryBehindError(FeatureStoreError):
    """SQL does not hold interactions that the update log has announced, and the wait for them ran out."""

    def __init__(self, message: str, user_ids: NDArray[np.int64]) -> None:
        super().__init__(message)
        self.user_ids = user_ids
        """i64[K], whose; the same update without them can be applied."""
