"""The log's contract: the broker and the in-memory log behave alike."""

from __future__ import annotations

import asyncio
import gc
from collections.abc import AsyncIterator
from contextlib import suppress
from types import SimpleNamespace

import pytest
from aiokafka import AIOKafkaConsumer, AIOKafkaProducer, ConsumerRecord, TopicPartition
from aiokafka.consumer.fetcher import READ_COMMITTED, PartitionRecords
from aiokafka.record.default_records import DefaultRecordBatchBuilder
from aiokafka.record.memory_records import MemoryRecords

from ops.local_broker import LocalBroker
from stream.clock import ManualClock, WallClock
from stream.errors import LogResetError, LogUnavailableError, RecordTooLargeError
from stream.fetching import _leave_records_raw, batch_of, fetch_fairly
from stream.kafka import KafkaConfig, KafkaLog
from stream.log import EventLog, LogReader, LogWriter, Record, acknowledged, start_when_available
from stream.log_bounds import LogBounds
from stream.memory_log import MemoryLog


@pytest.fixture(params=["memory", "kafka"])
async def log(request: pytest.FixtureRequest, fresh_broker: LocalBroker) -> EventLog:
    made: EventLog
    if request.param == "memory":
        made = MemoryLog(ManualClock(1_000), num_partitions=2)
    else:
        made = KafkaLog(KafkaConfig(bootstrap_servers=fresh_broker.bootstrap_servers, num_partitions=2))
    await made.create_topics()
    await made.create_topics()  # a second time is harmless
    return made


@pytest.fixture
async def writer(log: EventLog) -> AsyncIterator[LogWriter]:
    writer = log.writer()
    await writer.start()
    yield writer
    await writer.stop()


@pytest.fixture
async def reader(log: EventLog) -> AsyncIterator[LogReader]:
    reader = log.reader()
    await reader.start()
    yield reader
    await reader.stop()


async def read(reader: LogReader, count: int) -> list[Record]:
    records: list[Record] = []
    async with asyncio.timeout(10):
        while len(records) < count:
            records += await reader.poll(timeout_ms=200, max_records=count)
    return records


async def test_partitions_of_a_topic(log: EventLog, reader: LogReader) -> None:
    assert await reader.partitions(log.topics.interactions) == [0, 1]
    assert await reader.partitions(log.topics.commands) == [0]
    with pytest.raises(LogUnavailableError, match="no-such-topic"):
        await reader.partitions("no-such-topic")


async def test_records_come_back_in_order_with_key_and_headers(
    log: EventLog, writer: LogWriter, reader: LogReader
) -> None:
    topic = log.topics.history_updates
    sends = [
        await writer.send(topic, f"v{n}".encode(), key=b"k", partition=1, headers=(("traceparent", b"00-1"),))
        for n in range(5)
    ]
    await acknowledged(sends)
    await reader.assign({(topic, 0): "earliest", (topic, 1): "earliest"})
    records = await read(reader, 5)
    assert [r.value for r in records] == [b"v0", b"v1", b"v2", b"v3", b"v4"]
    assert [r.offset for r in records] == [0, 1, 2, 3, 4]
    assert {(r.partition, r.key, r.headers) for r in records} == {(1, b"k", (("traceparent", b"00-1"),))}


async def test_reading_starts_where_it_is_told(log: EventLog, writer: LogWriter, reader: LogReader) -> None:
    topic = log.topics.commands
    await acknowledged([await writer.send(topic, str(n).encode()) for n in range(6)])
    await reader.assign({(topic, 0): 4})
    assert [r.value for r in await read(reader, 2)] == [b"4", b"5"]
    await reader.assign({(topic, 0): 1})
    assert [r.value for r in await read(reader, 5)] == [b"1", b"2", b"3", b"4", b"5"]


