"""From 63-bit ids to dense numbers: an open-addressing hash whose every operation is vectorised.

Shapes: N ids of one call. Slots are probed linearly; at most half of them are used, so probing stays short.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Int64s = NDArray[np.int64]

_EMPTY = np.int64(-1)
_REMOVED = np.int64(-2)


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
        self._ids = np.full(num_slots, _EMPTY, dtype=np.int64)
        self._rows = np.full(num_slots, -1, dtype=np.int64)
        self._num_used = 0  # removed slots count: they still lengthen probes

    def find(self, ids: Int64s) -> Int64s:
        """int64[N]: the row of each id, -1 where it is unknown."""
        slots, found = self._probe(np.asarray(ids, dtype=np.int64))
        return np.where(found, self._rows[slots], -1)

    def put(self, ids: Int64s, rows: Int64s) -> None:
        """Add distinct ids, none of them present."""
        if len(ids) == 0:
            return
        self._reserve(len(ids))
        self._rows[self._place(ids, self._ids)] = rows
        self._num_used += len(ids)

    def free_slots(self, ids: Int64s) -> Int64s:
        """int64[N]: where `fill` may put distinct ids, none of them present; there must be room. Reads only."""
        return self._place(ids, self._ids.copy()) if len(ids) else np.empty(0, np.int64)

    def fill(self, slots: Int64s, ids: Int64s, rows: Int64s) -> None:
        """Add ids at their `free_slots`, nothing having been added since."""
        self._ids[slots] = ids
        self._rows[slots] = rows
        self._num_used += len(ids)

    def _place(self, ids: Int64s, held: Int64s) -> Int64s:
        """Write ids into the slots' ids `held`; returns where."""
        assert int(ids.min()) >= 0, "ids are 63-bit"
        placed = np.empty(len(ids), dtype=np.int64)
        pending = np.arange(len(ids))
        slots = self._home(ids)
        while len(pending):
            free = held[slots] == _EMPTY
            # Two ids may want one slot: the last one written keeps it, the others see that on reading back.
            held[slots[free]] = ids[pending[free]]
            won = free & (held[slots] == ids[pending])
            placed[pending[won]] = slots[won]
            pending = pending[~won]
            slots = (slots[~won] + 1) & (len(held) - 1)
        return placed

    def remove(self, ids: Int64s) -> None:
        """Forget distinct ids; unknown ones are ignored."""
        slots, found = self._probe(np.asarray(ids, dtype=np.int64))
        self._ids[slots[found]] = _REMOVED

    def _probe(self, ids: Int64s) -> tuple[Int64s, NDArray[np.bool_]]:
        slots = self._home(ids)
        found = np.zeros(len(ids), dtype=np.bool_)
        pending = np.arange(len(ids))
        while len(pending):
            held = self._ids[slots[pending]]
            found[pending] = (held == ids[pending]) & (ids[pending] >= 0)
            pending = pending[~found[pending] & (held != _EMPTY)]
            slots[pending] = (slots[pending] + 1) & (len(self._ids) - 1)
        return slots, found

    def _home(self, ids: Int64s) -> Int64s:
        return (mix64(ids.astype(np.uint64)) & np.uint64(len(self._ids) - 1)).astype(np.int64)

    def _reserve(self, num_more: int) -> None:
        roomier = self.roomier(num_more)
        if roomier is not None:
            self._ids, self._rows, self._num_used = roomier._ids, roomier._rows, roomier._num_used  # noqa: SLF001

    def roomier(self, num_more: int) -> IdIndex | None:
        """A copy with slots for so many more ids, None if there are slots already."""
        if 2 * (self._num_used + num_more) <= len(self._ids):
            return None
        kept = self._ids >= 0
        ids, rows = self._ids[kept], self._rows[kept]
        num_slots = len(self._ids)
        while num_slots < 4 * (len(ids) + num_more):
            num_slots *= 2
        copy = IdIndex(num_slots=num_slots)
        copy.put(ids, rows)
        return copy
