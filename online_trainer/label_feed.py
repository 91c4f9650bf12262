"""Reads the topic `labels` for whoever learns from it, beside the updates and behind them."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Final

from online_trainer.label_queue import LabelBatch, LabelPosition, LabelQueue
from stream.clock import Clock
from stream.errors import LogResetError
from stream.log import EventLog, PartitionId, Start

logger = logging.getLogger(__name__)

_RECORDS_PER_POLL: Final = 500


class LabelFeed:
    """A reader of its own, so that neither topic holds up the other, and the queue of what it has read."""

    def __init__(
        self,
        log: EventLog,
        positions: Mapping[int, LabelPosition],
        *,
        batch_items: int,
        max_pending_items: int,
        clock: Clock,
        tasks: tuple[str, ...],
    ) -> None:
        """tasks: those of the ranking head whose predictions at the impression are kept."""
        self._topic, self._reader, self._clock = log.topics.labels, log.reader(), clock
        self._max_pending_items = max_pending_items
        self._queue = LabelQueue(positions, batch_items=batch_items, tasks=tasks)
        self._next = {partition: at.offset for partition, at in positions.items()}
        self.num_lost = 0
        """Records that the log deleted before they were read."""

    async def start(self) -> None:
        """Connect. Raises LogUnavailableError."""
        await self._reader.start()

    async def assign(self, *, anew: tuple[int, ...] = ()) -> None:
        """Go on where the account stands; at the log's start of partitions that it does not know, or `anew`."""
        starts: dict[PartitionId, Start] = {
            (self._topic, partition): "earliest" if partition in anew else self._next.get(partition, "earliest")
            for partition in await self._reader.partitions(self._topic)
        }
        await self._reader.assign(starts)

    async def stop(self) -> None:
        """Disconnect; harmless when not connected."""
        await self._reader.stop()

    async def read(self, *, updates_up_to_ms: int | None, num_read: int) -> None:
        """Read what there is, without waiting. Raises LogUnavailableError.

        updates_up_to_ms: up to which moment the update log has been read (`LogReader.read_up_to_ms`). num_read:
        interactions read from it so far.
        """
        if updates_up_to_ms is not None:
            self._queue.release(updates_up_to_ms, num_read)
        if self.is_full:
            return
        try:
            records = await self._reader.poll(timeout_ms=0, max_records=_RECORDS_PER_POLL)
        except LogResetError as error:
            # Labels are no account of events: what is gone is counted and said, and does not stop the trainer.
            logger.error("%s: labels are read from where the log begins", error)  # noqa: TRY400 - says it all
            await self.assign(anew=tuple(self._next) if error.partition is None else (error.partition[1],))
            return
        read_at_ms = self._clock.now_ms()
        for record in records:
            self._count_lost(record.partition, record.offset)
            self._queue.add(record, read_at_ms=read_at_ms)

    def _count_lost(self, partition: int, offset: int) -> None:
        expected = self._next.get(partition, offset)
        if offset > expected:
            self.num_lost += offset - expected
            logger.error("%d records of %s/%d were deleted unread", offset - expected, self._topic, partition)
        self._next[partition] = offset + 1

    @property
    def is_full(self) -> bool:
        """Whether no more are read until some are taken."""
        return self._queue.num_pending >= self._max_pending_items

    def forget(self, user_ids: tuple[int, ...], announced_ms: int) -> None:
        """See LabelQueue."""
        self._queue.forget(user_ids, announced_ms)

    def is_due(self, num_learned: int) -> bool:
        """Whether a step can be made, so many interactions having been learned from."""
        return self._queue.is_due(num_learned)

    def take(self, num_learned: int) -> LabelBatch | None:
        """What the next step learns from; None: nothing is ready."""
        return self._queue.take(num_learned)

    def status(self) -> dict[str, int]:
        """Counts, JSON-ready."""
        return {
            "pending": self._queue.num_pending,
            "unreadable": self._queue.num_unreadable,
            "forgotten": self._queue.num_forgotten,
            "lost": self.num_lost,
        }
