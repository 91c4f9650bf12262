"""From 63-bit ids to dense numbers: an open-addressing hash whose every operation is vectorised.

Shapes: N ids of one call. Slots are probed linearly; at most half of them are used, so probing stays short. An index
that runs out of slots gets new ones at once and moves its ids there over the calls that follow, a few with each.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Int64s = NDArray[np.int64]

_EMPTY = np.int64(0)
_REMOVED = np.int64(1)
"""Slots hold ids with all bits flipped, negative numbers: memory fresh from the system, all zeros, holds none."""
_MOVED_MIN = 4096
_MOVED_PER_ID = 8
"""Old slots emptied with each call: so many, or so many for every id added. That ends long before the new ones, a
quarter used when it begins, are half used."""
_PREPARED_PER_ID = 64
"""New slots made ready with each call, for every id added since two fifths of the slots are used; ready by a half."""


class _Slots:
    """Where ids are: flipped ids and rows, int64 of a power of two."""

    def __init__(self, num_slots: int) -> None:
        self.flipped = np.zeros(num_slots, dtype=np.int64)
        self.rows = np.zeros(num_slots, dtype=np.int64)

    def find(self, ids: Int64s) -> tuple[Int64s, NDArray[np.bool_]]:
        """The slot of each id, and whether it is there."""
        slots, wanted = self._home(ids), ~ids
        found = np.zeros(len(ids), dtype=np.bool_)
        pending = np.flatnonzero(ids >= 0)
        while len(pending):
            held = self.flipped[slots[pending]]
            found[pending] = held == wanted[pending]
            pending = pending[~found[pending] & (held != _EMPTY)]
            slots[pending] = (slots[pending] + 1) & (len(self.rows) - 1)
        return slots, found

    def place(self, ids: Int64s, held: Int64s) -> Int64s:
        """Write distinct ids, none of them present, into ``held`` (these slots, or a copy); returns where."""
        assert len(ids) == 0 or int(ids.min()) >= 0, "ids are 63-bit"
        placed = np.empty(len(ids), dtype=np.int64)
        pending = np.arange(len(ids))
        slots, wanted = self._home(ids), ~ids
        while len(pending):
            free = held[slots] == _EMPTY
            # Two ids may want one slot: the last one written keeps it, the others see that on reading back.
            held[slots[free]] = wanted[pending[free]]
            won = free & (held[slots] == wanted[pending])
            placed[pending[won]] = slots[won]
            pending = pending[~won]
            slots = (slots[~won] + 1) & (len(held) - 1)
        return placed

    def put(self, ids: Int64s, rows: Int64s) -> None:
        """Add distinct ids, none of them present."""
        self.rows[self.place(ids, self.flipped)] = rows

    def touch(self, part: slice) -> None:
        """Have the system give memory for slots without ids: hashing would ask for all of it within a few calls."""
        self.flipped[part] = _EMPTY
        self.rows[part] = 0

    def live(self, part: slice) -> tuple[Int64s, Int64s]:
        """Ids and rows in some of the slots."""
        kept = np.flatnonzero(self.flipped[part] < 0)
        return ~self.flipped[part][kept], self.rows[part][kept]

    def _home(self, ids: Int64s) -> Int64s:
        return (mix64(ids.astype(np.uint64)) & np.uint64(len(self.rows) - 1)).astype(np.int64)


def mix64(values: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Scramble the bits of each value (the finaliser of splitmix64); wraps around silently."""
    mixed = values + np.uint64(0x9E3779B97F4A7C15)
    mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return mixed ^ (mixed >> np.uint64(31))