async def test_a_poll_respects_its_limit_and_its_time(log: EventLog, writer: LogWriter, reader: LogReader) -> None:
    topic = log.topics.commands
    await acknowledged([await writer.send(topic, b"x") for _ in range(10)])
    await reader.assign({(topic, 0): "earliest"})
    async with asyncio.timeout(10):
        while not (polled := await reader.poll(timeout_ms=200, max_records=3)):
            pass
    assert 1 <= len(polled) <= 3
    rest = await read(reader, 10 - len(polled))
    assert len(polled) + len(rest) == 10
    assert await reader.poll(timeout_ms=20, max_records=3) == []


async def read_up_to(reader: LogReader, *, since_ms: int) -> int:
    async with asyncio.timeout(10):
        while (moment := await reader.read_up_to_ms()) is None or moment < since_ms:
            assert await reader.poll(timeout_ms=20, max_records=10) == []
    return moment


async def test_a_reader_knows_up_to_when_it_has_read(log: EventLog, writer: LogWriter, reader: LogReader) -> None:
    clock = ManualClock(1_000) if isinstance(log, MemoryLog) else WallClock()
    topic = log.topics.history_updates
    assert await reader.read_up_to_ms() is None
    await acknowledged([await writer.send(topic, b"x", partition=1) for _ in range(4)])
    sent_ms = clock.now_ms()
    await reader.assign({(topic, 0): "earliest", (topic, 1): 1})
    polled: list[Record] = []
    while not polled:
        polled = await reader.poll(timeout_ms=200, max_records=2)
    assert await reader.read_up_to_ms() is None, "of three records, at most two were polled"
    await read(reader, 3 - len(polled))
    first = await read_up_to(reader, since_ms=sent_ms)
    assert sent_ms <= first <= clock.now_ms()
    # An empty log goes on, too: a partition that gets nothing must not hold time up.
    assert await read_up_to(reader, since_ms=first + (not isinstance(log, MemoryLog))) >= first


async def test_a_reader_at_the_end_sees_only_what_comes(log: EventLog, writer: LogWriter, reader: LogReader) -> None:
    topic = log.topics.commands
    await acknowledged([await writer.send(topic, b"old")])
    await reader.assign({(topic, 0): "latest"})
    await reader.poll(timeout_ms=100, max_records=10)
    await acknowledged([await writer.send(topic, b"new")])
    assert [r.value for r in await read(reader, 1)] == [b"new"]


async def test_bounds_are_where_a_log_begins_and_ends(log: EventLog, writer: LogWriter, reader: LogReader) -> None:
    topic = log.topics.interactions
    # One batch of several records: the local broker's own "latest" is the first of them plus one.
    await acknowledged([await writer.send(topic, b"x", partition=1) for _ in range(7)])
    assert await reader.bounds(topic) == {0: LogBounds(0, 0), 1: LogBounds(0, 7)}
    await reader.assign({(topic, 1): 5})
    assert [r.offset for r in await read(reader, 2)] == [5, 6]
    with pytest.raises(LogUnavailableError, match="no-such-topic"):
        await reader.bounds("no-such-topic")


async def test_a_position_beyond_the_end_is_refused_with_the_command_that_accepts_it(
    log: EventLog, writer: LogWriter, reader: LogReader
) -> None:
    topic = log.topics.interactions
    await acknowledged([await writer.send(topic, b"x", partition=1) for _ in range(7)])
    await reader.assign({(topic, 1): 9})
    lost = r"interactions/1 was reset.* ends at offset 7: 2 records .* offsets 7 to 8.*headrace log accept --reset"
    with pytest.raises(LogResetError, match=lost):
        await read(reader, 1)


async def test_a_tombstone_and_an_empty_value_differ(log: EventLog, writer: LogWriter, reader: LogReader) -> None:
    topic = log.topics.items
    await acknowledged([await writer.send(topic, None, key=b"a"), await writer.send(topic, b"", key=b"b")])
    await reader.assign({(topic, 0): "earliest"})
    assert [(r.key, r.value) for r in await read(reader, 2)] == [(b"a", None), (b"b", b"")]


