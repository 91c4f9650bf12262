"""Ingest: polls the partitions the consumer group gives it and commits what they bring, in transactions.

`stream.commit` holds the steps of a commit; this is who drives them: polling ahead, pausing when the database does not
keep up, and handing partitions over.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Final

from aiokafka import AIOKafkaConsumer, ConsumerRebalanceListener, TopicPartition
from aiokafka.errors import KafkaError
from opentelemetry import metrics

from feature_store.errors import ChunkCorruptError, ConcurrentAppendError, StoreUnavailableError
from stream.batch import DecodedBatch
from stream.commit import Committer
from stream.errors import LogUnavailableError
from stream.fetching import PositionGuard, RawRecord, batch_of, count_consumed, fetch_fairly
from stream.kafka import KafkaConfig, KafkaReader
from stream.log import RETRY_FIRST_S, RETRY_MAX_S
from stream.log_ends import LogEnds
from stream.messages import Topics

logger = logging.getLogger(__name__)

_RETRYABLE: Final = (StoreUnavailableError, ConcurrentAppendError, ChunkCorruptError, LogUnavailableError)
"""A damaged history holds up what was polled with an event of its user until it is mended, or its user forgotten, which
takes a process that stays: `commands` are carried out beside ingest."""
_NEWER_MS: Final = 10
"""How long what lies fetched waits for what came since: an answer of the broker, which has it."""
_STAY_IN_GROUP_S: Final = 1.0
"""While partitions are paused, how often the consumer is told that we are alive."""


@dataclass(frozen=True, kw_only=True, slots=True)
class IngestConfig:
    """How ingest polls and commits."""

    group_id: str = "headrace-ingest"
    """Consumer group that shares the partitions of `interactions` between workers; also the Faust app's id."""
    max_batch_records: int = 65_536
    """Records of one poll, shared by the partitions, and so of one transaction. A poll takes what is there, so this
    only counts when the worker is behind: large batches then catch up faster, small ones show their events sooner."""
    max_bytes_in_flight: int = 33_554_432
    """Records held in memory before they are durable (bytes): what is fetched ahead takes at most half of it."""
    pause_after_ms: int = 1_000
    """A commit that takes longer than this (ms), because the database or the broker does not keep up, pauses the
    partitions: nothing more is fetched until it is done, and memory stays flat."""
    batch_wait_ms: int = 40
    """Time between two polls (ms) while the stream is slower than full batches: each commit costs a SQL transaction and
    messages that trainer and every worker read, so waiting a little saves most of the work (at 300 events a second, 60
    instead of 20 ms halve ingest's CPU and save a third of the broker's and the workers'); it adds this much to the age
    of an event at most."""
    poll_timeout_ms: int = 200
    """How long one poll waits for records (ms)."""
    max_poll_interval_ms: int = 300_000
    """A worker that does not poll for this long (ms) loses its partitions to others."""
    session_timeout_ms: int = 10_000
    """A worker that is silent for this long (ms) is dead: the delay before another takes over."""
    drain_timeout_ms: int = 5_000
    """Time to finish the batch in hand when partitions are revoked or the worker stops (ms)."""
    prune_interval_ms: int = 600_000
    """Pause between two sweeps over all users that remove what store.max_history and store.max_age_ms let expire (ms),
    by the worker that has partition 0; 0: only `headrace store prune` sweeps."""

    def __post_init__(self) -> None:
        if not 1 <= self.max_batch_records <= 100_000:
            raise ValueError(f"ingest.max_batch_records = {self.max_batch_records}: must lie in 1..100000")
        if not self.group_id:
            raise ValueError("ingest.group_id is empty: workers share partitions through a named group")
        if self.max_bytes_in_flight < 1_048_576:
            raise ValueError(f"ingest.max_bytes_in_flight = {self.max_bytes_in_flight}: must be at least 1048576")
        if self.pause_after_ms < 1:
            raise ValueError(f"ingest.pause_after_ms = {self.pause_after_ms}: must be at least 1")
        if self.batch_wait_ms < 0:
            raise ValueError(f"ingest.batch_wait_ms = {self.batch_wait_ms}: must not be negative")
        if self.prune_interval_ms < 0:
            raise ValueError(f"ingest.prune_interval_ms = {self.prune_interval_ms}: must not be negative")


