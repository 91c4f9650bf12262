"""The label join: what answers showed, and what their users did next, become labels for the ranking head.

A second, slower commit protocol beside `stream.ingest`: the steps in `LabelJoiner._commit` are the guarantee. Each
impression and each accepted interaction has its effect once, because what is known about impressions changes in the
same SQL transaction as the positions. A crash between producing and committing sends labels again; `(request_id, item,
outcome)` identifies a label, so that readers can drop the second.

**When a window ends.** Not when the machine's clock says so: a clock runs on while updates lie unread, after a restart
or under a backlog, and would label as not taken what was taken. Not by the watermark of event times either: it stands
still when nobody does anything, and leaps when one producer's clock is wrong. Time here is the moment of the last look
at the log that left nothing unread (`LogReader.read_up_to_ms`): it stands still while the join is behind or the broker
away, and follows the clock on a quiet stream. What it cannot see is how far behind *ingest* is, whose updates are not
in the log yet: `labels.allowed_lateness_ms` covers that, and corrections cover what exceeds it.
"""

from __future__ import annotations

import asyncio
import logging
from collections import Counter
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Final, TypeVar

from opentelemetry import metrics

from feature_store.store import FeatureStore
from feature_store.transaction import StoreTransaction
from stream.clock import Clock
from stream.dead_letters import DeadLetterWriter
from stream.errors import LogResetError, LogUnavailableError
from stream.failpoints import fail_point
from stream.label_join import LabelBatch, LabelJoin, decode_batch
from stream.label_rules import ImpressionRules, Outcome
from stream.log import EventLog, LogReader, LogWriter, PartitionId, Start, acknowledged
from stream.log_bounds import was_reset
from stream.messages import encode_message
from stream.window_index import WindowIndex

logger = logging.getLogger(__name__)
_Result = TypeVar("_Result")

OUTCOMES: Final = ("taken", "not_taken", "late", "too_late", "duplicate_impression", "over_limit", "malformed")
"""What is counted: labels (late ones are taken, too late ones were not written), then impressions."""

_READER: Final = "labels/"
"""Before the topic in the names of our positions: other readers of `history-updates` keep theirs in the same table."""

_POSITIONS_EVERY_S: Final = 5.0
"""Positions are stored at least this often while nothing concerns any label; reading a part again is harmless."""


