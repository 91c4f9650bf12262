"""Tails kept in memory: they spare reads, and what another process has changed meanwhile is never overwritten."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import numpy as np
import pytest
from sqlalchemy import event

from feature_store.errors import ConcurrentAppendError
from feature_store.store import FeatureStore
from tests.feature_store.retained import forget, ingest, prune_all
from tests.feature_store.truth import Row, append, batch, rows_of

Open = Callable[..., FeatureStore]


def rows(*times: int, user: int = 1) -> list[Row]:
    return [Row(user, time, event_key=time) for time in times]


def times_of(store: FeatureStore, user: int = 1) -> list[int]:
    return [row.event_time_ms for row in rows_of(store.read(np.array([user]), max_len=100))[0]]


@contextmanager
def payloads_read(store: FeatureStore) -> Iterator[list[str]]:
    """The statements that fetch chunks."""
    statements: list[str] = []

    def note(_connection: object, _cursor: object, statement: str, *_: object) -> None:
        if statement.lstrip().startswith(("SELECT", "WITH")) and "payload" in statement:
            statements.append(statement)

    event.listen(store._engine, "before_cursor_execute", note)
    yield statements
    event.remove(store._engine, "before_cursor_execute", note)


def test_what_was_just_written_is_not_read_again(store: FeatureStore) -> None:
    append(store, rows(1, 2))
    with payloads_read(store) as statements:
        append(store, rows(3))
    assert statements == []
    assert times_of(store) == [1, 2, 3]


def test_without_memory_for_them_tails_are_read(open_store: Open) -> None:
    store = open_store(tail_cache_bytes=0)
    append(store, rows(1, 2))
    with payloads_read(store) as statements:
        append(store, rows(3))
    assert len(statements) == 1


def test_a_full_tail_and_an_event_from_before_the_tail_are_read(store: FeatureStore) -> None:
    append(store, rows(1, 2, 3, 4))
    with payloads_read(store) as statements:
        append(store, rows(5))
        append(store, rows(0))
    assert len(statements) == 2
    assert times_of(store) == [0, 1, 2, 3, 4, 5]


def test_another_writer_is_noticed_and_the_second_try_is_right(open_store: Open) -> None:
    ours, theirs = open_store(), open_store()
    append(ours, rows(1))
    append(theirs, rows(2))
    with pytest.raises(ConcurrentAppendError):
        append(ours, rows(3))
    append(ours, rows(3))
    assert times_of(ours) == [1, 2, 3]


def test_after_another_process_forgot_a_user_its_events_are_new_again(open_store: Open) -> None:
    ours, theirs = open_store(), open_store()
    append(ours, rows(1, 2))
    forget(theirs, 1)
    assert append(ours, rows(2)).seq.tolist() == [0]
    assert times_of(ours) == [2]


def test_a_user_forgotten_and_refilled_elsewhere_is_not_mixed_with_what_was_here(open_store: Open) -> None:
    ours, theirs = open_store(), open_store()
    append(ours, rows(1, 2))
    forget(theirs, 1)
    append(theirs, rows(7, 8))  # the same chunk number and next_seq as before
    append(ours, rows(9))
    assert times_of(ours) == [7, 8, 9]


def test_a_tail_pruned_elsewhere_is_not_written_back(open_store: Open) -> None:
    settings = {"max_age_ms": 100, "removal_delay_ms": 0}
    ours, theirs = open_store(**settings), open_store(**settings)
    ingest(ours, rows(1, 2))
    ingest(theirs, rows(1_000, user=2))
    assert prune_all(theirs) == 2
    ingest(ours, rows(1_001))
    assert times_of(ours) == [1_001]
    assert [row.seq for row in rows_of(ours.read(np.array([1]), max_len=9))[0]] == [2]


def test_what_was_rolled_back_is_not_kept(store: FeatureStore) -> None:
    append(store, rows(1))

    def fail() -> None:
        with store.transaction() as transaction:
            transaction.append(batch(rows(2)))
            raise RuntimeError("something went wrong")

    with pytest.raises(RuntimeError, match="went wrong"):
        fail()
    assert append(store, rows(2)).accepted.tolist() == [True]
    assert times_of(store) == [1, 2]


def test_two_appends_of_one_transaction_see_each_other(store: FeatureStore) -> None:
    append(store, rows(1))
    with store.transaction() as transaction:
        transaction.append(batch(rows(2)))
        again = transaction.append(batch(rows(2, 3)))
    assert again.accepted.tolist() == [False, True]
    append(store, rows(4))
    assert times_of(store) == [1, 2, 3, 4]


def test_memory_is_bounded_and_the_least_recently_written_goes_first(open_store: Open) -> None:
    store = open_store(tail_cache_bytes=4_000)
    for user in range(50):
        append(store, rows(1, user=user))
    with payloads_read(store) as statements:
        append(store, rows(2, user=49))
        assert statements == []
        append(store, rows(2, user=0))
        assert len(statements) == 1
    assert store._tails._num_bytes <= 4_000
