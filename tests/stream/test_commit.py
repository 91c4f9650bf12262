"""The commit protocol: each event's effect exactly once, whatever is repeated, refused or interrupted."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from aiokafka.errors import MessageSizeTooLargeError

from feature_store.config import FeatureStoreConfig
from feature_store.errors import StoreUnavailableError
from feature_store.ids import stable_id
from feature_store.store import FeatureStore
from stream.clock import ManualClock
from stream.commit import Committer
from stream.dead_letters import read_dead_letter
from stream.errors import LogUnavailableError, RecordTooLargeError
from stream.events import EventDecoder, EventRules
from stream.log import Record
from stream.memory_log import MemoryLog, MemoryWriter
from stream.messages import HistoryUpdate, Topics
from stream.redrive import LetterQuery, redrive
from tests.feature_store.databases import migrated_database

NOW_MS = 1_700_000_000_000


@pytest.fixture(params=["sqlite", "postgresql"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[FeatureStore]:
    with migrated_database(request.param, tmp_path) as url:
        store = FeatureStore(FeatureStoreConfig(url=url))
        yield store
        store.close()


@pytest.fixture
async def log() -> MemoryLog:
    log = MemoryLog(ManualClock(NOW_MS))
    await log.create_topics()
    return log


@pytest.fixture
async def committer(store: FeatureStore, log: MemoryLog) -> AsyncIterator[Committer]:
    committer = committer_of(store, log, log.writer())
    yield committer
    committer.close()


def committer_of(store: FeatureStore, log: MemoryLog, writer: MemoryWriter) -> Committer:
    return Committer(
        store=store,
        writer=writer,
        topics=log.topics,
        log_id=log.log_id,
        decoder=EventDecoder(EventRules()),
        clock=ManualClock(NOW_MS),
    )


def record(offset: int, value: dict[str, Any] | bytes | None = None, **changes: Any) -> Record:
    if value is None:
        value = {"event_id": f"e{offset}", "user_id": offset % 3, "item_id": offset, "action": "rating"}
        value |= {"event_time": NOW_MS - 1_000 + offset} | changes
    raw = value if isinstance(value, bytes) else json.dumps(value).encode()
    return Record("interactions", 0, offset, NOW_MS - 10, b"key", raw, (("traceparent", b"00-ab"),))


def updates_of(log: MemoryLog) -> list[HistoryUpdate]:
    return [HistoryUpdate.decode(r.value) for r in log.records((log.topics.history_updates, 0))]


def stored_items(store: FeatureStore, *users: int) -> dict[int, list[int]]:
    histories = store.read(np.array(users, np.int64), max_len=1_000)
    bounds = histories.offsets.tolist()
    return {u: histories.item_id[bounds[n] : bounds[n + 1]].tolist() for n, u in enumerate(users)}


async def test_events_become_histories_updates_and_a_position(
    committer: Committer, store: FeatureStore, log: MemoryLog
) -> None:
    position = await committer.commit(0, [record(n) for n in range(6)])
    assert position == 6
    assert store.positions(log.log_id, log.topics.interactions) == {0: 6}
    assert stored_items(store, 0, 1, 2) == {0: [0, 3], 1: [1, 4], 2: [2, 5]}
    (update,) = updates_of(log)
    assert update.offsets.tolist() == [0, 1, 2, 3, 4, 5]
    assert update.interactions.seq.tolist() == [0, 0, 0, 1, 1, 1]
    assert update.append_ms.tolist() == [NOW_MS - 10] * 6
    assert update.watermark_ms == NOW_MS - 995


async def test_a_repeated_batch_changes_nothing(committer: Committer, store: FeatureStore, log: MemoryLog) -> None:
    batch = [record(n) for n in range(6)]
    await committer.commit(0, batch)
    await committer.commit(0, batch)
    assert store.totals().num_interactions == 6
    assert len(updates_of(log)) == 1
    assert committer.counts.num_skipped == 6


async def test_an_overlapping_batch_applies_only_what_is_new(committer: Committer, store: FeatureStore) -> None:
    await committer.commit(0, [record(n) for n in range(4)])
    await committer.commit(0, [record(n) for n in range(2, 7)])
    assert store.totals().num_interactions == 7
    assert (committer.counts.num_accepted, committer.counts.num_skipped) == (7, 2)


async def test_an_event_sent_twice_by_its_producer_counts_once(committer: Committer, store: FeatureStore) -> None:
    await committer.commit(0, [record(0), record(1, event_id="e0", user_id=0, item_id=0, event_time=NOW_MS - 1_000)])
    assert stored_items(store, 0) == {0: [0]}
    assert committer.counts.num_duplicate == 1


async def test_the_watermark_is_the_partitions_and_survives_a_restart(store: FeatureStore) -> None:
    log = MemoryLog(ManualClock(NOW_MS), num_partitions=2)
    await log.create_topics()
    committer = committer_of(store, log, log.writer())
    await committer.commit(0, [record(0), record(1, event_time=NOW_MS - 5)])
    restarted = committer_of(store, log, log.writer())
    await restarted.commit(0, [record(2)])
    restarted.close()
    await committer.commit(1, [record(0, event_id="other", event_time=NOW_MS - 400)])
    assert [update.watermark_ms for update in updates_of(log)] == [NOW_MS - 5, NOW_MS - 5]
    (other,) = log.records((log.topics.history_updates, 1))
    assert HistoryUpdate.decode(other.value).watermark_ms == NOW_MS - 400
    assert store.stats().watermark_ms == NOW_MS - 5
    committer.close()


async def test_what_is_too_old_is_not_accepted_nor_announced_and_counts_as_expired(
    store: FeatureStore, log: MemoryLog
) -> None:
    narrow = FeatureStore(replace(store.config, max_age_ms=100))
    committer = committer_of(narrow, log, log.writer())
    await committer.commit(0, [record(0, event_time=NOW_MS - 50)])
    await committer.commit(0, [record(1, event_time=NOW_MS - 151), record(2, event_time=NOW_MS - 150), record(3, b"{")])
    counts = committer.counts
    assert (counts.num_accepted, counts.num_expired, counts.num_duplicate) == (2, 1, 0)
    assert sum(counts.num_refused.values()) == 1
    assert [update.offsets.tolist() for update in updates_of(log)] == [[0], [2]]
    assert store.positions(log.log_id, log.topics.interactions) == {0: 4}
    committer.close()
    narrow.close()


async def test_poison_records_become_dead_letters_and_stop_nothing(
    committer: Committer, store: FeatureStore, log: MemoryLog
) -> None:
    poison = Record("interactions", 0, 1, NOW_MS, b"k", b"\x00{", (("traceparent", b"00-ab"),))
    position = await committer.commit(0, [record(0), poison, record(2, action="teleport"), record(3)])
    assert position == 4
    assert store.totals().num_interactions == 2
    letters = log.records((log.topics.dead_letters, 0))
    assert [letter.value for letter in letters] == [poison.value, record(2, action="teleport").value]
    headers = dict(letters[0].headers)
    assert headers["traceparent"] == b"00-ab"
    assert headers["headrace-reason"] == b"malformed_json"
    assert headers["headrace-source-offset"] == b"1"
    assert dict(letters[1].headers)["headrace-reason"] == b"unknown_action"
    assert committer.counts.num_refused == {"malformed_json": 1, "unknown_action": 1}


async def test_headers_without_a_value_and_records_without_anything_stop_nothing(
    committer: Committer, store: FeatureStore, log: MemoryLog
) -> None:
    nothing: Any = (("traceparent", None), ("tracestate", None))  # Kafka allows it
    empty = Record("interactions", 0, 1, NOW_MS, None, None, nothing)
    assert await committer.commit(0, [replace(record(0), headers=nothing), empty, record(2)]) == 3
    assert store.totals().num_interactions == 2
    (letter,) = log.records((log.topics.dead_letters, 0))
    assert dict(letter.headers)["headrace-reason"] == b"empty"


class NarrowWriter(MemoryWriter):
    """A broker that takes no values of 100 bytes: says so when asked, or when it should acknowledge."""

    def __init__(self, log: MemoryLog, *, is_late: bool) -> None:
        super().__init__(log)
        self._is_late = is_late

    async def send(self, topic: str, value: bytes | None, **options: Any) -> Any:
        if topic != Topics().dead_letters or len(value or b"") < 100:
            return await super().send(topic, value, **options)
        if not self._is_late:
            raise RecordTooLargeError("too large")
        sent = asyncio.get_running_loop().create_future()
        sent.set_exception(MessageSizeTooLargeError("too large"))
        return sent


@pytest.mark.parametrize("is_late", [False, True])
async def test_a_record_that_is_too_large_for_a_letter_stops_nothing(
    store: FeatureStore, log: MemoryLog, *, is_late: bool
) -> None:
    committer = committer_of(store, log, NarrowWriter(log, is_late=is_late))
    assert await committer.commit(0, [record(0), record(1, b"?" * 100), record(2, b"?" * 99), record(3)]) == 4
    assert store.totals().num_interactions == 2
    letters = [read_dead_letter(letter) for letter in log.records((log.topics.dead_letters, 0))]
    assert sorted((letter.source_offset, letter.num_left_out, len(letter.value or b"")) for letter in letters) == [
        (1, 100 + len(b"key") + len("traceparent") + len(b"00-ab"), 0),
        (2, 0, 99),
    ]
    report = await redrive(log, store, ManualClock(NOW_MS), LetterQuery(), on_foreign=lambda _: None, quiet_ms=1)
    assert (report.num_sent.total(), report.num_foreign) == (1, 1)
    committer.close()


async def test_a_batch_of_nothing_but_poison_still_moves_the_position(
    committer: Committer, store: FeatureStore, log: MemoryLog
) -> None:
    await committer.commit(0, [record(5, b"?")])
    assert store.positions(log.log_id, log.topics.interactions) == {0: 6}
    assert updates_of(log) == []


async def test_a_late_event_is_put_where_it_belongs_and_counted(committer: Committer, store: FeatureStore) -> None:
    await committer.commit(0, [record(0, user_id=1, event_time=200), record(1, user_id=1, event_time=300)])
    await committer.commit(0, [record(2, user_id=1, event_time=250)])
    assert stored_items(store, 1) == {1: [0, 2, 1]}
    assert committer.counts.num_late == 1


async def test_text_ids_keep_their_names(committer: Committer, store: FeatureStore) -> None:
    await committer.commit(0, [record(0, user_id="anna", item_id="tt0017136")])
    assert store.names("user", [stable_id("anna")]) == {stable_id("anna"): "anna"}
    assert stored_items(store, stable_id("anna")) == {stable_id("anna"): [stable_id("tt0017136")]}


async def test_two_names_with_one_hash_are_never_merged(
    committer: Committer, store: FeatureStore, log: MemoryLog
) -> None:
    with store.transaction() as transaction:
        transaction.register_names("user", {stable_id("anna"): "somebody else with the same hash"})
    await committer.commit(0, [record(0, user_id="anna"), record(1)])
    assert stored_items(store, stable_id("anna"), 1) == {stable_id("anna"): [], 1: [1]}
    (letter,) = log.records((log.topics.dead_letters, 0))
    assert dict(letter.headers)["headrace-reason"] == b"id_collision"


class FailingWriter(MemoryWriter):
    """A broker that stops acknowledging after some records."""

    def __init__(self, log: MemoryLog, num_good: int) -> None:
        super().__init__(log)
        self.num_left = num_good

    async def send(self, *args: Any, **options: Any) -> Any:
        if self.num_left == 0:
            raise LogUnavailableError("the broker went away")
        self.num_left -= 1
        return await super().send(*args, **options)


async def test_without_the_broker_nothing_is_applied_and_the_batch_can_be_tried_again(
    store: FeatureStore, log: MemoryLog
) -> None:
    batch = [record(0), record(1, b"?"), record(2)]
    failing = committer_of(store, log, FailingWriter(log, num_good=1))
    with pytest.raises(LogUnavailableError):
        await failing.commit(0, batch)
    assert store.totals().num_interactions == 0
    assert store.positions(log.log_id, log.topics.interactions) == {}
    failing.close()
    working = committer_of(store, log, log.writer())
    assert await working.commit(0, batch) == 3
    assert store.totals().num_interactions == 2
    working.close()


async def test_a_missing_database_is_reported_with_nothing_sent(tmp_path: Path, log: MemoryLog) -> None:
    store = FeatureStore(FeatureStoreConfig(url=f"sqlite:///{tmp_path}/missing/store.db"))
    committer = committer_of(store, log, log.writer())
    with pytest.raises(StoreUnavailableError):
        await committer.commit(0, [record(0)])
    assert updates_of(log) == []
    committer.close()
    store.close()


async def test_two_workers_on_one_partition_fence_each_other(store: FeatureStore, log: MemoryLog) -> None:
    left, right = committer_of(store, log, log.writer()), committer_of(store, log, log.writer())
    batch = [record(n) for n in range(50)]
    positions = list(await asyncio.gather(left.commit(0, batch), right.commit(0, batch)))
    assert positions == [50, 50]
    assert store.totals().num_interactions == 50
    assert left.counts.num_accepted + right.counts.num_accepted == 50
    # Consumers drop by source offset; together the updates hold each event at least once and nothing else.
    assert {o for update in updates_of(log) for o in update.offsets.tolist()} == set(range(50))
    left.close()
    right.close()
