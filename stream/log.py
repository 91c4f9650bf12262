"""The log as headrace uses it: append records, read partitions from a position.

Implementations: `stream.kafka` (any Kafka-protocol broker) and `stream.memory_log` (tests and backtests). Readers
here are assigned by hand and belong to no consumer group: every trainer and every inference worker reads all
partitions and keeps its own positions. (Ingest shares partitions between workers through a group; see `stream.ingest`.)
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Final, Literal, Protocol

import numpy as np
from aiokafka.errors import KafkaError, MessageSizeTooLargeError
from numpy.typing import NDArray

from stream.errors import LogResetError, LogUnavailableError, RecordTooLargeError
from stream.log_bounds import LogBounds
from stream.messages import Topics
from stream.tracing import Headers

logger = logging.getLogger(__name__)

EMPTY_POLLS: Final = 2
"""So many empty polls in a row mean that nothing more is there; one may only mean a slow first fetch."""

Start = int | Literal["earliest", "latest"]
PartitionId = tuple[str, int]
"""(topic, partition)"""


@dataclass(frozen=True, slots=True)
class Record:
    """One record of the log. `timestamp_ms` is when the broker or producer stamped it."""

    topic: str
    partition: int
    offset: int
    timestamp_ms: int
    key: bytes | None
    value: bytes | None
    headers: Headers


@dataclass(frozen=True, kw_only=True, slots=True)
class RecordBatch:
    """N ≥ 1 records of one partition, column by column, in the order of their offsets."""

    topic: str
    partition: int
    offsets: NDArray[np.int64]
    """i64[N], ascending."""
    timestamps_ms: NDArray[np.int64]
    """i64[N], when the broker or producer stamped each record."""
    keys: list[bytes | None]
    values: list[bytes | None]
    headers: list[Headers]

    def __len__(self) -> int:
        return len(self.values)

    def record(self, row: int) -> Record:
        """One of the N records."""
        return Record(
            self.topic,
            self.partition,
            int(self.offsets[row]),
            int(self.timestamps_ms[row]),
            self.keys[row],
            self.values[row],
            self.headers[row],
        )

    @staticmethod
    def of(records: Sequence[Record]) -> RecordBatch:
        """The columns of records that exist one by one."""
        return RecordBatch(
            topic=records[0].topic,
            partition=records[0].partition,
            offsets=np.array([record.offset for record in records], np.int64),
            timestamps_ms=np.array([record.timestamp_ms for record in records], np.int64),
            keys=[record.key for record in records],
            values=[record.value for record in records],
            headers=[record.headers for record in records],
        )


class LogReader(Protocol):
    """Reads assigned partitions from given positions."""

    async def start(self) -> None:
        """Connect; raises LogUnavailableError."""
        ...

    async def stop(self) -> None:
        """Disconnect; harmless when not connected."""
        ...

    async def partitions(self, topic: str) -> list[int]:
        """Partition numbers of a topic; raises LogUnavailableError when it does not exist."""
        ...

    async def bounds(self, topic: str) -> dict[int, LogBounds]:
        """What each partition of a topic holds now. Moves the reader: `assign` it before the next `poll`.

        Raises LogUnavailableError when the broker is away or the topic does not exist.
        """
        ...

    async def since(self, topic: str, at_ms: int) -> dict[int, int]:
        """Of each partition of a topic, an offset behind which all lies that is stamped at or after `at_ms` (epoch ms).

        Some earlier records may, too, as brokers search by batches. Moves the reader like `bounds`, and raises what it
        does.
        """
        ...

    async def assign(self, starts: Mapping[PartitionId, Start]) -> None:
        """Read these partitions from these positions, replacing any earlier assignment."""
        ...

    async def poll(self, *, timeout_ms: int, max_records: int) -> list[Record]:
        """Records in offset order per partition; empty after `timeout_ms` without any.

        Raises LogResetError when a position no longer exists, LogUnavailableError when the broker is away.
        """
        ...

    async def read_up_to_ms(self) -> int | None:
        """A moment (epoch ms): whatever the assigned partitions held then has been polled. None: something has not.

        While the broker does not answer, the moment stands still.
        """
        ...


class LogWriter(Protocol):
    """Appends records; an awaited `send` result means the log has it on all in-sync replicas."""

    async def start(self) -> None:
        """Connect; raises LogUnavailableError."""
        ...

    async def stop(self) -> None:
        """Send what is buffered and disconnect; harmless when not connected."""
        ...

    async def send(
        self,
        topic: str,
        value: bytes | None,
        *,
        key: bytes | None = None,
        partition: int | None = None,
        headers: Headers = (),
    ) -> Awaitable[object]:
        """Queue a record, which has a key or a value; `acknowledged` waits for the results.

        Raises LogUnavailableError.
        """
        ...


class EventLog(Protocol):
    """Where topics live."""

    topics: Topics
    log_id: str

    def reader(self) -> LogReader:
        """A reader without a consumer group."""
        ...

    def writer(self) -> LogWriter:
        """A writer that waits for all in-sync replicas."""
        ...

    async def create_topics(self) -> None:
        """Create the topics that do not exist yet; raises LogUnavailableError."""
        ...


@asynccontextmanager
async def reading(log: EventLog) -> AsyncIterator[LogReader]:
    """A reader for as long as the block runs; raises LogUnavailableError."""
    reader = log.reader()
    await reader.start()
    try:
        yield reader
    finally:
        await reader.stop()


async def record_at(log: EventLog, topic: str, partition: int, offset: int, *, quiet_ms: int = 500) -> Record | None:
    """The record at one place, or None where there is none (any more); raises LogUnavailableError."""
    async with reading(log) as reader:
        if partition not in await reader.partitions(topic):
            return None
        await reader.assign({(topic, partition): offset})
        for _ in range(EMPTY_POLLS):
            try:
                records = await reader.poll(timeout_ms=quiet_ms, max_records=1)
            except LogResetError:  # beyond the end, or deleted by retention
                return None
            if records:
                return records[0] if records[0].offset == offset else None
    return None


async def acknowledged(sends: Sequence[Awaitable[object]]) -> None:
    """Wait until the log has every record sent; raises LogUnavailableError if one failed."""
    try:
        await asyncio.gather(*sends)
    except MessageSizeTooLargeError as error:
        raise RecordTooLargeError(f"the broker takes no record of that size: {error}") from error
    except KafkaError as error:
        raise LogUnavailableError(f"the broker did not acknowledge: {error}") from error


RETRY_FIRST_S: Final = 0.2
RETRY_MAX_S: Final = 5.0


async def start_when_available(
    start: Callable[[], Awaitable[None]],
    *,
    what: str,
    stopping: asyncio.Event,
    on_failure: Callable[[str], None] = lambda _problem: None,
) -> bool:
    """Call `start` (async, raises LogUnavailableError) until it succeeds, with exponential back-off.

    Says once per attempt what is missing and when it tries again; `on_failure` hears what is missing. Returns False
    if `stopping` was set meanwhile.
    """
    delay_s = RETRY_FIRST_S
    while not stopping.is_set():
        try:
            await start()
        except LogUnavailableError as error:
            on_failure(str(error))
            logger.warning("%s: %s; trying again in %.1f s", what, error, delay_s)
            try:
                await asyncio.wait_for(stopping.wait(), delay_s)
            except TimeoutError:
                delay_s = min(2 * delay_s, RETRY_MAX_S)
        else:
            return True
    return False
