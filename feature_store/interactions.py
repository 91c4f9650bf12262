"""Interactions in columns: a flat batch, and per-user jagged histories.

Both check their columns once, on construction, and are trusted afterwards. Shapes: N rows of a batch, B users,
T interactions of all users together.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

Columns = Mapping[str, NDArray[Any]]
"""One array per name in `COLUMN_DTYPES`, all of one length."""

COLUMN_DTYPES: Final[Mapping[str, np.dtype[Any]]] = {
    "event_time_ms": np.dtype(np.int64),
    "event_key": np.dtype(np.uint64),
    "item_id": np.dtype(np.int64),
    "action": np.dtype(np.uint32),
    "value": np.dtype(np.float32),
    "surface": np.dtype(np.uint8),
    "arrival_ms": np.dtype(np.int64),
    "seq": np.dtype(np.uint32),
}
"""The columns of one interaction in a history; the last two depend on arrival order, the others only on the event."""

BYTES_PER_INTERACTION: Final = sum(dtype.itemsize for dtype in COLUMN_DTYPES.values())

SURFACE_SHIFT: Final = 32
"""Bit of an interaction's acts from which on they hold its surface."""

_NOT_TOLD: Final = np.empty(0, np.uint8)
"""Stands for a column of zeros until the number of rows is known."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Interactions:
    """N interactions of any users, in arrival order."""

    user_id: NDArray[np.int64]
    """i64[N], ≥ 0."""
    item_id: NDArray[np.int64]
    """i64[N], ≥ 0."""
    event_time_ms: NDArray[np.int64]
    """i64[N], epoch milliseconds: when it happened."""
    action: NDArray[np.uint32]
    """u32[N], bitmask of the declared actions."""
    value: NDArray[np.float32]
    """f32[N], rating or watch seconds; NaN where there is none."""
    event_key: NDArray[np.uint64]
    """u64[N], 64-bit hash of the event id: with the event time, the identity within the user's history."""
    seq: NDArray[np.uint32]
    """u32[N], arrival number within the user; 0 until the store has accepted the row."""
    arrival_ms: NDArray[np.int64]
    """i64[N], epoch milliseconds: when ingest handled it."""
    surface: NDArray[np.uint8] = field(default_factory=lambda: _NOT_TOLD)
    """u8[N], number of the declared surface on which it happened; 0, and so when left out: not told, or another."""

    def __post_init__(self) -> None:
        if self.surface is _NOT_TOLD:
            object.__setattr__(self, "surface", np.zeros(len(self.user_id), np.uint8))
        _check_column("Interactions", "user_id", self.user_id, np.dtype(np.int64), len(self.user_id))
        for name, dtype in COLUMN_DTYPES.items():
            _check_column("Interactions", name, getattr(self, name), dtype, len(self.user_id))

    def __len__(self) -> int:
        return len(self.user_id)

    @property
    def columns(self) -> dict[str, NDArray[Any]]:
        """The columns that are stored in a history, without the user."""
        return {name: getattr(self, name) for name in COLUMN_DTYPES}

    def take(self, rows: NDArray[np.integer[Any]] | NDArray[np.bool_] | slice) -> Interactions:
        """The rows selected by an index array, a mask or a slice, in that order."""
        return Interactions(**{field.name: getattr(self, field.name)[rows] for field in fields(self)})

    @staticmethod
    def concat(parts: Sequence[Interactions]) -> Interactions:
        """All rows of all parts, in order."""
        if not parts:
            return Interactions.empty()
        return Interactions(
            **{f.name: np.concatenate([getattr(part, f.name) for part in parts]) for f in fields(Interactions)}
        )

    @staticmethod
    def empty() -> Interactions:
        """No rows."""
        columns = {name: np.empty(0, dtype) for name, dtype in COLUMN_DTYPES.items()}
        return Interactions(user_id=np.empty(0, np.int64), **columns)


