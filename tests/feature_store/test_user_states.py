"""Vectors of users in SQL: read as they were, of one version, forgotten with their user, pruned when nobody asks."""

from __future__ import annotations

import threading
from typing import Any

import numpy as np
import pytest
from sqlalchemy import create_engine, text

from feature_store.interactions import Interactions
from feature_store.store import FeatureStore
from feature_store.user_states import ANY, NewVectors, StateQuery, UserVectors

WIDTH = 3


def made(*rows: tuple[int, int, int], fill: float = 1.0) -> NewVectors:
    """Vectors of (user, next_seq, as_of_ms); each filled with `fill` times its next_seq."""
    user_id, next_seq, as_of_ms = np.array(rows, np.int64).reshape(-1, 3).T.copy()
    vector = np.repeat(next_seq[:, None] * np.float32(fill), WIDTH, axis=1).astype(np.float32)
    return NewVectors(user_id=user_id, next_seq=next_seq, as_of_ms=as_of_ms, vector=vector)


def write(store: FeatureStore, version: int, new: NewVectors, at_ms: int, model: str = "m") -> None:
    with store.transaction() as transaction:
        transaction.user_states.lock()
        transaction.user_states.write(model, version, new, written_at_ms=at_ms)


def serve(store: FeatureStore, version: int, from_ms: int, model: str = "m") -> int:
    with store.transaction() as transaction:
        transaction.user_states.begin_version(model, version, created_at_ms=from_ms)
        return transaction.user_states.serve_version(model, version, from_ms=from_ms)


def asked(
    store: FeatureStore, *moments: tuple[int, int, int, int], model: str = "m", width: int = WIDTH
) -> UserVectors:
    """(user, before_ms, known_before_ms, below_seq)."""
    user_id, before_ms, known_before_ms, below_seq = np.array(moments, np.int64).reshape(-1, 4).T.copy()
    query = StateQuery(user_id=user_id, before_ms=before_ms, known_before_ms=known_before_ms, below_seq=below_seq)
    return store.user_states.vectors(model, query, width=width)


def interact(store: FeatureStore, *users: int, event_time_ms: int = 100) -> None:
    n = len(users)
    columns: dict[str, Any] = {
        "user_id": np.array(users, np.int64),
        "item_id": np.arange(n, dtype=np.int64),
        "event_time_ms": np.full(n, event_time_ms, np.int64),
        "action": np.ones(n, np.uint32),
        "value": np.full(n, np.nan, np.float32),
        "event_key": np.arange(event_time_ms, event_time_ms + n, dtype=np.uint64),
        "seq": np.zeros(n, np.uint32),
        "arrival_ms": np.full(n, 100, np.int64),
    }
    with store.transaction() as transaction:
        transaction.append(Interactions(**columns))


@pytest.fixture
def filled(store: FeatureStore) -> FeatureStore:
    serve(store, 1, from_ms=500)
    write(store, 1, made((1, 5, 100), (2, 1, 100)), at_ms=1_000)
    write(store, 1, made((1, 8, 200)), at_ms=2_000)
    return store


def test_the_newest_vector_of_each_user_comes_back_with_what_it_was_made_of(filled: FeatureStore) -> None:
    found = filled.user_states.newest("m", np.array([2, 9, 1, 1]), width=WIDTH)
    assert found.version.tolist() == [1, -1, 1, 1]
    assert found.next_seq.tolist() == [1, -1, 8, 8]
    assert found.as_of_ms.tolist() == [100, -1, 200, 200]
    assert found.vector[:, 0].tolist() == [1, 0, 8, 8]
    assert found.is_there.tolist() == [True, False, True, True]
    np.testing.assert_array_equal(found.ages_s(1_200), np.array([1.1, np.nan, 1.0, 1.0], np.float32))


@pytest.mark.parametrize(
    ("moment", "next_seq"),
    [
        ((1, ANY, ANY, ANY), 8),
        ((1, 200, ANY, ANY), 5),  # made of what happened at the moment itself: a leak
        ((1, 201, ANY, ANY), 8),
        ((1, 100, ANY, ANY), -1),
        ((1, ANY, 2_000, ANY), 5),  # written at the moment itself
        ((1, ANY, 2_001, ANY), 8),
        ((1, ANY, 1_000, ANY), -1),
        ((1, ANY, ANY, 7), 5),  # made of an arrival that the reader has not had
        ((1, ANY, ANY, 8), 8),
        ((1, ANY, ANY, 4), -1),
    ],
)
def test_as_of_a_moment_it_is_the_vector_that_was_there_then(
    filled: FeatureStore, moment: tuple[int, int, int, int], next_seq: int
) -> None:
    assert asked(filled, moment).next_seq.tolist() == [next_seq]


