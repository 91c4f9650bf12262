"""Replay sends a recorded stream in event-time order, repeatably, at the speed asked for, and never lets go of much."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable
from pathlib import Path

import msgspec
import polars as pl
import pytest

from backtest.datasets import RecordedColumns, movietweetings
from backtest.errors import RecordedStreamError
from backtest.replay import RecordedStream, ReplayConfig, ReplayProgress, parse_speed, read_recorded, replay
from ops.local_broker import LocalBroker
from stream.clock import ManualClock, WallClock
from stream.errors import LogUnavailableError
from stream.events import Event, EventDecoder, EventRules
from stream.kafka import KafkaConfig, KafkaLog
from stream.memory_log import MemoryLog, MemoryWriter
from stream.tracing import Headers

COLUMNS = RecordedColumns(user="user", item="item", time="time")
TOPIC = "interactions"


def _write(tmp_path: Path, columns: dict[str, list[object]], name: str = "log.parquet") -> Path:
    path = tmp_path / name
    frame = pl.DataFrame(columns)
    if path.suffix == ".csv":
        frame.write_csv(path)
    else:
        frame.write_parquet(path)
    return path


def _recorded(times_ms: list[int]) -> RecordedStream:
    count = len(times_ms)
    frame = pl.Series(times_ms, dtype=pl.Int64).to_numpy()
    rows = pl.Series(range(count), dtype=pl.Int64).to_numpy()
    return RecordedStream(
        user_id=list(range(count)), item_id=[7] * count, event_time_ms=frame, row=rows, value=None, event_id=None
    )


async def _memory_log(num_partitions: int = 1) -> MemoryLog:
    log = MemoryLog(ManualClock(), num_partitions=num_partitions)
    await log.create_topics()
    return log


def _events(log: MemoryLog) -> list[Event]:
    return [msgspec.json.decode(record.value or b"", type=Event) for record in log.records((TOPIC, 0))]


async def test_events_go_out_in_event_time_order_and_ties_in_row_order(tmp_path: Path) -> None:
    path = _write(tmp_path, {"user": [1, 2, 3, 4], "item": [10, 20, 30, 40], "time": [500, 100, 500, 100]})
    log = await _memory_log()
    report = await replay(
        read_recorded(path, COLUMNS), log.writer(), TOPIC, ReplayConfig(event_id_prefix="log"), clock=WallClock()
    )
    sent = _events(log)
    assert [event.user_id for event in sent] == [2, 4, 1, 3]
    assert [event.event_time for event in sent] == [100, 100, 500, 500]
    assert [event.event_id for event in sent] == ["log-1", "log-3", "log-0", "log-2"]
    assert (report.num_events, report.is_complete) == (4, True)
    assert (report.first_event_time_ms, report.last_event_time_ms) == (100, 500)


async def test_a_record_is_keyed_by_its_user_and_passes_ingests_own_validation(tmp_path: Path) -> None:
    columns: dict[str, list[object]] = {
        "user": ["ann", "bob", "cy"],
        "item": [1, 2, 3],
        "time": [1_000, 2_000, 3_000],
        "stars": [4.5, None, float("nan")],
    }
    path = _write(tmp_path, columns)
    recorded = read_recorded(path, RecordedColumns(user="user", item="item", time="time", value="stars"))
    log = await _memory_log()
    await replay(recorded, log.writer(), TOPIC, ReplayConfig(action="view"), clock=WallClock())
    records = log.records((TOPIC, 0))
    assert [record.key for record in records] == [b"ann", b"bob", b"cy"]
    decoder = EventDecoder(EventRules(actions=("view",)))
    decoded = [decoder.decode(record.value, now_ms=10_000) for record in records]
    assert [event.value for event in decoded if isinstance(event, Event)] == [4.5, None, None]


async def test_surfaces_are_sent_under_the_key_that_ingest_looks_at(tmp_path: Path) -> None:
    path = _write(tmp_path, {"user": [1, 2, 3], "item": [1, 2, 3], "time": [1, 2, 3], "page": [4, None, 5]})
    recorded = read_recorded(path, RecordedColumns(user="user", item="item", time="time", surface="page"))
    log = await _memory_log()
    await replay(recorded, log.writer(), TOPIC, ReplayConfig(surface_key="page"), clock=WallClock())
    assert [event.context for event in _events(log)] == [{"page": "4"}, None, {"page": "5"}]


async def test_replaying_twice_sends_the_same_bytes(tmp_path: Path) -> None:
    path = _write(tmp_path, {"user": [3, 1, 2], "item": [1, 1, 1], "time": [9, 9, 1]})
    first, second = await _memory_log(), await _memory_log()
    for log in (first, second):
        await replay(read_recorded(path, COLUMNS), log.writer(), TOPIC, ReplayConfig(), clock=WallClock())
    assert [r.value for r in first.records((TOPIC, 0))] == [r.value for r in second.records((TOPIC, 0))]


async def test_event_ids_come_from_their_column_when_there_is_one(tmp_path: Path) -> None:
    path = _write(tmp_path, {"user": [1, 2], "item": [1, 1], "time": [2, 1], "id": [70, 71]})
    columns = RecordedColumns(user="user", item="item", time="time", event_id="id")
    log = await _memory_log()
    await replay(read_recorded(path, columns), log.writer(), TOPIC, ReplayConfig(), clock=WallClock())
    assert [event.event_id for event in _events(log)] == ["71", "70"]


def test_a_limit_takes_the_first_in_event_time_not_in_the_file(tmp_path: Path) -> None:
    path = _write(tmp_path, {"user": [1, 2, 3], "item": [1, 1, 1], "time": [30, 20, 10]})
    assert read_recorded(path, COLUMNS, limit=2).user_id == [3, 2]


@pytest.mark.parametrize(
    ("unit", "times", "expected"),
    [
        ("ms", [1_362_062_307_123, 0], [0, 1_362_062_307_123]),
        ("s", [1_362_062_307, 0], [0, 1_362_062_307_000]),
        ("s", [1_362_062_307.25, 0.5], [500, 1_362_062_307_250]),
        ("rfc3339", ["2013-02-28T15:38:27+01:00", "1970-01-01T00:00:00.5Z"], [500, 1_362_062_307_000]),
    ],
)
def test_times_of_every_unit_become_epoch_milliseconds(
    tmp_path: Path, unit: str, times: list[object], expected: list[int]
) -> None:
    path = _write(tmp_path, {"user": [1, 2], "item": [1, 1], "time": times})
    columns = RecordedColumns(user="user", item="item", time="time", time_unit=unit)
    assert read_recorded(path, columns).event_time_ms.tolist() == expected


def test_csv_is_read_like_parquet(tmp_path: Path) -> None:
    columns: dict[str, list[object]] = {"user": ["1", "x"], "item": [5, 6], "time": [2, 1]}
    from_csv = read_recorded(_write(tmp_path, columns, "log.csv"), COLUMNS)
    assert from_csv.user_id == ["x", "1"]
    assert from_csv.item_id == [6, 5]


def test_small_integer_columns_do_not_overflow(tmp_path: Path) -> None:
    path = tmp_path / "log.parquet"
    seconds = pl.Series("time", [2_000_000_000], dtype=pl.Int32)
    pl.DataFrame(
        [pl.Series("user", [1], dtype=pl.Int8), pl.Series("item", [1], dtype=pl.UInt64), seconds]
    ).write_parquet(path)
    columns = RecordedColumns(user="user", item="item", time="time", time_unit="s")
    assert read_recorded(path, columns).event_time_ms.tolist() == [2_000_000_000_000]


@pytest.mark.parametrize(
    ("columns", "unit", "message"),
    [
        ({"user_id": [1], "item": [1], "time": [1]}, "ms", "has no column user; did you mean user_id?"),
        ({"user": [1, -2], "item": [1, 1], "time": [1, 1]}, "ms", r"column user is negative in row 1 \(-2\)"),
        ({"user": [1.5], "item": [1], "time": [1]}, "ms", "column user holds Float64; ids are integers or text"),
        ({"user": [1, None], "item": [1, 1], "time": [1, 1]}, "ms", "column user is empty in 1 rows, first row 1"),
        ({"user": [1, 2], "item": [1, 1], "time": [None, 1]}, "ms", "column time is empty in 1 rows, first row 0"),
        ({"user": [1], "item": [1], "time": ["2013"]}, "s", "column time holds String, not a number"),
        ({"user": [1], "item": [1], "time": [float("inf")]}, "s", "column time is not finite in 1 rows"),
        ({"user": [1], "item": [1], "time": ["yesterday"]}, "rfc3339", "row 0: 'yesterday' is not RFC 3339"),
        ({"user": [1], "item": [1], "time": [5]}, "rfc3339", "rfc3339 needs text or date-times"),
    ],
)
def test_a_file_that_cannot_be_replayed_says_where(
    tmp_path: Path, columns: dict[str, list[object]], unit: str, message: str
) -> None:
    path = _write(tmp_path, columns)
    with pytest.raises(RecordedStreamError, match=message):
        read_recorded(path, RecordedColumns(user="user", item="item", time="time", time_unit=unit))


@pytest.mark.parametrize(("name", "content"), [("log.parquet", b"PAR0"), ("log.json", b"[]"), ("log.csv", b"")])
def test_a_file_that_is_no_table_is_refused(tmp_path: Path, name: str, content: bytes) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(RecordedStreamError, match=name):
        read_recorded(tmp_path / name, COLUMNS)
    with pytest.raises(RecordedStreamError, match="cannot be read"):
        read_recorded(tmp_path / "absent.parquet", COLUMNS)


class _SteppingClock:
    """A clock that only the event loop's waiting moves: every look advances it by one millisecond."""

    def __init__(self) -> None:
        self._looks = 0

    def now_ms(self) -> int:
        return self._looks

    def monotonic_s(self) -> float:
        self._looks += 1
        return self._looks / 1000


