"""Memory for many short histories: columns shared by all users, one block of rows per user.

A block holds its user's newest interactions in order, with room to grow; when a block is full it moves to the end of
the arena, and when the arena is full the least recently touched users are evicted and the rest is moved together.
Knows nothing of SQL or of updates: that is `feature_store.hot`.
"""

from __future__ import annotations

from itertools import islice
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from feature_store.column_rows import ColumnRows
from feature_store.config import SLOT_BYTES
from feature_store.interactions import BYTES_PER_INTERACTION, Columns
from feature_store.jagged import concat_ranges, offsets_of
from feature_store.merging import Places
from feature_store.slot_table import SlotTable

_MIN_CAPACITY: Final = 8
_FIRST_SLOTS: Final = 1024
_MOVE_ROWS: Final = 1 << 18
"""Interactions moved at once when blocks are moved together; bounds the temporary memory."""
_EVICTED_MAX: Final = 100_000
"""Evicted users whose next arrival number is remembered, newest evictions first: some ten megabytes."""


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
        self._rows = ColumnRows(budget_bytes // BYTES_PER_INTERACTION)
        self.num_evictions = 0
        self._index = SlotTable()
        self._free = list(range(_FIRST_SLOTS - 1, -1, -1))
        self._evicted: dict[int, int] = {}
        self._num_rows_used = 0
        self._now = 0
        self._user_id = np.zeros(_FIRST_SLOTS, np.int64)
        self.start = np.zeros(_FIRST_SLOTS, np.int64)
        self.capacity = np.zeros(_FIRST_SLOTS, np.int64)
        self.length = np.zeros(_FIRST_SLOTS, np.int64)
        self.next_seq = np.zeros(_FIRST_SLOTS, np.int64)
        self._touched = np.zeros(_FIRST_SLOTS, np.int64)

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
        return self._index.find(user_ids)

    def touch(self, slots: NDArray[np.int64]) -> None:
        """Mark users as used now: they are evicted last."""
        self._now += 1
        self._touched[slots] = self._now

    def next_seq_of(self, user_ids: NDArray[np.int64], slots: NDArray[np.int64]) -> NDArray[np.int64]:
        """i64[B], each user's next arrival number; of an evicted one as it was then, 0 if nothing is known of it."""
        is_absent = slots < 0
        if not is_absent.any():
            return self.next_seq[slots]
        next_seq = np.zeros(len(slots), np.int64)
        next_seq[~is_absent] = self.next_seq[slots[~is_absent]]
        next_seq[is_absent] = [self._evicted.get(user_id, 0) for user_id in user_ids[is_absent].tolist()]
        return next_seq

    def copy(self, starts: NDArray[np.int64], lengths: NDArray[np.int64]) -> dict[str, NDArray[Any]]:
        """The columns of the rows `[starts[b], starts[b] + lengths[b])`, back to back, in new memory."""
        return self._rows.copy(starts, lengths)

    def window(
        self, slots: NDArray[np.int64], max_len: int, before_ms: NDArray[np.int64] | None
    ) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """First row and end (both i64[B]) of each user's newest max_len interactions, strictly before a time."""
        start = self.start[slots]
        end = start + self.length[slots]
        if before_ms is not None:
            end = self._first_row_at(start, end, before_ms)
        return np.maximum(start, end - max_len), end

    def first_retained(self, slots: NDArray[np.int64], max_history: int, horizon_ms: int | None) -> NDArray[np.int64]:
        """i64[B], first row of each user's block that is at or after the horizon and among the newest max_history
        (0: of any number); the block's end if none is.
        """
        start = self.start[slots]
        end = start + self.length[slots]
        if max_history:
            start = np.maximum(start, end - max_history)
        return start if horizon_ms is None else self._first_row_at(start, end, np.full(len(slots), horizon_ms))

    def is_before(self, slots: NDArray[np.int64], places: Places) -> NDArray[np.bool_]:
        """bool[U], whether each user's newest row lies before a place; so it does if there is no row."""
        length = self.length[slots]
        last_row = np.maximum(self.start[slots] + length - 1, 0)
        last = Places(
            group=places.group,
            event_time_ms=self._rows.columns["event_time_ms"][last_row],
            event_key=self._rows.columns["event_key"][last_row],
        )
        is_before: NDArray[np.bool_] = (length == 0) | last.is_before(places)
        return is_before

    def append(
        self, slots: NDArray[np.int64], offsets: NDArray[np.int64], columns: Columns, next_seq: NDArray[np.int64]
    ) -> None:
        """Add rows at the end of users' blocks; beyond `max_kept` the oldest may be left out.

        Args:
            slots: i64[U], distinct, at most `max_users_at_once`.
            offsets: i64[U + 1], rows of `columns`.
            columns: the new rows, in order, all after the user's newest row.
            next_seq: i64[U], arrival number that each user's next interaction will have.
        """
        counts = np.diff(offsets)
        is_long = counts > self.max_kept
        if is_long.any():
            starts = np.maximum(offsets[1:] - self.max_kept, offsets[:-1])
            counts = offsets[1:] - starts
            rows = concat_ranges(starts, counts)
            columns = {name: column[rows] for name, column in columns.items()}
        # Where new rows are left out, so is all that comes before them.
        is_full = is_long | (self.length[slots] + counts > self.capacity[slots])
        if is_full.any():
            self._make_room(slots[is_full], counts[is_full])
        length = self.length[slots]
        self._rows.write(self.start[slots] + length, counts, columns)
        self.length[slots] = length + counts
        self.next_seq[slots] = next_seq

    def cut(self, slots: NDArray[np.int64], time_ms: NDArray[np.int64]) -> tuple[NDArray[np.int64], Columns]:
        """Take the rows at or after a time (i64[U]) out of users' blocks: how many of each user, and their columns."""
        start = self.start[slots]
        end = start + self.length[slots]
        first = self._first_row_at(start, end, time_ms)
        self.length[slots] = first - start
        return end - first, self._rows.copy(first, end - first)

    def put(
        self, user_ids: NDArray[np.int64], offsets: NDArray[np.int64], columns: Columns, next_seq: NDArray[np.int64]
    ) -> NDArray[np.int64]:
        """Set the whole content of users' blocks (distinct users, resident or not), touch them, and return their slots.

        Args:
            user_ids: i64[U], at most `max_users_at_once`.
            offsets: i64[U + 1], rows of `columns`; at most `max_kept` per user, in order.
            columns: the interactions.
            next_seq: i64[U], arrival number that each user's next interaction will have.
        """
        lengths = np.diff(offsets)
        assert lengths.max(initial=0) <= self.max_kept
        slots = self._take_slots(user_ids)
        self.touch(slots)
        self._allocate(slots, lengths)
        self._rows.write(self.start[slots], lengths, columns)
        self.length[slots] = lengths
        self.next_seq[slots] = next_seq
        return slots

    def drop(self, user_ids: NDArray[np.int64]) -> None:
        """Make users not resident, and remember nothing of them."""
        self._free.extend(self._index.remove(user_ids).tolist())
        self._unremember(user_ids)

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
            grown = max(2 * size, size + num_more)
            for name in ("_user_id", "start", "capacity", "length", "next_seq", "_touched"):
                setattr(self, name, np.concatenate([getattr(self, name), np.zeros(grown - size, np.int64)]))
            self._free.extend(range(grown - 1, size - 1, -1))
        if len(absent):
            new = np.array([self._free.pop() for _ in range(len(absent))])
            slots[absent] = new
            self._index.add(user_ids[absent], new)
            self._unremember(user_ids[absent])
            self._user_id[new] = user_ids[absent]
            self.capacity[new] = 0
            self.length[new] = 0
        return slots

    def _unremember(self, user_ids: NDArray[np.int64]) -> None:
        if self._evicted:
            for user_id in user_ids.tolist():
                self._evicted.pop(user_id, None)

    def _make_room(self, slots: NDArray[np.int64], num_more: NDArray[np.int64]) -> None:
        """Give blocks room for more rows at their end, leaving out the oldest rows beyond `max_kept`."""
        length = self.length[slots]
        kept = np.minimum(length, self.max_kept - num_more)
        content = self.copy(self.start[slots] + length - kept, kept)
        self._allocate(slots, kept + num_more)
        self._rows.write(self.start[slots], kept, content)
        self.length[slots] = kept

    def _allocate(self, slots: NDArray[np.int64], lengths: NDArray[np.int64]) -> None:
        """Let blocks be larger than these lengths; those that are not already move, and their content is undefined."""
        must_move = lengths >= self.capacity[slots]
        moved = slots[must_move]
        if len(moved) == 0:
            return
        capacities = np.maximum(_MIN_CAPACITY, _power_of_two_above(lengths[must_move]))
        capacities = np.minimum(2 * self.max_len, capacities)
        num_rows = int(capacities.sum())
        self._reserve(num_rows)
        self.start[moved] = self._num_rows_used + offsets_of(capacities)[:-1]
        self.capacity[moved] = capacities
        self._num_rows_used += num_rows

    def _reserve(self, num_rows: int) -> None:
        """Make room at the end of the arena, evicting users if what is live takes more than half of the budget."""
        if self.bytes_used + num_rows * BYTES_PER_INTERACTION <= self.budget_bytes:
            return
        slots = self._index.slots
        newest_first = slots[np.argsort(-self._touched[slots], kind="stable")]
        sizes = self.capacity[newest_first] * BYTES_PER_INTERACTION + SLOT_BYTES
        num_kept = int(np.searchsorted(np.cumsum(sizes), self.budget_bytes // 2, side="right"))
        evicted = newest_first[num_kept:]
        self.num_evictions += len(evicted)
        self._evict(evicted[::-1])
        self._move_together(newest_first[:num_kept])

    def _evict(self, slots: NDArray[np.int64]) -> None:
        user_ids = self._user_id[slots]
        self.drop(user_ids)
        self._evicted.update(zip(user_ids.tolist(), self.next_seq[slots].tolist(), strict=True))
        for user_id in list(islice(self._evicted, max(0, len(self._evicted) - _EVICTED_MAX))):
            del self._evicted[user_id]

    def _move_together(self, slots: NDArray[np.int64]) -> None:
        slots = slots[np.argsort(self.start[slots])]
        starts = offsets_of(self.capacity[slots])
        # Blocks only move towards the front, front ones first, so none overwrites one that has not moved yet.
        bounds = np.searchsorted(starts, np.arange(0, starts[-1] + _MOVE_ROWS, _MOVE_ROWS))
        for low, high in zip(bounds[:-1].tolist(), bounds[1:].tolist(), strict=True):
            part = slots[low:high]
            content = self._rows.copy(self.start[part], self.length[part])
            self._rows.write(starts[low : min(high, len(slots))], self.length[part], content)
        self.start[slots] = starts[:-1]
        self._num_rows_used = int(starts[-1])


def _power_of_two_above(lengths: NDArray[np.int64]) -> NDArray[np.int64]:
    """The smallest power of two greater than each length (exact for lengths below 2**53)."""
    _, exponent = np.frexp(lengths.astype(np.float64))
    return np.int64(1) << exponent.astype(np.int64)
