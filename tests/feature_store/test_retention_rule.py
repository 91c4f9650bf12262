"""With retention, too, a history as read is a function of the set of events; on both databases, against brute force."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule, run_state_machine_as_test

from feature_store.retention import Retention
from feature_store.store import FeatureStore
from tests.feature_store.retained import RetainedTruth, contents, empty, forget, ingest, prune_all
from tests.feature_store.truth import Row, content_of, rows_of

USERS = [0, 1, 2]
KEYS = [0, 5, 2**64 - 1]

# Each example empties the store itself.
ON_ONE_STORE = [HealthCheck.function_scoped_fixture, HealthCheck.too_slow, HealthCheck.data_too_large]

RETENTION = st.builds(
    Retention,
    chunk_len=st.just(4),
    max_history=st.sampled_from([0, 1, 3, 4, 6, 9]),
    max_age_ms=st.sampled_from([0, 5, 12, 30]),
    removal_delay_ms=st.sampled_from([0, 7]),
)


def events_until(time_ms: int) -> st.SearchStrategy[Row]:
    return st.builds(content_of, st.sampled_from(USERS), st.integers(0, time_ms), st.sampled_from(KEYS))


def arrive(store: FeatureStore, events: list[Row], data: st.DataObject) -> None:
    """Any order, duplicates, batches and partitions, with sweeps in between."""
    arrivals = data.draw(st.permutations(events + data.draw(st.lists(st.sampled_from(events), max_size=8))))
    cuts = sorted(data.draw(st.lists(st.integers(0, len(arrivals)), max_size=5)))
    for low, high in itertools.pairwise([0, *cuts, len(arrivals)]):
        ingest(store, arrivals[low:high], partition=data.draw(st.integers(0, 2)))
        if data.draw(st.booleans()):
            prune_all(store)


def check_any_arrival(store: FeatureStore, parts: list[list[Row]], retention: Retention, data: st.DataObject) -> None:
    """Parts are applied one after the other, a user is forgotten between them; within a part anything goes."""
    store.retention = retention
    truth = RetainedTruth(retention)
    forgotten = [data.draw(st.sampled_from(USERS)) for _ in parts[1:]]
    for number, part in enumerate(parts):
        for row in part:
            truth.applied.setdefault(row.user_id, {}).setdefault(row.place, row)
            truth.watermark_ms = max(truth.watermark_ms, row.event_time_ms)
        if number < len(forgotten):
            truth.forget(forgotten[number])
    expected = [truth.retained(user) for user in USERS]
    for _ in range(2):
        empty(store)
        for number, part in enumerate(parts):
            arrive(store, part, data)
            if number < len(forgotten):
                forget(store, forgotten[number])
        assert contents(store, USERS) == expected
        prune_all(store)
        assert contents(store, USERS) == expected


PARTS = st.lists(st.lists(events_until(40), min_size=1, max_size=25), min_size=1, max_size=2)


@given(parts=PARTS, retention=RETENTION, data=st.data())
@settings(max_examples=10, suppress_health_check=ON_ONE_STORE)
def test_any_order_duplication_batching_and_partition_gives_the_same_history(
    store: FeatureStore, parts: list[list[Row]], retention: Retention, data: st.DataObject
) -> None:
    check_any_arrival(store, parts, retention, data)


@pytest.mark.slow
@pytest.mark.timeout(1_800)
@given(parts=PARTS, retention=RETENTION, data=st.data())
@settings(max_examples=1_500, suppress_health_check=ON_ONE_STORE)
def test_any_order_duplication_batching_and_partition_gives_the_same_history_at_length(
    store: FeatureStore, parts: list[list[Row]], retention: Retention, data: st.DataObject
) -> None:
    check_any_arrival(store, parts, retention, data)


class StoreBesideTruth(RuleBasedStateMachine):
    """A store and the brute-force truth go through the same life."""

    def __init__(self, store: FeatureStore) -> None:
        super().__init__()
        self.store = store
        self.clock_ms = 0
        self.newest_ms = 10

    @initialize(retention=RETENTION)
    def choose(self, retention: Retention) -> None:
        empty(self.store)
        self.store.retention = retention
        self.truth = RetainedTruth(retention)

    def _ingest(self, rows: list[Row], partition: int) -> None:
        self.clock_ms += 1
        arrived = [row._replace(arrival_ms=self.clock_ms) for row in rows]
        self.truth.ingest(arrived, ingest(self.store, arrived, partition))

    @rule(
        rows=st.lists(st.tuples(st.sampled_from(USERS), st.integers(-30, 3), st.sampled_from(KEYS)), max_size=12),
        partition=st.integers(0, 1),
    )
    def append(self, rows: list[tuple[int, int, int]], partition: int) -> None:
        self._ingest([content_of(user, max(0, self.newest_ms + ago), key) for user, ago, key in rows], partition)

    @rule(user=st.sampled_from(USERS), num_rows=st.integers(3, 14))
    def append_in_order(self, user: int, num_rows: int) -> None:
        self._ingest([content_of(user, self.newest_ms + place, 1) for place in range(num_rows)], 0)
        self.newest_ms += num_rows

    @rule(data=st.data())
    def append_again(self, data: st.DataObject) -> None:
        known = [row for rows in self.truth.applied.values() for row in rows.values()]
        if known:
            self._ingest(data.draw(st.lists(st.sampled_from(known), max_size=6)), 1)

    @rule(by_ms=st.integers(1, 25))
    def time_goes_on(self, by_ms: int) -> None:
        """Another user's event moves the watermark."""
        self.newest_ms += by_ms
        self._ingest([content_of(99, self.newest_ms, 7)], 1)

    @rule(max_users=st.integers(1, 4), max_chunks=st.integers(2, 9))
    def prune(self, max_users: int, max_chunks: int) -> None:
        prune_all(self.store, max_users=max_users, max_chunks=max_chunks)

    @rule(user=st.sampled_from(USERS))
    def forget(self, user: int) -> None:
        forget(self.store, user)
        self.truth.forget(user)

    @rule(data=st.data(), max_len=st.integers(1, 20))
    def read_as_of(self, data: st.DataObject, max_len: int) -> None:
        limits: dict[str, Any] = {
            "before_ms": data.draw(st.none() | st.integers(0, self.newest_ms + 2)),
            "known_at_ms": data.draw(st.none() | st.integers(0, self.clock_ms)),
            "below_seq": data.draw(st.none() | st.integers(0, 40)),
        }
        found = rows_of(self.store.read(np.array(USERS), max_len=max_len, **limits))
        assert found == [self.truth.read(user, max_len, **limits) for user in USERS]

    @rule(data=st.data())
    def read_current(self, data: st.DataObject) -> None:
        before_ms = data.draw(st.none() | st.integers(0, self.newest_ms + 2))
        current = self.store.read_current(np.array(USERS), max_len=5, before_ms=before_ms)
        assert rows_of(current.histories) == [self.truth.read(user, 5, before_ms=before_ms) for user in USERS]
        assert current.next_seq.tolist() == [self.truth.next_seq(user) for user in USERS]

    @invariant()
    def histories_and_account_are_true(self) -> None:
        if hasattr(self, "truth"):
            self.truth.check(self.store, USERS)


