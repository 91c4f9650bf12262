"""Two writers at once: fenced on a position, refused on a user, and nothing is lost."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from sqlalchemy import text

from feature_store.chunk_writes import ChunkWrite, write_chunks
from feature_store.chunks import encode_chunks
from feature_store.engine import writing
from feature_store.errors import ConcurrentAppendError, PositionError, StoreBusyError
from feature_store.store import FeatureStore
from tests.feature_store.truth import Row, append, batch

WAIT_S = 20


@pytest.mark.parametrize("first_position", [0, 100])
def test_a_second_writer_of_a_position_waits_and_then_sees_where_the_first_left_it(
    store: FeatureStore, first_position: int
) -> None:
    has_begun, has_position = threading.Event(), threading.Event()

    def second_writer() -> int:
        has_begun.set()
        with store.transaction() as transaction:
            position = transaction.lock_position("log", "interactions", 3)
            has_position.set()
            return position.next_offset

    append(store, [Row(1, 1, 1)])
    if first_position:
        with store.transaction() as transaction:
            transaction.lock_position("log", "interactions", 3)
            transaction.set_position("log", "interactions", 3, first_position)
    with ThreadPoolExecutor(1) as pool:
        with store.transaction() as transaction:
            assert transaction.lock_position("log", "interactions", 3).next_offset == first_position
            second = pool.submit(second_writer)
            assert has_begun.wait(WAIT_S)
            assert not has_position.wait(0.2)
            transaction.set_position("log", "interactions", 3, 500)
        assert second.result(WAIT_S) == 500


def test_writers_of_other_positions_do_not_wait_on_postgresql(store: FeatureStore) -> None:
    if store.config.url.startswith("sqlite"):
        pytest.skip("SQLite has one writer at a time")
    append(store, [Row(1, 1, 1)])
    with store.transaction() as first, store.transaction() as second:
        first.lock_position("log", "interactions", 0)
        second.lock_position("log", "interactions", 1)
        first.append(batch([Row(1, 2, 2)]))
        second.append(batch([Row(2, 2, 3)]))


def test_positions_move_forward_only_and_must_be_locked(store: FeatureStore) -> None:
    with store.transaction() as transaction:
        transaction.lock_position("log", "interactions", 0)
        transaction.set_position("log", "interactions", 0, 7)
        transaction.set_position("log", "interactions", 0, 7)
        with pytest.raises(PositionError, match=r"position of interactions\[0\] in log 'log' is 7, it cannot become 6"):
            transaction.set_position("log", "interactions", 0, 6)
        with pytest.raises(PositionError, match="is None, it cannot become 1: lock it first"):
            transaction.set_position("log", "interactions", 1, 1)
    assert store.positions("log", "interactions") == {0: 7}
    assert store.positions("other-log", "interactions") == {}


def test_a_chunk_changed_since_it_was_read_is_refused(store: FeatureStore) -> None:
    append(store, [Row(1, 1, 1), Row(1, 2, 2)])
    one = batch([Row(1, 9, 9)])
    for expected_seq in (-1, 1):  # it was not there when we read; it was older
        write = ChunkWrite(
            user_id=np.array([1, 2]),
            chunk_no=np.array([0, 0]),
            n=np.array([1, 1]),
            first_ms=np.array([9, 9]),
            last_ms=np.array([9, 9]),
            next_seq=np.array([1, 1]),
            expected_seq=np.array([expected_seq, -1]),
            payload=encode_chunks(one.columns, np.array([1])) * 2,
        )

        def write_what_is_outdated(write: ChunkWrite = write) -> None:
            with writing(store._engine) as connection:
                write_chunks(connection, write)

        with pytest.raises(ConcurrentAppendError, match="1 of 2 history chunks were changed"):
            write_what_is_outdated()
    assert store.read(np.array([1, 2]), max_len=9).lengths().tolist() == [2, 0]


@pytest.mark.parametrize("num_stored", [0, 3, 4])
def test_a_second_writer_of_one_user_is_refused_by_postgresql(store: FeatureStore, num_stored: int) -> None:
    if store.config.url.startswith("sqlite"):
        pytest.skip("a second SQLite writer waits before it reads")
    append(store, [Row(2, 0, 0), *(Row(1, time, 1) for time in range(num_stored))])
    with ThreadPoolExecutor(1) as pool:
        with store.transaction() as transaction:
            transaction.append(batch([Row(1, 50, 1)]))
            second = pool.submit(append, store, [Row(1, 60, 1)])
            wait_until_blocked(store)
        with pytest.raises(ConcurrentAppendError):
            second.result(WAIT_S)
    append(store, [Row(1, 60, 1)])
    assert store.read(np.array([1]), max_len=99).event_time_ms.tolist()[-2:] == [50, 60]


def test_a_second_sqlite_writer_waits_before_it_reads_and_is_not_refused(store: FeatureStore) -> None:
    if not store.config.url.startswith("sqlite"):
        pytest.skip("PostgreSQL writers read without waiting")
    append(store, [Row(1, 1, 1)])
    with ThreadPoolExecutor(1) as pool:
        with store.transaction() as transaction:
            transaction.append(batch([Row(1, 2, 2)]))
            second = pool.submit(append, store, [Row(1, 3, 3)])
            threading.Event().wait(0.1)
        assert second.result(WAIT_S).seq.tolist() == [2]


def test_forgetting_waits_for_appends_under_way_so_that_nothing_of_the_user_stays(store: FeatureStore) -> None:
    append(store, [Row(1, time, 1) for time in range(8)])  # full chunks: the append below adds one

    def forget() -> int:
        with store.transaction() as transaction:
            return transaction.forget_users(np.array([1]))

    with ThreadPoolExecutor(1) as pool:
        with store.transaction() as transaction:
            transaction.append(batch([Row(1, 50, 1)]))
            forgotten = pool.submit(forget)
            if not store.config.url.startswith("sqlite"):
                wait_until_blocked(store)
        assert forgotten.result(WAIT_S) == 1
    assert store.totals().num_interactions == 0


def test_writers_that_retry_lose_nothing(store: FeatureStore, open_store: Callable[..., FeatureStore]) -> None:
    other = open_store()

    def write(writer: FeatureStore, number: int) -> int:
        refusals = 0
        for time in range(12):
            rows = [Row(user, 10 * time + number, number) for user in (1, 2, 3)]
            while True:
                try:
                    append(writer, rows)
                    break
                except (ConcurrentAppendError, StoreBusyError):
                    refusals += 1
                    assert refusals < 500
        return refusals

    with ThreadPoolExecutor(3) as pool:
        writers = [pool.submit(write, writer, number) for number, writer in enumerate((store, other, store))]
        for writer in writers:
            writer.result(60)
    histories = store.read(np.array([1, 2, 3]), max_len=99)
    assert histories.lengths().tolist() == [36, 36, 36]
    assert sorted(histories.seq.tolist()) == sorted(list(range(36)) * 3)


def test_a_reader_sees_one_state_while_a_writer_is_at_work(store: FeatureStore) -> None:
    append(store, [Row(1, 1, 1)])
    with store.transaction() as transaction:
        transaction.append(batch([Row(1, 2, 2)]))
        assert store.read(np.array([1]), max_len=9).num_interactions == 1
    assert store.read(np.array([1]), max_len=9).num_interactions == 2


def test_a_sqlite_writer_gives_up_after_the_busy_timeout(
    store: FeatureStore, open_store: Callable[..., FeatureStore]
) -> None:
    if not store.config.url.startswith("sqlite"):
        pytest.skip("PostgreSQL writers wait for rows, not for the database")
    impatient = open_store(busy_timeout_ms=20)
    append(store, [Row(1, 1, 1)])
    with store.transaction() as transaction:
        transaction.append(batch([Row(1, 2, 2)]))
        with pytest.raises(StoreBusyError, match="is held by another writer"):
            append(impatient, [Row(1, 3, 3)])


def wait_until_blocked(store: FeatureStore) -> None:
    """Wait until another PostgreSQL session waits for a lock."""
    pause = threading.Event()
    for _ in range(WAIT_S * 50):
        with writing(store._engine) as connection:
            query = text(
                "SELECT count(*) FROM pg_stat_activity WHERE wait_event_type = 'Lock' AND datname = current_database()"
            )
            if connection.execute(query).scalar_one() > 0:
                return
        pause.wait(0.02)
    raise AssertionError("no session waits for a lock")
