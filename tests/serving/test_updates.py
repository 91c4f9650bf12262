"""Following the log: new interactions are known at once, and nothing on the way there can do harm."""

from __future__ import annotations

import sys
import threading
from dataclasses import replace
from typing import Any

import httpx
import numpy as np
import pytest

from feature_store.interactions import Interactions
from model.manifest import Lineage
from ops.local_broker import LocalBroker
from serving.api import build_api
from serving.updates import UncoveredUpdates
from stream.errors import LogResetError, LogUnavailableError
from stream.kafka import KafkaConfig, KafkaLog
from stream.log import Record, acknowledged
from stream.memory_log import MemoryLog, MemoryReader
from stream.messages import HistoryUpdate, SnapshotPointer, encode_message
from tests.serving.building import NAME, NOW_MS, SERVING, Served, Town, eventually, ids_of, scores_of, to_id


async def test_an_interaction_is_part_of_the_next_answer(town: Town) -> None:
    async with town.worker(version=1) as served:
        before = await served.recommend(7, k=12)
        town.happen([(7, 6, NOW_MS - 5)])
        await served.until_applied(1)
        after = await served.recommend(7, k=12)
    assert 6 in ids_of(before)
    assert 6 not in ids_of(after)
    assert after["history_event_time"] == "2023-11-14T22:13:19.995Z"
    kept = set(ids_of(after))
    assert {item: score for item, score in scores_of(before).items() if item in kept} != scores_of(after)


async def test_a_user_unknown_until_now_gets_answers_of_the_model(town: Town) -> None:
    async with town.worker(version=1) as served:
        assert (await served.recommend("newcomer"))["fallback_reason"] == "no_history"
        town.happen([("newcomer", 6, NOW_MS - 5)])
        await served.until_applied(1)
        answer = await served.recommend("newcomer", k=12)
    assert not answer["fallback"]
    assert 6 not in ids_of(answer)


async def test_updates_that_come_twice_or_overlap_change_nothing(town: Town) -> None:
    async with town.worker(version=1) as served:
        first = town.happen([(7, 6, NOW_MS - 9), (8, 0, NOW_MS - 8)])
        second = town.happen([(7, 0, NOW_MS - 7), (9, 3, NOW_MS - 6)])
        await served.until_applied(4)
        expected = [await served.recommend(user, k=12) for user in (7, 8, 9)]
        both = Interactions.concat([first.interactions, second.interactions])
        town.announce(first)
        town.announce(second)
        town.announce(
            replace(
                first,
                last_offset=second.last_offset,
                interactions=both,
                offsets=np.arange(9, 13),
                append_ms=np.full(4, NOW_MS),
            )
        )
        last = town.happen([(10, 3, NOW_MS)])
        await served.until_applied(5)
        for user, answer in zip((7, 8, 9), expected, strict=True):
            found = await served.recommend(user, k=12)
            assert scores_of(found) == pytest.approx(scores_of(answer), rel=1e-5, abs=1e-5)
            assert {**found, "request_id": "", "items": []} == {**answer, "request_id": "", "items": []}
        assert served.worker.status()["updates"]["interactions"] == 5  # type: ignore[index]
    assert last.last_offset == 13


async def test_interactions_that_happened_while_nobody_listened_are_read_from_the_store(town: Town) -> None:
    town.happen([(7, 6, NOW_MS - 9)])
    async with town.worker(version=1) as served:
        assert 6 not in ids_of(await served.recommend(7, k=12))


async def test_a_forgotten_user_is_a_stranger(town: Town) -> None:
    async with town.worker(version=1) as served:
        assert not (await served.recommend("anna"))["fallback"]
        with town.store.transaction() as transaction:
            transaction.forget_users(np.array([to_id("anna")]))
        town.announce(HistoryUpdate.forgetting("memory", 0, (to_id("anna"),)))
        town.happen([(8, 1, NOW_MS)])
        await served.until_applied(1)
        assert (await served.recommend("anna"))["fallback_reason"] == "no_history"
        town.happen([("anna", 1, NOW_MS)])
        await served.until_applied(2)
        assert set(ids_of(await served.recommend("anna", k=12))) == {0, *range(2, 10), "film/ten", "film/eleven"}