async def test_no_event_goes_out_before_the_accelerated_clock_reaches_it() -> None:
    clock = _SteppingClock()
    sent_at_s: list[float] = []

    class Watching(MemoryWriter):
        async def send(
            self,
            topic: str,
            value: bytes | None,
            *,
            key: bytes | None = None,
            partition: int | None = None,
            headers: Headers = (),
        ) -> Awaitable[object]:
            sent_at_s.append(clock.monotonic_s())
            return await super().send(topic, value, key=key, partition=partition, headers=headers)

    # 60 events a minute apart, at 6000x: one every 10 ms.
    recorded = _recorded([minute * 60_000 for minute in range(60)])
    start_s = clock.monotonic_s()
    await replay(recorded, Watching(await _memory_log()), TOPIC, ReplayConfig(speed=6_000.0), clock=clock)
    due_s = [start_s + index * 0.010 for index in range(60)]
    assert all(sent >= due for sent, due in zip(sent_at_s, due_s, strict=True))
    assert sent_at_s[-1] < due_s[-1] + 0.05


async def test_what_falls_due_within_a_tick_goes_out_together() -> None:
    num_looks = 0

    class Counting(WallClock):
        def monotonic_s(self) -> float:
            nonlocal num_looks
            num_looks += 1
            return super().monotonic_s()

    recorded, log = _recorded(list(range(200))), await _memory_log()
    report = await replay(recorded, log.writer(), TOPIC, ReplayConfig(speed=1.0, tick_ms=100.0), clock=Counting())
    assert report.num_events == 200
    assert num_looks <= 30  # three ticks; without them, one look or more for every millisecond


