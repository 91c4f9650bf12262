"""The commit protocol: from records of `interactions` to durable histories, each event applied exactly once.

The guarantee is the order of the steps in `Committer.commit_all`. The transport is at least once; the effect is exactly
once, because the positions in the log are stored in the same SQL transaction as the histories.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Awaitable, Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from contextvars import copy_context
from dataclasses import dataclass, field, replace
from itertools import chain, pairwise
from types import TracebackType
from typing import Any, Final, TypeVar

import numpy as np
from opentelemetry import metrics, trace

from feature_store.errors import IdCollisionError
from feature_store.interactions import AppendResult, Interactions
from feature_store.store import FeatureStore
from feature_store.transaction import StoreTransaction
from stream.batch import DecodedBatch, decode_batch
from stream.clock import Clock
from stream.dead_letters import DeadLetterWriter
from stream.events import EventDecoder
from stream.failpoints import fail_point
from stream.freshness import F1_STORED, FreshnessRecorder
from stream.log import LogWriter, Record, RecordBatch, acknowledged
from stream.messages import HistoryUpdate, Topics
from stream.tracing import current_headers, links_to, processing_attributes

_tracer = trace.get_tracer("headrace.stream")

UPDATE_ROWS_MAX: Final = 10_000
"""Interactions in one message of `history-updates`: about 600 KiB, below the 1 MiB that brokers take by default."""

_Result = TypeVar("_Result")
Advise = Callable[[Mapping[int, int]], Awaitable[None]]
"""Hears of the new positions of partitions."""


@dataclass(slots=True)
class IngestCounts:
    """What happened to the records consumed so far, since this worker started."""

    num_accepted: int = 0
    num_duplicate: int = 0
    num_expired: int = 0
    """Older than what retention keeps: not accepted."""
    num_late: int = 0
    num_skipped: int = 0
    """Records below the stored position: applied before, dropped unseen."""
    num_refused: Counter[str] = field(default_factory=Counter)
    """Per reason code."""
    num_batches: int = 0
    watermark_ms: int = 0


@dataclass(frozen=True, kw_only=True, slots=True)
class _Applied:
    """What a transaction did for one partition."""

    batch: DecodedBatch
    """The part above the stored position."""
    update: HistoryUpdate
    """The accepted interactions."""
    position: int
    """The next offset to apply."""
    num_skipped: int
    result: AppendResult


class Committer:
    """Applies batches, step by step. Holds no consumer: it can be driven by any log."""

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
        self._processing = processing_attributes(topics.interactions)
        self._colliding: set[tuple[str, str]] = set()
        self._sql_since_s: list[float] = []
        # One thread: SQL never blocks the event loop, and a transaction never changes threads.
        self._sql = ThreadPoolExecutor(1, thread_name_prefix="ingest-sql")
        meter = metrics.get_meter("headrace.stream")
        self._events = meter.create_counter("headrace.ingest.events", unit="{event}", description="Events by outcome")
        self._durations = meter.create_histogram(
            "messaging.process.duration", unit="s", description="Decoded batch to durable histories: steps 3 to 8"
        )

    def close(self) -> None:
        """Release the SQL thread."""
        self._sql.shutdown(wait=True)

    async def stored_positions(self) -> dict[int, int]:
        """Next offset that has not been applied, of every partition that has been applied from."""
        return await self._in_sql_thread(lambda: self._store.positions(self._log_id, self._topics.interactions))

    def decode(self, records: RecordBatch) -> DecodedBatch:
        """Step 2 of the protocol: decode and validate. Pure: it can be repeated."""
        return decode_batch(records, self._decoder, self._clock.now_ms(), colliding=self._colliding)

    async def commit(self, partition: int, records: Sequence[Record]) -> int:
        """Decode and apply records of one partition; returns its new position. Raises what `commit_all` does."""
        batch = replace(RecordBatch.of(records), partition=partition)
        positions = await self.commit_all([self.decode(batch)])
        return positions[partition]

    async def commit_all(self, batches: Sequence[DecodedBatch], *, advise: Advise | None = None) -> dict[int, int]:
        """Apply one poll (step 1, polling it, is the caller's; step 2 is `decode`) in one transaction.

        Args:
            batches: at most one of each partition.
            advise: hears of the new positions once they are durable.

        Returns:
            Each partition's new position.

        Raises StoreUnavailableError, LogUnavailableError or ConcurrentAppendError with nothing applied: the
        same batches can be committed again.
        """
        started_s = self._clock.monotonic_s()
        batches = sorted(batches, key=lambda batch: batch.partition)
        with _tracer.start_as_current_span(
            "headrace.ingest.commit",
            kind=trace.SpanKind.CONSUMER,
            links=links_to(chain.from_iterable(batch.source.headers for batch in batches)),
            attributes=self._processing | _batch_attributes(batches),
        ) as span:
            while True:
                try:
                    applied = await self._apply(batches)
                    break
                except IdCollisionError as error:
                    # Never merge two users or items: refuse the newcomer's records and commit the others.
                    self._colliding.add((error.kind, error.new))
                    batches = [self.decode(batch.source) for batch in batches]
        fail_point("ingest.committed")
        positions = {each.batch.partition: each.position for each in applied}
        # Step 7: tell the consumer group, for tools that show lag. Advisory: SQL has the truth.
        if advise is not None:
            await advise(positions)
        fail_point("ingest.advised")
        # Step 8: record freshness, now that the events can be read.
        for each in applied:
            self._count(each, span)
        self._durations.record(self._clock.monotonic_s() - started_s, self._processing, trace.set_span_in_context(span))
        return positions

    async def _apply(self, batches: Sequence[DecodedBatch]) -> list[_Applied]:
        async with _Transaction(self._store.transaction(), self._in_sql_thread) as transaction:
            applied = await self._in_sql_thread(lambda: self._lock_and_append(transaction, batches))
            fail_point("ingest.appended")
            # Step 5: dead letters and updates are in the log before the positions move past their sources.
            await self._produce(applied)
            fail_point("ingest.produced")
            # Step 6: the positions move in the same transaction as the effect.
            await self._in_sql_thread(lambda: self._set_positions(transaction, applied))
            fail_point("ingest.positioned")
        return applied

    def _lock_and_append(self, transaction: StoreTransaction, batches: Sequence[DecodedBatch]) -> list[_Applied]:
        # Step 3: lock the partitions' positions (another worker on one of them waits here; every worker locks in the
        # same order) and drop what lies below.
        fresh, found = [], []
        for batch in batches:
            stored = transaction.lock_position(self._log_id, self._topics.interactions, batch.partition)
            rest, num_skipped = batch.from_offset(stored.next_offset)
            fresh.append(rest)
            found.append((stored, num_skipped))
        fail_point("ingest.locked")
        # Step 4: append to the histories; duplicates are no-ops, late events go where they belong.
        for batch in fresh:
            if batch.user_names:
                transaction.register_names("user", batch.user_names)
            if batch.item_names:
                transaction.register_names("item", batch.item_names)
        result = transaction.append(Interactions.concat([batch.interactions for batch in fresh]))
        bounds = np.cumsum([0, *(len(batch.offsets) for batch in fresh)]).tolist()
        applied = []
        for batch, (stored, num_skipped), (start, end) in zip(fresh, found, pairwise(bounds), strict=True):
            part = result.rows(slice(start, end))
            newest_ms = int(batch.interactions.event_time_ms.max(initial=0))
            update = HistoryUpdate(
                log_id=self._log_id,
                partition=batch.partition,
                first_offset=batch.first_offset,
                last_offset=batch.last_offset,
                watermark_ms=max(stored.watermark_ms, newest_ms),
                offsets=batch.offsets[part.accepted],
                append_ms=batch.append_ms[part.accepted],
                interactions=part.accepted_from(batch.interactions),
            )
            position = max(stored.next_offset, batch.last_offset + 1)
            applied.append(
                _Applied(batch=batch, update=update, position=position, num_skipped=num_skipped, result=part)
            )
        return applied

    def _set_positions(self, transaction: StoreTransaction, applied: Sequence[_Applied]) -> None:
        for each in applied:
            transaction.set_position(
                self._log_id,
                self._topics.interactions,
                each.batch.partition,
                each.position,
                watermark_ms=each.update.watermark_ms,
            )

    async def _produce(self, applied: Sequence[_Applied]) -> None:
        refused = [each for part in applied for each in part.batch.refused]
        await self._dead_letters.write(refused)
        trace_headers = current_headers()
        sends = [
            await self._writer.send(
                self._topics.history_updates,
                update.encode(),
                key=str(update.partition).encode(),
                partition=update.partition,
                headers=trace_headers,
            )
            for update in chain.from_iterable(each.update.split(UPDATE_ROWS_MAX) for each in applied)
        ]
        await acknowledged(sends)

    def _count(self, applied: _Applied, span: trace.Span) -> None:
        counts, update, batch = self.counts, applied.update, applied.batch
        num_accepted, num_expired = len(update.offsets), int(applied.result.expired.sum())
        num_duplicate = len(batch.offsets) - num_accepted - num_expired
        refused = Counter(refusal.reason for _, refusal in batch.refused)
        counts.num_accepted += num_accepted
        counts.num_duplicate += num_duplicate
        counts.num_expired += num_expired
        counts.num_late += int(applied.result.late.sum())
        counts.num_skipped += applied.num_skipped
        counts.num_refused.update(refused)
        counts.num_batches += 1
        counts.watermark_ms = max(counts.watermark_ms, update.watermark_ms)
        self._events.add(num_accepted, {"outcome": "accepted"})
        self._events.add(num_duplicate, {"outcome": "duplicate"})
        self._events.add(num_expired, {"outcome": "expired"})
        for reason, count in refused.items():
            self._events.add(count, {"outcome": "refused", "reason": reason})
        if num_accepted:
            now_ms = self._clock.now_ms()
            self.freshness.record(update.interactions.event_time_ms, update.append_ms, now_ms, span)

    def waits_for_sql_s(self) -> float:
        """How long the oldest call to the database has been under way (seconds); 0 without one."""
        return self._clock.monotonic_s() - min(self._sql_since_s) if self._sql_since_s else 0.0

    async def _in_sql_thread(self, call: Callable[[], _Result]) -> _Result:
        since_s = self._clock.monotonic_s()
        self._sql_since_s.append(since_s)
        try:
            # In the context of the commit, so that the transaction is a part of its span.
            return await asyncio.get_running_loop().run_in_executor(self._sql, copy_context().run, call)
        finally:
            self._sql_since_s.remove(since_s)


def _batch_attributes(batches: Sequence[DecodedBatch]) -> dict[str, str | int]:
    found: dict[str, str | int] = {"messaging.batch.message_count": sum(len(batch.source) for batch in batches)}
    if len(batches) == 1:
        found["messaging.destination.partition.id"] = str(batches[0].partition)
    return found


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
