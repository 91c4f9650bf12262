"""What the ranking head learns from: items that users met, what they did with them, and the histories before that.

Labels of impressions and interactions become the same thing here, with one rule for what a history may hold: what had
happened and had arrived before. Shapes: R rows (one user at one moment), C items, L interactions of histories.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Final

import numpy as np
import torch
from numpy.typing import NDArray

from feature_store.hot import HotHistories
from feature_store.interactions import Interactions, JaggedHistories
from model.item_table import ItemTable
from model.ranking_learning import ShownBatch

Int64s = NDArray[np.int64]
_NEVER: Final = int(np.iinfo(np.int64).max)


@dataclass(frozen=True, kw_only=True, slots=True)
class LabelledItems:
    """C items in R rows; columns by row, then by item."""

    user_id: Int64s
    """[R]"""
    shown_at_ms: Int64s
    """[R] event time: a history holds what happened strictly before."""
    known_before_ms: Int64s
    """[R] arrival time: a history holds what had arrived strictly before. int64's maximum where `below_seq` decides."""
    below_seq: Int64s
    """[R] arrival number: a history holds what arrived with a smaller one. int64's maximum where time decides."""
    written_before_ms: Int64s
    """[R] processing time: what was worked out for the user (its vector) was there strictly before."""
    surface: NDArray[np.uint8]
    """[R] where they were met, which was known before anything was done with them; 0: not told."""
    offsets: Int64s
    """[R + 1] row boundaries of the items."""
    item_id: Int64s
    """[C]"""
    action: NDArray[np.uint32]
    """[C] what the user did with it, a bit each; 0: nothing."""
    value: NDArray[np.float32]
    """[C] NaN where there is none, or it is not known."""
    is_measured: NDArray[np.bool_]
    """[C] False: learned from, but not part of the metrics (a late correction of what was measured before)."""

    def __len__(self) -> int:
        return len(self.item_id)

    @classmethod
    def of_interactions(cls, new: Interactions) -> LabelledItems:
        """Each interaction as an item met by its user when it happened, with what was done."""
        return cls(
            user_id=new.user_id,
            shown_at_ms=new.event_time_ms,
            known_before_ms=np.full(len(new), _NEVER),
            below_seq=new.seq.astype(np.int64),
            written_before_ms=new.arrival_ms,
            surface=new.surface,
            offsets=np.arange(len(new) + 1, dtype=np.int64),
            item_id=new.item_id,
            action=new.action,
            value=new.value,
            is_measured=np.ones(len(new), np.bool_),
        )

    @classmethod
    def concat(cls, parts: Sequence[LabelledItems]) -> LabelledItems:
        """All rows of at least one part, in order."""
        columns = {
            one.name: np.concatenate([getattr(part, one.name) for part in parts])
            for one in fields(cls)
            if one.name != "offsets"
        }
        lengths = np.concatenate([np.diff(part.offsets) for part in parts])
        return cls(offsets=np.concatenate([[0], np.cumsum(lengths)]), **columns)

    def take(self, is_kept: NDArray[np.bool_], *, max_items: int) -> LabelledItems:
        """The items of a mask, at most max_items in a row: longer rows become several, empty ones go."""
        row_C = np.repeat(np.arange(len(self.user_id)), np.diff(self.offsets))[is_kept]
        counts = np.bincount(row_C, minlength=len(self.user_id))
        place_C = np.arange(len(row_C)) - (np.cumsum(counts) - counts)[row_C]
        is_start = np.flatnonzero(place_C % max_items == 0)
        rows = row_C[is_start]
        return LabelledItems(
            user_id=self.user_id[rows],
            shown_at_ms=self.shown_at_ms[rows],
            known_before_ms=self.known_before_ms[rows],
            below_seq=self.below_seq[rows],
            written_before_ms=self.written_before_ms[rows],
            surface=self.surface[rows],
            offsets=np.append(is_start, len(row_C)).astype(np.int64),
            item_id=self.item_id[is_kept],
            action=self.action[is_kept],
            value=self.value[is_kept],
            is_measured=self.is_measured[is_kept],
        )

    def rows(self, part: slice) -> LabelledItems:
        """Rows that stand together."""
        row_C = np.repeat(np.arange(len(self.user_id)), np.diff(self.offsets))
        return self.take((row_C >= part.start) & (row_C < part.stop), max_items=max(len(self), 1))

    def as_interactions(self) -> Interactions:
        """One interaction an item, at the time it was shown, for a file; without keys and arrival."""
        row_C = np.repeat(np.arange(len(self.user_id)), np.diff(self.offsets))
        return Interactions(
            user_id=self.user_id[row_C],
            event_time_ms=self.shown_at_ms[row_C],
            item_id=self.item_id,
            action=self.action,
            value=self.value,
            surface=self.surface[row_C],
            event_key=np.zeros(len(self), np.uint64),
            arrival_ms=np.zeros(len(self), np.int64),
            seq=np.zeros(len(self), np.uint32),
        )


def histories_before(items: LabelledItems, hot: HotHistories, *, max_len: int) -> JaggedHistories:
    """The newest interactions of each row's user, of what had happened and had arrived before; at most max_len.

    Raises StoreUnavailableError.
    """
    # Memory answers as of one arrival number of a user; several of them would each be looked up in SQL.
    users, user_R = np.unique(items.user_id, return_inverse=True)
    newest = np.zeros(len(users), np.int64)
    np.maximum.at(newest, user_R, items.below_seq)
    found = hot.gather(items.user_id, max_len=max_len, before_ms=items.shown_at_ms, below_seq=newest[user_R])
    row_L = np.repeat(np.arange(found.num_users), found.lengths())
    had_arrived_L = (found.arrival_ms < items.known_before_ms[row_L]) & (found.seq < items.below_seq[row_L])
    if had_arrived_L.all():
        return found
    counts = np.bincount(row_L[had_arrived_L], minlength=found.num_users)
    return JaggedHistories(
        user_ids=found.user_ids,
        offsets=np.concatenate([[0], np.cumsum(counts)]).astype(np.int64),
        **{name: column[had_arrived_L] for name, column in found.columns.items()},
    )


def shown_batch(items: LabelledItems, histories: JaggedHistories, table: ItemTable) -> ShownBatch:
    """What the network reads; every item must have a row in the table."""
    return ShownBatch(
        rows_L=torch.from_numpy(table.lookup(histories.item_id)),
        actions_L=torch.from_numpy(histories.acts),
        values_L=torch.from_numpy(histories.value),
        timestamps_ms_L=torch.from_numpy(histories.event_time_ms),
        offsets=torch.from_numpy(histories.offsets),
        shown_rows_C=torch.from_numpy(table.lookup(items.item_id)),
        shown_at_ms_R=torch.from_numpy(items.shown_at_ms),
        shown_offsets=torch.from_numpy(items.offsets),
        shown_on_R=torch.from_numpy(items.surface.astype(np.int64)),
    )
