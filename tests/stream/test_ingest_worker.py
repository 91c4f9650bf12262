"""Ingest workers at a real broker: sharing partitions, fencing, waiting for what is away, refusing a reset log."""

from __future__ import annotations

import asyncio
import json
import sqlite3
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from aiokafka import AIOKafkaConsumer, TopicPartition

from feature_store.config import FeatureStoreConfig
from feature_store.errors import SchemaRevisionError
from feature_store.schema import migrate
from feature_store.store import FeatureStore
from ops.local_broker import LocalBroker
from stream.app import IngestService, StreamParts, build_app
from stream.clock import WallClock
from stream.commit import Committer
from stream.errors import LogResetError
from stream.events import EventDecoder, EventRules
from stream.ingest import IngestConfig, IngestWorker
from stream.kafka import KafkaConfig, KafkaLog
from stream.log import LogWriter, Record, acknowledged
from stream.messages import ForgetUser, HistoryUpdate, ItemMessage, encode_message

INGEST = IngestConfig(session_timeout_ms=1_000, poll_timeout_ms=50)
NOW_MS = 1_700_000_000_000


@dataclass
class Site:
    """A broker and a store, to which workers come and go."""

    log: KafkaLog
    store: FeatureStore
    url: str
    num_sent: int = 0
    committers: list[Committer] = field(default_factory=list)

    @asynccontextmanager
    async def worker(self) -> AsyncIterator[tuple[IngestWorker, asyncio.Task[None]]]:
        writer = self.log.writer()
        await writer.start()
        committer = self._committer(writer)
        worker = IngestWorker(INGEST, self.log.config, self.log.topics, committer)
        stopping = asyncio.Event()
        task = asyncio.create_task(worker.run(stopping))
        try:
            yield worker, task
        finally:
            stopping.set()
            await asyncio.wait([task], timeout=20)
            await writer.stop()
            committer.close()

    def _committer(self, writer: LogWriter) -> Committer:
        self.committers.append(
            Committer(
                store=self.store,
                writer=writer,
                topics=self.log.topics,
                log_id=self.log.log_id,
                decoder=EventDecoder(EventRules()),
                clock=WallClock(),
            )
        )
        return self.committers[-1]

    async def send(self, num_events: int) -> None:
        writer = self.log.writer()
        await writer.start()
        sends = []
        for number in range(self.num_sent, self.num_sent + num_events):
            event = {"event_id": f"e{number}", "user_id": number % 17, "item_id": number, "action": "view"}
            raw = json.dumps(event | {"event_time": NOW_MS + number}).encode()
            sends.append(await writer.send(self.log.topics.interactions, raw, partition=number % 2))
        await acknowledged(sends)
        await writer.stop()
        self.num_sent += num_events

    async def send_event(self, **fields: Any) -> None:
        event = {"event_id": f"e{self.num_sent}", "user_id": 3, "item_id": self.num_sent, "action": "view"}
        raw = json.dumps(event | {"event_time": NOW_MS + self.num_sent} | fields).encode()
        writer = self.log.writer()
        await writer.start()
        await acknowledged([await writer.send(self.log.topics.interactions, raw, partition=0)])
        await writer.stop()
        self.num_sent += 1

    async def read_all(self, topic: str) -> list[Record]:
        reader = self.log.reader()
        await reader.start()
        await reader.assign({(topic, partition): "earliest" for partition in await reader.partitions(topic)})
        records: list[Record] = []
        while polled := await reader.poll(timeout_ms=300, max_records=1_000):
            records += polled
        await reader.stop()
        return records


@pytest.fixture
def store_url(tmp_path: Path) -> str:
    url = f"sqlite:///{tmp_path}/store.db"
    migrate(url)
    return url


@pytest.fixture
def store(store_url: str) -> Iterator[FeatureStore]:
    store = FeatureStore(FeatureStoreConfig(url=store_url, busy_timeout_ms=200))
    yield store
    store.close()


@pytest.fixture
async def site(store: FeatureStore, store_url: str, fresh_broker: LocalBroker) -> Site:
    log = KafkaLog(KafkaConfig(bootstrap_servers=fresh_broker.bootstrap_servers, num_partitions=2))
    await log.create_topics()
    return Site(log, store, store_url)


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(30):
        while not condition():  # noqa: ASYNC110 - workers are watched from outside
            await asyncio.sleep(0.02)