class IngestWorker(ConsumerRebalanceListener):
    """Polls the partitions the consumer group gives it and commits them, one transaction a poll.

    While one poll is being committed, the next is fetched and decoded: never more than these two are held.
    """

    def __init__(self, config: IngestConfig, kafka: KafkaConfig, topics: Topics, committer: Committer) -> None:
        self._config, self._kafka, self._topics, self._committer = config, kafka, topics, committer
        self._consumer: Any = None
        self._fetched: dict[int, int] = {}
        """Next offset to fetch, per partition this worker owns."""
        self._next: dict[int, int] = {}
        """Next offset to apply."""
        self._generation = 0
        """Counts changes of what we own: a poll made before a change is not committed after it."""
        self._asking: asyncio.Task[dict[int, int]] | None = None
        """For the stored positions, when partitions were assigned last."""
        self._guard = PositionGuard()
        self._committing = asyncio.Lock()
        self._ends = LogEnds(kafka)
        self.is_paused = False
        self.blocked_by: str | None = "starting"
        meter = metrics.get_meter("headrace.stream")
        meter.create_observable_gauge(
            "headrace.ingest.lag", [self._observe_lag], unit="{record}", description="Records behind the log's end"
        )
        meter.create_observable_gauge(
            "headrace.ingest.paused",
            [lambda _options: [metrics.Observation(int(self.is_paused))]],
            description="1 while nothing is fetched because a commit does not get done",
        )

    async def run(self, stopping: asyncio.Event) -> None:
        """Ingest until `stopping` is set; finishes the batch in hand. Raises LogResetError or LogUnavailableError."""
        self._consumer = AIOKafkaConsumer(
            group_id=self._config.group_id,
            # What the log no longer holds is noticed by PositionGuard, never jumped over without a word.
            auto_offset_reset="earliest",
            max_poll_records=self._config.max_batch_records,
            max_poll_interval_ms=self._config.max_poll_interval_ms,
            session_timeout_ms=self._config.session_timeout_ms,
            heartbeat_interval_ms=self._config.session_timeout_ms // 3,
            max_partition_fetch_bytes=await self._partition_fetch_bytes(),
            **self._kafka.consumer_options(),
        )
        self._consumer.subscribe([self._topics.interactions], listener=self)
        committing: asyncio.Task[None] | None = None
        watching = asyncio.create_task(self._ends.watch(self._consumer))
        try:
            await self._consumer.start()
            while not stopping.is_set():
                batches, is_full = await self._poll()
                if self._asking is not None and self._asking.done() and not self._asking.cancelled():
                    # The client only logs what a listener raises, and would poll on without positions for ever.
                    self._asking.result()
                if committing is not None:
                    await self._finish(committing)
                committing = asyncio.create_task(self._commit_with_retries(batches, stopping)) if batches else None
                if committing is not None and not is_full:
                    await self._finish(committing)
                    committing = None
                if not is_full:
                    await asyncio.sleep(self._config.batch_wait_ms / 1000)
            if committing is not None:
                await self._finish(committing)
        except (KafkaError, OSError) as error:
            raise LogUnavailableError(f"the broker at {self._kafka.bootstrap_servers} failed: {error}") from error
        finally:
            self.blocked_by = "stopped"
            watching.cancel()
            self._disown()
            if committing is not None:
                # Whatever ended us, the transaction under way must not outlive its thread.
                await asyncio.wait([committing])
            await self._consumer.stop()

    async def _partition_fetch_bytes(self) -> int:
        """What one partition may hold in the consumer's buffers, so that all together hold half of what is allowed."""
        reader = KafkaReader(self._kafka)
        await reader.start()
        try:
            num_partitions = len(await reader.partitions(self._topics.interactions))
        finally:
            await reader.stop()
        return min(self._kafka.max_message_bytes, max(1, self._config.max_bytes_in_flight // 2 // num_partitions))

    async def _poll(self) -> tuple[list[DecodedBatch], bool]:
        """What one poll brings, and whether it brought as much as it may, so that more is probably waiting."""
        # Step 1: a bounded batch per partition.
        generation = self._generation
        fetched = await self._fetch()
        if generation == self._generation:
            positions = {self._topic_partition(partition): offset for partition, offset in self._fetched.items()}
            await self._guard.check(self._consumer, positions, fetched)
        if generation != self._generation:
            # What we own changed while we waited: start again from where the present owner has to.
            for partition, offset in self._fetched.items():
                self._consumer.seek(self._topic_partition(partition), offset)
            return [], False
        batches = []
        for topic_partition, records in fetched.items():
            partition = topic_partition.partition
            if partition not in self._fetched:
                continue  # being assigned: the seek to its stored position will bring these again
            self._fetched[partition] = records[-1].offset + 1
            count_consumed(self._topics.interactions, len(records))
            # Step 2: decode and validate.
            batches.append(self._committer.decode(batch_of(topic_partition, records)))
        share = self._config.max_batch_records // max(1, len(self._fetched))
        return batches, any(len(batch.source) >= share for batch in batches)

    async def _fetch(self) -> dict[TopicPartition, list[RawRecord]]:
        """What lies fetched, and what came since that was fetched; with nothing there, what comes first."""
        max_records = self._config.max_batch_records
        fetched = await fetch_fairly(self._consumer, timeout_ms=0, max_records=max_records)
        num_left = max_records - sum(map(len, fetched.values()))
        if num_left > max_records // 2:
            # A fetch brings what the broker has when it has anything, right after the last poll: without asking again,
            # most of what came while we waited would wait as long once more.
            timeout_ms = _NEWER_MS if fetched else self._config.poll_timeout_ms
            newer = await fetch_fairly(self._consumer, timeout_ms=timeout_ms, max_records=num_left)
            for partition, records in newer.items():
                fetched.setdefault(partition, []).extend(records)
        return fetched

    async def _finish(self, committing: asyncio.Task[None]) -> None:
        """Wait for a commit; if that takes long, with all partitions paused."""
        done, _ = await asyncio.wait([committing], timeout=self._config.pause_after_ms / 1000)
        if not done:
            self.is_paused = True
            try:
                while not committing.done():
                    await self._idle()
                    await asyncio.wait([committing], timeout=_STAY_IN_GROUP_S)
            finally:
                self.is_paused = False
                self._consumer.resume(*self._consumer.assignment())
        await committing

    async def _idle(self) -> None:
        """Poll with all partitions paused: nothing comes, buffers are given back, and the group knows we are alive."""
        self._consumer.pause(*self._consumer.assignment())
        for topic_partition, records in (await self._consumer.getmany(timeout_ms=0)).items():
            self._consumer.seek(topic_partition, records[0].offset)  # assigned to us between the two calls

    async def _commit_with_retries(self, batches: list[DecodedBatch], stopping: asyncio.Event) -> None:
        async def advise(positions: Mapping[int, int]) -> None:
            try:
                await self._consumer.commit({self._topic_partition(p): offset for p, offset in positions.items()})
            except KafkaError as error:
                logger.info("the group did not take the offsets %s: %s", dict(positions), error)

        generation, delay_s, is_first = self._generation, RETRY_FIRST_S, True
        async with self._committing:
            while generation == self._generation:
                try:
                    positions = await self._committer.commit_all(batches, advise=advise)
                except _RETRYABLE as error:
                    if isinstance(error, ConcurrentAppendError) and is_first:
                        # Another worker has some of the same users: what it wrote is read again, that is all.
                        is_first = False
                        continue
                    self.blocked_by = str(error)
                    if stopping.is_set():
                        return
                    partitions = ", ".join(str(batch.partition) for batch in batches)
                    logger.warning("partitions %s: %s; trying again in %.1f s", partitions, error, delay_s)
                    await asyncio.sleep(delay_s)
                    delay_s = min(2 * delay_s, RETRY_MAX_S)
                else:
                    self.blocked_by = None
                    if generation == self._generation:
                        self._next |= positions
                    return

    async def on_partitions_revoked(self, revoked: Collection[TopicPartition]) -> None:  # noqa: ARG002 - always all
        """Finish the batch in hand, within the time budget; then these partitions are another worker's."""
        try:
            await asyncio.wait_for(self._committing.acquire(), self._config.drain_timeout_ms / 1000)
        except TimeoutError:
            # The position row fences us: whoever comes next waits for, or overtakes, the open transaction.
            logger.warning("partitions revoked while a batch is still being committed")
        else:
            self._committing.release()
        self._disown()

    async def on_partitions_assigned(self, assigned: Collection[TopicPartition]) -> None:
        """Start from the positions in SQL, not from the group's."""
        self._asking = asyncio.create_task(self._stored_positions())
        stored = await self._asking
        positions = {each.partition: stored.get(each.partition, 0) for each in assigned}
        self._disown()
        for partition, position in positions.items():
            self._consumer.seek(self._topic_partition(partition), position)
        self._fetched, self._next = dict(positions), positions
        self.blocked_by = None
        logger.info("reading partitions %s", positions)

    def _disown(self) -> None:
        """From now on, what was polled before is not to be committed."""
        self._generation += 1
        self._fetched, self._next = {}, {}

    async def _stored_positions(self) -> dict[int, int]:
        delay_s = RETRY_FIRST_S
        while True:
            try:
                return await self._committer.stored_positions()
            except StoreUnavailableError as error:
                self.blocked_by = str(error)
                logger.warning("%s; trying again in %.1f s", error, delay_s)
                await asyncio.sleep(delay_s)
                delay_s = min(2 * delay_s, RETRY_MAX_S)

    def lag(self) -> dict[int, int]:
        """Records behind the end of the log per partition, as of about a second ago."""
        if self._consumer is None:
            return {}
        ends = {p: self._ends.end(self._consumer, self._topic_partition(p)) for p in self._next}
        return {p: max(0, (ends[p] or position) - position) for p, position in self._next.items()}

    def problem(self) -> str | None:
        """Why nothing is applied now; None while the work goes on, or there is none to do."""
        waits_s = self._committer.waits_for_sql_s()
        if waits_s > self._config.drain_timeout_ms / 1000:
            return f"the feature store has not answered for {waits_s:.0f} s"
        return self.blocked_by or self._ends.problem

    def positions(self) -> dict[int, int]:
        """Next offset to apply, per partition this worker owns."""
        return dict(self._next)

    def _topic_partition(self, partition: int) -> TopicPartition:
        return TopicPartition(self._topics.interactions, partition)

    def _observe_lag(self, _options: object) -> Iterable[metrics.Observation]:
        return [metrics.Observation(lag, {"partition": partition}) for partition, lag in self.lag().items()]
