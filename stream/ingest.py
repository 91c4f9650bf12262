"""Ingest: from `interactions` to durable histories, each event applied exactly once.

The guarantee is the order of the steps in `IngestWorker.commit`. The transport is at least once; the effect is
exactly once, because the position in the log is stored in the same SQL transaction as the histories.
"""

from __future__ import annotations

import asyncio
import logging
from collections import Counter
from collections.abc import Awaitable, Callable, Collection, Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, Final, TypeVar

from aiokafka import AIOKafkaConsumer, ConsumerRebalanceListener, TopicPartition
from aiokafka.errors import KafkaError
from opentelemetry import metrics, trace

from feature_store.errors import ConcurrentAppendError, IdCollisionError, StoreUnavailableError
from feature_store.store import FeatureStore
from feature_store.transaction import StoreTransaction
from stream.batch import DecodedBatch, decode_batch
from stream.clock import Clock
from stream.dead_letters import DeadLetterWriter
from stream.errors import LogUnavailableError
from stream.events import EventDecoder
from stream.failpoints import fail_point
from stream.freshness import F1_STORED, FreshnessRecorder
from stream.kafka import KafkaConfig, PositionGuard, end_of, fetch_fairly
from stream.log import RETRY_FIRST_S, RETRY_MAX_S, LogWriter, Record, acknowledged
from stream.messages import HistoryUpdate, Topics
from stream.tracing import current_headers, links_to

logger = logging.getLogger(__name__)
_tracer = trace.get_tracer("headrace.stream")

_RETRYABLE: Final = (StoreUnavailableError, ConcurrentAppendError, LogUnavailableError)
_Result = TypeVar("_Result")


@dataclass(frozen=True, kw_only=True, slots=True)
class IngestConfig:
    """How ingest polls and commits."""

    group_id: str = "headrace-ingest"
    """Consumer group that shares the partitions of `interactions` between workers; also the Faust app's id."""
    max_batch_records: int = 5_000
    """Records of one poll, shared by the partitions; larger batches are faster, smaller ones fresher under load."""
    batch_wait_ms: int = 20
    """Time between two polls (ms) while the stream is slower than full batches: each commit costs a SQL transaction, so
    waiting a little saves most of the work and adds this much to the age of an event at most."""
    poll_timeout_ms: int = 200
    """How long one poll waits for records (ms)."""
    max_poll_interval_ms: int = 300_000
    """A worker that does not poll for this long (ms) loses its partitions to others."""
    session_timeout_ms: int = 10_000
    """A worker that is silent for this long (ms) is dead: the delay before another takes over."""
    drain_timeout_ms: int = 5_000
    """Time to finish the batch in hand when partitions are revoked or the worker stops (ms)."""

    def __post_init__(self) -> None:
        if not 1 <= self.max_batch_records <= 100_000:
            raise ValueError(f"ingest.max_batch_records = {self.max_batch_records}: must lie in 1..100000")
        if not self.group_id:
            raise ValueError("ingest.group_id is empty: workers share partitions through a named group")
        if self.batch_wait_ms < 0:
            raise ValueError(f"ingest.batch_wait_ms = {self.batch_wait_ms}: must not be negative")


@dataclass(slots=True)
class IngestCounts:
    """What happened to the records consumed so far, since this worker started."""

    num_accepted: int = 0
    num_duplicate: int = 0
    num_late: int = 0
    num_skipped: int = 0
    """Records below the stored position: applied before, dropped unseen."""
    num_refused: Counter[str] = field(default_factory=Counter)
    """Per reason code."""
    num_batches: int = 0
    watermark_ms: int = 0