async def test_a_reader_that_has_only_just_started_can_be_stopped(log: EventLog) -> None:
    reader = log.reader()
    await reader.start()
    assert await reader.partitions(log.topics.commands) == [0]
    await reader.stop()
    await reader.stop()


async def test_a_start_that_is_given_up_leaves_no_connection_behind(log: EventLog) -> None:
    for end in (log.reader(), log.writer()):
        starting = asyncio.create_task(end.start())
        await asyncio.sleep(0)
        starting.cancel()
        with suppress(asyncio.CancelledError):  # one in memory has started by now
            await starting
        await end.stop()
    gc.collect()  # a client that was never closed says so here, which fails the test


async def test_a_missing_broker_is_named_and_waited_for(caplog: pytest.LogCaptureFixture) -> None:
    log = KafkaLog(KafkaConfig(bootstrap_servers="127.0.0.1:9", request_timeout_ms=500))
    stopping = asyncio.Event()

    async def stop_soon() -> None:
        await asyncio.sleep(0.5)
        stopping.set()

    _, started = await asyncio.gather(
        stop_soon(), start_when_available(log.reader().start, what="trainer", stopping=stopping)
    )
    assert started is False
    assert "127.0.0.1:9" in caplog.text
    assert "trying again" in caplog.text


async def test_records_that_lie_fetched_are_not_made_into_consumer_records(fresh_broker: LocalBroker) -> None:
    log = KafkaLog(KafkaConfig(bootstrap_servers=fresh_broker.bootstrap_servers, num_partitions=1))
    await log.create_topics()
    writer = log.writer()
    await writer.start()
    topic = log.topics.history_updates
    sends = [
        await writer.send(topic, value, key=key, headers=headers)
        for value, key, headers in [(b"a", b"k", ()), (None, b"k", (("h", b"1"),)), (b"c", None, ())]
    ]
    await acknowledged(sends)
    await writer.stop()
    consumer = AIOKafkaConsumer(auto_offset_reset="earliest", **log.config.client_options())
    await consumer.start()
    partition = TopicPartition(topic, 0)
    consumer.assign([partition])
    first = await fetch_fairly(consumer, timeout_ms=5_000, max_records=1)
    assert [record.value for record in first[partition]] == [b"a"]
    rest = await fetch_fairly(consumer, timeout_ms=5_000, max_records=10)
    await consumer.stop()
    assert not any(isinstance(record, ConsumerRecord) for record in rest[partition]), "aiokafka has new inner names"
    batch = batch_of(partition, rest[partition])
    assert (batch.topic, batch.partition, batch.offsets.tolist()) == (topic, 0, [1, 2])
    assert (batch.keys, batch.values, batch.headers) == ([b"k", None], [None, b"c"], [(("h", b"1"),), ()])
    assert (batch.timestamps_ms > 0).all()


@pytest.mark.parametrize("codec", ["gzip", "snappy", "lz4", "zstd"])
async def test_what_producers_compress_is_read(codec: str, fresh_broker: LocalBroker) -> None:
    log = KafkaLog(KafkaConfig(bootstrap_servers=fresh_broker.bootstrap_servers, num_partitions=1))
    await log.create_topics()
    topic, values = log.topics.interactions, [b"%d" % n * 100 for n in range(20)]
    producer = AIOKafkaProducer(compression_type=codec, **log.config.client_options())
    await producer.start()
    await asyncio.gather(*[await producer.send(topic, value, partition=0) for value in values])
    await producer.stop()
    reader = log.reader()
    await reader.start()
    assert [record.value for record in await read_all(reader, topic, {0: 0}, len(values))] == values
    await reader.stop()


