"""What an aiokafka consumer fetches, as headrace reads it: evenly, as columns, and never past what is missing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import numpy as np
from aiokafka import TopicPartition
from opentelemetry import metrics

from stream.errors import LogUnavailableError
from stream.log import RecordBatch
from stream.log_bounds import was_reset, was_truncated

_consumed = metrics.get_meter("headrace.stream").create_counter(
    "messaging.client.consumed.messages", unit="{message}", description="Records polled, by topic"
)


def count_consumed(topic: str, count: int) -> None:
    """Note records that were polled."""
    _consumed.add(count, messaging_attributes(topic, "poll"))


def messaging_attributes(topic: str, operation: str) -> dict[str, str]:
    """By OpenTelemetry's messaging conventions."""
    return {
        "messaging.system": "kafka",
        "messaging.operation.name": operation,
        "messaging.destination.name": topic,
    }


class RawRecord(Protocol):
    """What a fetched record must have: aiokafka's `ConsumerRecord` has it, and so has what it is made of."""

    offset: int
    timestamp: int
    key: bytes | None
    value: bytes | None
    headers: Sequence[tuple[str, bytes]]


async def fetch_fairly(consumer: Any, *, timeout_ms: int, max_records: int) -> dict[TopicPartition, list[RawRecord]]:
    """Poll an aiokafka consumer with an equal share of `max_records` for every assigned partition.

    Left alone, it drains one partition before it turns to the next, so that a consumer that catches up would run
    far ahead in some partitions and stand still in the others.

    Raises KafkaError, or LogUnavailableError for a record that the client cannot read.
    """
    _leave_records_raw(consumer)
    partitions = sorted(consumer.assignment())
    share = max(1, max_records // max(1, len(partitions)))
    fetched: dict[TopicPartition, list[RawRecord]] = {}
    for partition in partitions:
        if partition in consumer.assignment():  # a rebalance may take it away while we wait for another
            fetched |= await _getmany(consumer, partition, timeout_ms=0, max_records=share)
    if not fetched:
        fetched = await _getmany(consumer, timeout_ms=timeout_ms, max_records=share)
    return fetched


async def _getmany(
    consumer: Any, *partition: TopicPartition, timeout_ms: int, max_records: int
) -> dict[TopicPartition, list[RawRecord]]:
    try:
        found: dict[TopicPartition, list[RawRecord]] = await consumer.getmany(
            *partition, timeout_ms=timeout_ms, max_records=max_records
        )
    except UnicodeDecodeError as error:
        # Other clients may write any bytes; aiokafka has no way around them.
        where = " or ".join(f"{topic}/{number}" for topic, number in partition or sorted(consumer.assignment()))
        raise LogUnavailableError(
            f"a record of {where} has a header whose name is not UTF-8, which cannot be read: delete the records up to "
            "it (kafka-delete-records) and run `headrace log accept --truncated`, or wait for its expiry"
        ) from error
    return found


def _leave_records_raw(consumer: Any) -> None:
    """Spare what lies fetched in the consumer the making of a `ConsumerRecord` of every record.

    That takes as long as reading the record; besides key and value, a `ConsumerRecord` holds 232 bytes, and what it is
    made of 144 (aiokafka 0.14, Python 3.11, no headers). There is no API for it. Should these inner names ever change,
    ConsumerRecords come instead, and only time and memory are lost (a test would tell).
    """
    for waiting in getattr(getattr(consumer, "_fetcher", None), "_records", {}).values():
        records: Any = getattr(waiting, "_partition_records", None)
        if hasattr(records, "_consumer_record"):
            records._consumer_record = _as_it_is  # noqa: SLF001


def _as_it_is(_partition: TopicPartition, raw: RawRecord) -> RawRecord:
    return raw


def batch_of(partition: TopicPartition, records: Sequence[RawRecord]) -> RecordBatch:
    """What one poll brought of one partition, as columns."""
    return RecordBatch(
        topic=partition.topic,
        partition=partition.partition,
        offsets=np.array([raw.offset for raw in records], np.int64),
        timestamps_ms=np.array([raw.timestamp for raw in records], np.int64),
        keys=[raw.key for raw in records],
        values=[raw.value for raw in records],
        headers=[tuple(raw.headers) for raw in records],
    )


def end_of(consumer: Any, partition: TopicPartition) -> int | None:
    """The partition's end as of the last fetch; None before one, and when the partition is no longer ours."""
    end: int | None = consumer.highwater(partition) if partition in consumer.assignment() else None
    return end


def refuse_reset(consumer: Any, positions: Mapping[TopicPartition, int]) -> None:
    """Raise LogResetError when a partition ends before the position from which it is to be read next.

    Compares with the end that came with the last fetch: the local broker answers a position beyond the end with
    nothing, for ever, and what it reports as "latest" may be too low.
    """
    for partition, position in positions.items():
        end = end_of(consumer, partition)
        if end is not None and end < position:
            raise was_reset(partition.topic, partition.partition, position, end=end)


class PositionGuard:
    """Refuses to read on where the log no longer holds what is to be read next.

    A consumer that resets itself to the earliest record jumps over what is missing without a word. What it fetches
    tells: a record below the position means another log. A gap above it may be compaction or a transaction's marker, so
    the log's start decides; it is also looked at once for every partition, in case nothing comes.
    """

    def __init__(self) -> None:
        self._looked_at: set[TopicPartition] = set()

    async def check(
        self,
        consumer: Any,
        positions: Mapping[TopicPartition, int],
        fetched: Mapping[TopicPartition, Sequence[RawRecord]],
    ) -> None:
        """Raise LogResetError if records are missing at these positions; 0 means that nothing was read yet.

        Raises KafkaError when the broker does not answer.
        """
        refuse_reset(consumer, positions)
        to_look_at = {partition for partition, position in positions.items() if position} - self._looked_at
        for partition, records in fetched.items():
            position, first = positions.get(partition, 0), records[0].offset
            if first < position:
                raise was_reset(partition.topic, partition.partition, position, first=first)
            if first > position > 0:
                to_look_at.add(partition)
        if to_look_at:
            starts = await consumer.beginning_offsets(sorted(to_look_at))
            for partition, start in starts.items():
                if positions[partition] < start:
                    raise was_truncated(partition.topic, partition.partition, positions[partition], start=start)
        self._looked_at = set(positions)
