"""`headrace trace`, its facts: how far one event has come, and what is known of one that never got into a history."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from feature_store.config import FeatureStoreConfig
from feature_store.records import PublishedSnapshot
from feature_store.schema import migrate
from feature_store.store import FeatureStore
from model.retention import ReplicaLease, write_lease
from model.storage import open_storage
from ops.event_lookup import LookupParts, look_up
from ops.event_path import EventPath, HopState, Traced, text_of
from stream.clock import ManualClock
from stream.commit import Committer
from stream.events import EventDecoder, EventRules
from stream.kafka import KafkaConfig, KafkaLog
from stream.log import acknowledged
from stream.memory_log import MemoryLog
from stream.messages import HistoryUpdate

NOW_MS = 1_700_000_000_000
PRODUCER = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01"
PUBLISHER = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
DAY_MS = 86_400_000


class World:
    """A store, a log and an ingest; what trainer and replicas note is written by the test."""

    def __init__(self, root: Path, **settings: Any) -> None:
        url = f"sqlite:///{root}/store.db"
        migrate(url)
        self.store = FeatureStore(FeatureStoreConfig(url=url, **settings))
        self.clock = ManualClock(NOW_MS)
        self.log = MemoryLog(self.clock)
        self.snapshots = open_storage(root / "snapshots")
        self._committer = Committer(
            store=self.store,
            writer=self.log.writer(),
            topics=self.log.topics,
            log_id=self.log.log_id,
            decoder=EventDecoder(EventRules()),
            clock=self.clock,
        )
        self.said: list[str] = []
        self._next = 0

    def send(self, event_id: str, *, user: int | str = 7, age_ms: int = 500, action: str = "view") -> None:
        event = {"event_id": event_id, "user_id": user, "item_id": 3, "action": action}
        value = json.dumps(event | {"event_time": self.clock.now_ms() - age_ms}).encode()
        headers = (("traceparent", PRODUCER.encode()),)
        self.log.append(self.log.topics.interactions, 0, str(user).encode(), value, headers)

    async def ingest(self) -> None:
        records = self.log.records((self.log.topics.interactions, 0))[self._next :]
        self._next += len(records)
        await self._committer.commit(0, records)

    async def arrive(self, event_id: str, **fields: Any) -> None:
        self.send(event_id, **fields)
        self.clock.advance(40)
        await self.ingest()

    async def forget(self, user_id: int) -> None:
        with self.store.transaction() as transaction:
            transaction.forget_users([user_id])  # type: ignore[arg-type]
        writer, topic = self.log.writer(), self.log.topics.history_updates
        message = HistoryUpdate.forgetting(self.log.log_id, 0, (user_id,))
        await acknowledged([await writer.send(topic, message.encode(), partition=0)])

    def publish(
        self, version: int, *, up_to: int, steps: list[dict[str, Any]] | None = None, log_id: str = "memory"
    ) -> None:
        self.store.record_published(
            PublishedSnapshot(
                model="default",
                version=version,
                kind="delta",
                parent=version - 1,
                created_at_ms=self.clock.now_ms(),
                published_at_ms=self.clock.now_ms() + 20,
                watermark_ms=NOW_MS,
                lineage={"log_id": log_id, "positions": {"0": up_to}},
                traceparent=PUBLISHER,
                steps=steps,
            )
        )

    def run_replica(self, replica: str, version: int | None, *, age_ms: int = 0) -> None:
        lease = ReplicaLease(replica=replica, version=version, loading=None, at_ms=self.clock.now_ms() - age_ms)
        write_lease(self.snapshots, "default", lease)

    async def trace(self, event_id: str, users: list[int] | None = None, **changes: Any) -> Traced:
        parts: dict[str, Any] = {
            "store": self.store,
            "log": self.log,
            "snapshots": self.snapshots,
            "model": "default",
            "clock": self.clock,
            "replica_timeout_ms": 60_000,
            "say": self.said.append,
            "quiet_ms": 1,
        }
        return await look_up(LookupParts(**(parts | changes)), event_id, users, since_ms=self.clock.now_ms() - DAY_MS)

    async def path(self, event_id: str, **changes: Any) -> EventPath:
        (path,) = (await self.trace(event_id, **changes)).paths
        return path

    def close(self) -> None:
        self._committer.close()
        self.store.close()


@pytest.fixture
async def world(tmp_path: Path) -> AsyncIterator[World]:
    made = World(tmp_path)
    await made.log.create_topics()
    yield made
    made.close()


def states(path: EventPath) -> dict[str, str]:
    return {hop.name: hop.state.value for hop in path.hops}


def a_step(number: int, up_to: int, at_ms: int, **fields: Any) -> dict[str, Any]:
    return {"first_step": number, "last_step": number, "at_ms": at_ms, "positions": {"0": up_to}, **fields}


async def test_every_hop_has_its_time_its_ages_and_its_trace(world: World) -> None:
    await world.arrive("before")
    world.clock.advance(1_000)
    await world.arrive("wanted")
    steps = [a_step(8, 1, world.clock.now_ms() + 90), a_step(9, 2, world.clock.now_ms() + 100)]
    world.clock.advance(500)
    world.publish(4, up_to=1)
    world.publish(5, up_to=2, steps=steps)
    world.publish(6, up_to=2)
    now_ms = world.clock.now_ms()
    world.store.record_first_served("default", 5, "slow", now_ms + 900, swapped_at_ms=now_ms + 300)
    world.store.record_first_served("default", 6, "slow", now_ms + 900, swapped_at_ms=now_ms + 300)
    world.store.record_first_served("default", 5, "fast", now_ms + 80, swapped_at_ms=now_ms + 70)
    path = await world.path("wanted")
    assert [(hop.name, hop.replica, hop.append_age_ms, hop.what.split(",")[0]) for hop in path.hops] == [
        ("appended", None, 0, "interactions 0:1"),
        ("stored", None, 40, "arrival 1 of its user"),
        ("learned", None, 140, "step 9"),
        ("published", None, 560, "version 5"),
        ("swapped", "fast", 610, "version 5"),
        ("answered", "fast", 620, "version 5"),
        ("swapped", "slow", 840, "version 6"),
        ("answered", "slow", 1_440, "version 6"),
    ]
    assert all(hop.event_age_ms == hop.append_age_ms + 500 for hop in path.hops if hop.append_age_ms is not None)
    traces = {hop.name: hop.trace_id for hop in path.hops}
    assert (traces["appended"], traces["published"]) == (PRODUCER[3:35], PUBLISHER[3:35])
    assert path.is_complete
    text = text_of(await world.trace("wanted"))
    assert f"trace {PRODUCER[3:35]}" in text
    assert "1.44 s" in text


async def test_an_event_on_its_way_says_what_it_waits_for(world: World) -> None:
    await world.arrive("wanted")
    assert states(await world.path("wanted")) == {
        "appended": "reached",
        "stored": "reached",
        "learned": "waiting",
        "published": "waiting",
    }
    world.publish(1, up_to=0)
    waiting = next(hop for hop in (await world.path("wanted")).hops if hop.name == "published")
    assert waiting.what == "version 1, the newest, ends before interactions 0:0"
    world.publish(2, up_to=1, steps=[a_step(1, 1, NOW_MS)])
    path = await world.path("wanted")
    assert (path.hops[-1].name, path.hops[-1].state) == ("answered", HopState.WAITING)
    assert not path.is_complete


async def test_a_running_replica_with_older_weights_is_waited_for_and_a_silent_one_is_told_of(world: World) -> None:
    await world.arrive("wanted")
    world.publish(1, up_to=0)
    world.publish(2, up_to=1)
    world.store.record_first_served("default", 2, "a", NOW_MS + 100, swapped_at_ms=NOW_MS + 90)
    world.run_replica("a", 2)
    world.run_replica("gone", 1, age_ms=61_000)
    assert (await world.path("wanted")).is_complete
    world.run_replica("silent", 3)
    world.run_replica("behind", 1)
    path = await world.path("wanted")
    assert [(hop.replica, hop.name, hop.state.value) for hop in path.hops[-2:]] == [
        ("behind", "swapped", "waiting"),
        ("silent", "answered", "waiting"),
    ]
    assert not path.is_complete


async def test_a_batch_that_was_set_aside_is_no_learning(world: World) -> None:
    await world.arrive("wanted")
    world.publish(1, up_to=1, steps=[a_step(3, 1, NOW_MS + 90, is_set_aside=True)])
    learned = next(hop for hop in (await world.path("wanted")).hops if hop.name == "learned")
    assert (learned.state, learned.what.split(",")[0]) == (HopState.SET_ASIDE, "step 3")


async def test_of_a_step_that_passed_some_over_it_is_not_said_that_it_learned_this_one(world: World) -> None:
    await world.arrive("wanted")
    world.publish(1, up_to=1, steps=[a_step(3, 1, NOW_MS + 90, is_thinned=True)])
    path = await world.path("wanted")
    assert states(path)["learned"] == "unknown"
    assert "(unknown)" in text_of(await world.trace("wanted"))


async def test_an_event_that_was_told_twice_after_a_crash_is_the_one_that_was_stored(world: World) -> None:
    await world.arrive("wanted")
    topic = world.log.topics.history_updates
    (stored,) = world.log.records((topic, 0))
    await world.arrive("later")
    # The same message again, as a crash before the commit leaves it: its transaction was rolled back.
    world.log.append(topic, 0, stored.key, stored.value, ())
    assert (await world.path("wanted")).hops[1].what.endswith("history-updates 0:0")


async def test_a_late_event_and_a_repeated_one_are_what_they_are(world: World) -> None:
    await world.arrive("new")
    await world.arrive("late", age_ms=60_000)
    await world.arrive("late", age_ms=60_040)
    path = await world.path("late")
    assert (path.num_later, path.seq, path.standing) == (1, 1, "stored")
    assert path.hops[0].what == "interactions 0:1", "the delivery that was accepted"


async def test_only_the_history_of_the_user_named_is_read(world: World) -> None:
    await world.arrive("wanted", user=7)
    assert (await world.trace("wanted", [7])).paths
    assert not (await world.trace("elsewhere", [8])).paths


async def test_a_refused_event_says_why_and_where_its_bytes_are(world: World) -> None:
    await world.arrive("wanted", action="stare")
    traced = await world.trace("wanted")
    assert (traced.paths, traced.sent, traced.is_complete) == ((), (), False)
    (letter,) = traced.refused
    assert (letter.place, letter.reason, letter.source) == ("0:0", "unknown_action", "interactions 0:0")
    assert "headrace dlq show 0:0" in text_of(traced)


async def test_an_event_that_is_no_json_is_found_by_its_bytes(world: World) -> None:
    world.log.append(world.log.topics.interactions, 0, b"7", b'{"event_id": "wanted", ', ())
    await world.ingest()
    (letter,) = (await world.trace("wanted")).refused
    assert letter.reason == "malformed_json"


async def test_an_event_that_ingest_has_not_come_to_says_how_far_it_is(world: World) -> None:
    await world.arrive("before")
    world.send("between")
    world.send("wanted")
    (sent,) = (await world.trace("wanted")).sent
    assert (sent.place, sent.trace_id) == ("interactions 0:2", PRODUCER[3:35])
    assert sent.what == "not ingested yet: the stored position is 1, 2 to go"


async def test_an_event_that_had_expired_when_it_came_is_in_no_history(tmp_path: Path) -> None:
    world = World(tmp_path, max_history=1)
    await world.log.create_topics()
    await world.arrive("new")
    await world.arrive("wanted", age_ms=60_000)
    (sent,) = (await world.trace("wanted")).sent
    assert "it had expired" in sent.what
    world.close()


async def test_a_forgotten_user_s_event_says_so_and_no_more_than_is_known(world: World) -> None:
    await world.arrive("wanted", user=7)
    world.clock.advance(100)
    await world.forget(7)
    world.publish(1, up_to=1, steps=[a_step(1, 1, world.clock.now_ms() + 50)])
    path = await world.path("wanted")
    assert (path.standing, path.user_id) == ("forgotten", 7)
    assert states(path)["learned"] == "unknown"
    assert states(path)["published"] == "reached"


async def test_what_the_log_no_longer_holds_is_unknown_and_not_guessed(world: World) -> None:
    await world.arrive("wanted")
    world.publish(1, up_to=1)
    world.log.delete_before((world.log.topics.interactions, 0), 1)
    path = await world.path("wanted")
    assert (path.hops[0].trace_id, states(path)["published"]) == (None, "reached")
    world.log.delete_before((world.log.topics.history_updates, 0), 1)
    path = await world.path("wanted")
    assert states(path) == {"stored": "reached", "published": "unknown"}
    assert "version 1 is the first made after it arrived" in path.hops[-1].what
    assert not path.is_complete


async def test_positions_of_a_log_that_was_made_anew_tell_nothing_of_the_one_before(world: World) -> None:
    await world.arrive("wanted")
    world.publish(1, up_to=1_000, log_id="memory~1")
    path = await world.path("wanted")
    assert states(path) == {"appended": "reached", "stored": "reached", "published": "unknown"}
    world.publish(2, up_to=1)
    assert states(await world.path("wanted"))["published"] == "reached"


async def test_a_broker_whose_clock_is_behind_is_looked_for_further_back(world: World) -> None:
    world.send("wanted")
    arrived = world.clock.now_ms() + 60_000
    world.clock.advance(60_000)
    await world.ingest()
    topic = world.log.topics.history_updates
    (told,) = world.log.records((topic, 0))
    world.log.records((topic, 0))[0] = replace(told, timestamp_ms=arrived - 60_000)
    assert (await world.path("wanted")).hops[0].what == "interactions 0:0"


async def test_without_a_broker_the_store_still_tells_what_it_knows(world: World) -> None:
    await world.arrive("wanted")
    away = KafkaLog(KafkaConfig(bootstrap_servers="127.0.0.1:9", request_timeout_ms=500))
    traced = await world.trace("wanted", log=away)
    assert states(traced.paths[0]) == {"stored": "reached", "published": "unknown"}
    assert "127.0.0.1:9" in traced.notes[0]


async def test_an_event_that_nobody_sent_is_nowhere(world: World) -> None:
    await world.arrive("another")
    assert await world.trace("wanted") == Traced(event_id="wanted")
    assert len(world.said) == 1
    assert "searching dead letters, and the log since" in world.said[0]


async def test_where_earlier_versions_are_not_remembered_it_does_not_name_a_later_one_as_the_first(
    world: World,
) -> None:
    await world.arrive("e1")
    world.publish(1, up_to=1)
    world.store.record_first_served("default", 1, "one", world.clock.now_ms())
    world.clock.advance(DAY_MS)
    await world.arrive("e2")
    world.publish(2, up_to=2)
    world.store.record_first_served("default", 2, "one", world.clock.now_ms())
    assert world.store.prune_publications("default", before_ms=world.clock.now_ms(), kept=()) == 1
    first = await world.path("e1")
    assert [(hop.name, hop.state) for hop in first.hops[2:]] == [("published", HopState.UNKNOWN)]
    assert "version 2 or one before it" in first.hops[-1].what
    assert "trainer.keep_publications_d" in first.hops[-1].what
    assert not first.is_complete
    # It came after all that is not remembered.
    second = await world.path("e2")
    assert [hop.name for hop in second.hops] == ["appended", "stored", "learned", "published", "swapped", "answered"]
    assert second.hops[3].what == "version 2, delta"


async def test_a_remembered_version_that_does_not_contain_it_makes_the_next_one_the_first(world: World) -> None:
    world.publish(1, up_to=0)
    world.publish(2, up_to=0)
    await world.arrive("e1")
    world.publish(3, up_to=0)
    world.publish(4, up_to=1)
    assert world.store.prune_publications("default", before_ms=NOW_MS + 1, kept=()) == 2
    assert (await world.path("e1")).hops[3].what == "version 4, delta"
