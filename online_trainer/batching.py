"""From update messages to micro-batches: which new interactions the next step learns from.

A pure function of the sequence of messages and the budgets, so that a run can be repeated bit by bit; only the
decision to stop waiting (`flush`) depends on time, and only when the stream is quiet.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from feature_store.interactions import Interactions
from stream.messages import HistoryUpdate
from stream.tracing import Headers

SourcePartition = tuple[str, int]
"""(log_id, partition): offsets mean something within one log only."""


@dataclass(frozen=True, slots=True)
class PartitionPosition:
    """Where to continue one source partition."""

    update_offset: int
    """Offset in `history-updates` of the message to read first."""
    source_offset: int
    """First offset in `interactions` that has not been learned from."""


@dataclass(frozen=True, kw_only=True, slots=True)
class MicroBatch:
    """The new interactions of one training step, in the order of the updates."""

    interactions: Interactions
    append_ms: NDArray[np.int64]
    """[N] broker append time of each, epoch ms."""
    positions: dict[SourcePartition, PartitionPosition]
    """Positions after this batch, for the partitions it touches."""
    headers: tuple[Headers, ...]
    """Trace context of the update messages it draws from."""


@dataclass(slots=True)
class _Pending:
    update: HistoryUpdate
    update_offset: int
    headers: Headers
    order_ms: NDArray[np.int64]
    """[N] append times that never run back within the partition: rows are merged across partitions by them."""
    taken: int = 0

    def num_left(self) -> int:
        return len(self.order_ms) - self.taken


@dataclass(slots=True)
class _Queue:
    """Pending updates of one source partition."""

    seen_offset: int
    order_ms: int = 0
    updates: deque[_Pending] = field(default_factory=deque)

    def peek(self, num_rows: int) -> tuple[list[Interactions], list[NDArray[np.int64]], list[NDArray[np.int64]]]:
        """The first rows: interactions, append times and merge order, in parts."""
        interactions, append_ms, order_ms = [], [], []
        for pending in self.updates:
            rows = slice(pending.taken, pending.taken + min(num_rows, pending.num_left()))
            interactions.append(pending.update.interactions.take(rows))
            append_ms.append(pending.update.append_ms[rows])
            order_ms.append(pending.order_ms[rows])
            num_rows -= rows.stop - rows.start
            if num_rows == 0:
                break
        return interactions, append_ms, order_ms

    def drop(self, num_rows: int) -> tuple[PartitionPosition, list[Headers]]:
        """Remove the first rows (at least one); where to continue after them, and the messages they came from."""
        headers: list[Headers] = []
        while True:
            head = self.updates[0]
            count = min(num_rows, head.num_left())
            head.taken, num_rows = head.taken + count, num_rows - count
            headers.append(head.headers)
            is_done = head.num_left() == 0
            if num_rows == 0:
                source_offset = int(head.update.offsets[head.taken - 1]) + 1
                # A message that is done is not read again: retention may have deleted it by then.
                position = PartitionPosition(head.update_offset + is_done, source_offset)
            if is_done:
                self.updates.popleft()
            if num_rows == 0:
                return position, headers


class MicroBatcher:
    """Collects updates and closes micro-batches at the budgets.

    Rows at or below the last source offset taken from their partition are dropped: they come from an update that
    was sent again. Partitions are merged by broker append time, so that a trainer that catches up sees the stream in
    the order in which it happened, not one partition after the other.
    """

    def __init__(
        self,
        *,
        max_interactions: int,
        max_tokens: int,
        max_len: int,
        positions: dict[SourcePartition, PartitionPosition],
    ) -> None:
        self._max_interactions, self._max_tokens, self._max_len = max_interactions, max_tokens, max_len
        self._queues = {source: _Queue(position.source_offset - 1) for source, position in positions.items()}
        self.num_pending = 0
        self.num_repeated = 0

    def add(self, update: HistoryUpdate, update_offset: int, headers: Headers = ()) -> None:
        """Queue one update message."""
        queue = self._queues.setdefault((update.log_id, update.partition), _Queue(-1))
        fresh = update.above(queue.seen_offset)
        self.num_repeated += len(update.offsets) - len(fresh.offsets)
        if len(fresh.offsets) == 0:
            return
        order_ms = np.maximum(np.maximum.accumulate(fresh.append_ms), queue.order_ms)
        queue.seen_offset, queue.order_ms = int(fresh.offsets[-1]), int(order_ms[-1])
        queue.updates.append(_Pending(fresh, update_offset, headers, order_ms))
        self.num_pending += len(order_ms)

    def is_full(self) -> bool:
        """Whether a batch can be closed without waiting."""
        return self.num_pending >= self._max_interactions

    def take(self) -> MicroBatch | None:
        """Close a batch with what is pending, within the budgets; None when nothing is."""
        if not self.num_pending:
            return None
        sources = sorted(self._queues)
        candidates, append_ms, source_of = self._merge(sources)
        num_rows = self._num_within_budget(candidates)
        positions: dict[SourcePartition, PartitionPosition] = {}
        headers: list[Headers] = []
        for number, count in zip(*np.unique(source_of[:num_rows], return_counts=True), strict=True):
            source = sources[int(number)]
            positions[source], of_messages = self._queues[source].drop(int(count))
            headers += of_messages
        self.num_pending -= num_rows
        return MicroBatch(
            interactions=candidates.take(slice(0, num_rows)),
            append_ms=append_ms[:num_rows],
            positions=positions,
            headers=tuple(headers),
        )

    def _merge(self, sources: list[SourcePartition]) -> tuple[Interactions, NDArray[np.int64], NDArray[np.int64]]:
        """Candidates for a batch, oldest append first: interactions, append times, numbers of their sources."""
        interactions: list[Interactions] = []
        append_ms: list[NDArray[np.int64]] = []
        order_ms: list[NDArray[np.int64]] = []
        numbers: list[NDArray[np.int64]] = []
        for number, source in enumerate(sources):
            peeked = self._queues[source].peek(self._max_interactions)
            interactions += peeked[0]
            append_ms += peeked[1]
            order_ms += peeked[2]
            numbers += [np.full(len(part), number) for part in peeked[2]]
        # A stable sort keeps each partition's rows in source order.
        order = np.argsort(np.concatenate(order_ms), kind="stable")[: self._max_interactions]
        return (
            Interactions.concat(interactions).take(order),
            np.concatenate(append_ms)[order],
            np.concatenate(numbers)[order],
        )

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
