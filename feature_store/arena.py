"""Memory for many short histories: columns shared by all users, one block of rows per user.

A block holds its user's newest interactions in order, with room to grow; when a block is full it moves to the end of
the arena, and when the arena is full the least recently touched users are evicted and the rest is moved together.
Knows nothing of SQL or of updates: that is `feature_store.hot`.
"""

from __future__ import annotations

from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from feature_store.config import SLOT_BYTES
from feature_store.interactions import BYTES_PER_INTERACTION, Columns
from feature_store.jagged import concat_ranges, offsets_of
from feature_store.merging import Places
from feature_store.packed import PackedColumns

_MIN_CAPACITY: Final = 8
_MOVE_ROWS: Final = 1 << 18
"""Interactions moved at once when blocks are moved together; bounds the temporary memory."""


def working_set_bytes(max_len: int) -> int:
    """The most that one user can take up."""
    return 2 * max_len * BYTES_PER_INTERACTION + SLOT_BYTES


class HistoryArena:
    """Blocks of up to 2·max_len interactions, in at most `budget_bytes`. Not thread-safe."""

    def __init__(self, max_len: int, budget_bytes: int) -> None:
        self.max_len = max_len
        # More than asked for: a query as of a moment ago still finds max_len interactions before that moment here.
        self.max_kept = max_len + max_len // 2
        self.budget_bytes = budget_bytes
        self._rows = PackedColumns(budget_bytes // BYTES_PER_INTERACTION)
        self.num_evictions = 0
        self._index: dict[int, int] = {}
        self._free: list[int] = []
        self._num_rows_used = 0
        self._now = 0
        self._user_id = np.zeros(0, np.int64)
        self.start = np.zeros(0, np.int64)
        self.capacity = np.zeros(0, np.int64)
        self.length = np.zeros(0, np.int64)
        self.next_seq = np.zeros(0, np.int64)
        self._touched = np.zeros(0, np.int64)

    @property
    def num_users(self) -> int:
        """Resident users."""
        return len(self._index)

    @property
    def bytes_used(self) -> int:
        """Memory taken by resident users and by what has not been moved together yet."""
        return self._num_rows_used * BYTES_PER_INTERACTION + len(self._index) * SLOT_BYTES

    @property
    def max_users_at_once(self) -> int:
        """How many users one call may touch and still be sure that all of them stay resident."""
        return max(1, self.budget_bytes // 2 // working_set_bytes(self.max_len))

    def slots_of(self, user_ids: NDArray[np.int64]) -> NDArray[np.int64]:
        """i64[B], the slot of each user; -1 for those not resident."""
        find = self._index.get
        return np.fromiter((find(user_id, -1) for user_id in user_ids.tolist()), np.int64, len(user_ids))

    def touch(self, slots: NDArray[np.int64]) -> None:
        """Mark users as used now: they are evicted last."""
        self._now += 1
        self._touched[slots] = self._now

    def next_seq_of(self, slots: NDArray[np.int64]) -> NDArray[np.int64]:
        """i64[B], each user's next arrival number; 0 for a slot of -1."""
        is_resident = slots >= 0
        next_seq = np.zeros(len(slots), np.int64)
        next_seq[is_resident] = self.next_seq[slots[is_resident]]
        return next_seq

    def copy(self, starts: NDArray[np.int64], lengths: NDArray[np.int64]) -> dict[str, NDArray[Any]]:
        """The columns of the rows `[starts[b], starts[b] + lengths[b])`, back to back, in new memory."""
        return self._rows.copy(starts, lengths)

    def columns_of(self, slots: NDArray[np.int64]) -> dict[str, NDArray[Any]]:
        """All interactions of these users, back to back."""
        return self.copy(self.start[slots], self.length[slots])

    def window(
        self, slots: NDArray[np.int64], max_len: int, before_ms: NDArray[np.int64] | None
    ) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """First row and end (both i64[B]) of each user's newest max_len interactions, strictly before a time."""
        start = self.start[slots]
        end = start + self.length[slots]
        if before_ms is not None:
            end = self._first_row_at(start, end, before_ms)
        return np.maximum(start, end - max_len), end

    def fits_after(self, slots: NDArray[np.int64], new: Places) -> NDArray[np.bool_]:
        """bool[U], whether each user's new rows (ordered, grouped by user 0 … U-1) can go at the end of its block."""
        counts = np.bincount(new.group, minlength=len(slots))
        length = self.length[slots]
        first_new = new.take(np.cumsum(counts) - counts)
        last_row = np.maximum(self.start[slots] + length - 1, 0)
        last = Places(
            group=first_new.group,
            event_time_ms=self._rows.columns["event_time_ms"][last_row],
            event_key=self._rows.columns["event_key"][last_row],
        )
        follows: NDArray[np.bool_] = (length == 0) | last.is_before(first_new)
        return follows & (length + counts <= self.capacity[slots])

    def extend(
        self,
        slots: NDArray[np.int64],
        selected: NDArray[np.bool_],
        group: NDArray[np.int64],
        columns: Columns,
        next_seq: NDArray[np.int64],
    ) -> None:
        """Append rows at the end of the selected users' blocks.

        Args:
            slots: i64[U].
            selected: bool[U], users for whom `fits_after` holds.
            group: i64[N], the rows' user numbers 0 … U-1, ascending.
            columns: the N rows, those of each user in order; rows of other users are left out.
            next_seq: i64[U], arrival number that each user's next interaction will have.
        """
        counts = np.bincount(group, minlength=len(slots))
        rows = np.flatnonzero(selected[group])
        target = concat_ranges((self.start[slots] + self.length[slots])[selected], counts[selected])
        for name, column in columns.items():
            self._rows.columns[name][target] = column[rows]
        self.length[slots[selected]] += counts[selected]
        self.next_seq[slots[selected]] = next_seq[selected]

    def put(
        self, user_ids: NDArray[np.int64], offsets: NDArray[np.int64], columns: Columns, next_seq: NDArray[np.int64]
    ) -> None:
        """Set the whole content of users' blocks (distinct users, resident or not), and touch them.

        Args:
            user_ids: i64[U], at most `max_users_at_once`.
            offsets: i64[U + 1], rows of `columns`; at most `max_kept` per user, in order.
            columns: the interactions.
            next_seq: i64[U], arrival number that each user's next interaction will have.
        """
        lengths = np.diff(offsets)
        assert len(lengths) == 0 or lengths.max() <= self.max_kept
        slots = self.slots_of(user_ids)
        self.touch(slots[slots >= 0])
        must_move = (slots < 0) | (lengths >= self.capacity[slots] if len(self.capacity) else True)
        capacities = np.minimum(2 * self.max_len, np.maximum(_MIN_CAPACITY, _power_of_two_above(lengths)))
        self._reserve(int(capacities[must_move].sum()), int((slots < 0).sum()))
        slots = self._take_slots(user_ids)
        moved = slots[must_move]
        self.start[moved] = self._num_rows_used + offsets_of(capacities[must_move])[:-1]
        self.capacity[moved] = capacities[must_move]
        self._num_rows_used += int(capacities[must_move].sum())
        self.length[slots] = lengths
        self.next_seq[slots] = next_seq
        self.touch(slots)
        self._rows.write(self.start[slots], lengths, columns)

    def drop(self, user_ids: NDArray[np.int64]) -> None:
        """Make users not resident."""
        for user_id in user_ids.tolist():
            slot = self._index.pop(user_id, None)
            if slot is not None:
                self._free.append(slot)

    def _first_row_at(
        self, low: NDArray[np.int64], high: NDArray[np.int64], time_ms: NDArray[np.int64]
    ) -> NDArray[np.int64]:
        """Binary search in all blocks at once: the first row in [low, high) at or after a time, else high."""
        event_time_ms = self._rows.columns["event_time_ms"]
        low, high = low.copy(), high.copy()
        while (is_open := low < high).any():
            middle = (low + high) // 2
            is_before = event_time_ms[np.minimum(middle, len(event_time_ms) - 1)] < time_ms
            low = np.where(is_open & is_before, middle + 1, low)
            high = np.where(is_open & ~is_before, middle, high)
        return low

    def _take_slots(self, user_ids: NDArray[np.int64]) -> NDArray[np.int64]:
        slots = self.slots_of(user_ids)
        absent = np.flatnonzero(slots < 0)
        num_more = len(absent) - len(self._free)
        if num_more > 0:
            size = len(self.start)
            grown = max(2 * size, size + num_more, 1024)
            for name in ("_user_id", "start", "capacity", "length", "next_seq", "_touched"):
                setattr(self, name, np.concatenate([getattr(self, name), np.zeros(grown - size, np.int64)]))
            self._free.extend(range(grown - 1, size - 1, -1))
        for position in absent.tolist():
            slot = self._free.pop()
            slots[position] = slot
            self._index[int(user_ids[position])] = slot
        self._user_id[slots] = user_ids
        return slots

    def _reserve(self, num_rows: int, num_users: int) -> None:
        """Make room at the end of the arena, evicting users if what is live takes more than half of the budget."""
        if self.bytes_used + num_rows * BYTES_PER_INTERACTION + num_users * SLOT_BYTES <= self.budget_bytes:
            return
        slots = np.fromiter(self._index.values(), np.int64, len(self._index))
        newest_first = slots[np.argsort(-self._touched[slots], kind="stable")]
        sizes = self.capacity[newest_first] * BYTES_PER_INTERACTION + SLOT_BYTES
        num_kept = int(np.searchsorted(np.cumsum(sizes), self.budget_bytes // 2, side="right"))
        evicted = newest_first[num_kept:]
        self.num_evictions += len(evicted)
        self.drop(self._user_id[evicted])
        self._move_together(newest_first[:num_kept])

    def _move_together(self, slots: NDArray[np.int64]) -> None:
        slots = slots[np.argsort(self.start[slots])]
        starts = offsets_of(self.capacity[slots])
        # Blocks only move towards the front, front ones first, so none overwrites one that has not moved yet.
        bounds = np.searchsorted(starts, np.arange(0, starts[-1] + _MOVE_ROWS, _MOVE_ROWS))
        for low, high in zip(bounds[:-1].tolist(), bounds[1:].tolist(), strict=True):
            part = slots[low:high]
            # Whole blocks, so that what is written lies in one piece.
            blocks = self._rows.copy(self.start[part], self.capacity[part])
            self._rows.write(starts[low : low + 1], self.capacity[part].sum(keepdims=True), blocks)
        self.start[slots] = starts[:-1]
        self._num_rows_used = int(starts[-1])


def _power_of_two_above(lengths: NDArray[np.int64]) -> NDArray[np.int64]:
    """The smallest power of two greater than each length (exact for lengths below 2**53)."""
    _, exponent = np.frexp(lengths.astype(np.float64))
    return np.int64(1) << exponent.astype(np.int64)
