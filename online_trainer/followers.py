"""What came next after each item, with decayed counts, in bounded memory.

Two bounds. Each item keeps its `per_item` heaviest followers: one that is new to a full item takes the place of the
lightest. At most `max_items` items keep followers: when more come, an eighth of them, those that something followed
least recently, lose theirs. 12 bytes a follower.

Counts are kept as logarithms of sums of exp(rate * time), which do not change while nothing happens (model.trend).

Shapes: N pairs to add, S pairs found, A slots (items that keep followers), F = per_item.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

from model.item_table import RowMoves

Int64s = NDArray[np.int64]
Float64s = NDArray[np.float64]

_SLOTS_AT_FIRST: Final = 256


@dataclass(frozen=True, kw_only=True, slots=True)
class FoundFollowers:
    """Followers of several items as pairs: place_S int64[S] ascending (which item), rows_S int64[S], log_weight_S."""

    place_S: Int64s
    rows_S: Int64s
    log_weight_S: Float64s


class Followers:
    """Item -> the items that came next after it, heaviest kept; a function of the sequence of ``add`` calls."""

    def __init__(self, *, max_items: int, per_item: int) -> None:
        self._max_items, self._per_item = max_items, per_item
        self._num_adds = 0
        self._slot_of_row = np.full(0, -1, np.int32)
        self._allocate(min(_SLOTS_AT_FIRST, max_items))

    def _allocate(self, num_slots: int) -> None:
        self._row_of_slot = np.full(num_slots, -1, np.int64)
        self._touched = np.zeros(num_slots, np.int64)
        self._followers = np.full((num_slots, self._per_item), -1, np.int32)
        self._log_weight = np.full((num_slots, self._per_item), -np.inf)

    def of(self, rows: Int64s) -> FoundFollowers:
        """The followers of each item; rows: int64, -1 or an unknown item has none."""
        slots = self._slots(rows)
        place = np.flatnonzero(slots >= 0)
        rows_AF = self._followers[slots[place]]
        kept_AF = rows_AF >= 0
        return FoundFollowers(
            place_S=np.repeat(place, kept_AF.sum(1)),
            rows_S=rows_AF[kept_AF].astype(np.int64),
            log_weight_S=self._log_weight[slots[place]][kept_AF],
        )

    def add(self, rows: Int64s, next_rows: Int64s, log_counts: Float64s) -> None:
        """Count that `next_rows` came after `rows`, each by exp(log_count); [N] each.

        A row of -1 is left out, and so is an item after itself: who has seen it is not shown it again.
        """
        taken = (rows >= 0) & (next_rows >= 0) & (rows != next_rows)
        rows, next_rows, log_counts = rows[taken], next_rows[taken], log_counts[taken]
        for first in range(0, len(rows), self._max_items):
            part = slice(first, first + self._max_items)
            self._num_adds += 1
            self._add(rows[part], next_rows[part], log_counts[part])

    def _add(self, rows: Int64s, next_rows: Int64s, log_counts: Float64s) -> None:
        order = np.lexsort((log_counts, next_rows, rows))
        rows, next_rows = rows[order], next_rows[order]
        is_first = np.ones(len(rows), bool)
        is_first[1:] = (np.diff(rows) != 0) | (np.diff(next_rows) != 0)
        log_counts = np.logaddexp.reduceat(log_counts[order], np.flatnonzero(is_first))
        rows, next_rows = rows[is_first], next_rows[is_first]
        slots = self._slots_made(rows)
        at_NF = self._followers[slots] == next_rows[:, None]
        is_known = at_NF.any(1)
        known = slots[is_known], at_NF[is_known].argmax(1)
        self._log_weight[known] = np.logaddexp(self._log_weight[known], log_counts[is_known])
        self._put(slots[~is_known], next_rows[~is_known], log_counts[~is_known])

    def _put(self, slots: Int64s, next_rows: Int64s, log_counts: Float64s) -> None:
        """Followers that are new to their items take the lightest places; the heaviest of them if there are more."""
        order = np.lexsort((next_rows, -log_counts, slots))
        slots, next_rows, log_counts = slots[order], next_rows[order], log_counts[order]
        distinct, starts, counts = np.unique(slots, return_index=True, return_counts=True)
        rank = np.arange(len(slots)) - np.repeat(starts, counts)
        fits = rank < self._per_item
        lightest_AF = np.argsort(self._log_weight[distinct], axis=1, kind="stable")
        places = lightest_AF[np.repeat(np.arange(len(distinct)), counts)[fits], rank[fits]]
        self._followers[slots[fits], places] = next_rows[fits]
        self._log_weight[slots[fits], places] = log_counts[fits]

    def _slots(self, rows: Int64s) -> Int64s:
        inside = (rows >= 0) & (rows < len(self._slot_of_row))
        slots = np.full(len(rows), -1, np.int64)
        slots[inside] = self._slot_of_row[rows[inside]]
        return slots

    def _slots_made(self, rows: Int64s) -> Int64s:
        """int64[N]: a slot for each item, made where it had none; at most `max_items` distinct rows >= 0."""
        if len(rows) and (num_rows := int(rows.max()) + 1) > len(self._slot_of_row):
            grown = np.full(max(num_rows, 2 * len(self._slot_of_row)), -1, np.int32)
            grown[: len(self._slot_of_row)] = self._slot_of_row
            self._slot_of_row = grown
        slots = self._slots(rows)
        self._touched[slots[slots >= 0]] = self._num_adds
        new_rows = np.unique(rows[slots < 0])
        if len(new_rows):
            new_slots = self._free_slots(len(new_rows))
            self._slot_of_row[new_rows], self._row_of_slot[new_slots] = new_slots, new_rows
            self._touched[new_slots] = self._num_adds
        return self._slots(rows)

    def _free_slots(self, num_wanted: int) -> Int64s:
        free = np.flatnonzero(self._row_of_slot < 0)
        while len(free) < num_wanted and len(self._row_of_slot) < self._max_items:
            self._grow()
            free = np.flatnonzero(self._row_of_slot < 0)
        if len(free) < num_wanted:
            self._evict(max(num_wanted, self._max_items // 8))
            free = np.flatnonzero(self._row_of_slot < 0)
        return free[:num_wanted]

    def _grow(self) -> None:
        kept = self._row_of_slot, self._touched, self._followers, self._log_weight
        num_slots = len(self._row_of_slot)
        self._allocate(min(2 * num_slots, self._max_items))
        self._row_of_slot[:num_slots], self._touched[:num_slots] = kept[0], kept[1]
        self._followers[:num_slots], self._log_weight[:num_slots] = kept[2], kept[3]

    def _evict(self, num_items: int) -> None:
        """Empty the slots of the items that something followed least recently."""
        used = np.flatnonzero(self._row_of_slot >= 0)
        self._empty(used[np.argsort(self._touched[used], kind="stable")[:num_items]])

    def _empty(self, slots: Int64s) -> None:
        self._slot_of_row[self._row_of_slot[slots]] = -1
        self._row_of_slot[slots], self._followers[slots], self._log_weight[slots] = -1, -1, -np.inf

    def follow(self, moves: RowMoves) -> None:
        """Forget removed items, what followed them and that they followed; move the others. Reads the whole table."""
        new_rows = moves.new_rows().numpy()
        slots = self._slots(np.flatnonzero(new_rows < 0))
        self._empty(slots[slots >= 0])
        used = np.flatnonzero(self._row_of_slot >= 0)
        self._row_of_slot[used] = new_rows[self._row_of_slot[used]]
        self._slot_of_row[:] = -1
        self._slot_of_row[self._row_of_slot[used]] = used
        is_kept_AF = self._followers >= 0
        self._followers[is_kept_AF] = new_rows[self._followers[is_kept_AF]]
        self._log_weight[self._followers < 0] = -np.inf

    def state(self) -> dict[str, NDArray[np.generic]]:
        """Copies of everything."""
        return {
            "row_of_slot": self._row_of_slot.copy(),
            "touched": self._touched.copy(),
            "rows": self._followers.copy(),
            "log_weight": self._log_weight.copy(),
            "num_adds": np.array([self._num_adds]),
        }

    def load_state(self, state: Mapping[str, NDArray[np.generic]]) -> None:
        """Continue from a ``state``; under smaller bounds the lightest followers and the oldest items are dropped."""
        row_of_slot, touched = state["row_of_slot"].astype(np.int64), state["touched"].astype(np.int64)
        rows_AF, log_weight_AF = state["rows"].astype(np.int32), state["log_weight"].astype(np.float64)
        if len(row_of_slot) > self._max_items:
            newest = np.sort(np.argsort(np.where(row_of_slot < 0, -1, touched), kind="stable")[-self._max_items :])
            row_of_slot, touched = row_of_slot[newest], touched[newest]
            rows_AF, log_weight_AF = rows_AF[newest], log_weight_AF[newest]
        if rows_AF.shape[1] != self._per_item:
            heaviest_AF = np.argsort(-log_weight_AF, axis=1, kind="stable")[:, : self._per_item]
            rows_AF = np.take_along_axis(rows_AF, heaviest_AF, 1)
            log_weight_AF = np.take_along_axis(log_weight_AF, heaviest_AF, 1)
        self._allocate(len(row_of_slot))
        self._row_of_slot[:], self._touched[:] = row_of_slot, touched
        self._followers[:, : rows_AF.shape[1]], self._log_weight[:, : rows_AF.shape[1]] = rows_AF, log_weight_AF
        self._slot_of_row = np.full(int(row_of_slot.max(initial=-1)) + 1, -1, np.int32)
        used = np.flatnonzero(row_of_slot >= 0)
        self._slot_of_row[row_of_slot[used]] = used
        self._num_adds = int(state["num_adds"][0])
