"""The log in this process, for tests and backtests: the contract of `stream.log` without a broker."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Mapping
from dataclasses import fields, replace

from stream.clock import Clock
from stream.errors import LogUnavailableError
from stream.log import PartitionId, Record, Start
from stream.log_bounds import LogBounds, Standing, no_such_partition
from stream.messages import Topics
from stream.tracing import Headers


class MemoryLog:
    """The log in this process, for tests and backtests: same contract, no broker."""

    def __init__(self, clock: Clock, *, num_partitions: int = 1, log_id: str = "memory") -> None:
        self.topics = Topics()
        self.log_id = log_id
        self._clock = clock
        self._num_partitions = num_partitions
        self._records: dict[PartitionId, list[Record]] = {}
        self._starts: dict[PartitionId, int] = {}
        self._grown = asyncio.Event()

    async def create_topics(self) -> None:
        """Create every topic; existing ones keep their records."""
        for field in fields(Topics):
            parallel = field.name in {"interactions", "history_updates"}
            for partition in range(self._num_partitions if parallel else 1):
                self._records.setdefault((getattr(self.topics, field.name), partition), [])

    def reader(self) -> MemoryReader:
        """A reader over this log."""
        return MemoryReader(self)

    def writer(self) -> MemoryWriter:
        """A writer to this log."""
        return MemoryWriter(self)

    def partition_numbers(self, topic: str) -> list[int]:
        """Partition numbers of a topic; raises LogUnavailableError when it does not exist."""
        found = sorted(partition for name, partition in self._records if name == topic)
        if not found:
            raise LogUnavailableError(f"topic {topic!r} does not exist")
        return found

    def records(self, partition: PartitionId) -> list[Record]:
        """Everything appended to a partition, in order."""
        return self._records[partition]

    def delete_before(self, partition: PartitionId, offset: int) -> None:
        """Move a partition's start, as retention does: what lies below can no longer be read, and is freed."""
        records = self._records[partition]
        for below in range(self._starts.get(partition, 0), min(offset, len(records))):
            records[below] = replace(records[below], key=None, value=None, headers=())
        self._starts[partition] = offset

    def bounds(self, partition: PartitionId) -> LogBounds:
        """What a partition holds."""
        return LogBounds(self._starts.get(partition, 0), len(self._records[partition]))

    def append(
        self, topic: str, partition: int | None, key: bytes | None, value: bytes | None, headers: Headers
    ) -> Record:
        """Append one record; without `partition`, the key chooses it."""
        numbers = self.partition_numbers(topic)
        chosen = partition if partition is not None else numbers[sum(key or b"") % len(numbers)]
        if chosen not in numbers:
            raise no_such_partition(topic, chosen)
        records = self._records[topic, chosen]
        record = Record(topic, chosen, len(records), self._clock.now_ms(), key, value, headers)
        records.append(record)
        self._grown.set()
        self._grown = asyncio.Event()
        return record

    def now_ms(self) -> int:
        """What an append would be stamped with now."""
        return self._clock.now_ms()

    async def wait_for_growth(self, timeout_ms: int) -> None:
        """Return when something was appended, or after `timeout_ms`."""
        try:
            await asyncio.wait_for(self._grown.wait(), timeout_ms / 1000)
        except TimeoutError:
            return


class MemoryReader:
    """LogReader on a MemoryLog."""

    def __init__(self, log: MemoryLog) -> None:
        self._log = log
        self._next: dict[PartitionId, int] = {}

    async def start(self) -> None:
        """Nothing to connect to."""

    async def stop(self) -> None:
        """Nothing to disconnect from."""

    async def partitions(self, topic: str) -> list[int]:
        """See LogReader."""
        return self._log.partition_numbers(topic)

    async def bounds(self, topic: str) -> dict[int, LogBounds]:
        """See LogReader."""
        return {n: self._log.bounds((topic, n)) for n in self._log.partition_numbers(topic)}

    async def since(self, topic: str, at_ms: int) -> dict[int, int]:
        """See LogReader."""
        found = {}
        for partition, bounds in (await self.bounds(topic)).items():
            newer = (one.offset for one in self._log.records((topic, partition)) if one.timestamp_ms >= at_ms)
            found[partition] = max(bounds.start, next(newer, bounds.end))
        return found

    async def assign(self, starts: Mapping[PartitionId, Start]) -> None:
        """See LogReader."""
        self._next = {}
        for partition, start in starts.items():
            if start == "earliest":
                self._next[partition] = self._log.bounds(partition).start
            elif start == "latest":
                self._next[partition] = len(self._log.records(partition))
            else:
                self._next[partition] = start

    async def poll(self, *, timeout_ms: int, max_records: int) -> list[Record]:
        """See LogReader; raises LogResetError for a position that the log does not hold."""
        polled = self._take(max_records)
        if not polled and timeout_ms > 0:
            await self._log.wait_for_growth(timeout_ms)
            polled = self._take(max_records)
        return polled

    async def read_up_to_ms(self) -> int | None:
        """See LogReader."""
        is_unread = any(position < len(self._log.records(partition)) for partition, position in self._next.items())
        return None if is_unread or not self._next else self._log.now_ms()

    def _take(self, max_records: int) -> list[Record]:
        polled: list[Record] = []
        for partition, position in self._next.items():
            records = self._log.records(partition)
            topic, number = partition
            Standing(topic=topic, partition=number, position=position, bounds=self._log.bounds(partition)).refuse_loss()
            taken = records[position : position + max_records - len(polled)]
            self._next[partition] = position + len(taken)
            polled += taken
        return polled


class MemoryWriter:
    """LogWriter on a MemoryLog."""

    def __init__(self, log: MemoryLog) -> None:
        self._log = log

    async def start(self) -> None:
        """Nothing to connect to."""

    async def stop(self) -> None:
        """Nothing to disconnect from."""

    async def send(
        self,
        topic: str,
        value: bytes | None,
        *,
        key: bytes | None = None,
        partition: int | None = None,
        headers: Headers = (),
    ) -> Awaitable[object]:
        """See LogWriter."""
        assert value is not None or key is not None, "as in aiokafka: a record has a key or a value"
        sent: asyncio.Future[object] = asyncio.get_running_loop().create_future()
        sent.set_result(self._log.append(topic, partition, key, value, headers))
        return sent
