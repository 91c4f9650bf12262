"""Who is in memory is answered while others are read, and nothing that was read comes too late to be wrong."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from feature_store.arena import HistoryArena, working_set_bytes
from feature_store.config import FeatureStoreConfig, HotHistoriesConfig
from feature_store.hot import HotHistories
from feature_store.interactions import Interactions, JaggedHistories
from feature_store.reading import CurrentHistories
from feature_store.store import FeatureStore
from tests.feature_store.retained import ingest
from tests.feature_store.truth import Row, append, batch, content_of, rows_of

MAX_LEN = 6
PATIENCE_S = 20.0
"""Longer than anything takes that does not wait for ever."""


class HeldStore(FeatureStore):
    """A store whose next read of one user is held after it has seen the database, until it is let go."""

    def __init__(self, config: FeatureStoreConfig) -> None:
        super().__init__(config)
        self.held_user = -1
        self.has_read = threading.Event()
        self.may_return = threading.Event()

    def read_current(self, user_ids: NDArray[np.int64], **limits: Any) -> CurrentHistories:
        current = super().read_current(user_ids, **limits)
        if self.held_user in user_ids:
            self.held_user = -1
            self.has_read.set()
            assert self.may_return.wait(PATIENCE_S)
        return current


@pytest.fixture
def store(database_url: str) -> Iterator[HeldStore]:
    held = HeldStore(FeatureStoreConfig(url=database_url, chunk_len=4))
    yield held
    held.close()


def hot_over(
    store: FeatureStore, budget_bytes: int = 1 << 20, pause: Callable[[float], None] | None = None
) -> HotHistories:
    config = HotHistoriesConfig(max_len=MAX_LEN, budget_bytes=budget_bytes, behind_num_retries=2)
    return HotHistories(store, config, pause=pause or (lambda _seconds: None))


def times(hot: HotHistories, user: int) -> list[int]:
    histories = hot.gather(np.array([user]), max_len=MAX_LEN)
    return [row.event_time_ms for row in rows_of(histories)[0]]


def store_and_announce(store: FeatureStore, rows: list[Row]) -> Interactions:
    return append(store, rows).accepted_from(batch(rows))


@contextmanager
def held_read(store: HeldStore, user: int, call: Callable[[], Any]) -> Iterator[Future[Any]]:
    """Inside the block the call has read the user, but does not know it yet; afterwards it ends."""
    store.held_user = user
    with ThreadPoolExecutor(1) as pool:
        future = pool.submit(call)
        try:
            assert store.has_read.wait(PATIENCE_S)
            yield future
        finally:
            store.may_return.set()
        future.result(PATIENCE_S)


def test_residents_are_answered_and_updated_while_another_user_is_read(store: HeldStore) -> None:
    hot = hot_over(store)
    hot.apply(store_and_announce(store, [Row(1, 5, 1)]))
    append(store, [Row(2, 5, 1)])
    with held_read(store, 2, lambda: times(hot, 2)) as reader:
        assert times(hot, 1) == [5]
        hot.apply(store_and_announce(store, [Row(1, 6, 1), Row(3, 6, 1)]))
        assert times(hot, 1) == [5, 6]
        assert times(hot, 3) == [6]
        assert hot.stats.resident_users == 2
        assert not reader.done()
    assert reader.result() == [5]


def test_residents_are_answered_while_an_update_waits_for_sql(store: HeldStore) -> None:
    hot = hot_over(store)
    hot.apply(store_and_announce(store, [Row(1, 5, 1), Row(2, 5, 1)]))
    store_and_announce(store, [Row(2, 6, 1)])
    update = store_and_announce(store, [Row(1, 7, 1), Row(2, 7, 1)])
    with held_read(store, 2, lambda: hot.apply(update)):
        assert times(hot, 1) == [5, 7]
        # As it was before the gap, not in between.
        assert times(hot, 2) == [5]
    assert times(hot, 2) == [5, 6, 7]


def test_what_was_read_does_not_replace_what_an_update_has_brought_since(store: HeldStore) -> None:
    hot = hot_over(store)
    append(store, [Row(2, 5, 1)])
    with held_read(store, 2, lambda: times(hot, 2)) as reader:
        hot.apply(store_and_announce(store, [Row(2, 6, 1)]))
    assert reader.result() == [5, 6]
    assert times(hot, 2) == [5, 6]
    assert hot.stats.repairs == 0


def test_what_was_read_of_a_user_forgotten_since_does_not_come_back(store: HeldStore) -> None:
    hot = hot_over(store)
    append(store, [Row(2, 5, 1)])
    with held_read(store, 2, lambda: times(hot, 2)) as reader:
        with store.transaction() as transaction:
            transaction.forget_users(np.array([2]))
        hot.forget(np.array([2]))
    assert reader.result() == []
    assert times(hot, 2) == []


def test_what_an_update_read_of_a_user_forgotten_since_does_not_come_back(store: HeldStore) -> None:
    hot = hot_over(store)
    store_and_announce(store, [Row(2, 5, 1)])
    update = store_and_announce(store, [Row(2, 6, 1)])
    with held_read(store, 2, lambda: hot.apply(update)):
        with store.transaction() as transaction:
            transaction.forget_users(np.array([2]))
        hot.forget(np.array([2]))
    assert hot.stats.resident_users == 0
    assert times(hot, 2) == []


def test_what_was_read_before_an_update_that_was_evicted_since_is_read_again(store: HeldStore) -> None:
    hot = hot_over(store, budget_bytes=4 * working_set_bytes(MAX_LEN))
    append(store, [Row(2, 5, 1)])
    with held_read(store, 2, lambda: times(hot, 2)) as reader:
        hot.apply(store_and_announce(store, [Row(2, 6, 1)]))
        other = 10
        while hot._arena.slots_of(np.array([2]))[0] >= 0:
            hot.apply(store_and_announce(store, [Row(other, 5, 1)]))
            other += 1
    assert reader.result() == [5, 6]
    assert times(hot, 2) == [5, 6]


def test_an_evicted_user_is_not_answered_before_sql_has_what_was_applied(store: HeldStore) -> None:
    behind = [Row(2, 6, 1)]

    def commit(_seconds: float) -> None:
        append(store, behind)

    hot = hot_over(store, budget_bytes=4 * working_set_bytes(MAX_LEN), pause=commit)
    hot.apply(store_and_announce(store, [Row(2, 5, 1)]))
    hot.apply(batch([behind[0]._replace(seq=1)]))
    other = 10
    while hot.stats.evictions < 3:
        hot.apply(store_and_announce(store, [Row(other, 5, 1)]))
        other += 1
    assert times(hot, 2) == [5, 6]
    assert hot.stats.misses == 1


def test_what_an_update_read_does_not_replace_what_a_reader_has_brought_since(store: HeldStore) -> None:
    hot = hot_over(store)
    store_and_announce(store, [Row(2, 5, 1)])
    update = store_and_announce(store, [Row(2, 6, 1)])
    store_and_announce(store, [Row(2, 7, 1)])
    with held_read(store, 2, lambda: hot.apply(update)):
        assert times(hot, 2) == [5, 6, 7]
    assert times(hot, 2) == [5, 6, 7]


def test_what_was_read_is_cut_by_the_watermark_of_an_update_applied_since(store: HeldStore) -> None:
    store.retention = replace(store.retention, max_age_ms=10)
    hot = hot_over(store)
    ingest(store, [Row(2, 5, 1), Row(2, 9, 1)])
    rows = [Row(1, 17, 1)]
    with held_read(store, 2, lambda: times(hot, 2)) as reader:
        hot.apply(ingest(store, rows).accepted_from(batch(rows)))
    assert reader.result() == [9]
    assert times(hot, 2) == [9]


def test_what_an_update_read_is_cut_by_the_watermark_that_a_reader_has_found_since(store: HeldStore) -> None:
    store.retention = replace(store.retention, max_age_ms=10)
    hot = hot_over(store)
    ingest(store, [Row(2, 5, 1), Row(2, 9, 1)])
    rows = [Row(2, 12, 1)]
    update = ingest(store, rows).accepted_from(batch(rows))
    ingest(store, [Row(3, 17, 1)], partition=1)
    with held_read(store, 2, lambda: hot.apply(update)):
        assert times(hot, 3) == [17]
    assert times(hot, 2) == [9, 12]
    assert hot.stats.misses == 1


class WatchedArena(HistoryArena):
    """Calls somebody between finding the rows of an answer and copying them."""

    meanwhile: Callable[[], None] | None = None

    def window(
        self, slots: NDArray[np.int64], max_len: int, before_ms: NDArray[np.int64] | None
    ) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        found = super().window(slots, max_len, before_ms)
        if self.meanwhile is not None:
            self.meanwhile()
        return found


def test_no_block_moves_while_it_is_copied(store: HeldStore) -> None:
    hot = hot_over(store, budget_bytes=6 * working_set_bytes(MAX_LEN))
    arena = WatchedArena(MAX_LEN, hot.config.budget_bytes)
    hot._arena = arena
    hot.apply(store_and_announce(store, [Row(user, time, 1) for user in range(3) for time in range(5)]))
    # So many users that the blocks of the first ones are given to others.
    update = store_and_announce(store, [Row(user, 50 + time, 1) for user in range(20, 40) for time in range(5)])
    with ThreadPoolExecutor(1) as pool:
        started: list[Future[None]] = []

        def apply_meanwhile() -> None:
            arena.meanwhile = None
            started.append(pool.submit(hot.apply, update))
            with pytest.raises(TimeoutError):
                started[0].result(0.2)

        arena.meanwhile = apply_meanwhile
        assert times(hot, 0) == [0, 1, 2, 3, 4]
        started[0].result(PATIENCE_S)
    assert hot.stats.evictions > 0


NUM_USERS = 40
NUM_ROUNDS = 40


def check_torn(histories: JaggedHistories, applied: NDArray[np.int64]) -> None:
    """Every user's answer is the newest of its first so many interactions, and at least those applied before."""
    bounds = histories.offsets.tolist()
    for user, low, high in zip(histories.user_ids.tolist(), bounds[:-1], bounds[1:], strict=True):
        seq = histories.seq[low:high].tolist()
        if not seq:
            assert applied[user] == 0
            continue
        assert len(seq) == min(MAX_LEN, seq[-1] + 1)
        assert seq == list(range(seq[0], seq[-1] + 1)), "no row of another moment"
        assert seq[-1] + 1 >= applied[user], "never earlier than the last update"
        expected = [content_of(user, n, 0) for n in seq]
        assert histories.item_id[low:high].tolist() == [row.item_id for row in expected], "no row of another user"
        assert histories.event_time_ms[low:high].tolist() == seq
        assert histories.value[low:high].tolist() == [row.value for row in expected]


