"""What was lost is said exactly, and nothing is read on beyond it.

The local broker does not delete records, so its log never begins later than at 0. Truncation is therefore tested on the
in-memory log, and at the real broker through a consumer that is told of a later start.
"""

from __future__ import annotations

from typing import Any

import pytest
from aiokafka import AIOKafkaConsumer, TopicPartition

from ops.local_broker import LocalBroker
from stream.clock import ManualClock
from stream.errors import LogResetError
from stream.fetching import PositionGuard, fetch_fairly
from stream.kafka import KafkaConfig, KafkaLog
from stream.log import acknowledged
from stream.log_bounds import LogBounds, Standing, Verdict
from stream.memory_log import MemoryLog


@pytest.mark.parametrize(
    ("position", "verdict", "lag", "num_truncated"),
    [
        (9, Verdict.TRUNCATED, 10, 1),
        (0, Verdict.TRUNCATED, 10, 10),
        (10, Verdict.WHOLE, 10, 0),
        (20, Verdict.WHOLE, 0, 0),
        (21, Verdict.RESET, 0, 0),
    ],
)
def test_a_position_is_judged_by_where_the_log_begins_and_ends(
    position: int, verdict: Verdict, lag: int, num_truncated: int
) -> None:
    standing = Standing(topic="t", partition=0, position=position, bounds=LogBounds(10, 20))
    assert (standing.verdict, standing.lag, standing.num_truncated) == (verdict, lag, num_truncated)
    if verdict is Verdict.WHOLE:
        standing.refuse_loss()
    else:
        with pytest.raises(LogResetError, match=f"headrace log accept --{verdict.value}"):
            standing.refuse_loss()


async def test_a_reader_of_what_retention_deleted_is_refused() -> None:
    log = MemoryLog(ManualClock(1_000))
    await log.create_topics()
    for _ in range(10):
        log.append("interactions", 0, None, b"x", ())
    log.delete_before(("interactions", 0), 7)
    reader = log.reader()
    assert await reader.bounds("interactions") == {0: LogBounds(7, 10)}
    await reader.assign({("interactions", 0): "earliest"})
    assert [record.offset for record in await reader.poll(timeout_ms=0, max_records=10)] == [7, 8, 9]
    await reader.assign({("interactions", 0): 4})
    lost = r"interactions/0 was truncated.* begins at offset 7: 3 records, offsets 4 to 6,.*accept --truncated"
    with pytest.raises(LogResetError, match=lost):
        await reader.poll(timeout_ms=0, max_records=10)


class TruncatedConsumer(AIOKafkaConsumer):  # type: ignore[misc]  # aiokafka has no types
    """A consumer whose log begins later, as a broker with retention says it; reading from there is the test's part."""

    start_offset = 0
    num_asked = 0

    async def beginning_offsets(self, partitions: list[TopicPartition]) -> Any:
        self.num_asked += 1
        return dict.fromkeys(partitions, self.start_offset)


async def test_ingest_notices_a_gap_that_retention_made_and_lets_others_pass(fresh_broker: LocalBroker) -> None:
    log = KafkaLog(KafkaConfig(bootstrap_servers=fresh_broker.bootstrap_servers, num_partitions=1))
    await log.create_topics()
    writer = log.writer()
    await writer.start()
    await acknowledged([await writer.send(log.topics.interactions, b"x", partition=0) for _ in range(10)])
    await writer.stop()
    partition = TopicPartition(log.topics.interactions, 0)
    consumer = TruncatedConsumer(auto_offset_reset="earliest", **log.config.client_options())
    await consumer.start()
    consumer.assign([partition])

    async def check(guard: PositionGuard, *, expected: int, first: int) -> None:
        consumer.seek(partition, first)
        fetched = await fetch_fairly(consumer, timeout_ms=2_000, max_records=100)
        assert fetched[partition][0].offset == first
        await guard.check(consumer, {partition: expected}, fetched)

    guard = PositionGuard()
    await check(guard, expected=3, first=3)  # looked at once
    await check(guard, expected=3, first=3)
    assert consumer.num_asked == 1
    await check(guard, expected=3, first=5)  # a gap, but the log still begins at 0: compaction
    assert consumer.num_asked == 2
    consumer.start_offset = 5
    with pytest.raises(LogResetError, match="2 records, offsets 3 to 4, were deleted unread"):
        await check(guard, expected=3, first=5)
    with pytest.raises(LogResetError, match="offsets 3 to 4"):
        await check(PositionGuard(), expected=3, first=3)  # a new worker looks before anything shows
    await check(PositionGuard(), expected=0, first=5)  # nothing was read yet: it begins where the log does
    with pytest.raises(LogResetError, match="the log answers with offset 2"):
        await check(guard, expected=5, first=2)
    with pytest.raises(LogResetError, match="ends at offset 10: 90 records"):
        await check(guard, expected=100, first=5)
    await consumer.stop()
