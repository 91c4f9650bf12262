"""From updates to micro-batches with the moment at which each closes, and the events behind its rows."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from online_trainer.batching import MicroBatch, MicroBatcher
from stream.messages import HistoryUpdate

Int64s = NDArray[np.int64]


@dataclass(frozen=True, kw_only=True, slots=True)
class ClosedBatch:
    """A micro-batch. closed_ms: when. offsets: int64[N], of its interactions in the log."""

    batch: MicroBatch
    closed_ms: int
    offsets: Int64s


class BatchFeed:
    """Closes batches when they are full, or `wait_ms` after their first interaction arrived. One partition."""

    def __init__(self, batcher: MicroBatcher, *, wait_ms: int | None, next_offset: int) -> None:
        self._batcher, self._wait_ms, self._next_offset = batcher, wait_ms, next_offset
        self._offsets: deque[Int64s] = deque()
        self._arrivals: deque[Int64s] = deque()

    def batches(self, update: HistoryUpdate, update_offset: int) -> Iterator[ClosedBatch]:
        """Take in an update; the batches that it closes."""
        fresh = update.above(self._next_offset - 1)
        while len(fresh.offsets):
            count = self._num_until_due(fresh)
            if count == 0:
                yield self._close(self._due_ms())
                continue
            part = fresh if count == len(fresh.offsets) else fresh.split(count)[0]
            self._take_in(part, update_offset)
            fresh = fresh.above(int(part.offsets[-1]))
            while self._batcher.is_full():
                yield self._close(None)

    def rest(self) -> Iterator[ClosedBatch]:
        """When nothing more comes."""
        while self._batcher.num_pending:
            yield self._close(None)

    def _num_until_due(self, fresh: HistoryUpdate) -> int:
        """Rows that arrive before the batch in hand is due."""
        if self._wait_ms is None:
            return len(fresh.offsets)
        due_ms = self._due_ms() if self._batcher.num_pending else int(fresh.append_ms[0]) + self._wait_ms
        return int(np.searchsorted(fresh.append_ms, due_ms, side="right"))

    def _due_ms(self) -> int:
        assert self._wait_ms is not None
        return int(self._arrivals[0][0]) + self._wait_ms

    def _take_in(self, part: HistoryUpdate, update_offset: int) -> None:
        self._batcher.add(part, update_offset)
        self._offsets.append(part.offsets)
        self._arrivals.append(part.append_ms)
        self._next_offset = int(part.offsets[-1]) + 1

    def _close(self, due_ms: int | None) -> ClosedBatch:
        batch = self._batcher.take()
        assert batch is not None
        count = len(batch.interactions)
        offsets, arrivals = _first(self._offsets, count), _first(self._arrivals, count)
        return ClosedBatch(batch=batch, closed_ms=int(arrivals.max()) if due_ms is None else due_ms, offsets=offsets)


def _first(parts: deque[Int64s], count: int) -> Int64s:
    """Remove the first so many numbers."""
    taken = []
    while count:
        head = parts.popleft()
        taken.append(head[:count])
        if len(head) > count:
            parts.appendleft(head[count:])
        count -= len(taken[-1])
    return np.concatenate(taken)
