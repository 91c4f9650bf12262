"""A topic becomes a recording: what it holds when asked, as it arrived, judged as ingest judges it."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from backtest.errors import RecordedStreamError, RefusedRowsError
from backtest.intake import ImportConfig
from backtest.recording import Recording
from backtest.topic_import import import_topic
from ops.local_broker import LocalBroker
from stream.clock import ManualClock
from stream.events import Event, EventRules, encode_event
from stream.kafka import KafkaConfig, KafkaLog
from stream.log import EventLog, acknowledged
from stream.memory_log import MemoryLog

RULES = EventRules()
TOPIC = "interactions"


def _event(number: int, **fields: Any) -> bytes:
    given = {"event_id": f"e{number}", "user_id": number, "item_id": 7, "action": "view", "event_time": 1_000 + number}
    return encode_event(Event(**{**given, **fields}))


async def _send(log: EventLog, *values: bytes, partition: int = 0) -> None:
    writer = log.writer()
    await writer.start()
    await acknowledged([await writer.send(TOPIC, value, partition=partition) for value in values])
    await writer.stop()


@pytest.fixture(params=["memory", "broker"])
async def log(request: pytest.FixtureRequest, fresh_broker: LocalBroker) -> EventLog:
    made: EventLog
    if request.param == "memory":
        made = MemoryLog(ManualClock(), num_partitions=2)
    else:
        made = KafkaLog(KafkaConfig(bootstrap_servers=fresh_broker.bootstrap_servers, num_partitions=2))
    await made.create_topics()
    return made


def _users(recording: Recording) -> list[Any]:
    return [user for batch in recording.batches(100) for user in batch.user_id]


async def test_all_partitions_are_read_to_where_they_ended_when_it_began(log: EventLog, tmp_path: Path) -> None:
    await _send(log, *(_event(number, value=0.5) for number in range(0, 40, 2)), partition=0)
    await _send(log, *(_event(number) for number in range(1, 40, 2)), partition=1)
    recording = await import_topic(log, TOPIC, tmp_path / "recording", ImportConfig(), RULES)
    (batch,) = recording.batches(100)
    assert sorted(_users(recording)) == list(range(40))
    assert sorted(batch.event_id) == sorted(f"e{number}" for number in range(40))
    assert [event.value for event in batch.events() if event.user_id in {2, 3}].count(None) == 1
    assert Recording.open(recording.folder).manifest.mapping["ends"] == {"0": 20, "1": 20}


async def test_records_are_in_order_of_arrival_and_keep_their_own_time(tmp_path: Path) -> None:
    clock = ManualClock()
    log = MemoryLog(clock)
    await log.create_topics()
    for number, (at_ms, time_ms) in enumerate([(5_000, 4_900), (6_000, 100), (7_000, 6_900)]):
        clock.advance(at_ms - clock.now_ms())
        await _send(log, _event(number, event_time=time_ms))
    recording = await import_topic(log, TOPIC, tmp_path / "recording", ImportConfig(), RULES)
    (batch,) = recording.batches(100)
    assert batch.event_time_ms.tolist() == [4_900, 100, 6_900]
    assert batch.arrival_ms.tolist() == [5_000, 6_000, 7_000]
    later = await import_topic(log, TOPIC, tmp_path / "later", ImportConfig(), RULES, from_ms=6_000)
    assert _users(later) == [1, 2]
    with pytest.raises(RecordedStreamError, match="holds no record from 8000 ms on"):
        await import_topic(log, TOPIC, tmp_path / "none", ImportConfig(), RULES, from_ms=8_000)


async def test_surfaces_are_recorded_where_the_settings_name_their_key(log: EventLog, tmp_path: Path) -> None:
    contexts = [{"page": "home"}, {"page": 3}, {"page": True}, {"page": 2.0}, {"page": 2.5}, {"device": "home"}, None]
    await _send(log, *(_event(number, context=each) for number, each in enumerate(contexts)))
    rules = replace(RULES, surface_key="page", surfaces=("home", "3"))
    recording = await import_topic(log, TOPIC, tmp_path / "recording", ImportConfig(), rules)
    (batch,) = recording.batches(100)
    told = dict(zip(batch.event_id, batch.surface or [], strict=True))
    assert [told[f"e{number}"] for number in range(7)] == ["home", "3", None, "2", None, None, None]
    plain = await import_topic(log, TOPIC, tmp_path / "plain", ImportConfig(), RULES)
    assert [one.surface for one in plain.batches(100)] == [None]


BAD: list[tuple[Callable[[], bytes], str]] = [
    (lambda: b"{", "malformed_json"),
    (lambda: _event(5, action="sneeze"), "unknown_action"),
    (lambda: _event(5, user_id="five"), "wrong_type"),
    (lambda: _event(0), "duplicate_id"),
]


@pytest.mark.parametrize(("bad", "reason"), BAD)
async def test_a_bad_record_is_refused_with_its_partition_and_offset(
    log: EventLog, tmp_path: Path, bad: Callable[[], bytes], reason: str
) -> None:
    await _send(log, _event(0), _event(1), bad(), _event(2))
    with pytest.raises(RefusedRowsError, match=f"1 × {reason}: .*\n.*interactions/0, row 2"):
        await import_topic(log, TOPIC, tmp_path / "recording", ImportConfig(), RULES)
    aside = ImportConfig(on_error="dead-letter")
    recording = await import_topic(log, TOPIC, tmp_path / "recording", aside, RULES)
    assert _users(recording) == [0, 1, 2]
    (letter,) = [json.loads(line) for line in (recording.folder / "refused.jsonl").read_text().splitlines()]
    assert (letter["file"], letter["row"], letter["reason"]) == ("interactions/0", 2, reason)