@dataclass(frozen=True, kw_only=True, slots=True)
class JaggedHistories:
    """B histories in `(event_time_ms, event_key)` order; row b owns `[offsets[b], offsets[b + 1])` of every column."""

    user_ids: NDArray[np.int64]
    """i64[B], as asked for (a user may occur more than once)."""
    offsets: NDArray[np.int64]
    """i64[B + 1], row boundaries: `offsets[0] == 0`, `offsets[B] == T`."""
    item_id: NDArray[np.int64]
    """i64[T]."""
    event_time_ms: NDArray[np.int64]
    """i64[T], non-decreasing within a row."""
    action: NDArray[np.uint32]
    """u32[T]."""
    value: NDArray[np.float32]
    """f32[T], NaN where there is none."""
    event_key: NDArray[np.uint64]
    """u64[T]."""
    seq: NDArray[np.uint32]
    """u32[T], arrival number within the user."""
    arrival_ms: NDArray[np.int64]
    """i64[T]."""
    surface: NDArray[np.uint8] = field(default_factory=lambda: _NOT_TOLD)
    """u8[T], 0 where it was not told."""

    def __post_init__(self) -> None:
        if self.surface is _NOT_TOLD:
            object.__setattr__(self, "surface", np.zeros(len(self.item_id), np.uint8))
        _check_column("JaggedHistories", "user_ids", self.user_ids, np.dtype(np.int64), len(self.user_ids))
        _check_column("JaggedHistories", "offsets", self.offsets, np.dtype(np.int64), len(self.user_ids) + 1)
        if self.offsets[0] != 0 or (np.diff(self.offsets) < 0).any():
            raise ValueError("JaggedHistories.offsets must start at 0 and never fall")
        for name, dtype in COLUMN_DTYPES.items():
            _check_column("JaggedHistories", name, getattr(self, name), dtype, int(self.offsets[-1]))

    @property
    def num_users(self) -> int:
        """B."""
        return len(self.user_ids)

    @property
    def num_interactions(self) -> int:
        """T."""
        return int(self.offsets[-1])

    @property
    def columns(self) -> dict[str, NDArray[Any]]:
        """The columns, each of length T."""
        return {name: getattr(self, name) for name in COLUMN_DTYPES}

    @property
    def acts(self) -> NDArray[np.int64]:
        """i64[T]: what was done and where in one number, as models read it: actions, and from bit 32 on the surface."""
        return acts_of(self.action, self.surface)

    def lengths(self) -> NDArray[np.int64]:
        """i64[B], the number of interactions in each row."""
        return np.diff(self.offsets)

    def rows(self, part: slice) -> JaggedHistories:
        """Rows that stand together, as views."""
        offsets = self.offsets[part.start : part.stop + 1]
        kept = slice(offsets[0], offsets[-1])
        columns = {name: column[kept] for name, column in self.columns.items()}
        return JaggedHistories(user_ids=self.user_ids[part], offsets=offsets - offsets[0], **columns)

    @staticmethod
    def empty(user_ids: NDArray[np.int64]) -> JaggedHistories:
        """A row without interactions for every user."""
        columns = {name: np.empty(0, dtype) for name, dtype in COLUMN_DTYPES.items()}
        return JaggedHistories(user_ids=user_ids, offsets=np.zeros(len(user_ids) + 1, np.int64), **columns)


@dataclass(frozen=True, kw_only=True, slots=True)
class AppendResult:
    """What became of each row of an appended batch, in the batch's order."""

    accepted: NDArray[np.bool_]
    """bool[N]: stored by this append; False is expired, or a duplicate of a stored interaction or of an earlier row."""
    seq: NDArray[np.uint32]
    """u32[N]: the arrival number given to an accepted row; 0 for the others."""
    late: NDArray[np.bool_]
    """bool[N]: accepted, and older than an interaction that was stored before this append."""
    expired: NDArray[np.bool_]
    """bool[N]: not accepted, because retention would not keep it, or has removed what was there: whether it was stored
    before is not known any more."""

    @staticmethod
    def of_expired(num_rows: int) -> AppendResult:
        """Of N rows that have all expired."""
        return AppendResult(
            accepted=np.zeros(num_rows, np.bool_),
            seq=np.zeros(num_rows, np.uint32),
            late=np.zeros(num_rows, np.bool_),
            expired=np.ones(num_rows, np.bool_),
        )

    def put(self, rows: NDArray[np.int64], part: AppendResult) -> None:
        """Replace what became of some of the rows (i64[M])."""
        for column in fields(self):
            getattr(self, column.name)[rows] = getattr(part, column.name)

    def rows(self, part: slice) -> AppendResult:
        """What became of some of the rows."""
        return AppendResult(**{field.name: getattr(self, field.name)[part] for field in fields(self)})

    def accepted_from(self, interactions: Interactions) -> Interactions:
        """The accepted rows of the batch that was appended, carrying their `seq`: what an update announces."""
        columns = interactions.columns | {"seq": self.seq}
        return Interactions(
            user_id=interactions.user_id[self.accepted],
            **{name: column[self.accepted] for name, column in columns.items()},
        )


def acts_of(action: NDArray[np.uint32], surface: NDArray[np.uint8]) -> NDArray[np.int64]:
    """i64, of columns of one length: see `JaggedHistories.acts`."""
    return action.astype(np.int64) | surface.astype(np.int64) << SURFACE_SHIFT


def _check_column(owner: str, name: str, column: NDArray[Any], dtype: np.dtype[Any], length: int) -> None:
    if column.dtype != dtype or column.ndim != 1 or len(column) != length:
        raise ValueError(
            f"{owner}.{name} must be {dtype}[{length}], not {column.dtype}{list(column.shape)}: "
            f"convert it with np.asarray(…, np.{dtype})"
        )