class Committer:
    """Applies batches of one source partition, step by step. Holds no consumer: it can be driven by any log."""

    def __init__(
        self,
        *,
        store: FeatureStore,
        writer: LogWriter,
        topics: Topics,
        log_id: str,
        decoder: EventDecoder,
        clock: Clock,
        mode: str = "live",
    ) -> None:
        self.counts = IngestCounts()
        self.freshness = FreshnessRecorder(F1_STORED, mode=mode)
        self._store, self._writer, self._topics, self._log_id = store, writer, topics, log_id
        self._decoder, self._clock = decoder, clock
        self._dead_letters = DeadLetterWriter(writer, topics.dead_letters, clock)
        self._colliding: set[tuple[str, str]] = set()
        # One thread: SQL never blocks the event loop, and a transaction never changes threads.
        self._sql = ThreadPoolExecutor(1, thread_name_prefix="ingest-sql")
        meter = metrics.get_meter("headrace.stream")
        self._events = meter.create_counter("headrace.ingest.events", unit="{event}", description="Events by outcome")
        self._durations = meter.create_histogram("headrace.ingest.commit.duration", unit="s")

    def close(self) -> None:
        """Release the SQL thread."""
        self._sql.shutdown(wait=True)

    async def stored_position(self, partition: int) -> int:
        """Next offset of a source partition that has not been applied."""
        positions = await self._in_sql_thread(lambda: self._store.positions(self._log_id, self._topics.interactions))
        return positions.get(partition, 0)

    async def commit(
        self, partition: int, records: list[Record], *, advise: Callable[[int], Awaitable[None]] | None = None
    ) -> int:
        """Apply one batch (step 1, polling it, is the caller's) and return the partition's new position.

        Raises StoreUnavailableError, LogUnavailableError or ConcurrentAppendError with nothing applied: the
        same batch can be committed again.
        """
        started_s = self._clock.monotonic_s()
        # Step 2: decode and validate. Pure: it can be repeated.
        batch = decode_batch(records, self._decoder, self._clock.now_ms(), colliding=self._colliding)
        with _tracer.start_as_current_span(
            "headrace.ingest.commit",
            kind=trace.SpanKind.CONSUMER,
            links=links_to(record.headers for record in records),
            attributes={
                "messaging.system": "kafka",
                "messaging.destination.name": self._topics.interactions,
                "messaging.destination.partition.id": str(partition),
                "messaging.batch.message_count": len(records),
            },
        ):
            try:
                update, position = await self._apply(partition, batch)
            except IdCollisionError as error:
                # Never merge two users or items: refuse the newcomer's records and commit the others.
                self._colliding.add((error.kind, error.new))
                return await self.commit(partition, records, advise=advise)
        fail_point("ingest.committed")
        # Step 7: tell the consumer group, for tools that show lag. Advisory: SQL has the truth.
        if advise is not None:
            await advise(position)
        # Step 8: record freshness, now that the events can be read.
        if update is not None:
            self.freshness.record(update.interactions.event_time_ms, update.append_ms, self._clock.now_ms())
        self._durations.record(self._clock.monotonic_s() - started_s)
        return position

    async def _apply(self, partition: int, batch: DecodedBatch) -> tuple[HistoryUpdate | None, int]:
        async with _Transaction(self._store.transaction(), self._in_sql_thread) as transaction:
            # Step 3: lock the partition's position (another worker on it waits here) and drop what lies below.
            position = await self._in_sql_thread(
                lambda: transaction.lock_position(self._log_id, self._topics.interactions, partition)
            )
            batch, num_skipped = batch.from_offset(position)
            if batch.last_offset < position:
                self.counts.num_skipped += num_skipped
                return None, position
            # Step 4: append to the histories; duplicates are no-ops, late events go where they belong.
            update, num_late = await self._in_sql_thread(lambda: self._append(transaction, partition, batch))
            fail_point("ingest.appended")
            # Step 5: dead letters and updates are in the log before the position moves past their source.
            await self._produce(partition, update, batch)
            fail_point("ingest.produced")
            # Step 6: the position moves in the same transaction as the effect.
            position = batch.last_offset + 1
            await self._in_sql_thread(
                lambda: transaction.set_position(self._log_id, self._topics.interactions, partition, position)
            )
        self._count(batch, update, num_skipped=num_skipped, num_late=num_late)
        return (update if len(update.offsets) else None), position

    def _append(self, transaction: StoreTransaction, partition: int, batch: DecodedBatch) -> tuple[HistoryUpdate, int]:
        if batch.user_names:
            transaction.register_names("user", batch.user_names)
        if batch.item_names:
            transaction.register_names("item", batch.item_names)
        result = transaction.append(batch.interactions)
        accepted = result.accepted
        newest_ms = int(batch.interactions.event_time_ms.max(initial=0))
        update = HistoryUpdate(
            log_id=self._log_id,
            partition=partition,
            first_offset=batch.first_offset,
            last_offset=batch.last_offset,
            watermark_ms=max(self.counts.watermark_ms, newest_ms),
            offsets=batch.offsets[accepted],
            append_ms=batch.append_ms[accepted],
            interactions=result.accepted_from(batch.interactions),
        )
        return update, int(result.late.sum())

    async def _produce(self, partition: int, update: HistoryUpdate, batch: DecodedBatch) -> None:
        sends = await self._dead_letters.send(batch.refused)
        if len(update.offsets):
            sends.append(
                await self._writer.send(
                    self._topics.history_updates,
                    update.encode(),
                    key=str(partition).encode(),
                    partition=partition,
                    headers=current_headers(),
                )
            )
        await acknowledged(sends)
        self._dead_letters.count(batch.refused)

    def _count(self, batch: DecodedBatch, update: HistoryUpdate, *, num_skipped: int, num_late: int) -> None:
        counts, num_accepted = self.counts, len(update.offsets)
        num_duplicate = len(batch.offsets) - num_accepted
        refused = Counter(refusal.reason for _, refusal in batch.refused)
        counts.num_accepted += num_accepted
        counts.num_duplicate += num_duplicate
        counts.num_late += num_late
        counts.num_skipped += num_skipped
        counts.num_refused.update(refused)
        counts.num_batches += 1
        counts.watermark_ms = max(counts.watermark_ms, update.watermark_ms)
        self._events.add(num_accepted, {"outcome": "accepted"})
        self._events.add(num_duplicate, {"outcome": "duplicate"})
        for reason, count in refused.items():
            self._events.add(count, {"outcome": "refused", "reason": reason})

    async def _in_sql_thread(self, call: Callable[[], _Result]) -> _Result:
        return await asyncio.get_running_loop().run_in_executor(self._sql, call)


