"""The label join in ingest at a real broker: prompt, by one worker of several, taken over when that one leaves."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from pathlib import Path

import msgspec
import numpy as np
import pytest

from feature_store.config import FeatureStoreConfig
from feature_store.schema import migrate
from feature_store.store import FeatureStore
from ops.local_broker import LocalBroker
from stream.app import IngestService, StreamParts, build_app
from stream.clock import WallClock
from stream.events import Event, EventRules, encode_event
from stream.ingest import IngestConfig
from stream.kafka import KafkaConfig, KafkaLog
from stream.label_rules import LabelConfig
from stream.log import Record, acknowledged
from stream.messages import ForgetUser, Impression, Labels, encode_message

INGEST = IngestConfig(session_timeout_ms=1_000, poll_timeout_ms=50)
LABELS = LabelConfig(window_ms=2_000, allowed_lateness_ms=200, correction_ms=600_000, batch_wait_ms=20)
CLOCK = WallClock()


class Site:
    """A broker and a store, to which ingest services come and go."""

    def __init__(self, log: KafkaLog, store: FeatureStore, root: Path) -> None:
        self.log, self.store, self.root = log, store, root
        self.num_events = 0

    def service(self, labels: LabelConfig = LABELS, mode: str = "live") -> IngestService:
        parts = StreamParts(
            kafka=self.log.config,
            rules=EventRules(),
            ingest=INGEST,
            store=self.store,
            clock=CLOCK,
            data_dir=self.root / "faust",
            mode=mode,
            labels=labels,
        )
        return IngestService(parts)

    async def send(self, *records: tuple[str, bytes]) -> None:
        writer = self.log.writer()
        await writer.start()
        await acknowledged([await writer.send(topic, value, key=b"k") for topic, value in records])
        await writer.stop()

    async def show(self, request_id: str, user: int, *items: int | str, shown_at_ms: int | None = None) -> None:
        impression = Impression(
            request_id=request_id,
            user_id=user,
            items=list(items),
            scores=[None] * len(items),
            snapshot_version=1,
            shown_at_ms=CLOCK.now_ms() if shown_at_ms is None else shown_at_ms,
        )
        await self.send((self.log.topics.impressions, encode_message(impression)))

    async def act(self, user: int, item: int | str, event_time_ms: int | None = None) -> None:
        self.num_events += 1
        event = Event(
            event_id=f"e{self.num_events}",
            user_id=user,
            item_id=item,
            action="like",
            event_time=CLOCK.now_ms() if event_time_ms is None else event_time_ms,
        )
        await self.send((self.log.topics.interactions, encode_event(event)))

    async def read_all(self, topic: str) -> list[Record]:
        reader = self.log.reader()
        await reader.start()
        await reader.assign({(topic, partition): "earliest" for partition in await reader.partitions(topic)})
        records: list[Record] = []
        while polled := await reader.poll(timeout_ms=300, max_records=1_000):
            records += polled
        await reader.stop()
        return records

    async def labels(self) -> list[tuple[str, int | str, str]]:
        messages = [
            msgspec.json.decode(record.value or b"", type=Labels)
            for record in await self.read_all(self.log.topics.labels)
        ]
        return [(one.request_id, item, "late" if one.late else one.outcome) for one in messages for item in one.items]


@pytest.fixture
def store(tmp_path: Path) -> Iterator[FeatureStore]:
    url = f"sqlite:///{tmp_path}/store.db"
    migrate(url)
    store = FeatureStore(FeatureStoreConfig(url=url))
    yield store
    store.close()


@pytest.fixture
async def site(store: FeatureStore, tmp_path: Path, fresh_broker: LocalBroker) -> Site:
    log = KafkaLog(KafkaConfig(bootstrap_servers=fresh_broker.bootstrap_servers, num_partitions=2))
    await log.create_topics()
    return Site(log, store, tmp_path)


@asynccontextmanager
async def running(service: IngestService) -> AsyncIterator[IngestService]:
    await service.start()
    try:
        yield service
    finally:
        await service.stop()


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(30):
        while not condition():  # noqa: ASYNC110 - services are watched from outside
            await asyncio.sleep(0.02)


def joins(service: IngestService) -> bool:
    return service.labels is not None and service.labels.blocked_by is None


def count(service: IngestService, name: str) -> int:
    status = service.status()["labels"]
    assert isinstance(status, dict)
    number: int = status[name]
    return number


async def test_ingest_joins_what_was_shown_with_what_was_done(site: Site) -> None:
    async with running(site.service()) as service:
        await until(lambda: joins(service))
        shown_at_ms = CLOCK.now_ms()
        await site.show("r", 5, 10, "tt20", 30, shown_at_ms=shown_at_ms)
        await until(lambda: count(service, "open") == 1)
        await site.act(5, "tt20")
        await until(lambda: count(service, "taken") == 1)
        assert await site.labels() == [("r", "tt20", "taken")]
        await until(lambda: count(service, "not_taken") == 2)
        await site.act(5, 10, event_time_ms=shown_at_ms + 1)
        await until(lambda: count(service, "late") == 1)
        status = service.status()["labels"]
    labels = await site.labels()
    assert labels == [("r", "tt20", "taken"), ("r", 10, "not_taken"), ("r", 30, "not_taken"), ("r", 10, "late")]
    assert isinstance(status, dict)
    assert status["blocked_by"] is None
    assert status["positions"]["impressions/0"] == 1


async def test_forgetting_a_user_by_command_leaves_no_label_waiting(site: Site) -> None:
    service = site.service()
    parts = service._parts
    app = build_app(parts, service)
    await service.start()
    await app.start()
    try:
        await site.show("r", 5, 10)
        await site.show("r", 6, 10)
        await until(lambda: count(service, "open") == 2)
        await site.send((site.log.topics.commands, encode_message(ForgetUser(user_id=5))))
        await until(lambda: count(service, "open") == 1)
        await until(lambda: count(service, "not_taken") == 1)
    finally:
        await app.stop()
        await service.stop()
    with site.store.transaction() as transaction:
        assert transaction.impressions.request_ids(np.array([5, 6])) == {6: {"r"}}


async def test_one_of_two_workers_joins_and_the_other_takes_over(site: Site) -> None:
    services = [site.service(), site.service()]
    for service in services:
        await service.start()
    await until(lambda: all(len(service.worker.positions()) == 1 for service in services))
    await until(lambda: [joins(service) for service in services].count(True) == 1)
    idle, active = sorted(services, key=joins)
    assert idle.ready() == (True, "applying events")
    assert idle.labels is not None
    assert idle.labels.blocked_by == "another ingest worker joins the labels"
    await site.show("a", 5, 10, 20)
    await until(lambda: count(active, "open") == 1)
    await site.act(5, 10)
    await until(lambda: count(active, "taken") == 1)
    await active.stop()
    await until(lambda: count(idle, "not_taken") == 1)
    await idle.stop()
    assert await site.labels() == [("a", 10, "taken"), ("a", 20, "not_taken")]


async def test_a_replayed_stream_is_joined_by_when_it_came(site: Site) -> None:
    years_ago_ms = 1_000_000_000_000
    async with running(site.service(mode="replay")) as service:
        await site.act(5, 30, event_time_ms=years_ago_ms)
        await until(lambda: service.status()["accepted"] == 1 and joins(service))
        await site.show("r", 5, 10, 20, 30, shown_at_ms=years_ago_ms)
        await site.act(5, 20, event_time_ms=years_ago_ms + 86_400_000)
        await until(lambda: count(service, "not_taken") == 2)
    assert await site.labels() == [("r", 20, "taken"), ("r", 10, "not_taken"), ("r", 30, "not_taken")]


async def test_the_join_can_be_turned_off(site: Site) -> None:
    async with running(site.service(LabelConfig(enabled=False))) as service:
        await site.show("r", 5, 10)
        await site.act(5, 10)
        await until(lambda: service.status()["accepted"] == 1)
        assert service.status()["labels"] is None
    assert await site.labels() == []
    assert site.store.positions(site.log.log_id, "labels/" + site.log.topics.impressions) == {}


async def test_a_topic_that_was_reset_stops_the_labels_and_not_ingest(
    site: Site, caplog: pytest.LogCaptureFixture
) -> None:
    with site.store.transaction() as transaction:
        place = (site.log.log_id, "labels/" + site.log.topics.impressions, 0)
        transaction.lock_position(*place)
        transaction.set_position(*place, 1_000)
    await site.show("r", 5, 10)
    async with running(site.service()) as service:
        await until(lambda: "labels are not joined any more" in caplog.text)
        assert count(service, "blocked_by")
        await site.act(5, 10)
        await until(lambda: service.status()["accepted"] == 1)
        assert service.ready() == (True, "applying events")
    assert await site.labels() == []
