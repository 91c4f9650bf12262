"""Open impressions in SQL: found by who, by when and by what is due; forgotten with their user."""

from __future__ import annotations

import threading
from functools import reduce
from itertools import permutations
from typing import Any

import numpy as np
import pytest

from feature_store.impressions import ItemActions, OpenImpression
from feature_store.store import FeatureStore


def shown(user_id: int, request_id: str, from_ms: int = 100, **changes: Any) -> OpenImpression:
    given: dict[str, Any] = {
        "user_id": user_id,
        "request_id": request_id,
        "from_ms": from_ms,
        "until_ms": from_ms + 50,
        "due_ms": from_ms + 60,
        "item_ids": np.array([7, 2**62, 9], np.int64),
        "is_taken": np.array([False, True, False]),
        "payload": b"\x00{}",
    }
    return OpenImpression(**(given | changes))


def fields_of(impression: OpenImpression) -> tuple[Any, ...]:
    one = impression
    numbers = (one.user_id, one.request_id, one.from_ms, one.until_ms, one.due_ms, one.is_closed)
    return (*numbers, one.item_ids.tolist(), one.is_taken.tolist(), one.payload)


def overlapping(store: FeatureStore, *users: tuple[int, int, int]) -> list[str]:
    """Request ids found for (user, first, last)."""
    user_id, first_ms, last_ms = np.array(users, np.int64).T
    with store.transaction() as transaction:
        found = transaction.impressions.overlapping(user_id, first_ms, last_ms)
    return sorted(impression.request_id for impression in found)


def due(store: FeatureStore, now_ms: int = 2**60, limit: int = 100) -> list[OpenImpression]:
    with store.transaction() as transaction:
        return transaction.impressions.due(now_ms, limit)


@pytest.fixture
def filled(store: FeatureStore) -> FeatureStore:
    with store.transaction() as transaction:
        transaction.impressions.add(
            [shown(1, "a", 100), shown(1, "b", 400), shown(2, "a", 100), shown(2**63 - 1, "c", 0, is_closed=True)]
        )
    return store


def test_what_was_stored_comes_back(store: FeatureStore) -> None:
    one = shown(5, "ü" * 128, 0, until_ms=2**60, due_ms=2**61, is_closed=True)
    empty = shown(6, "none", item_ids=np.empty(0, np.int64), is_taken=np.empty(0, np.bool_), due_ms=2**62)
    with store.transaction() as transaction:
        transaction.impressions.add([one, empty])
    assert [fields_of(found) for found in due(store, 2**62)] == [fields_of(one), fields_of(empty)]


def test_an_identity_is_user_and_request(filled: FeatureStore) -> None:
    with filled.transaction() as transaction:
        assert transaction.impressions.request_ids(np.array([1, 1, 2, 3])) == {1: {"a", "b"}, 2: {"a"}}


def test_windows_are_met_from_their_first_to_before_their_last_moment(filled: FeatureStore) -> None:
    assert overlapping(filled, (1, 0, 99)) == []
    assert overlapping(filled, (1, 0, 100)) == ["a"]
    assert overlapping(filled, (1, 149, 149)) == ["a"]
    assert overlapping(filled, (1, 150, 399)) == []
    assert overlapping(filled, (1, 149, 400), (2, 449, 500), (3, 0, 2**60)) == ["a", "b"]
    assert overlapping(filled, (2**63 - 1, 0, 0)) == ["c"]


def test_many_users_are_asked_for_in_parts(store: FeatureStore) -> None:
    with store.transaction() as transaction:
        transaction.impressions.add([shown(user_id, "r") for user_id in range(9_000)])
        every = np.arange(9_000)
        found = transaction.impressions.overlapping(every, np.full(9_000, 100), np.full(9_000, 100))
        assert sorted(one.user_id for one in found) == every.tolist()
        assert len(transaction.impressions.request_ids(every)) == 9_000
        transaction.impressions.forget(every[:8_500])
        assert transaction.impressions.num_open() == 500