class _Transaction:
    """A store transaction whose begin, commit and rollback run in the SQL thread."""

    def __init__(
        self,
        transaction: AbstractContextManager[StoreTransaction],
        in_sql_thread: Callable[[Callable[[], Any]], Awaitable[Any]],
    ) -> None:
        self._transaction, self._in_sql_thread = transaction, in_sql_thread

    async def __aenter__(self) -> StoreTransaction:
        entered: StoreTransaction = await self._in_sql_thread(self._transaction.__enter__)
        return entered

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self._in_sql_thread(lambda: self._transaction.__exit__(kind, error, traceback))


class IngestWorker(ConsumerRebalanceListener):
    """Polls the partitions the consumer group gives it and commits them batch by batch."""

    def __init__(self, config: IngestConfig, kafka: KafkaConfig, topics: Topics, committer: Committer) -> None:
        self._config, self._kafka, self._topics, self._committer = config, kafka, topics, committer
        self._consumer: Any = None
        self._next: dict[int, int] = {}
        self._num_moves = 0
        """Changes while an assignment is under way; see _poll_once."""
        self._guard = PositionGuard()
        self._committing = asyncio.Lock()
        self.blocked_by: str | None = "starting"
        metrics.get_meter("headrace.stream").create_observable_gauge(
            "headrace.ingest.lag", [self._observe_lag], unit="{record}", description="Records behind the log's end"
        )

    async def run(self, stopping: asyncio.Event) -> None:
        """Ingest until `stopping` is set; finishes the batch in hand. Raises LogResetError."""
        self._consumer = AIOKafkaConsumer(
            group_id=self._config.group_id,
            enable_auto_commit=False,
            # A position outside the log shows as what PositionGuard refuses, never as a silent jump.
            auto_offset_reset="earliest",
            max_poll_records=self._config.max_batch_records,
            max_poll_interval_ms=self._config.max_poll_interval_ms,
            session_timeout_ms=self._config.session_timeout_ms,
            heartbeat_interval_ms=self._config.session_timeout_ms // 3,
            fetch_max_wait_ms=self._kafka.fetch_max_wait_ms,
            max_partition_fetch_bytes=self._kafka.max_message_bytes,
            **self._kafka.client_options(),
        )
        self._consumer.subscribe([self._topics.interactions], listener=self)
        try:
            await self._consumer.start()
            while not stopping.is_set():
                if not await self._poll_once(stopping):
                    await asyncio.sleep(self._config.batch_wait_ms / 1000)
        except (KafkaError, OSError) as error:
            raise LogUnavailableError(f"the broker at {self._kafka.bootstrap_servers} failed: {error}") from error
        finally:
            self.blocked_by = "stopped"
            await self._consumer.stop()

    async def _poll_once(self, stopping: asyncio.Event) -> bool:
        """Commit what one poll brings; whether it brought as much as it may, so that more is probably waiting."""
        # Step 1: a bounded batch per partition.
        num_moves = self._num_moves
        fetched = await fetch_fairly(
            self._consumer, timeout_ms=self._config.poll_timeout_ms, max_records=self._config.max_batch_records
        )
        positions = {TopicPartition(self._topics.interactions, p): position for p, position in self._next.items()}
        if num_moves != self._num_moves:
            # Fetched around an assignment, perhaps from where the group stood: read again from where SQL stands.
            for topic_partition in fetched.keys() & positions.keys() & self._consumer.assignment():
                self._consumer.seek(topic_partition, positions[topic_partition])
            return True
        await self._guard.check(self._consumer, positions, fetched)
        for topic_partition, records in fetched.items():
            async with self._committing:
                await self._commit_with_retries(topic_partition, records, stopping)
        share = self._config.max_batch_records // max(1, len(self._next))
        return any(len(records) >= share for records in fetched.values())

    async def _commit_with_retries(
        self, topic_partition: TopicPartition, records: list[Record], stopping: asyncio.Event
    ) -> None:
        partition, delay_s = topic_partition.partition, RETRY_FIRST_S

        async def advise(position: int) -> None:
            try:
                await self._consumer.commit({topic_partition: position})
            except KafkaError as error:
                logger.info("the group did not take offset %d of %s: %s", position, topic_partition, error)

        while partition in self._next:
            try:
                self._next[partition] = await self._committer.commit(partition, records, advise=advise)
            except _RETRYABLE as error:
                self.blocked_by = str(error)
                if stopping.is_set():
                    return
                logger.warning("partition %d: %s; trying again in %.1f s", partition, error, delay_s)
                await asyncio.sleep(delay_s)
                delay_s = min(2 * delay_s, RETRY_MAX_S)
            else:
                self.blocked_by = None
                return

    async def on_partitions_revoked(self, revoked: Collection[TopicPartition]) -> None:
        """Finish the batch in hand, within the time budget; then these partitions are another worker's."""
        try:
            await asyncio.wait_for(self._committing.acquire(), self._config.drain_timeout_ms / 1000)
        except TimeoutError:
            # The position row fences us: whoever comes next waits for, or overtakes, the open transaction.
            logger.warning("partitions revoked while a batch is still being committed")
        else:
            self._committing.release()
        for topic_partition in revoked:
            self._next.pop(topic_partition.partition, None)

    async def on_partitions_assigned(self, assigned: Collection[TopicPartition]) -> None:
        """Start from the positions in SQL, not from the group's."""
        self._num_moves += 1
        for topic_partition in assigned:
            position = await self._stored_position(topic_partition.partition)
            self._consumer.seek(topic_partition, position)
            self._next[topic_partition.partition] = position
        self._num_moves += 1
        self.blocked_by = None
        logger.info("reading partitions %s", {p.partition: self._next[p.partition] for p in assigned})

    async def _stored_position(self, partition: int) -> int:
        delay_s = RETRY_FIRST_S
        while True:
            try:
                return await self._committer.stored_position(partition)
            except StoreUnavailableError as error:
                self.blocked_by = str(error)
                logger.warning("%s; trying again in %.1f s", error, delay_s)
                await asyncio.sleep(delay_s)
                delay_s = min(2 * delay_s, RETRY_MAX_S)

    def lag(self) -> dict[int, int]:
        """Records behind the end of the log per partition, as far as the last fetch saw."""
        if self._consumer is None:
            return {}
        ends = {p: end_of(self._consumer, TopicPartition(self._topics.interactions, p)) for p in self._next}
        return {p: max(0, (ends[p] or position) - position) for p, position in self._next.items()}

    def positions(self) -> dict[int, int]:
        """Next offset to apply, per partition this worker owns."""
        return dict(self._next)

    def _observe_lag(self, _options: object) -> Iterable[metrics.Observation]:
        return [metrics.Observation(lag, {"partition": partition}) for partition, lag in self.lag().items()]