@pytest.mark.parametrize("num_working_sets", [8, 1_000])
def test_no_answer_is_torn_while_updates_readers_and_evictions_meet(store: HeldStore, num_working_sets: int) -> None:
    hot = hot_over(store, budget_bytes=num_working_sets * working_set_bytes(MAX_LEN))
    applied = np.zeros(NUM_USERS, np.int64)
    stop = threading.Event()

    def read(seed: int) -> int:
        random, num_read = np.random.default_rng(seed), 0
        while not stop.is_set() or num_read == 0:
            users = random.integers(0, NUM_USERS, int(random.integers(1, 12)))
            known = applied.copy()
            check_torn(hot.gather(users, max_len=MAX_LEN), known)
            below = known[users]
            exact = hot.gather(users, max_len=MAX_LEN, below_seq=below)
            assert exact.lengths().tolist() == np.minimum(below, MAX_LEN).tolist()
            last = exact.offsets[1:][below > 0] - 1
            assert exact.seq[last].tolist() == (below[below > 0] - 1).tolist()
            num_read += 1
        return num_read

    def write() -> None:
        random, next_seq = np.random.default_rng(0), np.zeros(NUM_USERS, np.int64)
        for _ in range(NUM_ROUNDS):
            rows = []
            for user in random.integers(0, NUM_USERS, 10).tolist():
                rows.append(content_of(user, int(next_seq[user]), 0))
                next_seq[user] += 1
            update = store_and_announce(store, rows)
            if random.random() < 0.9:  # else it is lost
                hot.apply(update)
                np.maximum.at(applied, update.user_id, update.seq.astype(np.int64) + 1)

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        with ThreadPoolExecutor(3) as pool:
            readers = [pool.submit(read, seed) for seed in (1, 2)]
            try:
                pool.submit(write).result(PATIENCE_S * 3)
            finally:
                stop.set()
            assert all(reader.result(PATIENCE_S) > 0 for reader in readers)
    finally:
        sys.setswitchinterval(interval)
    assert (hot.stats.evictions > 0) == (num_working_sets == 8)
    assert hot.stats.bytes_used <= num_working_sets * working_set_bytes(MAX_LEN)