def test_a_vector_is_written_once_and_stays_as_it_was(filled: FeatureStore) -> None:
    write(filled, 1, made((1, 8, 999), (3, 2, 300), fill=7.0), at_ms=9_000)
    assert filled.user_states.newest("m", np.array([1, 3]), width=WIDTH).vector[:, 0].tolist() == [8, 14]


def test_versions_never_mix_and_each_moment_has_its_own(filled: FeatureStore) -> None:
    with filled.transaction() as transaction:
        transaction.user_states.begin_version("m", 2, created_at_ms=3_000)
    write(filled, 2, made((1, 8, 200), fill=10.0), at_ms=3_000)
    # Unseen while it is filled, also by whoever has no vector of the version in effect.
    write(filled, 2, made((5, 1, 200), fill=10.0), at_ms=3_000)
    assert filled.user_states.newest("m", np.array([1, 2, 5]), width=WIDTH).version.tolist() == [1, 1, -1]
    assert serve(filled, 2, from_ms=4_000) == 4_000
    now = filled.user_states.newest("m", np.array([1, 2, 5]), width=WIDTH)
    assert now.version.tolist() == [2, -1, 2]
    assert now.vector[:, 0].tolist() == [80, 0, 10]
    assert asked(filled, (1, ANY, 4_000, ANY), (1, ANY, 4_001, ANY)).version.tolist() == [1, 2]
    # A clock that was set back: the order of versions stays.
    assert serve(filled, 3, from_ms=100) == 4_001


def test_models_do_not_see_each_other(filled: FeatureStore) -> None:
    serve(filled, 1, from_ms=500, model="other")
    write(filled, 1, made((1, 3, 100), fill=2.0), at_ms=1_000, model="other")
    assert filled.user_states.newest("m", np.array([1]), width=WIDTH).vector[0, 0] == 8
    assert filled.user_states.newest("other", np.array([1]), width=WIDTH).vector[0, 0] == 6


def test_a_vector_that_is_not_finite_is_refused(filled: FeatureStore) -> None:
    bad = made((4, 1, 100))
    bad.vector[0, 1] = np.nan
    with pytest.raises(ValueError, match="not finite"):
        NewVectors(user_id=bad.user_id, next_seq=bad.next_seq, as_of_ms=bad.as_of_ms, vector=bad.vector)


def test_a_damaged_vector_is_as_if_there_were_none_and_is_named(filled: FeatureStore, database_url: str) -> None:
    from feature_store.config import parse_url

    engine = create_engine(parse_url(database_url))
    with engine.begin() as connection:
        stored = connection.execute(text("SELECT vector FROM user_state WHERE user_id = 2")).scalar_one()
        changed = bytes(stored)[:-1] + b"\x77"
        connection.execute(text("UPDATE user_state SET vector = :v WHERE user_id = 2"), {"v": changed})
    engine.dispose()
    found = filled.user_states.newest("m", np.array([1, 2]), width=WIDTH)
    assert found.version.tolist() == [1, -1]
    assert found.damaged.tolist() == [2]
    assert filled.user_states.newest("m", np.array([1]), width=WIDTH + 1).damaged.tolist() == [1]


def test_many_users_are_asked_for_in_parts(store: FeatureStore) -> None:
    serve(store, 1, from_ms=0)
    write(store, 1, made(*((user, user % 7 + 1, 5) for user in range(4_500))), at_ms=1)
    every = np.arange(4_600)
    found = store.user_states.newest("m", every, width=WIDTH)
    assert found.is_there.sum() == 4_500
    assert store.user_states.newest_seq("m", 1, every).tolist() == found.next_seq.tolist()


def test_what_was_written_lately_is_told_in_order(filled: FeatureStore) -> None:
    states = filled.user_states
    assert states.written_since("m", 1, since_ms=0) == [(1_000, 1), (1_000, 2), (2_000, 1)]
    assert states.written_since("m", 1, since_ms=1_001) == [(2_000, 1)]
    assert states.written_since("m", 1, since_ms=0, after=(1_000, 1), limit=1) == [(1_000, 2)]


def test_forgetting_a_user_takes_the_vectors(filled: FeatureStore) -> None:
    interact(filled, 1, 2)
    before = filled.user_states.num_forgotten()
    with filled.transaction() as transaction:
        transaction.forget_users(np.array([1, 1, 77]))
        assert transaction.num_forgotten() == before + 1
    assert filled.user_states.newest("m", np.array([1, 2]), width=WIDTH).version.tolist() == [-1, 1]
    assert filled.user_states.num_forgotten() == before + 1


