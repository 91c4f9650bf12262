"""The label join on both databases: who took what and when, each label once, whatever is repeated or interrupted."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from feature_store.config import FeatureStoreConfig
from feature_store.errors import StoreUnavailableError
from feature_store.ids import stable_id
from feature_store.interactions import Interactions
from feature_store.store import FeatureStore
from stream.dead_letters import read_dead_letter
from stream.errors import LogResetError, LogUnavailableError
from stream.label_rules import ITEMS_PER_MESSAGE, Awaited
from stream.labels import LabelJoiner
from stream.log import PartitionId, Record
from stream.memory_log import MemoryLog, MemoryReader, MemoryWriter
from tests.feature_store.databases import migrated_database
from tests.stream.label_world import CONFIG, NOW_MS, World, run


@pytest.fixture(params=["sqlite", "postgresql"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[FeatureStore]:
    with migrated_database(request.param, tmp_path) as url:
        store = FeatureStore(FeatureStoreConfig(url=url, chunk_len=4))
        yield store
        store.close()


@pytest.fixture
async def world(store: FeatureStore) -> World:
    world = World(store)
    await world.log.create_topics()
    return world


@pytest.fixture
async def joiner(world: World) -> AsyncIterator[LabelJoiner]:
    joiner = world.joiner()
    yield joiner
    await joiner.close()


async def test_what_is_taken_is_told_at_once_and_the_rest_when_the_window_ends(
    world: World, joiner: LabelJoiner
) -> None:
    world.show("r", 5, [10, "tt20", 30])
    await run(joiner)
    world.clock.advance(400)
    world.act(5, stable_id("tt20"), action=2)
    await run(joiner)
    assert world.labels() == [("r", "tt20", "taken")]
    world.clock.advance(699)
    await run(joiner)
    assert len(world.messages()) == 1
    world.clock.advance(1)
    await run(joiner)
    taken, rest = world.messages()
    assert (taken.user_id, taken.shown_at_ms, taken.snapshot_version) == (5, NOW_MS, 3)
    assert (taken.items, taken.places, taken.scores) == (["tt20"], [1], [0.9])
    assert (taken.actions, taken.event_times_ms, taken.late) == ([2], [NOW_MS + 400], False)
    assert (rest.outcome, rest.items, rest.places, rest.scores) == ("not_taken", [10, 30], [0, 2], [1.0, 0.8])
    assert (rest.actions, rest.event_times_ms, rest.late) == ([], [], False)
    assert [record.key for record in world.log.records(("labels", 0))] == [b"5", b"5"]
    assert joiner.counts["taken"] == 1
    assert joiner.counts["not_taken"] == 2
    assert joiner.status()["open"] == 0


async def test_labels_carry_where_their_items_were_shown_and_what_was_predicted_of_them_then(
    world: World, joiner: LabelJoiner
) -> None:
    world.show("r", 5, [10, 20, 30], predictions={"click": [0.5, 0.25, None], "value": [9.5, 8.5, None]}, surface=7)
    world.show("by retrieval", 5, [40])
    await run(joiner)
    await joiner.close()
    another = world.joiner()
    world.act(5, 20)
    await run(another)
    world.clock.advance(1_100)
    await run(another)
    world.act(5, 10, at=999)  # late
    await run(another)
    await another.close()
    said = {(one.request_id, one.outcome, one.late): (one.items, one.predictions) for one in world.messages()}
    assert said == {
        ("r", "taken", False): ([20], {"click": [0.25], "value": [8.5]}),
        ("r", "not_taken", False): ([10, 30], {"click": [0.5, None], "value": [9.5, None]}),
        ("r", "taken", True): ([10], {"click": [0.5], "value": [9.5]}),
        ("by retrieval", "not_taken", False): ([40], None),
    }
    assert {(one.request_id, one.surface) for one in world.messages()} == {("r", 7), ("by retrieval", 0)}


async def test_labels_of_a_long_list_are_several_messages(world: World, joiner: LabelJoiner) -> None:
    items = list(range(2 * ITEMS_PER_MESSAGE + 500))
    world.show("r", 5, items, predictions={"click": [item / 10_000 for item in items]})
    for item in (7, ITEMS_PER_MESSAGE + 1):
        world.act(5, item)
    await run(joiner)
    world.clock.advance(1_100)
    await run(joiner)
    assert max(len(message.items) for message in world.messages()) == ITEMS_PER_MESSAGE
    assert sorted(item for _, item, _ in world.labels()) == items
    for message in world.messages():
        assert message.predictions == {"click": [place / 10_000 for place in message.places]}
        assert len(message.actions) == (len(message.items) if message.outcome == "taken" else 0)


async def test_the_window_holds_its_first_moment_and_not_its_last(world: World, joiner: LabelJoiner) -> None:
    world.show("r", 5, [10, 20, 30, 40], at=0)
    world.clock.advance(1_050)
    for item, at in ((10, -1), (20, 0), (30, 999), (40, 1_000)):
        world.act(5, item, at=at)
    world.act(6, 10, at=500)  # somebody else
    await run(joiner)
    assert sorted(world.labels()) == [("r", 20, "taken"), ("r", 30, "taken")]


async def test_an_impression_that_arrives_after_the_interaction_finds_it(world: World, joiner: LabelJoiner) -> None:
    world.act(5, 10, at=20)
    await run(joiner)
    world.clock.advance(300)
    world.show("r", 5, [10, 20], at=10)
    await run(joiner)
    assert world.labels() == [("r", 10, "taken")]


async def test_an_interaction_that_was_announced_before_and_stored_after_its_impression_is_found_at_the_end(
    world: World, joiner: LabelJoiner
) -> None:
    interaction = world.interaction(5, 10, at=20)
    world.announce(interaction)
    await run(joiner)
    world.show("r", 5, [10, 20], at=10)
    await run(joiner)
    world.keep(interaction)
    world.clock.advance(2_000)
    await run(joiner)
    assert world.labels() == [("r", 10, "taken"), ("r", 20, "not_taken")]


async def test_several_actions_on_one_item_are_one_label(world: World, joiner: LabelJoiner) -> None:
    world.show("r", 5, [10, 20, 10])
    world.act(5, 10, at=7, action=4)
    world.act(5, 10, at=5, action=2)
    await run(joiner)
    world.act(5, 10, at=9, action=8)
    await run(joiner)
    (message,) = world.messages()
    assert (message.items, message.places) == ([10, 10], [0, 2])
    assert (message.actions, message.event_times_ms) == ([6, 6], [NOW_MS + 5] * 2)


CLICK, PURCHASE, SHARE = 1, 2, 4


@pytest.fixture
async def patient(store: FeatureStore) -> World:
    """Clicks and purchases are predicted."""
    world = World(store, awaited=Awaited(action=CLICK | PURCHASE))
    await world.log.create_topics()
    return world


async def test_a_label_waits_for_what_is_predicted_and_holds_all_of_it(patient: World) -> None:
    joiner = patient.joiner()
    patient.show("r", 5, [10, 20, 30])
    patient.act(5, 10, at=5, action=CLICK)
    patient.act(5, 20, at=6, action=CLICK | SHARE)
    await run(joiner)
    assert patient.messages() == []
    patient.clock.advance(700)
    patient.act(5, 10, at=700, action=PURCHASE, value=9.5)
    await run(joiner)
    (both,) = patient.messages()
    # At once: nothing that is predicted can change any more.
    assert (both.items, both.places, both.actions, both.values) == ([10], [0], [CLICK | PURCHASE], [9.5])
    assert both.event_times_ms == [NOW_MS + 5]
    patient.act(5, 10, at=701, action=SHARE)
    patient.clock.advance(400)
    await run(joiner)
    assert patient.labels() == [("r", 10, "taken"), ("r", 20, "taken"), ("r", 30, "not_taken")]
    clicked = patient.messages()[1]
    assert (clicked.actions, clicked.late, clicked.event_times_ms) == ([CLICK | SHARE], False, [NOW_MS + 6])
    assert joiner.counts["taken"] == 2
    await joiner.close()


async def test_what_waits_survives_the_joiner_and_is_not_looked_up_again(patient: World) -> None:
    first = patient.joiner()
    patient.show("r", 5, [10, 20, 10])
    await run(first)
    # Announced and never stored: only the join knows of it.
    patient.announce(patient.interaction(5, 10, at=3, action=CLICK, value=2.5))
    await run(first)
    await first.close()
    second = patient.joiner()
    patient.clock.advance(1_100)
    await run(second)
    taken, rest = patient.messages()
    assert (taken.items, taken.places, taken.actions) == ([10, 10], [0, 2], [CLICK, CLICK])
    assert (taken.event_times_ms, taken.values) == ([NOW_MS + 3] * 2, [2.5, 2.5])
    assert (rest.items, rest.outcome) == ([20], "not_taken")
    await second.close()


async def test_both_orders_of_arrival_come_to_the_same_label(patient: World) -> None:
    joiner = patient.joiner()
    patient.act(5, 10, at=3, action=CLICK)
    patient.show("r", 5, [10], at=0)
    await run(joiner)
    patient.act(5, 10, at=2, action=PURCHASE)
    await run(joiner)
    (message,) = patient.messages()
    assert (message.actions, message.event_times_ms) == ([CLICK | PURCHASE], [NOW_MS + 2])
    await joiner.close()


async def test_a_correction_waits_for_nothing(patient: World) -> None:
    joiner = patient.joiner()
    patient.show("r", 5, [10, 20])
    patient.act(5, 20, at=4, action=CLICK)
    patient.clock.advance(1_100)
    await run(joiner)
    patient.act(5, 10, at=999, action=CLICK)
    # A label that was written stays as it is.
    patient.act(5, 20, at=999, action=PURCHASE)
    await run(joiner)
    assert patient.labels() == [("r", 20, "taken"), ("r", 10, "not_taken"), ("r", 10, "late")]
    assert [message.actions for message in patient.messages()] == [[CLICK], [], [CLICK]]
    await joiner.close()


async def test_a_predicted_value_is_waited_for(store: FeatureStore) -> None:
    world = World(store, awaited=Awaited(action=CLICK, value=True))
    await world.log.create_topics()
    joiner = world.joiner()
    world.show("r", 5, [10, 20])
    world.act(5, 10, at=1, action=CLICK)
    await run(joiner)
    assert world.messages() == []
    world.act(5, 10, at=2, action=SHARE, value=31.0)
    await run(joiner)
    assert [(message.items, message.values) for message in world.messages()] == [([10], [31.0])]
    await joiner.close()


async def test_without_the_broker_what_waits_is_as_it_was(patient: World) -> None:
    log = FaultyLog(patient)
    await log.create_topics()
    patient.log = log
    joiner = patient.joiner()
    patient.show("r", 5, [10])
    patient.act(5, 10, at=1, action=CLICK)
    await run(joiner)
    patient.act(5, 10, at=2, action=PURCHASE)
    log.num_good_sends = 0
    for _ in range(2):
        with pytest.raises(LogUnavailableError):
            await joiner.step()
    with patient.store.transaction() as transaction:
        (waiting,) = transaction.impressions.due(2**62, 10)
    assert [one.action for one in waiting.pending.values()] == [CLICK]
    log.num_good_sends = 10
    await run(joiner)
    assert [message.actions for message in patient.messages()] == [[CLICK | PURCHASE]]
    await joiner.close()


async def test_one_interaction_takes_an_item_from_every_answer_that_showed_it(
    world: World, joiner: LabelJoiner
) -> None:
    world.show("a", 5, [10], at=0)
    world.show("b", 5, [20, 10], at=10)
    world.show("c", 6, [10], at=0)
    world.act(5, 10, at=30)
    await run(joiner)
    assert sorted(world.labels()) == [("a", 10, "taken"), ("b", 10, "taken")]


async def test_an_impression_delivered_twice_is_one(world: World, joiner: LabelJoiner) -> None:
    world.show("r", 5, [10, 20])
    world.show("r", 5, [10, 20])
    world.act(5, 10)
    await run(joiner)
    world.show("r", 5, [10, 20])
    world.clock.advance(2_000)
    await run(joiner)
    world.show("r", 5, [10, 20], at=0)
    await run(joiner)
    assert world.labels() == [("r", 10, "taken"), ("r", 20, "not_taken")]
    assert joiner.counts["duplicate_impression"] == 3


async def test_a_late_interaction_corrects_what_said_not_taken(world: World, joiner: LabelJoiner) -> None:
    world.show("r", 5, [10, 20])
    world.clock.advance(1_100)
    await run(joiner)
    world.clock.advance(5_000)  # the last moment for corrections
    world.act(5, 10, at=999)
    await run(joiner)
    world.act(5, 10, at=998)
    await run(joiner)
    assert world.labels() == [("r", 10, "not_taken"), ("r", 20, "not_taken"), ("r", 10, "late")]
    assert world.messages()[-1].event_times_ms == [NOW_MS + 999]
    assert joiner.counts["late"] == 1


async def test_what_comes_too_late_is_counted_once_and_in_the_end_nothing_is_kept(
    world: World, joiner: LabelJoiner
) -> None:
    world.show("r", 5, [10, 20])
    world.clock.advance(1_100)
    await run(joiner)
    world.clock.advance(5_001)
    for _ in range(2):
        world.act(5, 10, at=999)
        await run(joiner)
    assert len(world.labels()) == 2
    assert joiner.counts["too_late"] == 1
    world.clock.advance(5_000)
    await run(joiner)
    with world.store.transaction() as transaction:
        assert transaction.impressions.next_due_ms() is None
    world.act(5, 20, at=999)
    await run(joiner)
    assert joiner.counts["too_late"] == 1


async def test_nothing_is_closed_while_anything_lies_unread(world: World) -> None:
    world.config = replace(CONFIG, poll_records=2)
    joiner = world.joiner()
    world.show("r", 5, [10, 20])
    await run(joiner)
    for user in range(100, 109):
        world.act(user, 1, at=5)
    world.act(5, 10, at=900)
    world.clock.advance(60_000)
    assert await joiner.step()
    assert world.labels() == []
    await run(joiner)
    assert world.labels() == [("r", 10, "taken"), ("r", 20, "not_taken")]
    await joiner.close()


async def test_a_clock_that_was_ahead_for_a_moment_ends_no_window_afterwards(world: World, joiner: LabelJoiner) -> None:
    await run(joiner)
    world.clock._now_ms += 86_400_000
    await run(joiner)
    world.clock._now_ms -= 86_400_000
    world.show("r", 5, [10, 20])
    await run(joiner)
    await run(joiner)
    assert world.labels() == []
    world.act(5, 10)
    await run(joiner)
    world.clock.advance(1_100)
    await run(joiner)
    assert world.labels() == [("r", 10, "taken"), ("r", 20, "not_taken")]


async def test_a_joiner_that_was_away_joins_as_if_it_had_not_been(world: World, joiner: LabelJoiner) -> None:
    world.show("r", 5, [10, 20])
    world.act(5, 10, at=10)
    world.clock.advance(86_400_000)
    await run(joiner)
    assert world.labels() == [("r", 10, "taken"), ("r", 20, "not_taken")]
    assert joiner.counts["late"] == 0


async def test_a_new_joiner_continues_where_the_last_one_stopped(world: World, joiner: LabelJoiner) -> None:
    world.show("r", 5, [10, 20, 30])
    world.act(5, 10)
    await run(joiner)
    await joiner.close()
    second = world.joiner()
    await run(second)
    assert second.status()["open"] == 1
    world.act(5, 20, at=3)
    await run(second)
    world.clock.advance(1_100)
    await run(second)
    assert world.labels() == [("r", 10, "taken"), ("r", 20, "taken"), ("r", 30, "not_taken")]
    assert second.counts["duplicate_impression"] == 0
    await second.close()


async def test_two_joiners_fence_each_other(world: World) -> None:
    left, right = world.joiner(), world.joiner()
    for turn in range(6):
        for user in range(20):
            world.show(f"r{turn}", user, [turn, 50])
            world.act(user, turn)
        await asyncio.gather(run(left), run(right))
    world.clock.advance(1_100)
    await asyncio.gather(run(left), run(right))
    await asyncio.gather(run(left), run(right))
    expected = [(f"r{turn}", item, what) for turn in range(6) for item, what in ((turn, "taken"), (50, "not_taken"))]
    assert sorted(world.labels()) == sorted(expected * 20)
    total = left.counts + right.counts
    assert (total["taken"], total["not_taken"], total["duplicate_impression"]) == (120, 120, 0)
    await left.close()
    await right.close()


async def test_a_joiner_that_was_overtaken_notices_and_starts_anew(world: World, joiner: LabelJoiner) -> None:
    await run(joiner)
    second = world.joiner()
    world.show("r", 5, [10, 20])
    await run(second)
    world.act(5, 10, at=1)
    await run(joiner)  # finds the positions moved, and nothing else: its own time has not come
    await run(joiner)
    await run(second)
    await run(second)
    assert world.labels() == [("r", 10, "taken")]
    await second.close()


@pytest.mark.parametrize("raw", [b"5", b"nobody", None])
async def test_impressions_that_make_no_sense_become_dead_letters(
    world: World, joiner: LabelJoiner, raw: bytes | None
) -> None:
    world.append_impression(raw, key=b"" if raw is None else b"k")
    world.show("r", 5, [10, 20], scores=[1.0])
    world.show("r\0", 5, [10])
    world.show("future", 5, [10], at=300_001)
    world.show("huge", 5, [10], shown_at_ms=2**62)
    world.show("predictions", 5, [10], predictions={"click": [0.5, 0.5]})
    world.append_impression(
        b'{"request_id":"","user_id":5,"items":[],"scores":[],"snapshot_version":1,"shown_at_ms":1}'
    )
    world.append_impression(
        b'{"request_id":"x","user_id":-5,"items":[],"scores":[],"snapshot_version":1,"shown_at_ms":1}'
    )
    world.show("good", 5, [10])
    world.act(5, 10, at=1)
    await run(joiner)
    letters = [read_dead_letter(record) for record in world.log.records(("dead-letters", 0))]
    assert [letter.source_offset for letter in letters] == [0, 1, 2, 3, 4, 5, 6, 7]
    assert {(letter.reason, letter.source_topic) for letter in letters} == {("malformed_message", "impressions")}
    assert letters[0].value == raw
    assert "1 scores" in letters[1].error
    assert "2 predictions of 'click'" in letters[5].error
    assert joiner.counts["malformed"] == 8
    assert world.labels() == [("good", 10, "taken")]


async def test_an_update_of_another_log_or_version_is_left_alone(world: World, joiner: LabelJoiner) -> None:
    world.show("r", 5, [10])
    await run(joiner)
    world.announce(world.interaction(5, 10, at=1), log_id="an older log")
    world.log.append(world.log.topics.history_updates, 1, None, b"from the future", ())
    await run(joiner)
    assert world.labels() == []
    assert joiner.counts["malformed"] == 1
    assert world.log.records(("dead-letters", 0)) == []


async def test_a_forgotten_user_gets_no_labels(world: World, joiner: LabelJoiner) -> None:
    world.show("before", 5, [10, 20])
    world.show("other", 7, [10])
    await run(joiner)
    with world.store.transaction() as transaction:
        transaction.forget_users(np.array([5]))
    world.show("between", 5, [10, 20])
    await run(joiner)
    world.announce(Interactions.empty(), forgotten=(5,))
    world.act(5, 10, at=5)
    await run(joiner)
    assert joiner.status()["open"] == 1
    world.clock.advance(2_000)
    await run(joiner)
    assert world.labels() == [("other", 10, "not_taken")]


async def test_an_impression_without_value_takes_back_what_its_user_was_shown(
    world: World, joiner: LabelJoiner
) -> None:
    world.show("a", 5, [10])
    world.show("b", "anna", [10])
    world.show("c", 6, [10])
    await run(joiner)
    world.append_impression(None, key=b"5")
    world.append_impression(None, key=b"anna")
    world.clock.advance(2_000)
    await run(joiner)
    assert world.labels() == [("c", 10, "not_taken")]


async def test_in_a_replay_the_log_and_not_the_event_says_when(world: World) -> None:
    world.mode = "replay"
    joiner = world.joiner()
    world.clock.advance(10_000)
    world.act(5, 30, at=-(10**9))  # before anything was shown
    world.clock.advance(1)
    world.show("r", 5, [10, 20, 30], at=-(10**9))
    world.clock.advance(500)
    world.act(5, 10, at=-(10**9) + 86_400_000)
    await run(joiner)
    world.clock.advance(500)
    world.act(5, 20, at=-(10**9) + 5)  # the window has ended, although the event times say otherwise
    await run(joiner)
    world.clock.advance(2_000)
    await run(joiner)
    assert world.labels() == [("r", 10, "taken"), ("r", 20, "not_taken"), ("r", 30, "not_taken")]
    assert world.messages()[0].event_times_ms == [NOW_MS - 10**9 + 86_400_000]
    assert world.messages()[0].shown_at_ms == NOW_MS - 10**9
    await joiner.close()


async def test_impressions_of_one_user_have_a_limit(world: World) -> None:
    world.config = replace(CONFIG, user_impressions_max=2)
    joiner = world.joiner()
    for number in range(4):
        world.show(f"r{number}", 5, [10])
    world.show("r", 6, [10])
    await run(joiner)
    world.show("r4", 5, [10])
    world.act(5, 10, at=1)
    await run(joiner)
    assert sorted(world.labels()) == [("r0", 10, "taken"), ("r1", 10, "taken")]
    assert joiner.counts["over_limit"] == 3
    await joiner.close()


async def test_with_more_users_than_the_index_holds_labels_are_the_same(world: World) -> None:
    world.config = replace(CONFIG, indexed_users_max=3)
    joiner = world.joiner()
    for user in range(8):
        world.show("r", user, [user, 50])
        await run(joiner)
    await joiner.disconnect()
    for user in range(8):
        world.act(user, user, at=1)
    await run(joiner)
    assert sorted(world.labels()) == [("r", user, "taken") for user in range(8)]
    await joiner.close()


async def test_without_impressions_nothing_is_written_but_a_position_now_and_then(
    world: World, joiner: LabelJoiner
) -> None:
    await run(joiner)
    before = world.stored_positions()
    for user in range(40):
        world.act(user, 10)
        await run(joiner)
    assert world.stored_positions() == before
    world.clock.advance(5_000)
    await run(joiner)
    assert world.stored_positions() == {"labels/history-updates": {0: 20, 1: 20}, "labels/impressions": {0: 0}}


async def test_what_was_read_before_a_crash_is_read_again_and_changes_nothing(world: World) -> None:
    first = world.joiner()
    world.act(5, 10, at=1)
    await run(first)  # read, but no position stored
    world.show("r", 5, [10, 20], at=0)
    await run(first)
    await first.close()
    second = world.joiner()
    world.clock.advance(2_000)
    await run(second)
    assert world.labels() == [("r", 10, "taken"), ("r", 20, "not_taken")]
    await second.close()


class FaultyLog(MemoryLog):
    """A log whose readers and writers fail when a test says so."""

    def __init__(self, world: World) -> None:
        super().__init__(world.clock, num_partitions=2)
        self.num_good_sends = 1_000
        self.lost_before: dict[PartitionId, int] = {}

    def reader(self) -> MemoryReader:
        return FaultyReader(self)

    def writer(self) -> MemoryWriter:
        return FaultyWriter(self)


class FaultyWriter(MemoryWriter):
    async def send(self, *args: Any, **options: Any) -> Any:
        assert isinstance(self._log, FaultyLog)
        if self._log.num_good_sends == 0:
            raise LogUnavailableError("the broker went away")
        self._log.num_good_sends -= 1
        return await super().send(*args, **options)


class FaultyReader(MemoryReader):
    async def poll(self, *, timeout_ms: int, max_records: int) -> list[Record]:
        assert isinstance(self._log, FaultyLog)
        for partition, first in self._log.lost_before.items():
            if 0 < self._next[partition] < first:
                raise LogResetError("the beginning has expired", partition=partition)
            self._next[partition] = max(first, self._next[partition])
        return await super().poll(timeout_ms=timeout_ms, max_records=max_records)


@pytest.fixture
async def faulty(world: World) -> FaultyLog:
    log = FaultyLog(world)
    await log.create_topics()
    world.log = log
    return log


async def test_without_the_broker_nothing_changes_and_the_next_step_tries_again(
    world: World, faulty: FaultyLog
) -> None:
    joiner = world.joiner()
    await run(joiner)
    before = world.stored_positions()
    world.act(5, 10, at=1)
    world.show("a", 5, [10, 20], at=0)
    world.show("b", 5, [10, 30], at=0)
    world.append_impression(b"?")
    for num_good_sends in range(3):
        faulty.num_good_sends = num_good_sends
        with pytest.raises(LogUnavailableError):
            await joiner.step()
        assert world.stored_positions() == before
        assert joiner.counts.total() == 0
    faulty.num_good_sends = 1_000
    await run(joiner)
    world.clock.advance(2_000)
    await run(joiner)
    assert joiner.counts == {**joiner.counts, "taken": 2, "not_taken": 2, "malformed": 1}
    assert sorted(set(world.labels())) == [
        ("a", 10, "taken"),
        ("a", 20, "not_taken"),
        ("b", 10, "taken"),
        ("b", 30, "not_taken"),
    ]
    await joiner.close()


async def test_a_log_whose_beginning_has_expired_is_read_from_where_it_begins(world: World, faulty: FaultyLog) -> None:
    joiner = world.joiner()
    world.show("a", 5, [10])
    await run(joiner)
    world.act(5, 1, at=1)
    world.show("lost", 5, [10])
    world.show("b", 5, [10])
    faulty.lost_before = {("impressions", 0): 2}
    with pytest.raises(LogUnavailableError, match="expired; reading it from its start"):
        await run(joiner)
    await run(joiner)
    world.clock.advance(2_000)
    await run(joiner)
    assert world.labels() == [("a", 10, "not_taken"), ("b", 10, "not_taken")]
    await joiner.close()


async def test_a_log_that_was_reset_is_refused(world: World, joiner: LabelJoiner) -> None:
    for number in range(5):
        world.show(f"r{number}", 5, [10])
    await run(joiner)
    await joiner.close()
    again = World(world.store)
    await again.log.create_topics()
    again.show("new", 5, [10])
    second = again.joiner()
    with pytest.raises(LogUnavailableError, match="the log ends at offset 1: .*; reading it from its start"):
        await run(second)
    with pytest.raises(LogResetError, match=r"impressions/0 was reset: offset 5 .* offset 0, .*log accept --reset"):
        await run(second)
    assert again.labels() == []
    await second.close()


async def test_a_missing_database_is_reported_and_nothing_is_lost(tmp_path: Path) -> None:
    world = World(FeatureStore(FeatureStoreConfig(url=f"sqlite:///{tmp_path}/missing/store.db")))
    joiner = world.joiner()
    with pytest.raises(StoreUnavailableError):
        await run(joiner)
    await joiner.close()
    world.store.close()
