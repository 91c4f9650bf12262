"""Redrive: a letter goes back where it came from, once; nothing waits for it, nothing is stored twice."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Iterator
from contextlib import aclosing
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from feature_store.config import FeatureStoreConfig
from feature_store.records import SourcePlace
from feature_store.store import FeatureStore
from ops.local_broker import LocalBroker
from stream.clock import ManualClock, WallClock
from stream.commit import Committer
from stream.dead_letters import DeadLetter, read_dead_letter
from stream.errors import LogUnavailableError
from stream.events import EventDecoder, EventRules
from stream.kafka import KafkaConfig, KafkaLog
from stream.log import EventLog, LogWriter, Record, acknowledged, record_at
from stream.memory_log import MemoryLog
from stream.messages import Topics
from stream.redrive import LetterQuery, RedriveReport, read_letters, redrive
from tests.feature_store.databases import migrated_database

NOW_MS = 1_700_000_000_000
DEAD_LETTERS = Topics().dead_letters
DECLARED = EventRules(actions=("rating", "view", "click", "like", "purchase", "stare"))


@pytest.fixture(params=["sqlite", "postgresql"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[FeatureStore]:
    with migrated_database(request.param, tmp_path) as url:
        store = FeatureStore(FeatureStoreConfig(url=url))
        yield store
        store.close()


class Site:
    """A log in memory and an ingest that can be given other rules."""

    def __init__(self, store: FeatureStore) -> None:
        self.clock = ManualClock(NOW_MS)
        self.log = MemoryLog(self.clock, num_partitions=2)
        self.store = store
        self._next = {0: 0, 1: 0}
        self._committers: list[Committer] = []
        self.start_ingest(EventRules())

    def start_ingest(self, rules: EventRules) -> None:
        self._committers.append(
            Committer(
                store=self.store,
                writer=self.log.writer(),
                topics=self.log.topics,
                log_id=self.log.log_id,
                decoder=EventDecoder(rules),
                clock=self.clock,
            )
        )

    async def ingest(self) -> None:
        """Apply what is in the log, a tick later."""
        self.clock.advance(1)
        for partition in self._next:
            if records := self.interactions(partition)[self._next[partition] :]:
                self._next[partition] = await self._committers[-1].commit(partition, records)

    def interactions(self, partition: int) -> list[Record]:
        return self.log.records((self.log.topics.interactions, partition))

    def send(self, number: int, *, partition: int = 0, **changes: Any) -> None:
        event = {"event_id": f"e{number}", "user_id": 5, "item_id": number, "action": "stare"}
        raw = json.dumps(event | {"event_time": NOW_MS + number} | changes).encode()
        self.log.append(self.log.topics.interactions, partition, b"5", raw, (("colour", b"blue"),))

    async def redrive(self, *, is_dry_run: bool = False, **query: Any) -> RedriveReport:
        self.clock.advance(1)
        return await redrive(
            self.log,
            self.store,
            self.clock,
            LetterQuery(**query),
            is_dry_run=is_dry_run,
            on_foreign=lambda _problem: None,
            quiet_ms=1,
        )

    def letters(self) -> list[DeadLetter]:
        return [read_dead_letter(record) for record in self.log.records((self.log.topics.dead_letters, 0))]

    def close(self) -> None:
        for committer in self._committers:
            committer.close()


@pytest.fixture
async def site(store: FeatureStore) -> AsyncIterator[Site]:
    site = Site(store)
    await site.log.create_topics()
    yield site
    site.close()


def stored_items(store: FeatureStore) -> list[int]:
    items: list[int] = store.read(np.array([5]), max_len=10_000).item_id.tolist()
    return items


async def read_all(log: EventLog) -> list[DeadLetter]:
    async with aclosing(read_letters(log, on_foreign=pytest.fail, quiet_ms=300)) as letters:
        return [letter async for letter in letters]


async def test_after_the_action_is_declared_redriven_letters_are_stored_once(site: Site) -> None:
    for number in range(4):
        site.send(number, partition=number % 2)
    await site.ingest()
    assert stored_items(site.store) == []
    assert len(site.letters()) == 4
    site.start_ingest(DECLARED)
    assert (await site.redrive()).num_sent == {"unknown_action": 4}
    await site.ingest()
    assert stored_items(site.store) == [0, 1, 2, 3]
    again = await site.redrive()
    assert (again.num_sent.total(), again.num_known) == (0, 4)
    await site.ingest()
    assert stored_items(site.store) == [0, 1, 2, 3]
    assert [len(site.interactions(partition)) for partition in (0, 1)] == [4, 4]


async def test_a_redriven_record_is_the_producers_and_goes_to_its_partition(site: Site) -> None:
    site.send(7, partition=1)
    await site.ingest()
    await site.redrive()
    original, redriven = site.interactions(1)
    assert (redriven.key, redriven.value) == (original.key, original.value)
    assert redriven.headers == (("colour", b"blue"), ("headrace-attempts", b"1"))


async def test_a_letter_refused_again_says_so_and_can_be_redriven_again(site: Site) -> None:
    site.send(1)
    await site.ingest()
    for attempts in (2, 3):
        assert (await site.redrive()).num_sent.total() == 1
        await site.ingest()
        assert site.letters()[-1].attempts == attempts
    assert [letter.source_offset for letter in site.letters()] == [0, 1, 2]
    site.start_ingest(DECLARED)
    assert (await site.redrive()).num_sent.total() == 1
    await site.ingest()
    assert stored_items(site.store) == [1]


async def test_a_letter_sent_before_a_crash_is_sent_again_and_stored_once(site: Site) -> None:
    class Broken(FeatureStore):
        def record_redriven(self, *_: object) -> None:
            raise LogUnavailableError("killed between sending and remembering")

    site.send(1)
    await site.ingest()
    site.start_ingest(DECLARED)
    good, site.store = site.store, Broken(site.store.config)
    with pytest.raises(LogUnavailableError):
        await site.redrive()
    site.store.close()
    site.store = good
    await site.ingest()
    assert (await site.redrive()).num_sent.total() == 1
    await site.ingest()
    assert stored_items(good) == [1]


async def test_reason_and_limit_choose_and_a_dry_run_sends_nothing(site: Site) -> None:
    for number in range(3):
        site.send(number)
    site.send(9, action="view", event_time=-1)
    await site.ingest()
    dry = await site.redrive(is_dry_run=True)
    assert dry.num_sent == {"unknown_action": 3, "negative_time": 1}
    assert len(site.interactions(0)) == 4
    assert (await site.redrive(reason="negative_time")).num_sent == {"negative_time": 1}
    assert (await site.redrive(limit=2)).num_sent == {"unknown_action": 2}
    assert (await site.redrive(limit=2)).num_sent == {"unknown_action": 1}
    assert (await site.redrive(limit=2)).num_sent.total() == 0


async def test_more_letters_than_one_poll_brings_are_all_sent_once(site: Site) -> None:
    for number in range(1_203):
        site.send(number, partition=number % 2)
    await site.ingest()
    site.start_ingest(DECLARED)
    assert (await site.redrive(limit=700)).num_sent.total() == 700
    assert (await site.redrive()).num_sent.total() == 503
    await site.ingest()
    assert stored_items(site.store) == list(range(1_203))


async def test_two_letters_of_one_record_are_one(site: Site) -> None:
    site.send(1)
    await site.ingest()
    (letter,) = site.log.records((site.log.topics.dead_letters, 0))
    site.log.append(letter.topic, 0, letter.key, letter.value, letter.headers)
    report = await site.redrive()
    assert (report.num_sent.total(), report.num_known) == (1, 1)


async def test_what_is_no_dead_letter_or_came_from_elsewhere_is_left_alone(site: Site) -> None:
    site.send(1)
    await site.ingest()
    (letter,) = site.log.records((site.log.topics.dead_letters, 0))
    elsewhere = tuple((n, b"payments" if n == "headrace-source-topic" else v) for n, v in letter.headers)
    site.log.append(letter.topic, 0, None, b"{}", ())
    site.log.append(letter.topic, 0, letter.key, letter.value, elsewhere)
    problems: list[str] = []
    site.clock.advance(1)
    report = await redrive(site.log, site.store, site.clock, LetterQuery(), on_foreign=problems.append, quiet_ms=1)
    assert (report.num_sent.total(), report.num_foreign) == (1, 2)
    assert "0:1 is not a dead letter" in problems[0]
    assert "0:2 came from payments" in problems[1]


async def test_a_letter_whose_partition_is_gone_goes_where_its_key_says(site: Site) -> None:
    site.send(1)
    await site.ingest()
    (letter,) = site.log.records((site.log.topics.dead_letters, 0))
    headers = tuple((n, b"8" if n == "headrace-source-partition" else v) for n, v in letter.headers)
    site.log.append(letter.topic, 0, letter.key, letter.value, headers)
    assert (await site.redrive()).num_sent.total() == 2


async def test_reading_ends_although_letters_keep_coming(site: Site) -> None:
    site.send(1)
    await site.ingest()
    async with aclosing(read_letters(site.log, on_foreign=pytest.fail, quiet_ms=1)) as letters:
        seen = []
        async for letter in letters:
            seen.append(letter.place)
            site.send(2)
            await site.ingest()  # another letter, appended after reading began
    assert seen == ["0:0"]


async def test_letters_stamped_by_a_clock_that_is_ahead_are_read_and_sent_back(site: Site) -> None:
    site.send(1)
    await site.ingest()
    behind = ManualClock(NOW_MS - 60_000)
    report = await redrive(site.log, site.store, behind, LetterQuery(), on_foreign=pytest.fail, quiet_ms=1)
    assert report.num_sent.total() == 1


async def test_a_place_without_a_record_is_none(site: Site) -> None:
    site.send(1)
    await site.ingest()
    found = await record_at(site.log, DEAD_LETTERS, 0, 0, quiet_ms=1)
    assert found is not None
    assert json.loads(found.value or b"")["item_id"] == 1
    for partition, offset in ((0, 1), (0, 99), (7, 0)):
        assert await record_at(site.log, DEAD_LETTERS, partition, offset, quiet_ms=1) is None


@pytest.mark.parametrize(
    ("query", "words"), [({"reason": "ugly"}, "--reason ugly: use one of empty"), ({"limit": 0}, "--limit 0")]
)
def test_a_query_that_cannot_be_meant_is_refused(query: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        LetterQuery(**query)


def test_redriven_places_belong_to_a_log_and_are_remembered_once(store: FeatureStore) -> None:
    places = [SourcePlace("interactions", 0, 1), SourcePlace("interactions", 1, 1), SourcePlace("items", 0, 2**62)]
    store.record_redriven("main", places[:2], 10)
    store.record_redriven("main", places[1:], 20)
    store.record_redriven("main", [], 30)
    asked = [*places, SourcePlace("interactions", 0, 2), SourcePlace("items", 0, 1)]
    assert store.redriven_among("main", asked) == set(places)
    assert store.redriven_among("other", asked) == set()
    assert store.redriven_among("main", []) == set()


@pytest.mark.parametrize("store", ["sqlite"], indirect=True)
async def test_at_a_real_broker_poison_is_redriven_and_stored_once(
    store: FeatureStore, fresh_broker: LocalBroker
) -> None:
    log = KafkaLog(KafkaConfig(bootstrap_servers=fresh_broker.bootstrap_servers, num_partitions=2))
    await log.create_topics()
    writer, clock = log.writer(), WallClock()
    await writer.start()
    await send_events(log, writer, 30)
    await ingest_all(log, writer, store, EventRules())
    letters = await read_all(log)
    assert len(letters) == 30
    assert {letter.reason for letter in letters} == {"unknown_action"}
    found = await record_at(log, DEAD_LETTERS, letters[-1].partition, letters[-1].offset)
    assert found is not None
    assert found.value == letters[-1].value
    assert await record_at(log, DEAD_LETTERS, 0, 1_000) is None

    for num_expected in (30, 0):
        report = await redrive(log, store, clock, LetterQuery(), on_foreign=pytest.fail)
        assert report.num_sent.total() == num_expected
        await ingest_all(log, writer, store, DECLARED)
        assert stored_items(store) == list(range(30))
    assert sum(store.positions(log.log_id, log.topics.interactions).values()) == 60
    await writer.stop()


async def send_events(log: KafkaLog, writer: LogWriter, num_events: int) -> None:
    sends = []
    for number in range(num_events):
        event = {"event_id": f"e{number}", "user_id": 5, "item_id": number, "action": "stare"}
        raw = json.dumps(event | {"event_time": NOW_MS + number}).encode()
        sends.append(await writer.send(log.topics.interactions, raw, partition=number % 2))
    await acknowledged(sends)


async def ingest_all(log: KafkaLog, writer: LogWriter, store: FeatureStore, rules: EventRules) -> None:
    committer = Committer(
        store=store,
        writer=writer,
        topics=log.topics,
        log_id=log.log_id,
        decoder=EventDecoder(rules),
        clock=WallClock(),
    )
    reader, topic = log.reader(), log.topics.interactions
    await reader.start()
    stored = await committer.stored_positions()
    await reader.assign({(topic, partition): stored.get(partition, 0) for partition in (0, 1)})
    while records := await reader.poll(timeout_ms=500, max_records=1_000):
        for partition in (0, 1):
            if of_partition := [record for record in records if record.partition == partition]:
                await committer.commit(partition, of_partition)
    await reader.stop()
    committer.close()