async def test_a_log_slower_than_the_clock_is_reported_as_behind() -> None:
    class Slow(MemoryWriter):
        async def send(
            self,
            topic: str,
            value: bytes | None,
            *,
            key: bytes | None = None,
            partition: int | None = None,
            headers: Headers = (),
        ) -> Awaitable[object]:
            await asyncio.sleep(0.02)
            return await super().send(topic, value, key=key, partition=partition, headers=headers)

    recorded = _recorded(list(range(10)))
    config = ReplayConfig(speed=1.0, chunk_max=1)
    report = await replay(recorded, Slow(await _memory_log()), TOPIC, config, clock=WallClock())
    assert report.is_complete
    assert report.behind_max_s > 0.1


class _NeverAcknowledging(MemoryWriter):
    """A log that takes records and says nothing."""

    def __init__(self, log: MemoryLog) -> None:
        super().__init__(log)
        self.futures: list[asyncio.Future[object]] = []

    async def send(
        self,
        topic: str,
        value: bytes | None,
        *,
        key: bytes | None = None,
        partition: int | None = None,
        headers: Headers = (),
    ) -> Awaitable[object]:
        self.futures.append(asyncio.get_running_loop().create_future())
        return self.futures[-1]


async def test_unacknowledged_events_have_a_limit() -> None:
    writer = _NeverAcknowledging(await _memory_log())
    config = ReplayConfig(in_flight_max=100, chunk_max=10)
    running = asyncio.create_task(replay(_recorded([0] * 1_000), writer, TOPIC, config, clock=WallClock()))
    await asyncio.sleep(0.05)
    assert len(writer.futures) == 100
    for future in writer.futures[:30]:
        future.set_result(None)
    await asyncio.sleep(0.05)
    assert 110 <= len(writer.futures) <= 130
    running.cancel()
    with pytest.raises(asyncio.CancelledError):
        await running