def test_what_is_due_comes_longest_overdue_first_and_changes_are_kept(filled: FeatureStore) -> None:
    assert due(filled, 59) == []
    assert [one.request_id for one in due(filled, 60)] == ["c"]
    assert [one.user_id for one in due(filled, limit=1)] == [2**63 - 1]
    with filled.transaction() as transaction:
        first, second = transaction.impressions.due(160, 100)[1:]
        first.is_closed, first.due_ms, first.is_taken[0] = True, 999, True
        transaction.impressions.save([first])
        transaction.impressions.remove([second])
        assert transaction.impressions.num_open() == 1
        assert transaction.impressions.next_due_ms() == 60
    assert [fields_of(one) for one in due(filled)][-1] == fields_of(first)
    assert len(due(filled)) == 3


def test_each_users_windows_are_told_up_to_a_limit(filled: FeatureStore) -> None:
    with filled.transaction() as transaction:
        windows = transaction.impressions.user_windows(10)
        assert windows.user_id.tolist() == [1, 2, 2**63 - 1]
        assert windows.from_ms.tolist() == [100, 100, 0]
        assert windows.until_ms.tolist() == [450, 150, 50]
        assert len(transaction.impressions.user_windows(2).user_id) == 2


def test_an_empty_table_answers(store: FeatureStore) -> None:
    with store.transaction() as transaction:
        assert len(transaction.impressions.user_windows(10).user_id) == 0
        assert transaction.impressions.next_due_ms() is None
        assert transaction.impressions.num_open() == 0
        transaction.impressions.add([])
        transaction.impressions.save([])
        transaction.impressions.remove([])


def test_forgetting_a_user_takes_what_was_shown(filled: FeatureStore) -> None:
    with filled.transaction() as transaction:
        transaction.forget_users(np.array([1, 77]))
    assert [one.user_id for one in due(filled)] == [2**63 - 1, 2]


def test_forgetting_waits_for_a_join_under_way_and_takes_what_it_stored(store: FeatureStore) -> None:
    done = threading.Event()

    def forget() -> None:
        with store.transaction() as transaction:
            transaction.forget_users(np.array([1]))
        done.set()

    with store.transaction() as transaction:
        transaction.impressions.lock()
        forgetting = threading.Thread(target=forget)
        forgetting.start()
        assert not done.wait(0.2)
        transaction.impressions.add([shown(1, "a")])
    forgetting.join(10)
    assert done.is_set()
    assert due(store) == []


def test_what_waits_for_more_comes_back(store: FeatureStore) -> None:
    waiting = {
        2: ItemActions(action=2**31 + 1, first_ms=2**60, value=1.5, value_ms=2**60 + 1),
        0: ItemActions(action=2, first_ms=5),
    }
    with store.transaction() as transaction:
        transaction.impressions.add([shown(1, "a", pending=waiting), shown(1, "b")])
    found = {one.request_id: one for one in due(store)}
    assert found["a"].pending[2] == waiting[2]
    assert (found["a"].pending[0].action, found["a"].pending[0].first_ms) == (2, 5)
    assert not found["a"].pending[0].has_value
    assert found["b"].pending == {}
    changed = found["a"]
    changed.pending = {1: waiting[2]}
    with store.transaction() as transaction:
        transaction.impressions.save([changed])
    assert next(one for one in due(store) if one.request_id == "a").pending == {1: waiting[2]}
    changed.pending = {}
    with store.transaction() as transaction:
        transaction.impressions.save([changed])
    assert all(one.pending == {} for one in due(store))


def test_what_is_known_of_an_item_does_not_depend_on_the_order_in_which_it_came() -> None:
    parts = [
        ItemActions(action=1, first_ms=30),
        ItemActions(action=2, first_ms=20, value=7.0, value_ms=20),
        ItemActions(action=4, first_ms=25, value=3.0, value_ms=25),
        ItemActions(action=4, first_ms=25, value=2.0, value_ms=25),
    ]
    for order in permutations(parts):
        known = reduce(ItemActions.joined, order)
        assert known == ItemActions(action=7, first_ms=20, value=3.0, value_ms=25)
        assert known.joined(order[0]) == known