class IdIndex:
    """A map from id (int64 >= 0) to row (int64 >= 0).

    >>> index = IdIndex()
    >>> index.put(np.array([70, 30]), np.array([0, 1]))
    >>> index.find(np.array([30, 5])).tolist()
    [1, -1]
    """

    def __init__(self, *, num_slots: int = 1024) -> None:
        if num_slots < 2 or num_slots & (num_slots - 1):
            raise ValueError(f"num_slots is {num_slots}; it must be a power of two of at least 2")
        self._slots = _Slots(num_slots)
        self._num_used = 0  # of them, or wanted of them by ids still in the old ones; removed ones lengthen probes too
        self._next: _Slots | None = None
        self._num_prepared = 0
        self._old: _Slots | None = None
        self._num_emptied = 0

    def find(self, ids: Int64s) -> Int64s:
        """int64[N]: the row of each id, -1 where it is unknown."""
        ids = np.asarray(ids, dtype=np.int64)
        slots, found = self._slots.find(ids)
        rows = np.where(found, self._slots.rows[slots], -1)
        if self._old is not None and not found.all():
            missing = np.flatnonzero(~found)
            slots, found = self._old.find(ids[missing])
            rows[missing[found]] = self._old.rows[slots[found]]
        return rows

    def put(self, ids: Int64s, rows: Int64s) -> None:
        """Add distinct ids, none of them present."""
        if 5 * (self._num_used + len(ids)) > 2 * len(self._slots.rows):
            self._prepare(len(ids))
        if 2 * (self._num_used + len(ids)) > len(self._slots.rows):
            self._change_slots()
        self._slots.put(ids, rows)
        self._num_used += len(ids)
        self._move(max(_MOVED_MIN, _MOVED_PER_ID * len(ids)))

    def free_slots(self, ids: Int64s) -> Int64s:
        """int64[N]: where `fill` may put distinct ids, none of them present; there must be room. Reads only."""
        return self._slots.place(ids, self._slots.flipped.copy()) if len(ids) else np.empty(0, np.int64)

    def fill(self, slots: Int64s, ids: Int64s, rows: Int64s) -> None:
        """Add ids at their `free_slots`, nothing having been added since."""
        self._slots.flipped[slots] = ~ids
        self._slots.rows[slots] = rows
        self._num_used += len(ids)

    def change(self, ids: Int64s, rows: Int64s) -> None:
        """Give distinct ids, all of them present, other rows."""
        for held in (self._slots, self._old):
            if held is not None:
                slots, found = held.find(ids)
                held.rows[slots[found]] = rows[found]

    def remove(self, ids: Int64s) -> None:
        """Forget distinct ids; unknown ones are ignored."""
        for held in (self._slots, self._old):
            if held is not None:
                slots, found = held.find(np.asarray(ids, dtype=np.int64))
                held.flipped[slots[found]] = _REMOVED

    def _prepare(self, num_more: int) -> None:
        """Make the slots ready that the index will change to, a part with each call."""
        num_used = self._num_used + num_more
        if self._next is None or len(self._next.rows) < 2 * num_used:
            self._move(None)  # done long ago, unless slots were filled while ids moved
            num_live = int((self._slots.flipped < 0).sum()) + num_more
            self._next, self._num_prepared = _Slots(_room_for(num_live, len(self._slots.rows))), 0
        end = self._num_prepared + max(_MOVED_MIN, _PREPARED_PER_ID * num_more)
        self._next.touch(slice(self._num_prepared, end))
        self._num_prepared = end

    def _change_slots(self) -> None:
        assert self._next is not None, "slots are prepared before they are needed"
        self._old, self._slots, self._next, self._num_emptied = self._slots, self._next, None, 0
        self._num_used = int((self._old.flipped < 0).sum())

    def _move(self, num_slots: int | None) -> None:
        """Move the ids in so many of the old slots (None: in all) to the new ones."""
        if self._old is None:
            return
        end = len(self._old.rows) if num_slots is None else self._num_emptied + num_slots
        self._slots.put(*self._old.live(slice(self._num_emptied, end)))
        # Left behind as removed, so that an id is in one place and the probes that lead past it stay whole.
        emptied = self._old.flipped[self._num_emptied : end]
        emptied[emptied < 0] = _REMOVED
        self._num_emptied = end
        if end >= len(self._old.rows):
            self._old = None

    def roomier(self, num_more: int) -> IdIndex | None:
        """A copy with slots for so many more ids, None if there are slots already. Reads only."""
        if 2 * (self._num_used + num_more) <= len(self._slots.rows):
            return None
        held = [slots.live(slice(None)) for slots in (self._slots, self._old) if slots is not None]
        ids, rows = (np.concatenate(parts) for parts in zip(*held, strict=True))
        copy = IdIndex(num_slots=_room_for(len(ids) + num_more, len(self._slots.rows)))
        copy.put(ids, rows)
        return copy


def _room_for(num_ids: int, num_slots: int) -> int:
    """Slots of which a quarter would be used, in doublings of num_slots."""
    while num_slots < 4 * num_ids:
        num_slots *= 2
    return num_slots