async def test_a_log_that_refuses_ends_the_replay_with_its_error() -> None:
    class Refusing(MemoryWriter):
        async def send(
            self,
            topic: str,
            value: bytes | None,
            *,
            key: bytes | None = None,
            partition: int | None = None,
            headers: Headers = (),
        ) -> Awaitable[object]:
            raise LogUnavailableError("the broker is away")

    with pytest.raises(LogUnavailableError):
        await replay(_recorded([0]), Refusing(await _memory_log()), TOPIC, ReplayConfig(), clock=WallClock())


async def test_told_to_stop_it_waits_for_what_it_sent_and_says_it_is_not_complete() -> None:
    log, stopping = await _memory_log(), asyncio.Event()
    recorded = _recorded([0, 1, 3_600_000])  # the third is an hour away

    async def stop_soon() -> None:
        await asyncio.sleep(0.05)
        stopping.set()

    stopper = asyncio.create_task(stop_soon())
    report = await replay(recorded, log.writer(), TOPIC, ReplayConfig(speed=1.0), clock=WallClock(), stopping=stopping)
    await stopper
    assert (report.num_events, report.is_complete) == (2, False)
    assert len(_events(log)) == 2


async def test_progress_says_how_far_it_is() -> None:
    seen: list[ReplayProgress] = []
    config = ReplayConfig(chunk_max=10, progress_interval_s=0.001)
    log = await _memory_log()
    await replay(
        _recorded(list(range(100))), log.writer(), TOPIC, config, clock=_SteppingClock(), on_progress=seen.append
    )
    assert seen[-1].num_sent == seen[-1].num_events == 100
    assert seen[-1].event_time_ms == 99
    assert [one.num_sent for one in seen] == sorted(one.num_sent for one in seen)


async def test_an_empty_file_is_a_complete_replay_of_nothing() -> None:
    report = await replay(_recorded([]), (await _memory_log()).writer(), TOPIC, ReplayConfig(), clock=WallClock())
    assert (report.num_events, report.is_complete, report.first_event_time_ms) == (0, True, None)


@pytest.mark.parametrize(("text", "speed"), [("1000x", 1000.0), ("0.5x", 0.5), ("20", 20.0), ("max", None)])
def test_speeds_are_read(text: str, speed: float | None) -> None:
    assert parse_speed(text) == speed


@pytest.mark.parametrize("text", ["fast", "-1x", "0x", "infx", "nanx", ""])
def test_impossible_speeds_are_refused(text: str) -> None:
    with pytest.raises(ValueError, match="such as 1000x, or max"):
        parse_speed(text)


async def test_the_shipped_stream_arrives_whole_at_a_real_broker(fresh_broker: LocalBroker) -> None:
    data = movietweetings()
    recorded = read_recorded(data.interactions, data.columns, limit=5_000)
    log = KafkaLog(KafkaConfig(bootstrap_servers=fresh_broker.bootstrap_servers, num_partitions=2))
    await log.create_topics()
    writer, reader = log.writer(), log.reader()
    await writer.start()
    await reader.start()
    try:
        report = await replay(recorded, writer, TOPIC, ReplayConfig(action=data.action), clock=WallClock())
        assert report.num_events == 5_000
        await reader.assign({(TOPIC, 0): "earliest", (TOPIC, 1): "earliest"})
        received: list[tuple[int, int, str]] = []
        while len(received) < 5_000:
            for record in await reader.poll(timeout_ms=1_000, max_records=2_000):
                event = json.loads(record.value or b"")
                received.append((record.partition, event["event_time"], event["event_id"]))
    finally:
        await writer.stop()
        await reader.stop()
    assert len({event_id for _, _, event_id in received}) == 5_000
    for partition in (0, 1):
        times = [time_ms for at, time_ms, _ in received if at == partition]
        assert times == sorted(times)
        assert len(times) > 1_000
