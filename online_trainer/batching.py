"""From update messages to micro-batches: which new interactions the next step learns from.

A pure function of the sequence of messages and the budgets, so that a run can be repeated bit by bit; only the
decision to stop waiting (`flush`) depends on time, and only when the stream is quiet.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from feature_store.interactions import Interactions
from stream.messages import HistoryUpdate
from stream.tracing import Headers


@dataclass(frozen=True, slots=True)
class PartitionPosition:
    """Where to continue one source partition."""

    update_offset: int
    """Offset in `history-updates` of the message to read again first."""
    source_offset: int
    """First offset in `interactions` that has not been learned from."""


@dataclass(frozen=True, kw_only=True, slots=True)
class MicroBatch:
    """The new interactions of one training step, in the order of the updates."""

    interactions: Interactions
    append_ms: NDArray[np.int64]
    """[N] broker append time of each, epoch ms."""
    positions: dict[int, PartitionPosition]
    """Positions after this batch, for the partitions it touches."""
    headers: tuple[Headers, ...]
    """Trace context of the update messages it draws from."""


@dataclass(slots=True)
class _Pending:
    update: HistoryUpdate
    update_offset: int
    headers: Headers
    taken: int = 0

    def num_left(self) -> int:
        return len(self.update.offsets) - self.taken


class MicroBatcher:
    """Collects updates and closes micro-batches at the budgets.

    Rows at or below the last source offset taken from their partition are dropped: they come from an update that
    was sent again.
    """

    def __init__(
        self, *, max_interactions: int, max_tokens: int, max_len: int, positions: dict[int, PartitionPosition]
    ) -> None:
        self._max_interactions, self._max_tokens, self._max_len = max_interactions, max_tokens, max_len
        self._seen = {partition: position.source_offset - 1 for partition, position in positions.items()}
        self._pending: deque[_Pending] = deque()
        self.num_pending = 0
        self.num_repeated = 0

    def add(self, update: HistoryUpdate, update_offset: int, headers: Headers = ()) -> None:
        """Queue one update message."""
        fresh = update.above(self._seen.get(update.partition, -1))
        self.num_repeated += len(update.offsets) - len(fresh.offsets)
        if len(fresh.offsets) == 0:
            return
        self._seen[update.partition] = int(fresh.offsets[-1])
        self._pending.append(_Pending(fresh, update_offset, headers))
        self.num_pending += len(fresh.offsets)

    def is_full(self) -> bool:
        """Whether a batch can be closed without waiting."""
        return self.num_pending >= self._max_interactions

    def take(self) -> MicroBatch | None:
        """Close a batch with what is pending, within the budgets; None when nothing is."""
        if not self.num_pending:
            return None
        candidates = self._peek()
        num_rows = self._num_within_budget(candidates)
        taken: list[_Pending] = []
        appended: list[NDArray[np.int64]] = []
        positions: dict[int, PartitionPosition] = {}
        left = num_rows
        while left:
            head = self._pending[0]
            count = min(left, head.num_left())
            rows = slice(head.taken, head.taken + count)
            appended.append(head.update.append_ms[rows])
            taken.append(head)
            positions[head.update.partition] = PartitionPosition(
                head.update_offset, int(head.update.offsets[rows.stop - 1]) + 1
            )
            head.taken, left = rows.stop, left - count
            if head.num_left() == 0:
                self._pending.popleft()
        self.num_pending -= num_rows
        return MicroBatch(
            interactions=candidates.take(slice(0, num_rows)),
            append_ms=np.concatenate(appended),
            positions=positions,
            headers=tuple(head.headers for head in taken),
        )

    def _peek(self) -> Interactions:
        parts: list[Interactions] = []
        left = self._max_interactions
        for pending in self._pending:
            count = min(left, pending.num_left())
            parts.append(pending.update.interactions.take(slice(pending.taken, pending.taken + count)))
            left -= count
            if left == 0:
                break
        return Interactions.concat(parts)

    def _num_within_budget(self, candidates: Interactions) -> int:
        """Rows until the token budget is spent, or a user has more new interactions than one history row holds.

        A user costs its history length, known from `seq` without reading the history: arrivals so far.
        """
        users = candidates.user_id
        _, first_rows, user_of_row = np.unique(users, return_index=True, return_inverse=True)
        tokens = np.minimum(candidates.seq.astype(np.int64) + 1, self._max_len)
        is_first = np.zeros(len(users), bool)
        is_first[first_rows] = True
        cost = np.cumsum(np.where(is_first, tokens, 1))
        within = int(np.searchsorted(cost, self._max_tokens, side="right"))
        by_user = np.argsort(user_of_row, kind="stable")
        starts = np.cumsum(np.bincount(user_of_row)) - np.bincount(user_of_row)
        rank_within_user = np.empty(len(users), np.int64)
        rank_within_user[by_user] = np.arange(len(users)) - starts[user_of_row[by_user]]
        overfull = np.flatnonzero(rank_within_user >= self._max_len)
        return max(1, min(within, int(overfull[0]) if len(overfull) else len(users)))