class LabelJoiner:
    """Joins `impressions` with `history-updates` of one log, one batch a step. Can be driven on any log.

    Any number may exist; the locked positions see to it that each batch is applied by one of them. One that finds that
    another has moved the positions starts anew from there.
    """

    def __init__(self, *, log: EventLog, store: FeatureStore, clock: Clock, rules: ImpressionRules) -> None:
        self.counts: Counter[str] = Counter(dict.fromkeys(OUTCOMES, 0))
        """Per outcome, since this joiner was made."""
        self._log, self._store, self._clock, self._rules, self._config = log, store, clock, rules, rules.config
        self._reader: LogReader = log.reader()
        self._writer: LogWriter = log.writer()
        self._dead_letters = DeadLetterWriter(self._writer, log.topics.dead_letters, clock)
        self._is_open = False
        self._from_start: set[PartitionId] = set()
        self._batch: LabelBatch | None = None
        self._stored: dict[PartitionId, int] = {}
        self._stored_at_s = 0.0
        self._next: dict[PartitionId, int] = {}
        self._time_ms = 0
        self._index = WindowIndex.empty(self._config.indexed_users_max)
        self._next_due_ms: int | None = None
        self._num_open = 0
        self._producing: Future[None] | None = None
        # One thread: SQL never blocks the event loop, and a transaction never changes threads.
        self._sql = ThreadPoolExecutor(1, thread_name_prefix="labels-sql")
        meter = metrics.get_meter("headrace.stream")
        self._counter = meter.create_counter("headrace.labels", unit="{label}", description="Labels by outcome")
        meter.create_observable_gauge(
            "headrace.labels.open", [self._observe_open], unit="{impression}", description="Impressions not closed yet"
        )
        meter.create_observable_gauge(
            "headrace.labels.lag", [self._observe_lag], unit="ms", description="Since the log was last read to its end"
        )

    async def step(self) -> bool:
        """Join what one poll brings; whether more is waiting, so that the next step should follow at once.

        Raises StoreUnavailableError, LogUnavailableError or ConcurrentAppendError with nothing applied: the next step
        tries again. Raises LogResetError when the log no longer holds what the stored positions speak of.
        """
        if not self._is_open:
            await self._open()
        if self._batch is None:
            self._batch = await self._poll()
        batch, is_more_due = self._batch, False
        # Not the highest so far: a clock that was ahead for a moment would end every window as soon as it opens.
        time_ms = self._time_ms if batch.read_up_to_ms is None else batch.read_up_to_ms
        is_due = self._next_due_ms is not None and self._next_due_ms <= time_ms
        # Without anything to join, the positions lag: to read a part again would change nothing.
        is_old = self._clock.monotonic_s() - self._stored_at_s >= _POSITIONS_EVERY_S
        if batch.concerns_labels or is_due or (is_old and self._next | batch.next_offsets != self._stored):
            loop = asyncio.get_running_loop()
            committed = await self._in_sql_thread(lambda: self._commit(batch, time_ms, loop))
            if committed is None:
                logger.info("another worker joins labels; starting anew from the stored positions")
                await self.disconnect()
                return False
            is_more_due = committed
        self._next |= batch.next_offsets
        self._batch, self._time_ms = None, time_ms
        # A poll that brought nothing although something is unread has only met an answer that is still under way.
        return is_more_due or (batch.read_up_to_ms is None and bool(batch.next_offsets))

    async def _open(self) -> None:
        """Connect, and start from what is stored."""
        await self.disconnect()
        await self._log.create_topics()
        await self._reader.start()
        await self._writer.start()
        topics = (self._log.topics.impressions, self._log.topics.history_updates)
        partitions = [(topic, number) for topic in topics for number in await self._reader.partitions(topic)]
        await self._in_sql_thread(lambda: self._load(partitions))
        starts: dict[PartitionId, Start] = dict(self._stored)
        for partition, position in self._stored.items():
            # 0 means that nothing was applied; a log whose first records have expired has no offset 0.
            if position == 0 or partition in self._from_start:
                starts[partition] = "earliest"
        await self._reader.assign(starts)
        self._is_open = True

    def _load(self, partitions: list[PartitionId]) -> None:
        with self._store.transaction() as transaction:
            self._stored = self._lock(transaction, partitions)
            impressions = transaction.impressions
            windows = impressions.user_windows(self._config.indexed_users_max + 1)
            self._num_open, self._next_due_ms = impressions.num_open(), impressions.next_due_ms()
        self._next, self._batch, self._time_ms = dict(self._stored), None, 0
        self._stored_at_s = self._clock.monotonic_s()
        self._index = WindowIndex(windows, self._config.indexed_users_max)
        if not self._index.is_whole:
            logger.warning("more users than labels.indexed_users_max have impressions: labels cost more SQL")

    async def _poll(self) -> LabelBatch:
        # Step 1: a bounded batch, of all partitions of both topics.
        try:
            records = await self._reader.poll(timeout_ms=0, max_records=self._config.poll_records)
        except LogResetError as error:
            if error.partition is None or error.partition in self._from_start:
                raise
            # Either its first records have expired beyond our position, or it was reset: read what there is, and see.
            self._from_start.add(error.partition)
            self._is_open = False
            raise LogUnavailableError(f"{error}; reading it from its start") from error
        for record in records:
            expected = self._next[record.topic, record.partition]
            if record.offset < expected:
                raise was_reset(record.topic, record.partition, expected, first=record.offset)
        # Step 2: decode; leave out, by column, the interactions that no impression waits for. Pure: can be repeated.
        self._index.drop_ended(self._time_ms, self._config)
        return decode_batch(
            records,
            self._rules,
            self._index,
            topics=self._log.topics,
            log_id=self._log.log_id,
            read_up_to_ms=await self._reader.read_up_to_ms(),
        )

    def _commit(self, batch: LabelBatch, time_ms: int, loop: asyncio.AbstractEventLoop) -> bool | None:
        """Apply a batch and what is due; whether more is due. None, with nothing applied: another joiner was here."""
        outcome = Outcome()
        positions = self._next | batch.next_offsets
        with self._store.transaction() as transaction:
            # Step 3: lock all positions (another joiner waits here); they must be where we left them.
            if self._lock(transaction, positions) != self._stored:
                return None
            impressions = transaction.impressions
            impressions.lock()
            # Step 4: open, take, close. An impression that is known, or an item that is taken, changes nothing.
            join = LabelJoin(impressions=impressions, store=self._store, rules=self._rules, outcome=outcome)
            join.apply(batch)
            is_more_due = join.close_due(time_ms)
            next_due_ms = impressions.next_due_ms()
            num_open = self._num_open + outcome.num_opened - outcome.num_closed
            if batch.forgotten:
                num_open = impressions.num_open()
            fail_point("labels.applied")
            # Step 5: labels and dead letters are in the log before the positions move past their source.
            self._producing = asyncio.run_coroutine_threadsafe(self._produce(batch, outcome), loop)
            self._producing.result()
            fail_point("labels.produced")
            # Step 6: the positions move in the same transaction as the effect.
            for (topic, partition), position in positions.items():
                if position > self._stored[topic, partition]:
                    transaction.set_position(self._log.log_id, _READER + topic, partition, position)
        fail_point("labels.committed")
        # Step 7: count what is durable.
        self._stored, self._stored_at_s = positions, self._clock.monotonic_s()
        self._next_due_ms, self._num_open = next_due_ms, num_open
        for name, count in outcome.counts.items():
            self.counts[name] += count
            self._counter.add(count, {"outcome": name})
        return is_more_due

    async def _produce(self, batch: LabelBatch, outcome: Outcome) -> None:
        await self._dead_letters.write(batch.refused)
        sends = [
            await self._writer.send(self._log.topics.labels, encode_message(labels), key=str(labels.user_id).encode())
            for labels in outcome.labels
        ]
        await acknowledged(sends)

    def _lock(self, transaction: StoreTransaction, partitions: Iterable[PartitionId]) -> dict[PartitionId, int]:
        log_id = self._log.log_id
        # In order: two joiners then wait for each other instead of deadlocking.
        return {
            (topic, number): transaction.lock_position(log_id, _READER + topic, number).next_offset
            for topic, number in sorted(partitions)
        }

    async def disconnect(self) -> None:
        """Leave the log; the next step starts from what is stored. Harmless when not connected."""
        self._is_open = False
        await self._reader.stop()
        await self._writer.stop()

    async def close(self) -> None:
        """Give up a transaction whose labels are not acknowledged yet, disconnect, and release the SQL thread."""
        if self._producing is not None:
            self._producing.cancel()
        await asyncio.to_thread(self._sql.shutdown)
        await self.disconnect()

    async def _in_sql_thread(self, call: Callable[[], _Result]) -> _Result:
        return await asyncio.get_running_loop().run_in_executor(self._sql, call)

    def status(self) -> dict[str, object]:
        """Counts, open impressions and positions, JSON-ready."""
        return {
            **self.counts,
            "open": self._num_open,
            "positions": {f"{topic}/{number}": position for (topic, number), position in self._next.items()},
            "read_up_to_ms": self._time_ms or None,
        }

    def _observe_open(self, _options: object) -> Iterable[metrics.Observation]:
        return [metrics.Observation(self._num_open)] if self._is_open else []

    def _observe_lag(self, _options: object) -> Iterable[metrics.Observation]:
        if not self._is_open or not self._time_ms:
            return []
        return [metrics.Observation(max(0, self._clock.now_ms() - self._time_ms))]