async def until_stored(site: Site) -> None:
    await until(lambda: site.store.totals().num_interactions >= site.num_sent)
    assert site.store.totals().num_interactions == site.num_sent


async def test_a_worker_applies_every_partition_and_continues_from_sql(site: Site) -> None:
    await site.send(500)
    async with site.worker() as (worker, _):
        await until_stored(site)
        await until(lambda: worker.positions() == {0: 250, 1: 250})
        assert worker.lag() == {0: 0, 1: 0}
        assert worker.blocked_by is None
    await site.send(100)
    async with site.worker() as (_, _):
        await until_stored(site)
    assert site.committers[1].counts.num_accepted == 100
    assert site.committers[1].counts.num_skipped == 0


async def test_a_poll_brings_what_came_after_the_last_fetch(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("stream.ingest._NEWER_MS", 5_000)  # a busy machine's broker takes longer to answer
    await site.send(2)
    writer = site.log.writer()
    worker = IngestWorker(INGEST, site.log.config, site.log.topics, site._committer(writer))
    consumer = AIOKafkaConsumer(enable_auto_commit=False, **site.log.config.client_options())
    await consumer.start()
    try:
        partitions = [TopicPartition(site.log.topics.interactions, number) for number in (0, 1)]
        consumer.assign(partitions)
        for partition in partitions:
            consumer.seek(partition, 0)
        worker._consumer = consumer
        # Fetched in the background as soon as it is assigned: what is sent from now on is not among it.
        await until(lambda: len(consumer._fetcher._records) > 0)
        await site.send(4)
        fetched = await worker._fetch()
    finally:
        await consumer.stop()
    assert sum(map(len, fetched.values())) == 6
    assert all([raw.offset for raw in raws] == list(range(len(raws))) for raws in fetched.values())


async def test_a_second_worker_takes_over_partitions_without_losing_or_doubling(site: Site) -> None:
    await site.send(200)
    async with site.worker() as (first, _):
        await until_stored(site)
        async with site.worker() as (second, _):
            await until(lambda: len(first.positions()) == 1 and len(second.positions()) == 1)
            await site.send(200)
            await until_stored(site)
        await until(lambda: len(first.positions()) == 2)
        await site.send(200)
        await until_stored(site)
    assert sum(committer.counts.num_accepted for committer in site.committers) == 600
    assert all(committer.counts.num_accepted > 0 for committer in site.committers)
    keys = [
        key
        for record in await site.read_all(site.log.topics.history_updates)
        for key in HistoryUpdate.decode(record.value).interactions.event_key.tolist()
    ]
    assert len(keys) == len(set(keys)) == 600


async def test_a_locked_database_delays_and_loses_nothing(site: Site, caplog: pytest.LogCaptureFixture) -> None:
    lock = sqlite3.connect(site.url.removeprefix("sqlite:///"), isolation_level=None)
    lock.execute("BEGIN IMMEDIATE")
    await site.send(100)
    async with site.worker() as (worker, _):
        await until(lambda: "trying again" in caplog.text)
        assert worker.blocked_by is not None
        assert site.store.totals().num_interactions == 0
        lock.execute("ROLLBACK")
        lock.close()
        await until_stored(site)
        await until(lambda: worker.blocked_by is None)


async def test_positions_that_cannot_be_read_end_the_worker_instead_of_leaving_it_idle(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def without_tables(_committer: Committer) -> dict[int, int]:
        raise SchemaRevisionError("run `headrace migrate`")

    monkeypatch.setattr(Committer, "stored_positions", without_tables)
    await site.send(2)
    async with site.worker() as (_, task):
        await until(task.done)
    assert isinstance(task.exception(), SchemaRevisionError)


async def test_a_damaged_history_is_waited_for_until_its_user_is_forgotten(site: Site) -> None:
    await site.send(34)
    async with site.worker():
        await until_stored(site)
    database = sqlite3.connect(site.url.removeprefix("sqlite:///"))
    database.execute("UPDATE history_chunk SET payload = x'00' WHERE user_id = 3")
    database.commit()
    database.close()
    site.store._tails.clear()  # as after a restart: a tail in memory would be written anew, and sound
    async with site.worker() as (worker, task):
        await site.send_event(user_id=3)
        await until(lambda: "chunk 0 of user 3 is corrupt" in (worker.problem() or "") or task.done())
        assert not task.done()
        with site.store.transaction() as transaction:
            transaction.forget_users(np.array([3]))
        await until(lambda: site.store.read(np.array([3]), max_len=10).num_interactions == 1)
        await until(lambda: worker.problem() is None)


async def test_a_log_that_ends_before_the_stored_position_is_refused(site: Site) -> None:
    await site.send(10)
    with site.store.transaction() as transaction:
        transaction.lock_position(site.log.log_id, site.log.topics.interactions, 0)
        transaction.set_position(site.log.log_id, site.log.topics.interactions, 0, 1_000)
    async with site.worker() as (_, task):
        with pytest.raises(LogResetError, match=r"interactions/0 was reset: offset 1000 .*headrace log accept --reset"):
            await asyncio.wait_for(task, 20)
    # The other partition may have been applied; of this one, nothing.
    assert site.store.positions(site.log.log_id, site.log.topics.interactions)[0] == 1_000
    assert set(site.store.read(np.arange(17), max_len=50).item_id.tolist()) <= {1, 3, 5, 7, 9}


async def test_a_running_worker_takes_events_of_a_newer_schema_and_refuses_retyped_fields_by_name(site: Site) -> None:
    async with site.worker() as (_, _):
        counts = site.committers[0].counts
        await site.send_event()
        await until(lambda: counts.num_accepted == 1)
        await site.send_event(schema_version=2, dwell_ms=1_200)
        await until(lambda: counts.num_accepted == 2)
        await site.send_event(schema_version=2, dwell_ms=1_200, value={"stars": 5})
        await until(lambda: counts.num_refused == {"wrong_type": 1})
        await site.send_event(schema_version=1)
        await until(lambda: counts.num_accepted == 3)
    assert site.store.read(np.array([3]), max_len=10).item_id.tolist() == [0, 1, 3]
    (letter,) = await site.read_all(site.log.topics.dead_letters)
    headers = dict(letter.headers)
    assert (headers["headrace-reason"], headers["headrace-field"]) == (b"wrong_type", b"value")


async def test_the_faust_app_keeps_items_and_forgets_users(site: Site, tmp_path: Path) -> None:
    await site.send(34)
    writer = site.log.writer()
    await writer.start()
    topics = site.log.topics
    sends = [
        await writer.send(topics.items, encode_message(ItemMessage(item_id=1, title="One", categories=["a"]))),
        await writer.send(topics.items, encode_message(ItemMessage(item_id="two", title="Two", embedding=[0.5, 1.0]))),
        await writer.send(topics.items, b"{}", key=b"bad"),
        await writer.send(topics.items, encode_message(ItemMessage(item_id=3, title="Three"))),
        await writer.send(topics.items, None, key=b"3"),
    ]
    await acknowledged(sends)
    parts = StreamParts(
        kafka=site.log.config,
        rules=EventRules(),
        ingest=INGEST,
        store=site.store,
        clock=WallClock(),
        data_dir=tmp_path / "faust",
    )
    service = IngestService(parts)
    app = build_app(parts, service)

    async def told() -> list[tuple[int, int]]:
        """Of each announcement that user 5 is forgotten: its partition, and the one it names."""
        updates = [(r.partition, HistoryUpdate.decode(r.value)) for r in await site.read_all(topics.history_updates)]
        return [(partition, update.partition) for partition, update in updates if update.forgotten == (5,)]

    await service.start()
    await app.start()
    try:
        await until_stored(site)
        await until(lambda: site.store.unavailable_items().tolist() == [3])
        items = site.store.items([1, 3])
        assert (items[1].title, items[1].categories) == ("One", ("a",))
        await acknowledged([await writer.send(topics.commands, encode_message(ForgetUser(user_id=5)))])
        await until(lambda: site.store.read(np.array([5]), max_len=10).num_interactions == 0)
        # Announced after it is durable; a worker that is stopped in between does both again when it comes back.
        async with asyncio.timeout(30):
            while len(await told()) < 2:
                pass  # reading the log to its end takes its time
        assert service.ready() == (True, "applying events")
        assert service.status()["accepted"] == 34
    finally:
        await app.stop()
        await service.stop()
        await writer.stop()
    assert sorted(await told()) == [(0, 0), (1, 1)]
    (letter,) = await site.read_all(topics.dead_letters)
    assert letter.key == b"bad"
    assert dict(letter.headers)["headrace-reason"] == b"malformed_message"
