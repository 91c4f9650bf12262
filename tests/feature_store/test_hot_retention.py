"""Hot histories under retention: what store.read gives, and for a trainer a function of the update log."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from feature_store.arena import working_set_bytes
from feature_store.config import HotHistoriesConfig
from feature_store.hot import HotHistories
from feature_store.interactions import Interactions
from feature_store.store import FeatureStore
from tests.feature_store.retained import ingest, prune_all
from tests.feature_store.truth import Row, batch, random_rows, rows_of

OpenStore = Callable[..., FeatureStore]
MAX_LEN = 6
SMALLEST_BUDGET = 2 * working_set_bytes(MAX_LEN)
NUM_USERS = 6
EVERYONE = np.arange(NUM_USERS)
LIMITS = [
    {"max_age_ms": 40, "removal_delay_ms": 10_000},
    {"max_age_ms": 15, "removal_delay_ms": 0},
    {"max_history": MAX_LEN},
    {"max_history": 2 * MAX_LEN, "max_age_ms": 25, "removal_delay_ms": 0},
]


def hot_over(store: FeatureStore, *, budget_bytes: int = 1 << 20) -> HotHistories:
    config = HotHistoriesConfig(max_len=MAX_LEN, budget_bytes=budget_bytes, behind_num_retries=0)
    return HotHistories(store, config, pause=lambda _: None)


def ingest_and_announce(store: FeatureStore, rows: list[Row], partition: int = 0) -> Interactions:
    return ingest(store, rows, partition).accepted_from(batch(rows))


def rows_around(random: np.random.Generator, step: int) -> list[Row]:
    rows = random_rows(random, int(random.integers(1, 9)), num_users=NUM_USERS, num_times=30)
    return [row._replace(event_time_ms=row.event_time_ms + 3 * step) for row in rows]


@pytest.mark.parametrize(("limits", "budget_bytes"), list(zip(LIMITS, 2 * [1 << 12, 1 << 20], strict=True)), ids=str)
def test_caught_up_it_gives_what_the_store_gives(
    open_store: OpenStore, limits: dict[str, Any], budget_bytes: int
) -> None:
    store, random = open_store(**limits), np.random.default_rng(3)
    hot = hot_over(store, budget_bytes=budget_bytes)
    for step in range(25):
        partition = int(random.integers(0, 2))
        update = ingest_and_announce(store, rows_around(random, step), partition)
        hot.apply(update, watermark_ms=int(update.event_time_ms.max(initial=0)))
        if step % 5 == 0:
            prune_all(store)
        if step % 9 == 0:
            hot.forget(random.integers(0, NUM_USERS, 2))
        query: dict[str, Any] = {"max_len": int(random.integers(1, MAX_LEN + 1))}
        if random.random() < 0.5:
            query["before_ms"] = random.integers(3 * step, 3 * step + 31, NUM_USERS)
        assert rows_of(hot.gather(EVERYONE, **query)) == rows_of(store.read(EVERYONE, **query))


def test_just_started_it_does_not_show_what_the_store_knows_to_be_too_old(open_store: OpenStore) -> None:
    store = open_store(max_age_ms=10)
    ingest(store, [Row(1, 90, 1), Row(1, 95, 1), Row(2, 92, 1)])
    ingest(store, [Row(3, 104, 1)], partition=1)
    hot = hot_over(store)
    assert hot.gather(np.array([1]), max_len=MAX_LEN).event_time_ms.tolist() == [95]
    # The first update seen comes from a partition that is behind.
    hot.apply(ingest_and_announce(store, [Row(2, 97, 2)]), watermark_ms=97)
    assert hot.gather(np.array([2, 1]), max_len=MAX_LEN).event_time_ms.tolist() == [97, 95]


def test_what_sql_knows_to_be_too_old_goes_for_all_users_of_an_answer(open_store: OpenStore) -> None:
    store = open_store(max_age_ms=10)
    ingest(store, [Row(1, 90, 1), Row(1, 95, 1), Row(2, 92, 1)])
    ingest(store, [Row(3, 104, 1)], partition=1)
    hot = hot_over(store)
    hot.apply(ingest_and_announce(store, [Row(2, 97, 2)]), watermark_ms=97)
    assert hot.gather(np.array([2]), max_len=MAX_LEN).event_time_ms.tolist() == [92, 97]
    assert hot.gather(np.array([2, 1]), max_len=MAX_LEN).event_time_ms.tolist() == [97, 95]
    assert (hot.stats.hits, hot.stats.misses) == (2, 1)


def test_what_expires_in_memory_is_not_looked_for_in_sql(open_store: OpenStore) -> None:
    store = open_store(max_age_ms=10, removal_delay_ms=0)
    hot = hot_over(store)
    hot.apply(ingest_and_announce(store, [Row(1, time, 1) for time in range(20)]))
    hot.apply(ingest_and_announce(store, [Row(2, 27, 1)]))
    prune_all(store)
    misses = hot.stats.misses
    assert hot.gather(np.array([1]), max_len=MAX_LEN).event_time_ms.tolist() == [17, 18, 19]
    hot.forget(np.array([1]))
    for _ in range(3):
        assert hot.gather(np.array([1]), max_len=MAX_LEN).event_time_ms.tolist() == [17, 18, 19]
    # Once to read it; that it is shorter than asked and than the arrivals does not make it incomplete.
    assert hot.stats.misses == misses + 1


@pytest.mark.parametrize(("behind", "budget_bytes"), [(1, 1 << 20), (20, SMALLEST_BUDGET)])
def test_a_reader_that_is_behind_reads_what_one_that_was_not_has_read(
    open_store: OpenStore, behind: int, budget_bytes: int
) -> None:
    """A trainer that repeats updates after a restart, while SQL is ahead and sweeps go on, within removal_delay_ms."""
    store, random = open_store(max_age_ms=25, removal_delay_ms=4 * 25), np.random.default_rng(8)
    updates: list[Interactions] = []
    answers: list[list[list[Row]]] = []
    prompt, slow, watermark_ms = hot_over(store), hot_over(store, budget_bytes=budget_bytes), 0

    def answer(hot: HotHistories, update: Interactions, watermark_ms: int) -> list[list[Row]]:
        hot.apply(update, watermark_ms=watermark_ms)
        below_seq = np.zeros(NUM_USERS, np.int64)
        np.maximum.at(below_seq, update.user_id, update.seq.astype(np.int64) + 1)
        users = np.unique(update.user_id)
        return rows_of(hot.gather(users, max_len=MAX_LEN, below_seq=below_seq[users]))

    for step in range(45):
        update = ingest_and_announce(store, rows_around(random, step), step % 2)
        updates.append(update)
        answers.append(answer(prompt, update, 0))
        prune_all(store)
        if step >= behind:
            if step == 35:  # a restart: nothing in memory, the watermark from the checkpoint
                slow = hot_over(store, budget_bytes=budget_bytes)
            assert answer(slow, updates[step - behind], watermark_ms) == answers[step - behind]
            watermark_ms = max(watermark_ms, int(updates[step - behind].event_time_ms.max(initial=0)))
