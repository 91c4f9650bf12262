"""From update messages to micro-batches: which new interactions the next step learns from.

A pure function of the sequence of messages and calls and the budgets, so that a run can be repeated bit by bit. Time
decides when a batch that is not full is closed, which only happens when the stream is quiet, and how much waits, which
only matters to the policies for a trainer that is behind (`LagRule`).
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from feature_store.interactions import Interactions
from online_trainer.config import LagPolicy, TrainerConfig
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
    thinned: Interactions
    """Those passed over because the stream outran the trainer: in histories and trends, not tested, not learned from.
    They came before `interactions`."""
    dropped: Interactions
    """Those of users who were forgotten since: taken from the stream, and not to be learned from."""
    positions: dict[SourcePartition, PartitionPosition]
    """Positions after this batch, for the partitions it touches."""
    headers: tuple[Headers, ...]
    """Trace context of the update messages it draws from."""
    is_large: bool = False
    """It was closed at the limits for a trainer that is behind."""

    def log_time_ms(self) -> int:
        """How far (epoch ms) the log had come when the newest of them was appended and handled; 0: of none."""
        # Both: a producer may stamp a record with the time of a recorded event.
        return max(int(self.append_ms.max(initial=0)), int(self.interactions.arrival_ms.max(initial=0)))

    def taken(self) -> Interactions:
        """What enters histories and trends: all but those of users who are gone."""
        return Interactions.concat([self.thinned, self.interactions]) if len(self.thinned) else self.interactions


@dataclass(frozen=True, kw_only=True, slots=True)
class LagRule:
    """What changes while more interactions wait than the trainer keeps up with."""

    policy: LagPolicy
    lag_interactions: int
    """More than so many waiting: the stream has outrun the trainer."""
    max_interactions: int
    """Of a batch meanwhile, under `larger_batches`; tokens in proportion."""

    @classmethod
    def of(cls, config: TrainerConfig) -> LagRule:
        """The rule that the settings ask for."""
        return cls(
            policy=config.lag_policy,
            lag_interactions=config.lag_interactions,
            max_interactions=config.lag_batch_interactions,
        )


@dataclass(slots=True)
class _Pending:
    update: HistoryUpdate
    update_offset: int
    headers: Headers
    order_ms: NDArray[np.int64]
    """[N] append times that never run back within the partition: rows are merged across partitions by them."""
    is_kept: NDArray[np.bool_]
    """[N] False: the user was forgotten after this was announced."""
    taken: int = 0

    def num_left(self) -> int:
        return len(self.order_ms) - self.taken


@dataclass(slots=True)
class _Rows:
    """Rows of several messages, in parts."""

    interactions: list[Interactions] = field(default_factory=list)
    append_ms: list[NDArray[np.int64]] = field(default_factory=list)
    order_ms: list[NDArray[np.int64]] = field(default_factory=list)
    is_kept: list[NDArray[np.bool_]] = field(default_factory=list)
    source: list[NDArray[np.int64]] = field(default_factory=list)


@dataclass(slots=True)
class _Queue:
    """Pending updates of one source partition."""

    seen_offset: int
    order_ms: int = 0
    updates: deque[_Pending] = field(default_factory=deque)

    def peek(self, num_rows: int) -> _Rows:
        """The first rows."""
        peeked = _Rows()
        for pending in self.updates:
            rows = slice(pending.taken, pending.taken + min(num_rows, pending.num_left()))
            peeked.interactions.append(pending.update.interactions.take(rows))
            peeked.append_ms.append(pending.update.append_ms[rows])
            peeked.order_ms.append(pending.order_ms[rows])
            peeked.is_kept.append(pending.is_kept[rows])
            num_rows -= rows.stop - rows.start
            if num_rows == 0:
                break
        return peeked

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
        lag: LagRule | None = None,
    ) -> None:
        """lag: None leaves batches as they are however much waits."""
        self._max_interactions, self._max_tokens, self._max_len = max_interactions, max_tokens, max_len
        self._lag = lag
        self._queues = {source: _Queue(position.source_offset - 1) for source, position in positions.items()}
        self._forgotten: dict[int, dict[int, int]] = {}
        """Partition of `history-updates` → user → offset of the message that ends what was announced before."""
        self.num_pending = 0
        self.num_repeated = 0
        self.num_read = 0
        """Interactions ever queued: those that are not pending have been taken."""

    def add(self, update: HistoryUpdate, update_offset: int, headers: Headers = ()) -> None:
        """Queue one update message."""
        queue = self._queues.setdefault((update.log_id, update.partition), _Queue(-1))
        fresh = update.above(queue.seen_offset)
        self.num_repeated += len(update.offsets) - len(fresh.offsets)
        if len(fresh.offsets) == 0:
            return
        order_ms = np.maximum(np.maximum.accumulate(fresh.append_ms), queue.order_ms)
        queue.seen_offset, queue.order_ms = int(fresh.offsets[-1]), int(order_ms[-1])
        queue.updates.append(_Pending(fresh, update_offset, headers, order_ms, np.ones(len(order_ms), bool)))
        self._drop_forgotten(update.partition)
        self.num_pending += len(order_ms)
        self.num_read += len(order_ms)

    def forget(self, partition: int, user_ids: tuple[int, ...], before: int) -> None:
        """Of what messages below offset `before` of a partition announce, learn nothing of these users.

        Such messages may be queued already, or still come: then this message was read ahead of them.
        """
        self._forgotten.setdefault(partition, {}).update(dict.fromkeys(user_ids, before))
        self._drop_forgotten(partition)

    def read_up_to(self, partition: int, update_offset: int) -> None:
        """Messages below this offset of a partition do not come any more."""
        of_partition = self._forgotten.get(partition, {})
        self._forgotten[partition] = {user: before for user, before in of_partition.items() if before > update_offset}

    def _drop_forgotten(self, partition: int) -> None:
        of_partition = self._forgotten.get(partition)
        if not of_partition:
            return
        for (_, of_source), queue in self._queues.items():
            for pending in queue.updates if of_source == partition else ():
                user_ids = [user for user, before in of_partition.items() if pending.update_offset < before]
                pending.is_kept &= ~np.isin(pending.update.interactions.user_id, user_ids)

    def is_full(self) -> bool:
        """Whether a batch can be closed without waiting."""
        return self.num_pending >= self._max_interactions

    def is_behind(self) -> bool:
        """Whether the stream has outrun the trainer."""
        return self._lag is not None and self.num_pending > self._lag.lag_interactions

    def oldest_append_ms(self) -> int | None:
        """Broker append time of what has waited longest; None when nothing waits."""
        heads = [queue.updates[0] for queue in self._queues.values() if queue.updates]
        return min((int(head.update.append_ms[head.taken]) for head in heads), default=None)

    def take(self) -> MicroBatch | None:
        """Close a batch with what is pending, within the budgets; None when nothing is."""
        if not self.num_pending:
            return None
        policy = self._lag.policy if self._lag is not None and self.is_behind() else "fall_behind"
        max_rows, max_tokens = self._max_interactions, self._max_tokens
        if self._lag is not None and policy == "larger_batches":
            max_rows = self._lag.max_interactions
            max_tokens = max_tokens * max_rows // self._max_interactions
        num_thinned = self.num_pending - max_rows if policy == "thin" else 0
        sources = sorted(self._queues)
        rows, order = self._merge(sources, num_thinned + max_rows)
        candidates = Interactions.concat(rows.interactions).take(order)
        num_rows = num_thinned + self._num_within_budget(candidates.take(slice(num_thinned, None)), max_tokens)
        order, candidates = order[:num_rows], candidates.take(slice(0, num_rows))
        is_kept, source_of = np.concatenate(rows.is_kept)[order], np.concatenate(rows.source)[order]
        is_learned = is_kept & (np.arange(num_rows) >= num_thinned)
        positions: dict[SourcePartition, PartitionPosition] = {}
        headers: list[Headers] = []
        for number, count in zip(*np.unique(source_of, return_counts=True), strict=True):
            source = sources[int(number)]
            positions[source], of_messages = self._queues[source].drop(int(count))
            headers += of_messages
        self.num_pending -= num_rows
        return MicroBatch(
            interactions=candidates.take(is_learned),
            append_ms=np.concatenate(rows.append_ms)[order][is_learned],
            thinned=candidates.take(is_kept & ~is_learned),
            dropped=candidates.take(~is_kept),
            positions=positions,
            headers=tuple(headers),
            is_large=policy == "larger_batches",
        )

    def _merge(self, sources: list[SourcePartition], num_rows: int) -> tuple[_Rows, NDArray[np.intp]]:
        """Candidates for a batch with the numbers of their sources, and their order: oldest append first."""
        merged = _Rows()
        for number, source in enumerate(sources):
            peeked = self._queues[source].peek(num_rows)
            merged.interactions += peeked.interactions
            merged.append_ms += peeked.append_ms
            merged.order_ms += peeked.order_ms
            merged.is_kept += peeked.is_kept
            merged.source += [np.full(len(part), number) for part in peeked.order_ms]
        # A stable sort keeps each partition's rows in source order.
        return merged, np.argsort(np.concatenate(merged.order_ms), kind="stable")[:num_rows]

    def _num_within_budget(self, candidates: Interactions, max_tokens: int) -> int:
        """Rows until the token budget is spent, or a user has more new interactions than one history row holds.

        A user costs its history length, known from `seq` without reading the history: arrivals so far.
        """
        users = candidates.user_id
        _, first_rows, user_of_row = np.unique(users, return_index=True, return_inverse=True)
        tokens = np.minimum(candidates.seq.astype(np.int64) + 1, self._max_len)
        is_first = np.zeros(len(users), bool)
        is_first[first_rows] = True
        cost = np.cumsum(np.where(is_first, tokens, 1))
        within = int(np.searchsorted(cost, max_tokens, side="right"))
        by_user = np.argsort(user_of_row, kind="stable")
        starts = np.cumsum(np.bincount(user_of_row)) - np.bincount(user_of_row)
        rank_within_user = np.empty(len(users), np.int64)
        rank_within_user[by_user] = np.arange(len(users)) - starts[user_of_row[by_user]]
        overfull = np.flatnonzero(rank_within_user >= self._max_len)
        return max(1, min(within, int(overfull[0]) if len(overfull) else len(users)))