async def test_what_cannot_be_read_is_counted_and_skipped(town: Town) -> None:
    async with town.worker(version=1) as served:
        town.log.append("history-updates", 0, None, b"nonsense", ())
        town.log.append("snapshots", 0, b"hstu", b"nonsense", ())
        town.happen([(8, 1, NOW_MS)])
        await served.until_applied(1)
        status: Any = served.worker.status()["updates"]
        assert (status["unreadable"], status["updates"]) == (2, 1)


async def test_updates_of_a_log_that_was_made_anew_are_followed_though_their_offsets_are_low(town: Town) -> None:
    async with town.worker(version=1) as served:
        town.happen([(8, 1, NOW_MS - 9), (8, 2, NOW_MS - 8)])
        await served.until_applied(2)
        anew = town.happen([(7, 6, NOW_MS - 7)], announced=False)
        town.announce(replace(anew, log_id="memory~1", first_offset=0, last_offset=0, offsets=np.array([0])))
        await served.until_applied(3)
        assert 6 not in ids_of(await served.recommend(7, k=12))
        # What the log before had sent again stays known.
        before = town.happen([(9, 1, NOW_MS)], announced=False)
        town.announce(replace(before, first_offset=0, last_offset=0, offsets=np.array([0])))
        town.announce(replace(before, log_id="memory~1", first_offset=1, last_offset=1, offsets=np.array([1])))
        await served.until_applied(4)


async def test_updates_and_announcements_come_through_a_real_broker(town: Town, fresh_broker: LocalBroker) -> None:
    log = KafkaLog(KafkaConfig(bootstrap_servers=fresh_broker.bootstrap_servers, log_id="memory", num_partitions=2))
    writer = log.writer()
    config = replace(SERVING, snapshot_poll_ms=30_000, snapshot_retry_max_ms=30_000)
    async with town.worker(config, version=1, log=log) as served:
        await writer.start()
        for seq in range(5):
            update = town.happen([(7, 6 + seq % 3, NOW_MS - 9 + seq)], announced=False)
            sent = await writer.send(log.topics.history_updates, update.encode(), partition=0)
            await acknowledged([sent])
        await served.until_applied(5)
        assert set(ids_of(await served.recommend(7, k=12))) == {0, 3, 9, "film/ten", "film/eleven"}
        town.publisher.learn([1])
        town.publisher.publish()
        pointer = SnapshotPointer(model=NAME, version=2, kind="delta", parent=1, created_at_ms=NOW_MS)
        await acknowledged([await writer.send(log.topics.snapshots, encode_message(pointer), key=NAME.encode())])
        await served.until_version(2)
        await writer.stop()


