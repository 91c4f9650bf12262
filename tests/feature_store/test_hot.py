"""Hot histories are a copy of SQL that never goes wrong, whatever order things happen in."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from feature_store.arena import working_set_bytes
from feature_store.config import HotHistoriesConfig
from feature_store.errors import HistoryBehindError
from feature_store.hot import HotHistories
from feature_store.interactions import Interactions
from feature_store.store import FeatureStore
from tests.feature_store.truth import Row, append, batch, random_rows, rows_of

MAX_LEN = 6
SMALLEST_BUDGET = 2 * working_set_bytes(MAX_LEN)
NUM_USERS = 7
EVERYONE = np.arange(NUM_USERS)


def never_pause(seconds: float) -> None:
    """For tests in which SQL is never behind for long."""


def hot_over(store: FeatureStore, *, budget_bytes: int = 1 << 20, num_retries: int = 2) -> HotHistories:
    config = HotHistoriesConfig(max_len=MAX_LEN, budget_bytes=budget_bytes, behind_num_retries=num_retries)
    return HotHistories(store, config, pause=never_pause)


def store_and_announce(store: FeatureStore, rows: list[Row]) -> Interactions:
    """Append rows, and return what the update log says of them."""
    return append(store, rows).accepted_from(batch(rows))


def assert_equals_sql(hot: HotHistories, store: FeatureStore, max_len: int = MAX_LEN) -> None:
    assert rows_of(hot.gather(EVERYONE, max_len=max_len)) == rows_of(store.read(EVERYONE, max_len=max_len))


@pytest.mark.parametrize("budget_bytes", [SMALLEST_BUDGET, 3 * SMALLEST_BUDGET, 1 << 20])
@pytest.mark.parametrize("seed", range(2))
def test_equals_sql_after_any_interleaving(store: FeatureStore, budget_bytes: int, seed: int) -> None:
    random = np.random.default_rng(seed)
    hot = hot_over(store, budget_bytes=budget_bytes)
    unsent: list[Interactions] = []
    for step in range(30):
        choice = random.random()
        if choice < 0.5:
            rows = random_rows(random, int(random.integers(1, 12)), num_users=NUM_USERS, num_times=10 + 3 * step)
            unsent.append(store_and_announce(store, rows))
        elif choice < 0.75 and unsent:
            update = unsent.pop(0)
            hot.apply(update)
            if len(update):
                users, last = np.unique(update.user_id), np.zeros(NUM_USERS, np.int64)
                np.maximum.at(last, update.user_id, update.seq.astype(np.int64))
                known: dict[str, Any] = {"max_len": MAX_LEN, "below_seq": last[users] + 1}
                assert rows_of(hot.gather(users, **known)) == rows_of(store.read(users, **known))
        elif choice < 0.8 and unsent:
            unsent.pop(0)  # an update is lost: the next one of these users leaves a gap
        elif choice < 0.85:
            hot.forget(random.integers(0, NUM_USERS, 2))
        else:
            users = random.integers(0, NUM_USERS + 2, 5)
            before_ms = random.integers(0, 120, 5)
            window: dict[str, Any] = {"max_len": int(random.integers(1, MAX_LEN + 1)), "before_ms": before_ms}
            slots = hot._arena.slots_of(users)
            below = np.where(slots >= 0, hot._arena.next_seq_of(users, slots), 2**31)
            histories = hot.gather(users, **window)
            # What is not resident is read as SQL has it now; what is resident is as its last update left it.
            if budget_bytes > SMALLEST_BUDGET * 3:
                assert rows_of(histories) == rows_of(store.read(users, below_seq=below, **window))
    for update in unsent:
        hot.apply(update)
    hot.apply(store_and_announce(store, [Row(user, 10_000, 1) for user in range(NUM_USERS)]))
    assert_equals_sql(hot, store)
    assert_equals_sql(hot, store, max_len=2)
    assert hot.stats.bytes_used <= budget_bytes


def test_an_update_that_is_known_already_changes_nothing(store: FeatureStore) -> None:
    hot = hot_over(store)
    update = store_and_announce(store, [Row(1, 5, 1), Row(1, 6, 2), Row(2, 5, 3)])
    hot.apply(Interactions.concat([update, update]))
    hot.apply(update)
    assert_equals_sql(hot, store)
    again = store_and_announce(store, [Row(1, 7, 4)])
    hot.apply(Interactions.concat([again, update, again]))
    assert_equals_sql(hot, store)
    assert hot.stats.repairs == 0


def test_a_gap_in_the_updates_is_repaired_from_sql(store: FeatureStore) -> None:
    hot = hot_over(store)
    hot.apply(store_and_announce(store, [Row(1, 5, 1)]))
    store_and_announce(store, [Row(1, 6, 2)])
    hot.apply(store_and_announce(store, [Row(1, 7, 3), Row(2, 7, 4)]))
    assert_equals_sql(hot, store)
    assert hot.stats.repairs == 1


def test_an_update_with_a_hole_in_itself_is_repaired_from_sql(store: FeatureStore) -> None:
    hot = hot_over(store)
    update = store_and_announce(store, [Row(1, time, 1) for time in range(5)])
    hot.apply(update.take(np.array([0, 1, 4])))
    assert_equals_sql(hot, store)


def test_a_user_seen_first_in_the_middle_holds_only_what_the_update_log_reached(store: FeatureStore) -> None:
    hot = hot_over(store)
    store_and_announce(store, [Row(1, 5, 1)])
    update = store_and_announce(store, [Row(1, 6, 2)])
    store_and_announce(store, [Row(1, 7, 3)])
    hot.apply(update)
    histories = hot.gather(np.array([1]), max_len=MAX_LEN)
    assert histories.event_time_ms.tolist() == [5, 6]


def test_late_and_early_interactions_land_in_order(store: FeatureStore) -> None:
    hot = hot_over(store)
    for time in (50, 10, 30, 20, 60, 40, 55, 5):
        hot.apply(store_and_announce(store, [Row(1, time, time)]))
        assert_equals_sql(hot, store)
    assert hot.gather(np.array([1]), max_len=MAX_LEN).event_time_ms.tolist() == [20, 30, 40, 50, 55, 60]


def test_a_late_interaction_far_back_in_a_full_block_leaves_no_hole(store: FeatureStore) -> None:
    hot = hot_over(store)
    for times in (range(0, 80, 2), range(80, 86, 2), [67]):
        hot.apply(store_and_announce(store, [Row(1, time, 1) for time in times]))
    for before_ms in range(60, 86):
        window: dict[str, Any] = {"max_len": MAX_LEN, "before_ms": before_ms}
        assert rows_of(hot.gather(np.array([1]), **window)) == rows_of(store.read(np.array([1]), **window))


def test_older_interactions_than_are_kept_come_from_sql(store: FeatureStore) -> None:
    hot = hot_over(store)
    hot.apply(store_and_announce(store, [Row(1, time, 1) for time in range(40)]))
    histories = hot.gather(np.array([1, 2, 1]), max_len=4, before_ms=np.array([10, 10, 40]))
    assert [[row.event_time_ms for row in rows] for rows in rows_of(histories)] == [
        [6, 7, 8, 9],
        [],
        [36, 37, 38, 39],
    ]


def test_a_moment_ago_is_answered_from_memory(store: FeatureStore) -> None:
    hot = hot_over(store)
    hot.apply(store_and_announce(store, [Row(1, time, 1) for time in range(40)]))
    times = hot.gather(np.array([1]), max_len=MAX_LEN, before_ms=37).event_time_ms.tolist()
    assert times == [31, 32, 33, 34, 35, 36]
    assert hot.stats.misses == 0


def test_gathering_below_a_seq_ignores_what_sql_knows_beyond_it(store: FeatureStore) -> None:
    hot = hot_over(store)
    store_and_announce(store, [Row(1, 1, 1), Row(1, 9, 2), Row(1, 5, 3)])
    assert hot.gather(np.array([1]), max_len=3, below_seq=2).event_time_ms.tolist() == [1, 9]
    assert hot.gather(np.array([1]), max_len=3).event_time_ms.tolist() == [1, 5, 9]


def test_a_tiny_budget_evicts_the_users_touched_longest_ago(store: FeatureStore) -> None:
    hot = hot_over(store, budget_bytes=4 * SMALLEST_BUDGET)
    everyone = np.arange(60)
    hot.apply(store_and_announce(store, [Row(int(user), time, 1) for time in range(9) for user in everyone]))
    assert hot.stats.evictions > 0
    assert hot.stats.resident_users < 60
    hot.gather(np.array([0]), max_len=MAX_LEN)
    for user in range(1, 60):
        hot.gather(np.array([0, user]), max_len=MAX_LEN)
        assert hot.stats.bytes_used <= 4 * SMALLEST_BUDGET
    misses = hot.stats.misses
    hot.gather(np.array([0, 59]), max_len=MAX_LEN)
    assert hot.stats.misses == misses
    histories = hot.gather(everyone, max_len=MAX_LEN)
    assert rows_of(histories) == rows_of(store.read(everyone, max_len=MAX_LEN))


def test_one_update_larger_than_the_budget_is_still_applied_exactly(store: FeatureStore) -> None:
    hot = hot_over(store, budget_bytes=SMALLEST_BUDGET)
    hot.apply(store_and_announce(store, [Row(user, time, 1) for time in range(30) for user in range(NUM_USERS)]))
    assert_equals_sql(hot, store)


def test_forgetting_drops_a_user_everywhere(store: FeatureStore) -> None:
    hot = hot_over(store)
    hot.apply(store_and_announce(store, [Row(1, 1, 1), Row(2, 1, 2)]))
    with store.transaction() as transaction:
        transaction.forget_users(np.array([1]))
    hot.forget(np.array([1, 77]))
    assert hot.gather(np.array([1, 2]), max_len=MAX_LEN).lengths().tolist() == [0, 1]
    hot.apply(store_and_announce(store, [Row(1, 9, 9)]))
    assert hot.gather(np.array([1]), max_len=MAX_LEN).event_time_ms.tolist() == [9]


def test_an_update_of_a_user_forgotten_since_is_skipped(store: FeatureStore) -> None:
    hot = hot_over(store)
    store_and_announce(store, [Row(1, 1, 1)])
    update = store_and_announce(store, [Row(1, 2, 2), Row(2, 2, 3)])
    with store.transaction() as transaction:
        transaction.forget_users(np.array([1]))
    hot.apply(update)
    assert hot.gather(np.array([1, 2]), max_len=MAX_LEN).lengths().tolist() == [0, 1]


def test_an_update_announced_before_its_commit_waits_for_sql(store: FeatureStore) -> None:
    first = [Row(1, 1, 1), Row(1, 2, 2)]
    append(store, first[:1])
    looks: list[float] = []

    def commit_on_the_second_look(seconds: float) -> None:
        looks.append(seconds)
        if len(looks) == 2:
            append(store, first[1:])

    config = HotHistoriesConfig(max_len=MAX_LEN, budget_bytes=1 << 20, behind_retry_interval_ms=20)
    hot = HotHistories(store, config, pause=commit_on_the_second_look)
    hot.apply(batch([Row(1, 3, 3, seq=2)]))
    assert hot.gather(np.array([1]), max_len=MAX_LEN).event_time_ms.tolist() == [1, 2, 3]
    assert looks == [0.02, 0.02]


def test_interactions_that_never_reach_sql_are_an_error_that_names_the_user(store: FeatureStore) -> None:
    append(store, [Row(1, 1, 1)])
    hot = hot_over(store)
    with pytest.raises(
        HistoryBehindError, match="1 interactions of user 1, but the update log announced number 5"
    ) as e:
        hot.apply(batch([Row(1, 3, 3, seq=5), Row(2, 3, 3, seq=0)]))
    assert e.value.user_ids.tolist() == [1]


@pytest.mark.parametrize("max_len", [0, MAX_LEN + 1])
def test_more_history_than_is_kept_is_refused(store: FeatureStore, max_len: int) -> None:
    with pytest.raises(ValueError, match=f"max_len={max_len} must be between 1 and hot.max_len=6"):
        hot_over(store).gather(EVERYONE, max_len=max_len)


def test_nothing_is_gathered_for_nobody(store: FeatureStore) -> None:
    hot = hot_over(store)
    hot.apply(Interactions.empty())
    assert hot.gather(np.empty(0, np.int64), max_len=3).num_users == 0


def test_a_budget_too_small_for_one_user_is_refused() -> None:
    with pytest.raises(ValueError, match="raise it to at least"):
        HotHistoriesConfig(max_len=MAX_LEN, budget_bytes=SMALLEST_BUDGET - 1)
