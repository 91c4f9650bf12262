"""The agents of `items` and `commands`: what is wrong with one message, or away for a while, costs no other message."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from feature_store.config import FeatureStoreConfig
from feature_store.errors import ConcurrentAppendError, FeatureStoreError, StoreUnavailableError
from feature_store.ids import stable_id
from feature_store.schema import migrate
from feature_store.store import FeatureStore
from feature_store.transaction import StoreTransaction
from stream import app
from stream.app import LowRateAgents
from stream.clock import ManualClock
from stream.dead_letters import DeadLetter, read_dead_letter
from stream.memory_log import MemoryLog

NOW_MS = 1_700_000_000_000


class FlakyStore(FeatureStore):
    """A store whose database does not carry out the first transactions."""

    num_failures = 0
    failure: type[FeatureStoreError] = StoreUnavailableError

    @contextmanager
    def transaction(self) -> Iterator[StoreTransaction]:
        if self.num_failures:
            self.num_failures -= 1
            raise self.failure("not now")
        with super().transaction() as transaction:
            yield transaction


class OneTake:
    """A stream of Faust that gives one handful of events, and notes which are acknowledged."""

    def __init__(self, topic: str, *values: Any) -> None:
        raw = [value if isinstance(value, bytes) else json.dumps(value).encode() for value in values]
        self.events = [
            SimpleNamespace(
                message=SimpleNamespace(
                    topic=topic, partition=0, offset=offset, timestamp=NOW_MS / 1000, key=None, value=value, headers=()
                )
            )
            for offset, value in enumerate(raw)
        ]
        self.acknowledged: list[int] = []

    async def noack_take(self, _max: int, *, within: float) -> AsyncIterator[list[SimpleNamespace]]:
        yield self.events

    async def ack(self, event: SimpleNamespace) -> None:
        self.acknowledged.append(event.message.offset)


@pytest.fixture
def store(tmp_path: Path) -> Iterator[FlakyStore]:
    url = f"sqlite:///{tmp_path}/store.db"
    migrate(url)
    store = FlakyStore(FeatureStoreConfig(url=url))
    yield store
    store.close()


@pytest.fixture
async def log() -> MemoryLog:
    log = MemoryLog(ManualClock(NOW_MS))
    await log.create_topics()
    return log


@pytest.fixture
def agents(store: FlakyStore, log: MemoryLog, monkeypatch: pytest.MonkeyPatch) -> LowRateAgents:
    monkeypatch.setattr(app, "RETRY_FIRST_S", 0.01)
    made: Any = LowRateAgents
    return made(store, log.writer(), log, ManualClock(NOW_MS))  # type: ignore[no-any-return]


def letters_of(log: MemoryLog) -> list[DeadLetter]:
    return [read_dead_letter(record) for record in log.records((log.topics.dead_letters, 0))]


@pytest.mark.parametrize("failure", [StoreUnavailableError, ConcurrentAppendError])
@pytest.mark.parametrize("topic", ["items", "commands"])
async def test_a_refused_message_is_one_letter_however_often_the_others_are_tried(
    agents: LowRateAgents, store: FlakyStore, log: MemoryLog, topic: str, failure: type[FeatureStoreError]
) -> None:
    store.failure = failure
    good = {"item_id": 1} if topic == "items" else {"command": "forget_user", "user_id": 1}
    stream, store.num_failures = OneTake(topic, b"?", good), 3
    async with asyncio.timeout(20):
        async for _ in getattr(agents, topic)(stream):
            pass
    assert store.num_failures == 0
    assert [letter.source_offset for letter in letters_of(log)] == [0]
    assert stream.acknowledged == [0, 1]


async def test_an_item_whose_hash_is_taken_is_refused_alone(
    agents: LowRateAgents, store: FlakyStore, log: MemoryLog
) -> None:
    with store.transaction() as transaction:
        transaction.register_names("item", {stable_id("two"): "somebody else with the same hash"})
    stream = OneTake("items", {"item_id": 1}, {"item_id": "two"}, b"?", {"item_id": "three"})
    async for _ in agents.items(stream):
        pass
    assert sorted(store.items([1, stable_id("two"), stable_id("three")])) == sorted([1, stable_id("three")])
    assert [letter.source_offset for letter in letters_of(log)] == [1, 2]
    assert "same 63-bit hash" in letters_of(log)[0].error
