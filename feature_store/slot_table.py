"""Which slot each user has: a hash table that is asked for thousands of users at a time.

Open addressing with linear probing, in two arrays; every step of a probe is taken for all users at once. A dictionary
costs an interpreter's loop and a cache miss or two a user, which at 50,000 users was most of an update's time.
"""

from __future__ import annotations

from typing import Final

import numpy as np
from numpy.typing import NDArray

_EMPTY: Final = -1
_REMOVED: Final = -2
"""Both are no user ids: those are not negative."""
_FIRST_CELLS: Final = 2048
_MULTIPLIER: Final = np.uint64(0x9E3779B97F4A7C15)
"""2**64 divided by the golden ratio: multiplication by it spreads numbers that lie close together."""


class SlotTable:
    """A slot for each of any number of users."""

    def __init__(self) -> None:
        self._set_size(_FIRST_CELLS)

    def __len__(self) -> int:
        return self._num_users

    @property
    def slots(self) -> NDArray[np.int64]:
        """i64[len(self)], every user's slot, in no order."""
        return self._slots[self._keys >= 0]

    def find(self, user_ids: NDArray[np.int64]) -> NDArray[np.int64]:
        """i64[B], the slot of each user; -1 for those without one."""
        return self._slots[self._cells_of(user_ids)]

    def add(self, user_ids: NDArray[np.int64], slots: NDArray[np.int64]) -> None:
        """Give slots to distinct users that have none."""
        # At most half of the cells are in use, so that probes stay short.
        if 2 * (self._num_used + len(user_ids)) > len(self._keys):
            kept = self._keys >= 0
            kept_ids, kept_slots = self._keys[kept], self._slots[kept]
            num_users = len(kept_ids) + len(user_ids)
            self._set_size(max(_FIRST_CELLS, 1 << (3 * num_users).bit_length()))
            self._add(kept_ids, kept_slots)
        self._add(user_ids, slots)

    def remove(self, user_ids: NDArray[np.int64]) -> NDArray[np.int64]:
        """Take the slots of users away and return them, in no order; users without one are left out."""
        cells = np.sort(self._cells_of(user_ids))
        cells = cells[(self._slots[cells] >= 0) & (np.diff(cells, prepend=-1) > 0)]
        slots = self._slots[cells]
        # Not empty: probes for other users must go on past it.
        self._keys[cells] = _REMOVED
        self._slots[cells] = -1
        self._num_users -= len(cells)
        return slots

    def _set_size(self, num_cells: int) -> None:
        self._keys = np.full(num_cells, _EMPTY)
        self._slots = np.full(num_cells, -1)
        self._shift = np.uint64(64 - (num_cells - 1).bit_length())
        self._num_users = 0
        self._num_used = 0
        """Cells that are not empty."""

    def _first_cells(self, user_ids: NDArray[np.int64]) -> NDArray[np.int64]:
        return ((user_ids.astype(np.uint64) * _MULTIPLIER) >> self._shift).astype(np.int64)

    def _cells_of(self, user_ids: NDArray[np.int64]) -> NDArray[np.int64]:
        """The cell of each user, or the empty one where its probe ends."""
        cells = self._first_cells(user_ids)
        keys = self._keys[cells]
        pending = np.flatnonzero((keys != user_ids) & (keys != _EMPTY))
        while len(pending):
            cells[pending] = (cells[pending] + 1) & (len(self._keys) - 1)
            keys = self._keys[cells[pending]]
            pending = pending[(keys != user_ids[pending]) & (keys != _EMPTY)]
        return cells

    def _add(self, user_ids: NDArray[np.int64], slots: NDArray[np.int64]) -> None:
        cells = self._first_cells(user_ids)
        pending = np.arange(len(user_ids))
        while len(pending):
            wanted = pending[self._keys[cells[pending]] == _EMPTY]
            # Where several users want one cell, the last of them gets it.
            self._keys[cells[wanted]] = user_ids[wanted]
            pending = pending[self._keys[cells[pending]] != user_ids[pending]]
            cells[pending] = (cells[pending] + 1) & (len(self._keys) - 1)
        self._slots[cells] = slots
        self._num_users += len(user_ids)
        self._num_used += len(user_ids)