def test_what_an_aborted_transaction_wrote_is_left_out() -> None:
    # The local broker has no transactions: this is what another answers with, as its bytes.
    def batch(offset: int, value: bytes, producer_id: int) -> bytes:
        builder = DefaultRecordBatchBuilder(
            magic=2,
            compression_type=0,
            is_transactional=1,
            producer_id=producer_id,
            producer_epoch=0,
            base_sequence=0,
            batch_size=1_000,
        )
        builder.append(offset=0, timestamp=1, key=None, value=value, headers=[])
        return offset.to_bytes(8, "big") + bytes(builder.build())[8:]

    options = KafkaConfig(bootstrap_servers="unused:9092").consumer_options()
    assert options["isolation_level"] == "read_committed"
    found = PartitionRecords(
        TopicPartition("interactions", 0),
        MemoryRecords(batch(0, b"aborted", 7) + batch(1, b"committed", 8)),
        [(7, 0)],
        0,
        None,
        None,
        True,
        READ_COMMITTED,
    )
    # As `fetch_fairly` leaves what lies fetched.
    waiting = SimpleNamespace(_partition_records=found)
    _leave_records_raw(SimpleNamespace(_fetcher=SimpleNamespace(_records={0: waiting})))
    assert [(raw.offset, raw.value) for raw in found] == [(1, b"committed")]
    assert found.next_fetch_offset == 2


async def test_reading_can_begin_at_a_time(log: EventLog, writer: LogWriter, reader: LogReader) -> None:
    topic = log.topics.history_updates
    await acknowledged([await writer.send(topic, value, partition=0) for value in (b"a", b"b")])
    before_ms = (await read_all(reader, topic, {0: 0}, 2))[-1].timestamp_ms
    if isinstance(log, MemoryLog):
        assert isinstance(log._clock, ManualClock)
        log._clock.advance(50)
    await asyncio.sleep(0.05)
    await acknowledged([await writer.send(topic, value, partition=0) for value in (b"c", b"d")])
    found = await reader.since(topic, before_ms + 40)
    assert [record.value for record in await read_all(reader, topic, {0: found[0]}, 2)] == [b"c", b"d"]
    assert await reader.since(topic, 0) == {0: 0, 1: 0}


async def read_all(reader: LogReader, topic: str, starts: dict[int, int], count: int) -> list[Record]:
    await reader.assign({(topic, partition): start for partition, start in starts.items()})
    return await read(reader, count)


async def test_a_partition_that_a_topic_does_not_have_is_named_with_the_cure(log: EventLog, writer: LogWriter) -> None:
    with pytest.raises(LogUnavailableError, match="'history-updates' has no partition 2: .* add the missing ones"):
        await writer.send(log.topics.history_updates, b"x", partition=2)


async def test_a_record_that_is_too_large_is_told_from_a_broker_that_is_away(fresh_broker: LocalBroker) -> None:
    log = KafkaLog(KafkaConfig(bootstrap_servers=fresh_broker.bootstrap_servers, max_message_bytes=1_000))
    await log.create_topics()
    writer = log.writer()
    await writer.start()
    with pytest.raises(RecordTooLargeError, match=r"log.max_message_bytes is 1000"):
        await writer.send(log.topics.interactions, b"x" * 1_000)
    await writer.stop()


class UnreadableConsumer:
    """What aiokafka does with a header whose name is not UTF-8, which its own producer cannot write."""

    def assignment(self) -> set[TopicPartition]:
        return {TopicPartition("interactions", 0), TopicPartition("interactions", 1)}

    async def getmany(self, *partitions: TopicPartition, **_options: int) -> dict[TopicPartition, list[ConsumerRecord]]:
        if partitions == (TopicPartition("interactions", 0),):
            return {}
        raise UnicodeDecodeError("utf-8", b"\xff", 0, 1, "invalid start byte")


async def test_a_header_that_cannot_be_read_is_named_with_its_partition_and_ends_nobody() -> None:
    with pytest.raises(LogUnavailableError, match=r"a record of interactions/1 has a header whose name is not UTF-8"):
        await fetch_fairly(UnreadableConsumer(), timeout_ms=0, max_records=10)