def test_how_far_a_back_fill_has_come_does_not_keep_the_id_of_a_user_who_was_forgotten(filled: FeatureStore) -> None:
    with filled.transaction() as transaction:
        transaction.user_states.begin_version("m", 2, created_at_ms=0)
        transaction.user_states.filled("m", 2, 77)
    with filled.transaction() as transaction:
        transaction.forget_users(np.array([1, 77]))
    assert [one.filled_up_to for one in filled.user_states.versions("m")] == [ANY, 76]
    serve(filled, 2, from_ms=4_000)
    assert [one.filled_up_to for one in filled.user_states.versions("m")] == [ANY, ANY]


def test_forgetting_waits_for_a_writer_and_takes_what_it_wrote(store: FeatureStore) -> None:
    serve(store, 1, from_ms=0)
    done = threading.Event()

    def forget() -> None:
        with store.transaction() as transaction:
            transaction.forget_users(np.array([1]))
        done.set()

    with store.transaction() as transaction:
        transaction.user_states.lock()
        forgetting = threading.Thread(target=forget)
        forgetting.start()
        assert not done.wait(0.2)
        transaction.user_states.write("m", 1, made((1, 5, 100)), written_at_ms=1)
    forgetting.join(10)
    assert done.is_set()
    assert store.user_states.newest("m", np.array([1]), width=WIDTH).version.tolist() == [-1]


def test_users_are_told_by_id_and_only_those_lately_active(store: FeatureStore) -> None:
    interact(store, 3, 1, 2, event_time_ms=100)
    interact(store, 2, event_time_ms=900)
    assert store.user_states.users_after(-1, limit=10).tolist() == [1, 2, 3]
    assert store.user_states.users_after(1, limit=1).tolist() == [2]
    assert store.user_states.users_after(-1, limit=10, active_since_ms=101).tolist() == [2]


def prune(store: FeatureStore, now_ms: int, **settings: Any) -> tuple[int, int | None]:
    given: dict[str, Any] = {"keep_ms": 1_000, "states_max": 100} | settings
    return store.user_states.prune("m", now_ms=now_ms, **given)


def test_there_may_be_nothing_to_prune(store: FeatureStore) -> None:
    assert prune(store, 10) == (0, None)
    assert store.user_states.newest("m", np.array([1]), width=WIDTH).version.tolist() == [-1]


def test_what_was_superseded_long_ago_is_pruned_and_the_newest_stays(filled: FeatureStore) -> None:
    assert prune(filled, 3_000) == (0, None)
    assert prune(filled, 3_001) == (1, None)
    assert asked(filled, (1, ANY, 1_500, ANY)).version.tolist() == [-1]
    assert filled.user_states.newest("m", np.array([1, 2]), width=WIDTH).next_seq.tolist() == [8, 1]
    assert prune(filled, 10**9) == (0, None)


def test_versions_that_were_replaced_long_ago_and_those_given_up_are_pruned(filled: FeatureStore) -> None:
    with filled.transaction() as transaction:
        transaction.user_states.begin_version("m", 2, created_at_ms=3_000)
    write(filled, 2, made((1, 8, 200)), at_ms=3_000)
    with filled.transaction() as transaction:
        transaction.user_states.drop_version("m", 2)
        transaction.user_states.drop_version("m", 1)  # in effect: not given up
        transaction.user_states.begin_version("m", 3, created_at_ms=4_000)
    write(filled, 3, made((1, 8, 200)), at_ms=4_000)
    serve(filled, 3, from_ms=5_000)
    assert prune(filled, 6_000, keep_ms=10_000) == (1, None)  # of version 2
    assert [one.version for one in filled.user_states.versions("m")] == [1, 3]
    assert prune(filled, 6_001, max_users=1) == (2, 1)
    assert prune(filled, 6_001, max_users=1, after_user=1) == (1, 2)
    assert prune(filled, 6_001, after_user=2) == (0, None)
    assert [one.version for one in filled.user_states.versions("m")] == [3]


def test_more_vectors_of_a_user_than_the_limit_are_pruned_oldest_first(store: FeatureStore) -> None:
    serve(store, 1, from_ms=0)
    for number in range(1, 6):
        write(store, 1, made((1, number, number)), at_ms=number)
    assert prune(store, 5, keep_ms=1_000, states_max=2) == (3, None)
    assert asked(store, (1, 5, ANY, ANY), (1, 4, ANY, ANY)).next_seq.tolist() == [4, -1]


def test_a_vector_of_what_has_all_expired_is_pruned(open_store: Any) -> None:
    store = open_store(max_age_ms=1_000, removal_delay_ms=0)
    serve(store, 1, from_ms=0)
    write(store, 1, made((1, 1, 100), (2, 1, 1_500)), at_ms=1)
    with store.transaction() as transaction:
        transaction.lock_position("log", "interactions", 0)
        transaction.set_position("log", "interactions", 0, 1, watermark_ms=1_101)
    assert prune(store, 2) == (1, None)
    assert store.user_states.newest("m", np.array([1, 2]), width=WIDTH).is_there.tolist() == [False, True]
