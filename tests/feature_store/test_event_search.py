"""One event is found by its key: among all histories, or in one; on both databases."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from feature_store.ids import event_key
from feature_store.interactions import Interactions
from feature_store.records import StoredEvent
from feature_store.store import FeatureStore

BASE_MS = 1_700_000_000_000


def interactions(events: list[tuple[int, str, int]]) -> Interactions:
    """(user, event id, seconds), arriving a millisecond apart; items count up from 100."""
    count = len(events)
    return Interactions(
        user_id=np.array([user for user, _, _ in events], np.int64),
        item_id=100 + np.arange(count, dtype=np.int64),
        event_time_ms=np.array([BASE_MS + 1_000 * at_s for _, _, at_s in events], np.int64),
        action=np.full(count, 2, np.uint32),
        value=np.full(count, np.nan, np.float32),
        event_key=np.array([event_key(event_id) for _, event_id, _ in events], np.uint64),
        seq=np.zeros(count, np.uint32),
        arrival_ms=BASE_MS + 60_000 + np.arange(count, dtype=np.int64),
    )


def append(store: FeatureStore, events: list[tuple[int, str, int]]) -> None:
    with store.transaction() as transaction:
        transaction.append(interactions(events))


def test_an_event_is_found_among_all_users_and_all_chunks(store: FeatureStore) -> None:
    append(store, [(user, f"{user}-{at_s}", at_s) for user in range(20) for at_s in range(11)])
    (found,) = store.find_event(event_key("7-6"))
    assert found == StoredEvent(
        user_id=7,
        item_id=100 + 7 * 11 + 6,
        event_time_ms=BASE_MS + 6_000,
        action=2,
        seq=6,
        arrival_ms=BASE_MS + 60_000 + 7 * 11 + 6,
        num_later=0,
        is_expired=False,
    )
    assert store.find_event(event_key("7-6"), [7]) == [found]
    assert store.find_event(event_key("7-6"), [6, 99]) == []
    assert store.find_event(event_key("nobody sent it")) == []


def test_a_late_event_says_how_many_later_ones_were_there(store: FeatureStore) -> None:
    append(store, [(1, f"e{at_s}", at_s) for at_s in range(6)])
    append(store, [(1, "late", 3)])
    append(store, [(1, "after", 9)])
    (found,) = store.find_event(event_key("late"))
    # One of the same second stands before or behind it, as their keys have it.
    assert found.num_later == 2 + (event_key("e3") > event_key("late"))
    assert store.find_event(event_key("after"))[0].num_later == 0


def test_one_id_that_was_used_for_two_events_is_two_events(store: FeatureStore) -> None:
    append(store, [(1, "again", 1), (1, "again", 1), (1, "again", 2), (5, "again", 1)])
    found = [(one.user_id, one.event_time_ms - BASE_MS) for one in store.find_event(event_key("again"))]
    assert found == [(1, 1_000), (1, 2_000), (5, 1_000)]


def test_an_event_that_expired_is_found_while_it_is_stored(open_store: Callable[..., FeatureStore]) -> None:
    append(open_store(), [(1, f"e{at_s}", at_s) for at_s in range(6)])
    keeping_two = open_store(max_history=2)
    assert [keeping_two.find_event(event_key(f"e{at_s}"))[0].is_expired for at_s in (0, 3, 4, 5)] == [
        True,
        True,
        False,
        False,
    ]


def test_the_bytes_of_a_key_elsewhere_are_no_event(store: FeatureStore) -> None:
    key = 0x0000_0000_0000_0064
    assert key.to_bytes(8, "little") == (100).to_bytes(8, "little"), "the item id of the first event below"
    append(store, [(1, "e", 0)])
    assert store.find_event(key) == []
