"""What retention removes is gone, is accounted for, and never comes back; on both databases."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np
import pytest
from sqlalchemy import text

from feature_store.chunk_rows import newest_chunks
from feature_store.chunk_writes import ChunkWrite, remove_chunks, write_chunks
from feature_store.config import FeatureStoreConfig
from feature_store.engine import writing
from feature_store.errors import ConcurrentAppendError, StoreBusyError
from feature_store.records import Finding, PruneSlice
from feature_store.removing import emptied_payload, load_removed
from feature_store.store import FeatureStore
from tests.feature_store.retained import (
    EVERYTHING,
    RetainedTruth,
    contents,
    findings_in,
    forget,
    ingest,
    prune_all,
    stored_rows,
)
from tests.feature_store.truth import Row, content_of, rows_of

OpenStore = Callable[..., FeatureStore]
EMPTIED = len(emptied_payload())
WAIT_S = 100


def times(store: FeatureStore, user_id: int = 1) -> list[int]:
    found: list[int] = store.read(np.array([user_id]), max_len=EVERYTHING).event_time_ms.tolist()
    return found


def execute(store: FeatureStore, statement: str) -> None:
    with writing(store._engine) as connection:
        assert connection.execute(text(statement)).rowcount > 0


def account(store: FeatureStore) -> dict[str, tuple[int, int]]:
    with writing(store._engine) as connection:
        removed = load_removed(connection)
    return {source: (row.num_interactions, row.fingerprint % 2**64) for source, row in removed.items()}


# -- by count


def test_the_newest_are_kept_and_whole_chunks_below_them_go_with_the_appends(open_store: OpenStore) -> None:
    store = open_store(max_history=6)
    for time in range(60):
        ingest(store, [Row(1, time, 1)])
        assert times(store) == list(range(max(0, time - 5), time + 1))
        # An emptied chunk, and those that six interactions touch; one more goes when the next is begun.
        assert len(stored_rows(store)) <= 4
    assert stored_rows(store)[0] == (1, 11, 0, EMPTIED)
    assert account(store) == {"log/interactions/0": (48, 48)}
    assert (prune_all(store), prune_all(store)) == (4, 0)
    assert account(store)["prune"] == (4, 4)
    assert findings_in(store) == []


def test_an_event_that_max_history_newer_ones_leave_behind_is_expired(open_store: OpenStore) -> None:
    store = open_store(max_history=3)
    first = ingest(store, [Row(1, time, 1) for time in (50, 10, 40, 30)])
    # What newer events of its own batch leave behind is accepted, and learned from; readers do not see it.
    assert first.accepted.all()
    assert times(store) == [30, 40, 50]
    second = ingest(store, [Row(1, time, 1) for time in (10, 20, 30, 40, 35, 20, 60)])
    assert second.expired.tolist() == [True, True, False, False, False, True, False]
    assert second.accepted.tolist() == [False, False, False, False, True, False, True]
    assert second.seq.tolist() == [0, 0, 0, 0, 4, 0, 5]
    assert second.late.tolist() == [False, False, False, False, True, False, False]
    # 35 is stored, but no longer among the newest three: whether it was there is not asked.
    assert ingest(store, [Row(1, 35, 1)]).expired.all()
    assert times(store) == [40, 50, 60]
    ingest(store, [Row(2, time, 1) for time in (5, 6, 7)])
    assert ingest(store, [Row(2, 4, 1), Row(2, 5, 0), Row(2, 5, 2)]).expired.tolist() == [True, True, False]


def test_one_millisecond_that_fills_several_chunks_is_cut_by_the_keys(open_store: OpenStore) -> None:
    store = open_store(max_history=5)
    for key in (9, 3, 17, 1, 8, 12, 6, 4, 15, 0, 11, 2, 16, 7, 10, 5, 14, 13):
        ingest(store, [Row(1, 50, key)])
        prune_all(store)
    assert store.read(np.array([1]), max_len=99).event_key.tolist() == [13, 14, 15, 16, 17]
    assert findings_in(store) == []


def test_a_history_longer_than_new_settings_allow_is_cut_at_once_and_removed_bit_by_bit(open_store: OpenStore) -> None:
    ingest(open_store(), [Row(1, time, time) for time in range(203)])
    store = open_store(max_history=10)
    assert times(store) == list(range(193, 203))
    assert len(stored_rows(store)) == 51
    ingest(store, [Row(1, 300, 1), Row(1, 301, 1)])
    assert len(stored_rows(store)) == 48  # five chunks became one emptied chunk, and the tail moved on
    assert prune_all(store, max_chunks=7) == 4 * 43
    assert [row[1:3] for row in stored_rows(store)] == [(47, 0), (48, 4), (49, 4), (50, 4), (51, 1)]
    assert findings_in(store) == []


# -- by age


def test_what_is_past_the_horizon_is_not_seen_and_not_accepted(open_store: OpenStore) -> None:
    store = open_store(max_age_ms=10)
    ingest(store, [Row(1, time, 1) for time in range(0, 20, 2)])
    assert times(store) == [8, 10, 12, 14, 16, 18]
    result = ingest(store, [Row(1, time, 2) for time in (7, 8, 30)])
    assert (result.expired.tolist(), result.accepted.tolist()) == ([True, False, False], [False, True, True])
    assert times(store) == [30]
    # The watermark is the store's: another user's event moves it, and so does another partition's.
    ingest(store, [Row(2, 35, 1)], partition=5)
    assert ingest(store, [Row(1, 24, 1)]).expired.tolist() == [True]
    ingest(store, [Row(2, 41, 1)], partition=6)
    assert times(store) == []
    stats = store.stats()
    assert (stats.watermark_ms, stats.horizon_ms) == (41, 31)


def test_a_late_watermark_does_not_move_the_stores_back(open_store: OpenStore) -> None:
    store = open_store(max_age_ms=10)
    ingest(store, [Row(1, 100, 1)])
    ingest(store, [Row(2, 95, 1)])
    ingest(store, [], partition=3)
    assert store.stats().watermark_ms == 100
    with store.transaction() as transaction:
        assert transaction.lock_position("log", "interactions", 0).watermark_ms == 100
        transaction.set_position("log", "interactions", 0, 5)
        assert transaction.lock_position("log", "interactions", 0).watermark_ms == 100


def test_chunks_go_only_when_the_delay_is_over_and_the_last_one_is_emptied(open_store: OpenStore) -> None:
    store = open_store(max_age_ms=10, removal_delay_ms=5)
    ingest(store, [Row(1, time, 1, item_id=0x1122334455667788) for time in range(10)])
    ingest(store, [Row(9, 18, 1)])
    assert prune_all(store) == 0  # [0, 3] ends at 3, and 18 - 10 - 5 is 3
    ingest(store, [Row(9, 19, 1)])
    assert prune_all(store) == 4
    assert [row[1:3] for row in stored_rows(store)][:3] == [(0, 0), (1, 4), (2, 2)]
    ingest(store, [Row(9, 500, 1)])
    assert (times(store), prune_all(store)) == ([], 6)
    with writing(store._engine) as connection:
        (emptied,) = connection.execute(text("SELECT * FROM history_chunk WHERE user_id = 1")).mappings()
    assert (emptied["chunk_no"], emptied["n"], emptied["next_seq"]) == (2, 0, 10)
    assert (emptied["first_ms"], emptied["last_ms"]) == (9, 9)
    assert bytes(emptied["payload"]) == emptied_payload()
    assert findings_in(store) == []
    assert prune_all(store) == 0


def test_an_emptied_user_goes_on_where_the_arrivals_were(open_store: OpenStore) -> None:
    store = open_store(max_age_ms=10, removal_delay_ms=0)
    ingest(store, [Row(1, time, 1) for time in range(6)])
    ingest(store, [Row(9, 50, 1)])
    prune_all(store)
    current = store.read_current(np.array([1]), max_len=9)
    assert (current.next_seq.tolist(), current.histories.num_interactions) == ([6], 0)
    assert store.totals().num_users == 1
    result = ingest(store, [Row(1, 60, 1), Row(1, 5, 1), Row(1, 45, 1)])
    assert (result.accepted.tolist(), result.seq.tolist()) == ([True, False, True], [6, 0, 7])
    assert times(store) == [60]
    assert [row[:3] for row in stored_rows(store)][:2] == [(1, 1, 0), (1, 2, 2)]
    assert findings_in(store) == []


def test_an_event_between_what_was_removed_and_what_is_left_is_accepted(open_store: OpenStore) -> None:
    store = open_store(max_age_ms=10, removal_delay_ms=0)
    ingest(store, [Row(1, time, 1) for time in (1, 2, 3, 4, 28, 29)])
    ingest(store, [Row(1, 30, 1)])
    assert prune_all(store) == 4
    result = ingest(store, [Row(1, 19, 1), Row(1, 25, 1)])
    assert (result.expired.tolist(), result.accepted.tolist()) == ([True, False], [False, True])
    assert times(store) == [25, 28, 29, 30]


def test_the_watermark_can_be_asked_for_as_of_before_for_as_long_as_the_delay(open_store: OpenStore) -> None:
    store = open_store(max_age_ms=10, removal_delay_ms=20)
    ingest(store, [Row(1, time, 1) for time in range(40)])
    prune_all(store)
    one = np.array([1])
    assert times(store) == list(range(29, 40))
    assert store.read(one, max_len=99, watermark_ms=30).event_time_ms.tolist() == list(range(20, 40))
    current = store.read_current(one, max_len=99, watermark_ms=19)
    assert (current.histories.event_time_ms.tolist(), current.watermark_ms) == (list(range(9, 40)), 19)
    assert store.read_current(one, max_len=99).watermark_ms == 39
    current = store.read_current(one, max_len=99, before_ms=20, watermark_ms=19)
    assert (current.histories.event_time_ms.tolist(), current.next_seq.tolist()) == (list(range(9, 20)), [40])


# -- what was removed does not come back


def test_removed_events_are_expired_even_when_settings_would_keep_them_now(open_store: OpenStore) -> None:
    narrow = open_store(max_history=4, max_age_ms=30, removal_delay_ms=0)
    events = [content_of(user, time, key) for user in (1, 2) for time in range(30) for key in (1, 2)]
    ingest(narrow, events)
    ingest(narrow, [Row(9, 100, 1)])
    prune_all(narrow)
    before = narrow.totals()
    wide = open_store()
    assert ingest(wide, events).expired.all()
    assert ingest(narrow, events).expired.all()
    assert wide.totals() == before
    assert before.num_accepted == len(events) + 1


def test_after_settings_are_relaxed_what_was_hidden_is_seen_again_and_what_was_removed_is_not(
    open_store: OpenStore,
) -> None:
    ingest(open_store(max_history=6), [Row(1, time, 1) for time in range(20)])
    wide = open_store()
    assert times(wide) == list(range(12, 20))
    result = ingest(wide, [Row(1, time, 1) for time in range(20)])
    assert not result.accepted.any()
    assert result.expired.tolist() == [time < 12 for time in range(20)]
    # Of the last millisecond that was removed nothing more is accepted, since it cannot be known what was in it.
    assert ingest(wide, [Row(1, 11, 2), Row(1, 12, 0)]).accepted.tolist() == [False, True]
    assert times(wide) == [12, *range(12, 20)]


def test_a_forgotten_user_starts_over_and_the_account_stays_right(open_store: OpenStore) -> None:
    store = open_store(max_history=4)
    events = [Row(1, time, 2**64 - 1 - time) for time in range(20)]
    ingest(store, events)
    forget(store, 1)
    assert account(store)["forget"][0] + account(store)["log/interactions/0"][0] == 20
    ingest(store, [*events[-2:], Row(2, 5, 3)])
    totals = store.totals()
    assert (totals.num_accepted, totals.num_removed) == (23, 20)
    keys = [*(row.event_key for row in events), *(row.event_key for row in events[-2:]), 3]
    assert totals.accepted_fingerprint == sum(keys) % 2**64
    assert store.read_current(np.array([1]), max_len=9).next_seq.tolist() == [2]


def test_a_user_with_a_damaged_chunk_can_be_forgotten_and_what_is_sound_is_accounted(open_store: OpenStore) -> None:
    store = open_store()
    ingest(store, [Row(1, time, 1 + time) for time in range(10)])
    other = "(SELECT payload FROM history_chunk WHERE chunk_no = 2)"
    execute(store, f"UPDATE history_chunk SET payload = {other} WHERE chunk_no = 1")
    forget(store, 1)
    assert stored_rows(store) == []
    assert account(store) == {"forget": (10, 1 + 2 + 3 + 4 + 9 + 10)}


# -- sweeping


def test_a_sweep_goes_in_slices_that_can_be_taken_up_again(open_store: OpenStore) -> None:
    store = open_store(max_age_ms=10, removal_delay_ms=0)
    ingest(store, [Row(user, time, 1) for user in range(7) for time in range(9)])
    ingest(store, [Row(100, 50, 1)])
    assert store.prune(max_users=2, max_chunks=9) == PruneSlice(
        num_users=2, num_chunks=6, num_interactions=18, next_after=1
    )
    # Two rows at a time: user 2 in two slices, since three of its chunks go.
    assert store.prune(after_user=1, max_users=2, max_chunks=2).next_after == 1
    assert store.prune(after_user=1, max_users=2, max_chunks=2) == PruneSlice(
        num_users=2, num_chunks=1, num_interactions=1, next_after=1
    )
    assert prune_all(store, max_users=1, max_chunks=2) == 4 * 9
    assert [row[1:3] for row in stored_rows(store)] == [(2, 0)] * 7 + [(0, 1)]
    assert store.prune() == PruneSlice(num_users=8, num_chunks=0, num_interactions=0, next_after=None)
    assert store.prune(after_user=100).num_users == 0


def test_without_limits_a_sweep_removes_nothing(store: FeatureStore) -> None:
    ingest(store, [Row(user, time, 1) for user in range(3) for time in range(30)])
    before = stored_rows(store)
    assert prune_all(store) == 0
    assert stored_rows(store) == before
    assert account(store) == {}


def test_sweeps_while_others_append_lose_nothing_and_count_nothing_twice(open_store: OpenStore) -> None:
    config = {"max_history": 9, "max_age_ms": 60, "removal_delay_ms": 0}
    stores = [open_store(**config) for _ in range(4)]
    is_done = threading.Event()

    def again(call: Callable[[], object]) -> None:
        for _ in range(1_000):
            try:
                call()
            except (ConcurrentAppendError, StoreBusyError):
                continue
            return
        raise AssertionError("writers meet all the time")

    def append_all(number: int) -> None:
        random = np.random.default_rng(number)
        for step in range(40):
            newest = 5 + 4 * step
            rows = [
                # Users come and go, so that sweeps find some whom no append visits any more.
                content_of(step // 4 + int(user), max(0, newest - int(ago)), int(ago))
                for user, ago in zip(random.integers(0, 3, 6), random.integers(0, 40, 6), strict=True)
            ]
            sent[number] += rows
            again(lambda rows=rows: ingest(stores[number], rows, partition=number))  # type: ignore[misc]

    def sweep(number: int) -> None:
        while not is_done.is_set():
            again(lambda: removed.append(prune_all(stores[number], max_users=2, max_chunks=3)))
            is_done.wait(0.01)

    sent: dict[int, list[Row]] = {0: [], 1: []}
    removed: list[int] = []
    with ThreadPoolExecutor(4) as pool:
        sweepers = [pool.submit(sweep, number) for number in (2, 3)]
        appenders = [pool.submit(append_all, number) for number in (0, 1)]
        try:
            for appender in appenders:
                appender.result(WAIT_S)
        finally:
            is_done.set()
        for sweeper in sweepers:
            sweeper.result(WAIT_S)
    truth = RetainedTruth(stores[0].retention)
    for row in sent[0] + sent[1]:
        truth.applied.setdefault(row.user_id, {}).setdefault(row.place, row)
        truth.watermark_ms = max(truth.watermark_ms, row.event_time_ms)
    users = list(range(12))
    assert contents(stores[0], users) == [truth.retained(user) for user in users]
    assert findings_in(stores[0]) == []
    totals = stores[0].totals()
    arrivals = stores[0].read_current(np.array(users), max_len=1).next_seq
    assert totals.num_accepted == arrivals.sum()
    assert sum(removed) > 0
    prune_all(stores[0])
    assert stores[0].totals().num_accepted == totals.num_accepted
    assert stores[0].totals().accepted_fingerprint == totals.accepted_fingerprint


def test_a_chunk_that_was_emptied_since_it_was_read_is_not_written_again(open_store: OpenStore) -> None:
    store = open_store(max_age_ms=10, removal_delay_ms=0)
    ingest(store, [Row(1, time, 1) for time in range(3)])
    with writing(store._engine) as connection:
        tail = newest_chunks(connection, np.array([1]), 1)
    ingest(store, [Row(9, 50, 1)])
    assert prune_all(store) == 3
    rewritten = ChunkWrite(
        user_id=tail.user_id,
        chunk_no=tail.chunk_no,
        n=tail.length,
        first_ms=tail.first_ms,
        last_ms=tail.first_ms,
        next_seq=tail.next_seq + 1,
        expected_seq=tail.next_seq,
        payload=tail.payloads,
    )

    def write_what_was_read() -> None:
        with writing(store._engine) as connection:
            write_chunks(connection, rewritten)

    with pytest.raises(ConcurrentAppendError, match="1 of 1 history chunks were changed"):
        write_what_was_read()


@pytest.mark.parametrize("changed", ["n", "next_seq"])
@pytest.mark.parametrize("number", [0, 1])
def test_a_chunk_that_is_not_as_it_was_read_is_not_removed(store: FeatureStore, changed: str, number: int) -> None:
    ingest(store, [Row(1, time, 1) for time in range(10)])
    columns = {"user_id": [1, 1], "chunk_no": [0, 1], "n": [4, 4], "next_seq": [10, 10]}
    columns[changed][number] -= 1
    before = stored_rows(store)

    def remove_what_was_read() -> None:
        with writing(store._engine) as connection:
            as_read = {name: np.array(values) for name, values in columns.items()}
            remove_chunks(connection, as_read, np.array([False, True]), emptied_payload())

    with pytest.raises(ConcurrentAppendError, match="1 of 2 expired history chunks were changed"):
        remove_what_was_read()
    assert stored_rows(store) == before


# -- looking the store over


@pytest.fixture
def pruned(open_store: OpenStore) -> FeatureStore:
    """Users 1 (an emptied chunk, then three interactions), 2 (emptied) and 9 (one interaction)."""
    store = open_store(max_age_ms=10, removal_delay_ms=0)
    ingest(store, [Row(user, time, 1) for user in (1, 2) for time in range(8)])
    ingest(store, [Row(9, 15, 1)])
    ingest(store, [Row(1, time, 2) for time in (10, 12, 14)])
    ingest(store, [Row(9, 20, 2)])
    prune_all(store)
    assert [row[:3] for row in stored_rows(store)] == [(1, 1, 0), (1, 2, 3), (2, 1, 0), (9, 0, 2)]
    assert findings_in(store) == []
    return store


@pytest.mark.parametrize(
    ("statement", "finding"),
    [
        (
            "DELETE FROM history_chunk WHERE user_id = 1 AND chunk_no = 1",
            Finding("chunk 0 should come before it and is missing", user_id=1, chunk_no=2),
        ),
        (
            "UPDATE history_chunk SET chunk_no = 0 WHERE user_id = 2",
            Finding("it is empty, 8 of the user's interactions are gone, not 1 to 4", user_id=2, chunk_no=0),
        ),
        (
            "UPDATE history_chunk SET next_seq = 0 WHERE user_id = 2",
            Finding("it is empty, 0 of the user's interactions are gone, not 1 to 8", user_id=2, chunk_no=1),
        ),
        (
            "UPDATE history_chunk SET first_ms = 3 WHERE user_id = 2",
            Finding("it is empty, but first_ms is 3, last_ms 7", user_id=2, chunk_no=1),
        ),
        (
            "UPDATE history_chunk SET first_ms = 11, last_ms = 11 WHERE user_id = 1 AND chunk_no = 1",
            Finding("it begins before the last interaction that was removed", user_id=1, chunk_no=2),
        ),
        (
            "UPDATE history_chunk SET n = 1 WHERE user_id = 2",
            Finding("its size does not fit its number of interactions", user_id=2, chunk_no=1),
        ),
        (
            "UPDATE removal SET num_interactions = num_interactions - 1 WHERE source = 'prune'",
            Finding("16 interactions are gone from histories, but retention has removed only 15"),
        ),
        (
            "UPDATE removal SET num_interactions = -16",
            Finding("the number of interactions removed by 'prune' is negative"),
        ),
        (
            "DELETE FROM removal",
            Finding("it is empty, but retention has removed nothing from this store", user_id=2, chunk_no=1),
        ),
    ],
)
def test_what_cannot_be_after_retention_is_found(pruned: FeatureStore, statement: str, finding: Finding) -> None:
    execute(pruned, statement)
    assert finding in findings_in(pruned)


def test_a_gap_after_an_emptied_chunk_is_reported_when_it_is_read(pruned: FeatureStore) -> None:
    ingest(pruned, [Row(1, 15 + time, 3) for time in range(5)])
    execute(pruned, "DELETE FROM history_chunk WHERE user_id = 1 AND chunk_no = 2")
    with pytest.raises(Exception, match="history chunk 1 of user 1 is corrupt"):
        pruned.read(np.array([1]), max_len=99)


# -- settings


@pytest.mark.parametrize("name", ["max_history", "max_age_ms", "removal_delay_ms"])
def test_negative_limits_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match=f"store.{name}=-1 must be between 0 and"):
        FeatureStoreConfig(url="sqlite:///store.db", **{name: -1})  # type: ignore[arg-type]


def test_reads_at_several_moments_stay_within_what_is_kept(open_store: OpenStore) -> None:
    store = open_store(max_history=7)
    ingest(store, [Row(1, time, 1, arrival_ms=99 - time) for time in range(30)])
    asked = np.array([1, 1, 1, 2])
    histories = store.read(asked, max_len=3, before_ms=np.array([28, 25, 10, 9]))
    assert [[row.event_time_ms for row in rows] for rows in rows_of(histories)] == [[25, 26, 27], [23, 24], [], []]
    assert store.read(np.array([1]), max_len=9, known_at_ms=73).event_time_ms.tolist() == [26, 27, 28, 29]
    assert store.read(np.array([1]), max_len=9, below_seq=25).event_time_ms.tolist() == [23, 24]
    without = open_store()
    without.retention = replace(store.retention, max_history=0)
    assert without.read(np.array([1]), max_len=3, before_ms=10).event_time_ms.tolist() in ([], [7, 8, 9])