class FaultyLog(MemoryLog):
    """A log whose readers meet errors that a test has prepared."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.errors: list[Exception] = []
        self.num_assigned = 0

    def reader(self) -> MemoryReader:
        return FaultyReader(self)


class FaultyReader(MemoryReader):
    async def assign(self, starts: Any) -> None:
        assert isinstance(self._log, FaultyLog)
        self._log.num_assigned += 1
        await super().assign(starts)

    async def poll(self, *, timeout_ms: int, max_records: int) -> list[Record]:
        assert isinstance(self._log, FaultyLog)
        if self._log.errors:
            raise self._log.errors.pop()
        return await super().poll(timeout_ms=timeout_ms, max_records=max_records)


@pytest.fixture
async def faulty(town: Town) -> FaultyLog:
    log = FaultyLog(town.clock)
    await log.create_topics()
    town.log = log
    return log


async def test_a_broker_that_goes_away_and_comes_back_loses_nothing(town: Town, faulty: FaultyLog) -> None:
    async with town.worker(version=1) as served:
        faulty.errors = [LogUnavailableError("gone for a moment")]
        await eventually(lambda: not faulty.errors)
        town.happen([(7, 6, NOW_MS - 9)])
        await served.until_applied(1)
        assert 6 not in ids_of(await served.recommend(7, k=12))
        assert faulty.num_assigned == 1


async def test_a_log_that_was_reset_makes_the_worker_read_histories_anew(town: Town, faulty: FaultyLog) -> None:
    async with town.worker(version=1) as served:
        assert 6 in ids_of(await served.recommend(7, k=12))
        town.happen([(7, 6, NOW_MS - 9)], announced=False)  # heard by nobody
        faulty.errors = [LogResetError("the position is gone")]
        await eventually(lambda: faulty.num_assigned == 2)
        await served.worker._model_thread.run(lambda: None)
        assert 6 not in ids_of(await served.recommend(7, k=12))
        town.happen([(7, 0, NOW_MS - 8)])
        await served.until_applied(1)
        assert 0 not in ids_of(await served.recommend(7, k=12))


async def test_in_replay_the_time_of_a_request_is_where_the_stream_has_come_to(town: Town) -> None:
    live = town.build()
    town.clock.advance(365 * 86_400_000)  # the machine's clock is far ahead of the recorded stream
    async with town.worker(version=1, mode="replay", replica="replay") as served:
        assert served.worker._query_now_ms() == NOW_MS - 60_000
        town.happen([(8, 1, NOW_MS - 500)])
        await served.until_applied(1)
        assert served.worker._query_now_ms() == NOW_MS - 500
        recorded = await served.rank(8, [0, 1, 2, 3])
    town.clock._now_ms = NOW_MS - 500
    await live.start()
    transport = httpx.ASGITransport(app=build_api(live))
    async with httpx.AsyncClient(transport=transport, base_url="http://worker") as client:
        served = Served(live, client)
        await served.until_version(1)
        assert (await served.rank(8, [0, 1, 2, 3]))["items"] == recorded["items"]
    await live.stop()


def test_waiting_interactions_are_counted_from_the_oldest_until_weights_cover_them() -> None:
    waiting = UncoveredUpdates()
    assert waiting.behind_ms(5_000) == 0
    waiting.add("log", 0, 10, 1_000)
    waiting.add("log", 0, 20, 2_000)
    waiting.add("log", 1, 5, 3_000)
    assert waiting.behind_ms(5_000) == 4_000
    waiting.covered(Lineage(log_id="log", positions={0: 11, 1: 0}))
    assert waiting.behind_ms(5_000) == 3_000
    waiting.covered(Lineage(log_id="another", positions={0: 100, 1: 100}))
    assert waiting.behind_ms(5_000) == 3_000
    waiting.covered(Lineage(log_id="log", positions={0: 21, 1: 6}))
    assert waiting.behind_ms(5_000) == 0


def test_what_the_weights_contained_before_it_was_heard_of_does_not_wait() -> None:
    waiting = UncoveredUpdates()
    waiting.covered(Lineage(log_id="log", positions={0: 21}))
    waiting.add("log", 0, 10, 1_000)
    waiting.add("log", 0, 20, 2_000)
    assert waiting.behind_ms(5_000) == 0
    waiting.add("log", 0, 21, 3_000)
    waiting.add("log", 1, 5, 4_000)
    assert waiting.behind_ms(5_000) == 2_000
    waiting.add("log~1", 0, 3, 4_500)
    assert waiting.behind_ms(5_000) == 500


def test_how_long_they_wait_may_be_asked_from_any_thread() -> None:
    """As whoever collects metrics does."""
    waiting, ended = UncoveredUpdates(), threading.Event()

    def follow() -> None:
        for number in range(45_000):
            waiting.add(f"log~{number // 150}", number % 150, 5, 7)
        ended.set()

    interval_s = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    following = threading.Thread(target=follow)
    try:
        following.start()
        while not ended.is_set():
            assert 0 <= waiting.behind_ms(20_000) <= 20_000
    finally:
        sys.setswitchinterval(interval_s)
        following.join()


def test_when_the_log_was_made_anew_only_its_own_interactions_wait() -> None:
    waiting = UncoveredUpdates()
    waiting.add("log", 0, 10, 1_000)
    waiting.add("log~1", 0, 2, 3_000)
    assert waiting.behind_ms(5_000) == 2_000
    waiting.covered(Lineage(log_id="log", positions={0: 100}))
    assert waiting.behind_ms(5_000) == 2_000
    waiting.covered(Lineage(log_id="log~1", positions={0: 3}))
    assert waiting.behind_ms(5_000) == 0


def test_what_is_remembered_of_waiting_interactions_is_bounded_and_never_flatters() -> None:
    waiting = UncoveredUpdates()
    for offset in range(10_000):
        waiting.add("log", 0, offset, offset)
    assert len(waiting._waiting[0]) == 4_096
    waiting.covered(Lineage(log_id="log", positions={0: 9_999}))
    assert waiting.behind_ms(20_000) >= 20_000 - 9_999


def test_readiness_settings_are_off_by_default() -> None:
    assert SERVING.weights_behind_max_ms == 0
