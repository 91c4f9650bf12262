"""Looks at a run from outside: samples the stored positions while it lasts, and reads at its end what is left of it."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Mapping
from dataclasses import fields
from types import TracebackType
from typing import Any, Self

from aiokafka import AIOKafkaConsumer, AIOKafkaProducer, TopicPartition
from aiokafka.admin import AIOKafkaAdminClient, NewTopic

from feature_store.config import FeatureStoreConfig
from feature_store.errors import StoreUnavailableError
from feature_store.store import FeatureStore
from stream.dead_letters import read_dead_letter
from stream.errors import LogUnavailableError
from stream.kafka import KafkaConfig, KafkaLog
from stream.log import Record, start_when_available
from stream.messages import HistoryUpdate, Topics
from tests.faults.checker import Observed, Verdict, check, read_histories
from tests.faults.installation import Installation
from tests.faults.load import OBSERVER, Truth

TOPICS = Topics()


class PositionSampler:
    """Writes down the stored positions about twenty times a second for as long as its block runs."""

    def __init__(self, installation: Installation) -> None:
        self.samples: list[dict[int, int]] = []
        self._log_id = installation.kafka.log_id
        self._url = installation.url
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._sample, name="positions", daemon=True)

    def num_applied(self) -> int:
        """Records applied so far, of all partitions."""
        return sum(self.samples[-1].values()) if self.samples else 0

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._stopping.set()
        self._thread.join(30)

    def _sample(self) -> None:
        store = FeatureStore(FeatureStoreConfig(url=self._url, busy_timeout_ms=100))
        while not self._stopping.wait(0.05):
            try:
                positions = store.positions(self._log_id, TOPICS.interactions)
            except StoreUnavailableError:
                continue  # the fault of the day
            if not self.samples or self.samples[-1] != positions:
                self.samples.append(positions)
        store.close()


class UpdatesReader:
    """Follows `history-updates` as trainer and workers do, through whatever happens to the broker."""

    def __init__(self, installation: Installation) -> None:
        self.updates: list[HistoryUpdate] = []
        self.num_outages = 0
        self._kafka = installation.kafka
        self._stopping = threading.Event()
        self._failed: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="updates", daemon=True)

    def catch_up(self) -> list[HistoryUpdate]:
        """Everything read, once nothing more comes."""
        before = -1
        while before != len(self.updates):
            before = len(self.updates)
            time.sleep(1)
            if self._failed is not None:
                raise self._failed
        return sorted(self.updates, key=lambda update: update.partition)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._stopping.set()
        self._thread.join(30)

    def _run(self) -> None:
        try:
            asyncio.run(self._read())
        except BaseException as error:  # noqa: BLE001 - told to the test's own thread
            self._failed = error

    async def _read(self) -> None:
        log = KafkaLog(self._kafka)
        reader = log.reader()
        await start_when_available(reader.start, what="the reader", stopping=asyncio.Event())
        topic = log.topics.history_updates
        await reader.assign({(topic, partition): "earliest" for partition in await reader.partitions(topic)})
        try:
            while not self._stopping.is_set():
                try:
                    records = await reader.poll(timeout_ms=200, max_records=1_000)
                except LogUnavailableError:
                    self.num_outages += 1
                    await asyncio.sleep(0.1)
                else:
                    self.updates += [HistoryUpdate.decode(record.value) for record in records]
        finally:
            await reader.stop()


def read_topic(kafka: KafkaConfig, topic: str) -> list[Record]:
    """Everything on a topic, in offset order per partition."""
    return asyncio.run(_read_topic(kafka, topic))


async def _read_topic(kafka: KafkaConfig, topic: str) -> list[Record]:
    consumer = AIOKafkaConsumer(
        client_id=OBSERVER, enable_auto_commit=False, auto_offset_reset="earliest", **kafka.client_options()
    )
    await consumer.start()
    try:
        await consumer.topics()
        partitions = [TopicPartition(topic, number) for number in sorted(consumer.partitions_for_topic(topic) or ())]
        consumer.assign(partitions)
        await consumer.seek_to_beginning(*partitions)
        # The local broker's "latest" may be too low by a batch, so the end is what comes with a fetch.
        at_least = await consumer.end_offsets(partitions)
        records: list[Record] = []
        while True:
            fetched = await consumer.getmany(timeout_ms=300)
            records += [_record(raw) for raws in fetched.values() for raw in raws]
            if not fetched and all([await consumer.position(p) >= at_least[p] for p in partitions]):
                return sorted(records, key=lambda record: (record.partition, record.offset))
    finally:
        await consumer.stop()


def refill(kafka: KafkaConfig, records: list[Record]) -> None:
    """Give an empty broker its topics, and these records at the offsets, times, keys and headers they had."""

    async def write() -> None:
        await create_topics(kafka)
        producer = AIOKafkaProducer(acks="all", client_id=OBSERVER, **kafka.client_options())
        await producer.start()
        try:
            sends = [
                await producer.send(
                    record.topic,
                    record.value,
                    key=record.key,
                    partition=record.partition,
                    timestamp_ms=record.timestamp_ms,
                    headers=list(record.headers),
                )
                for record in records
            ]
            for record, sent in zip(records, await asyncio.gather(*sends), strict=True):
                assert sent.offset == record.offset, f"{record} came to lie at offset {sent.offset}"
        finally:
            await producer.stop()

    asyncio.run(write())


async def create_topics(kafka: KafkaConfig) -> None:
    """The topics of headrace, through a connection that the proxy does not cut."""
    admin = AIOKafkaAdminClient(client_id=OBSERVER, **kafka.client_options())
    await admin.start()
    try:
        parallel = {TOPICS.interactions, TOPICS.history_updates}
        names = (getattr(TOPICS, field.name) for field in fields(Topics))
        await admin.create_topics(
            [NewTopic(name, kafka.num_partitions if name in parallel else 1, 1) for name in names]
        )
    finally:
        await admin.close()


def ends_of(log: list[Record]) -> dict[int, int]:
    """Offset after the last record, per partition."""
    ends: dict[int, int] = {}
    for record in log:
        ends[record.partition] = max(ends.get(record.partition, 0), record.offset + 1)
    return ends


def wait_until_applied(installation: Installation, *, timeout_s: float = 180) -> list[Record]:
    """Wait until everything on `interactions` has been applied, which is returned; nothing may be sent meanwhile."""
    log = read_topic(installation.kafka, TOPICS.interactions)
    ends = ends_of(log)

    def is_applied() -> bool:
        try:
            positions = installation.store.positions(installation.kafka.log_id, TOPICS.interactions)
        except StoreUnavailableError:
            return False
        return {p: position for p, position in positions.items() if position} == ends

    started_s = time.monotonic()
    while not is_applied():
        assert time.monotonic() < started_s + timeout_s, (
            f"{installation.store.positions(installation.kafka.log_id, TOPICS.interactions)} is stored, {ends} is the "
            f"log's end, after {timeout_s:g} s; logs: {installation.logs()}"
        )
        time.sleep(0.1)
    return log


def observe(
    installation: Installation, truth: Truth, log: list[Record], sampler: PositionSampler | None = None
) -> Observed:
    """Read what is left: histories, updates, dead letters, positions."""
    return Observed(
        log=log,
        histories=read_histories(installation.store, truth),
        num_stored=installation.store.totals().num_interactions,
        updates=[
            HistoryUpdate.decode(record.value) for record in read_topic(installation.kafka, TOPICS.history_updates)
        ],
        letters=[read_dead_letter(record) for record in read_topic(installation.kafka, TOPICS.dead_letters)],
        positions=installation.store.positions(installation.kafka.log_id, TOPICS.interactions),
        sampled_positions=sampler.samples if sampler is not None else (),
    )


def assert_exactly_once(
    installation: Installation,
    truth: Truth,
    sampler: PositionSampler | None = None,
    *,
    seed: int,
    timeout_s: float = 180,
) -> Verdict:
    """Wait until everything is applied; then nothing may be lost and nothing may count twice."""
    log = wait_until_applied(installation, timeout_s=timeout_s)
    verdict = check(truth, observe(installation, truth, log, sampler))
    assert not verdict.problems, f"seed {seed}: " + "\n".join(verdict.problems) + installation.logs()
    assert verdict.num_accepted > 0, "nothing was sent"
    findings: list[str] = []
    installation.store.verify(lambda finding: findings.append(finding.sentence()))
    assert not findings, f"seed {seed}: {findings}"
    return verdict


def all_records(kafka: KafkaConfig) -> list[Record]:
    """Everything on every topic: what a durable broker still has after a restart."""
    return [record for field in fields(Topics) for record in read_topic(kafka, getattr(TOPICS, field.name))]


def _record(raw: Any) -> Record:
    return Record(raw.topic, raw.partition, raw.offset, raw.timestamp, raw.key, raw.value, tuple(raw.headers or ()))


def positions_of(installation: Installation) -> Mapping[int, int]:
    """The stored positions now."""
    return installation.store.positions(installation.kafka.log_id, TOPICS.interactions)
