"""A stored history is a function of the set of events, and reads see it as of a point in time; on both databases."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sqlalchemy import select, text

from feature_store import appending
from feature_store.chunks import SURFACE_VERSION, canonical_bytes
from feature_store.engine import writing
from feature_store.errors import ChunkCorruptError, StoreLayoutError
from feature_store.store import FeatureStore
from feature_store.tables import history_chunk
from tests.feature_store.truth import Row, Truth, append, batch, content_of, random_rows, rows_of

USERS = np.arange(5)

# Each example clears the store itself.
one_store_for_all_examples = settings(
    max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)


def stored_chunks(store: FeatureStore) -> list[tuple[object, ...]]:
    """Every chunk row, its payload cut to what depends on the events alone."""
    with writing(store._engine) as connection:
        rows = connection.execute(select(history_chunk).order_by(history_chunk.c.user_id, history_chunk.c.chunk_no))
        return [
            (row.user_id, row.chunk_no, row.n, row.first_ms, row.last_ms, of_the_events(row.payload, row.n))
            for row in rows
        ]


def of_the_events(payload: bytes, num_interactions: int) -> bytes:
    return bytes(payload[: canonical_bytes(num_interactions, has_surfaces=payload[0] == SURFACE_VERSION)])


def clear(store: FeatureStore) -> None:
    with store.transaction() as transaction:
        transaction.forget_users(USERS)


EVENTS = st.lists(
    st.builds(content_of, st.integers(0, 3), st.integers(0, 12), st.sampled_from([0, 5, 2**64 - 1])),
    min_size=1,
    max_size=30,
)


@given(events=EVENTS, data=st.data())
@one_store_for_all_examples
def test_any_order_duplication_and_batching_gives_the_same_bytes(
    store: FeatureStore, events: list[Row], data: st.DataObject
) -> None:
    append(store, events)
    expected = stored_chunks(store)
    expected_totals = store.totals()
    clear(store)
    arrivals = data.draw(st.permutations(events + data.draw(st.lists(st.sampled_from(events), max_size=10))))
    cuts = sorted(data.draw(st.lists(st.integers(0, len(arrivals)), max_size=4)))
    for low, high in zip([0, *cuts], [*cuts, len(arrivals)], strict=True):
        append(store, arrivals[low:high])
    assert stored_chunks(store) == expected
    totals = store.totals()
    assert (totals.num_interactions, totals.fingerprint) == (
        expected_totals.num_interactions,
        expected_totals.fingerprint,
    )
    clear(store)


@pytest.mark.parametrize(("seed", "rows_at_once"), [(0, 32_768), (1, 32_768), (2, 7)])
def test_appends_and_reads_agree_with_brute_force(
    store: FeatureStore, seed: int, rows_at_once: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(appending, "ROWS_AT_ONCE", rows_at_once)
    random = np.random.default_rng(seed)
    truth = Truth()
    for step in range(12):
        rows = random_rows(random, int(random.integers(1, 25)), num_times=10 + 6 * step)
        result = append(store, rows)
        expected = truth.append(rows)
        assert (result.accepted.tolist(), result.seq.tolist(), result.late.tolist()) == expected
        users = random.integers(0, 6, 7)
        limits: dict[str, Any] = {
            "before_ms": random.integers(0, 90, 7) if random.random() < 0.6 else None,
            "known_at_ms": int(random.integers(0, 25)) if random.random() < 0.4 else None,
            "below_seq": random.integers(0, 40, 7) if random.random() < 0.4 else None,
        }
        max_len = int(random.integers(1, 20))
        found = rows_of(store.read(users, max_len=max_len, **limits))
        for position, user in enumerate(users.tolist()):
            at = {
                name: int(value[position]) if isinstance(value, np.ndarray) else value for name, value in limits.items()
            }
            assert found[position] == truth.read(user, max_len, **at), (user, max_len, at)
    totals = store.totals()
    stored = [row for history in truth.rows.values() for row in history]
    assert totals.num_users == len(truth.rows)
    assert totals.num_interactions == len(stored)
    assert totals.fingerprint == sum(row.event_key for row in stored) % 2**64


def test_chunks_are_full_but_for_the_last(store: FeatureStore) -> None:
    for time in (5, 1, 9, 3, 7, 2, 8, 4, 6):
        append(store, [Row(1, time, 1)])
    assert [row[1:5] for row in stored_chunks(store)] == [(0, 4, 1, 4), (1, 4, 5, 8), (2, 1, 9, 9)]


def test_a_late_event_is_put_in_the_middle_and_reported(store: FeatureStore) -> None:
    append(store, [Row(1, time, 1) for time in range(0, 100, 10)])
    result = append(store, [Row(1, 35, 1), Row(1, 200, 1), Row(2, 35, 1)])
    assert result.late.tolist() == [True, False, False]
    times = store.read(np.array([1]), max_len=99).event_time_ms.tolist()
    assert times == [0, 10, 20, 30, 35, 40, 50, 60, 70, 80, 90, 200]


def test_a_late_event_rewrites_no_chunk_before_its_own(store: FeatureStore) -> None:
    append(store, [Row(1, time, 1) for time in range(0, 120, 10)])
    append(store, [Row(1, 55, 1)])
    with writing(store._engine) as connection:
        rows = connection.execute(select(history_chunk.c.next_seq).order_by(history_chunk.c.chunk_no)).scalars()
        assert rows.all() == [12, 13, 13, 13]


def test_events_of_one_millisecond_that_fill_several_chunks_keep_their_order(store: FeatureStore) -> None:
    keys = [9, 3, 7, 1, 8, 2, 6, 4, 5, 0]
    for key in keys:
        append(store, [Row(1, 50, key)])
    assert not append(store, [Row(1, 50, key) for key in keys]).accepted.any()
    assert store.read(np.array([1]), max_len=99).event_key.tolist() == sorted(keys)


def test_a_duplicate_changes_nothing_and_keeps_the_first_arrival(store: FeatureStore) -> None:
    append(store, [Row(1, 10, 1, arrival_ms=100), Row(1, 20, 2, arrival_ms=100)])
    result = append(store, [Row(1, 10, 1, item_id=99, arrival_ms=500), Row(1, 20, 2)])
    assert result.accepted.tolist() == [False, False]
    current = store.read_current(np.array([1, 2]), max_len=9)
    assert current.next_seq.tolist() == [2, 0]
    assert current.histories.arrival_ms.tolist() == [100, 100]
    assert current.histories.item_id.tolist() == [7, 7]


def test_a_transaction_appends_on_top_of_its_own_appends(store: FeatureStore) -> None:
    with store.transaction() as transaction:
        transaction.append(batch([Row(1, 1, 1)]))
        assert transaction.append(batch([Row(1, 1, 1), Row(1, 0, 2)])).seq.tolist() == [0, 1]
    assert store.read(np.array([1]), max_len=9).seq.tolist() == [1, 0]


def test_an_empty_batch_is_fine(store: FeatureStore) -> None:
    assert len(append(store, []).accepted) == 0
    assert store.read(np.empty(0, np.int64), max_len=3).num_users == 0


def test_extreme_values_survive(store: FeatureStore) -> None:
    row = Row(2**63 - 1, -1, 2**64 - 1, item_id=2**63 - 1, action=2**32 - 1, value=float("-inf"), arrival_ms=-5)
    append(store, [row])
    assert rows_of(store.read(np.array([2**63 - 1]), max_len=1)) == [[row]]


def test_a_missing_value_stays_missing(store: FeatureStore) -> None:
    append(store, [Row(1, 1, 1, value=float("nan"))])
    assert np.isnan(store.read(np.array([1]), max_len=1).value).all()


def test_histories_far_longer_than_asked_are_read_from_their_end(store: FeatureStore) -> None:
    append(store, [Row(1, time, 1, arrival_ms=time % 7) for time in range(300)])
    times = store.read(np.array([1]), max_len=5, before_ms=200, known_at_ms=0).event_time_ms.tolist()
    assert times == [168, 175, 182, 189, 196]


def test_each_history_is_read_as_of_its_own_arrival_time(store: FeatureStore) -> None:
    append(store, [Row(user, time, 1, arrival_ms=time + 5) for user in (1, 2) for time in range(10)])
    read = store.read(np.array([1, 2, 1]), max_len=9, known_at_ms=np.array([8, 20, 4]))
    assert [row[-1].event_time_ms if row else None for row in rows_of(read)] == [3, 9, None]


def test_asking_for_no_history_is_refused(store: FeatureStore) -> None:
    with pytest.raises(ValueError, match="max_len=0 must be at least 1"):
        store.read(np.array([1]), max_len=0)


def test_nothing_of_a_failed_transaction_stays(store: FeatureStore) -> None:
    append(store, [Row(1, 1, 1)])
    before = (store.totals(), stored_chunks(store), store.positions("log", "interactions"))

    class PulledPlugError(Exception): ...

    def interrupted() -> None:
        with store.transaction() as transaction:
            transaction.lock_position("log", "interactions", 0)
            transaction.append(batch([Row(1, 0, 1), Row(2, 1, 1)]))
            transaction.register_names("user", {5: "five"})
            transaction.set_position("log", "interactions", 0, 10)
            raise PulledPlugError

    with pytest.raises(PulledPlugError):
        interrupted()
    assert (store.totals(), stored_chunks(store), store.positions("log", "interactions")) == before
    assert store.names("user", [5]) == {}


def test_a_damaged_chunk_is_reported_with_its_user_and_number(store: FeatureStore) -> None:
    append(store, [Row(user, time, 1) for user in (1, 2) for time in range(10)])
    with writing(store._engine) as connection:
        where = (history_chunk.c.user_id == 2) & (history_chunk.c.chunk_no == 1)
        payload = bytearray(connection.execute(select(history_chunk.c.payload).where(where)).scalar_one())
        payload[20] ^= 4
        connection.execute(history_chunk.update().where(where).values(payload=bytes(payload)))
    reads: list[Callable[[], object]] = [
        lambda: store.read(USERS, max_len=9),
        store.totals,
        lambda: append(store, [Row(2, 5, 5)]),
    ]
    for read in reads:
        with pytest.raises(ChunkCorruptError, match="history chunk 1 of user 2 is corrupt: its checksum"):
            read()
    assert store.read(np.array([1]), max_len=99).num_interactions == 10


def test_a_missing_chunk_is_reported(store: FeatureStore) -> None:
    append(store, [Row(1, time, 1) for time in range(12)])
    with writing(store._engine) as connection:
        connection.execute(text("DELETE FROM history_chunk WHERE chunk_no = 1"))
    for call in (lambda: append(store, [Row(1, 0, 2)]), lambda: store.read(USERS, max_len=12)):
        with pytest.raises(ChunkCorruptError, match="history chunk 0 of user 1"):
            call()


def test_a_store_built_with_another_chunk_len_is_refused(
    store: FeatureStore, open_store: Callable[..., FeatureStore]
) -> None:
    append(store, [Row(1, 1, 1)])
    other = open_store(chunk_len=8)
    calls: list[Callable[[], object]] = [
        other.require_current_schema,
        lambda: append(other, [Row(1, 2, 2)]),
        lambda: other.read(USERS, max_len=3),
    ]
    for call in calls:
        with pytest.raises(StoreLayoutError, match="built with chunk_len=4, but store.chunk_len=8"):
            call()


def test_forgetting_removes_history_and_name_and_starts_over(store: FeatureStore) -> None:
    append(store, [Row(user, time, 1) for user in (1, 2) for time in range(9)])
    with store.transaction() as transaction:
        transaction.register_names("user", {1: "one", 2: "two"})
        assert transaction.forget_users(np.array([1, 1, 77])) == 1
    assert store.read(np.array([1, 2]), max_len=99).lengths().tolist() == [0, 9]
    assert store.names("user", [1, 2]) == {2: "two"}
    assert append(store, [Row(1, 5, 1)]).seq.tolist() == [0]
