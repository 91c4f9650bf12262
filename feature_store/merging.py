"""The one rule of order and identity: where new interactions go among stored ones, and which are duplicates.

Pure functions on columns. An interaction's place in its user's history is `(event_time_ms, event_key)`; a second one
with the same place is a duplicate. Names: U users as group numbers 0 … U-1, O stored rows ordered by (group, place), N
new rows in arrival order; row O + i is new row i.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from feature_store.interactions import Columns
from feature_store.jagged import offsets_of, rank_in_group


@dataclass(frozen=True, kw_only=True, slots=True)
class Places:
    """Group, time and key of rows: what order and identity depend on."""

    group: NDArray[np.int64]
    event_time_ms: NDArray[np.int64]
    event_key: NDArray[np.uint64]

    @staticmethod
    def of(group: NDArray[np.int64], columns: Columns) -> Places:
        """Of interactions given as columns."""
        return Places(group=group, event_time_ms=columns["event_time_ms"], event_key=columns["event_key"])

    def __len__(self) -> int:
        return len(self.group)

    def take(self, rows: NDArray[Any] | slice) -> Places:
        """The selected rows."""
        return Places(group=self.group[rows], event_time_ms=self.event_time_ms[rows], event_key=self.event_key[rows])

    def then(self, other: Places) -> Places:
        """These rows followed by the other's."""
        return Places(
            group=np.concatenate([self.group, other.group]),
            event_time_ms=np.concatenate([self.event_time_ms, other.event_time_ms]),
            event_key=np.concatenate([self.event_key, other.event_key]),
        )

    def order(self) -> NDArray[np.int64]:
        """The rows in (group, place) order; equal places stay in the order given."""
        # Rows mostly come in order, so sorting by time is quick, and keys, which do not, only matter at equal times.
        order = np.lexsort((self.event_time_ms, self.group))
        group, time_ms = self.group[order], self.event_time_ms[order]
        if ((group[1:] == group[:-1]) & (time_ms[1:] == time_ms[:-1])).any():
            return np.lexsort((self.event_key, self.event_time_ms, self.group))
        return order

    def repeats_previous(self) -> NDArray[np.bool_]:
        """For ordered rows: whether each has the same group and place as the one before it."""
        repeats = np.zeros(len(self), np.bool_)
        if len(self) > 1:
            repeats[1:] = (
                (self.group[1:] == self.group[:-1])
                & (self.event_time_ms[1:] == self.event_time_ms[:-1])
                & (self.event_key[1:] == self.event_key[:-1])
            )
        return repeats

    def is_before(self, other: Places) -> NDArray[np.bool_]:
        """Row by row: whether the place (not the group) is strictly before the other's."""
        is_before: NDArray[np.bool_] = (self.event_time_ms < other.event_time_ms) | (
            (self.event_time_ms == other.event_time_ms) & (self.event_key < other.event_key)
        )
        return is_before


@dataclass(frozen=True, kw_only=True, slots=True)
class Merge:
    """Stored and new rows of U groups in one order, duplicates left out."""

    source: NDArray[np.int64]
    """i64[M], row numbers (stored 0 … O-1, new O … O+N-1) in (group, place) order."""
    offsets: NDArray[np.int64]
    """i64[U + 1], where each group's rows lie in `source`."""
    first_changed: NDArray[np.int64]
    """i64[U], index within the group of its first new row; the group's length if it has none."""
    accepted: NDArray[np.bool_]
    """bool[N], in arrival order: False for a duplicate of a stored row or of an earlier new one."""
    late: NDArray[np.bool_]
    """bool[N], in arrival order: accepted, and placed before a stored row of its group."""


def merge(stored: Places, new: Places, num_groups: int) -> Merge:
    """Merge new rows (any order) into stored rows (ordered, without duplicates).

    Groups whose new rows all come after their stored ones, which is nearly every group of a live stream, are appended
    without sorting their stored rows again.
    """
    num_stored = len(stored)
    stored_offsets = offsets_of(np.bincount(stored.group, minlength=num_groups))
    order = new.order()
    ordered = new.take(order)
    is_late = _is_before_last_stored(ordered, stored, stored_offsets)
    repeats = ordered.repeats_previous()
    is_disordered = np.zeros(num_groups, np.bool_)
    is_disordered[ordered.group[is_late]] = True

    # Ordered groups: stored rows, then the new ones that are not repeats.
    stored_stays = np.flatnonzero(~is_disordered[stored.group])
    is_kept = ~repeats & ~is_disordered[ordered.group]
    # Disordered groups: sort stored and new rows together; stored rows come first among equals, so new ones repeat.
    stored_moves = np.flatnonzero(is_disordered[stored.group])
    new_moves = np.flatnonzero(is_disordered[ordered.group])
    mixed = stored.take(stored_moves).then(ordered.take(new_moves))
    mixed_order = mixed.order()
    mixed_order = mixed_order[~mixed.take(mixed_order).repeats_previous()]
    mixed_rows = np.concatenate([stored_moves, num_stored + order[new_moves]])[mixed_order]

    rows = np.concatenate([stored_stays, num_stored + order[is_kept], mixed_rows])
    groups = np.concatenate([stored.group[stored_stays], ordered.group[is_kept], mixed.group[mixed_order]])
    counts = np.bincount(groups, minlength=num_groups)
    offsets = offsets_of(counts)
    source = np.empty(len(rows), np.int64)
    stored_counts = np.diff(stored_offsets)
    kept_rank = rank_in_group(ordered.group[is_kept], num_groups)
    places = np.concatenate(
        [
            rank_in_group(stored.group[stored_stays], num_groups),
            stored_counts[ordered.group[is_kept]] + kept_rank,
            rank_in_group(mixed.group[mixed_order], num_groups),
        ]
    )
    source[offsets[groups] + places] = rows
    is_new = rows >= num_stored
    first_changed = counts.astype(np.int64)
    np.minimum.at(first_changed, groups[is_new], places[is_new])
    accepted = np.zeros(len(new), np.bool_)
    accepted[rows[is_new] - num_stored] = True
    late = np.zeros(len(new), np.bool_)
    late[order] = is_late
    return Merge(source=source, offsets=offsets, first_changed=first_changed, accepted=accepted, late=late & accepted)


def _is_before_last_stored(ordered: Places, stored: Places, stored_offsets: NDArray[np.int64]) -> NDArray[np.bool_]:
    """Whether each row is at or before the last stored row of its group (at: a duplicate of it)."""
    if len(stored) == 0:
        return np.zeros(len(ordered), np.bool_)
    has_stored = np.diff(stored_offsets)[ordered.group] > 0
    last = stored.take(np.maximum(stored_offsets[1:][ordered.group] - 1, 0))
    return has_stored & ~last.is_before(ordered)