def live(store: FeatureStore, *, num_lives: int, num_steps: int) -> None:
    class OnThisStore(StoreBesideTruth):
        def __init__(self) -> None:
            super().__init__(store)

    run_state_machine_as_test(
        OnThisStore,
        settings=settings(max_examples=num_lives, stateful_step_count=num_steps, suppress_health_check=ON_ONE_STORE),
    )


def test_a_life_of_appends_sweeps_and_forgetting_agrees_with_brute_force(store: FeatureStore) -> None:
    live(store, num_lives=6, num_steps=12)


@pytest.mark.slow
@pytest.mark.timeout(3_600)
def test_many_long_lives_agree_with_brute_force(store: FeatureStore) -> None:
    live(store, num_lives=400, num_steps=40)


def test_a_smaller_chunk_length_than_max_history_and_a_larger_one_keep_the_same(
    open_store: Callable[..., FeatureStore],
) -> None:
    retention = Retention(chunk_len=4, max_history=10, max_age_ms=25, removal_delay_ms=0)
    histories = []
    for chunk_len in (1, 4, 64):
        store = open_store()
        with_length = replace(retention, chunk_len=chunk_len)
        store.config = replace(store.config, chunk_len=chunk_len)
        store._layout_is_checked = True
        store.retention = with_length
        empty(store)
        for time in range(30):
            ingest(store, [content_of(time % 2, time, 1), content_of(0, 29 - time, 2)], time % 3)
        histories.append(contents(store, USERS))
        assert len(histories[-1][0]) == 10
    assert histories[0] == histories[1] == histories[2]
