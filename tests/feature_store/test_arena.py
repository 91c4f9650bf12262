"""The arena is a dictionary of lists within its budget, and forgets the users touched longest ago first."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from feature_store.arena import HistoryArena, working_set_bytes
from feature_store.jagged import offsets_of
from tests.feature_store.truth import Row, batch, content_of

MAX_LEN = 6
MAX_KEPT = 9
NUM_USERS = 9


def rows_in(arena: HistoryArena, user: int) -> list[int] | None:
    """The event times in a user's block."""
    slots = arena.slots_of(np.array([user]))
    if slots[0] < 0:
        return None
    columns = arena.copy(arena.start[slots], arena.length[slots])
    rows = [content_of(user, time, 0) for time in columns["event_time_ms"].tolist()]
    assert columns["item_id"].tolist() == [row.item_id for row in rows], "columns of one interaction stay together"
    assert columns["action"].tolist() == [row.action for row in rows]
    return [row.event_time_ms for row in rows]


def as_columns(times: list[list[int]], users: list[int]) -> tuple[NDArray[np.int64], dict[str, NDArray[Any]]]:
    rows: list[Row] = [content_of(user, time, 0) for user, own in zip(users, times, strict=True) for time in own]
    return offsets_of(np.array([len(own) for own in times])), batch(rows).columns


USERS = st.lists(st.integers(0, NUM_USERS - 1), min_size=1, max_size=3, unique=True)
STEPS = st.lists(
    st.tuples(st.sampled_from(["put", "append", "cut", "drop", "touch"]), USERS, st.integers(0, 20)), max_size=40
)


@given(STEPS, st.sampled_from([6, 8, 40]))
def test_it_holds_what_lists_hold(steps: list[tuple[str, list[int], int]], num_working_sets: int) -> None:
    budget_bytes = num_working_sets * working_set_bytes(MAX_LEN)
    arena, truth, now = HistoryArena(MAX_LEN, budget_bytes), dict[int, list[int]](), 0
    for kind, asked, number in steps:
        users = [user for user in asked if kind == "put" or user in truth]
        ids = np.array(users, np.int64)
        slots = arena.slots_of(ids)
        arena.touch(slots[slots >= 0])
        if kind in ("put", "append"):
            counts = [1 + (number + user) % (MAX_KEPT if kind == "put" else 2 * MAX_KEPT) for user in users]
            times = [list(range(now + 1, now + 1 + count)) for count in counts]
            now += 1 + max(counts, default=0)
            offsets, columns = as_columns(times, users)
            if kind == "put":
                arena.put(ids, offsets, columns, ids + now)
                truth |= dict(zip(users, times, strict=True))
            else:
                arena.append(slots, offsets, columns, ids + now)
                truth |= {user: truth[user] + own for user, own in zip(users, times, strict=True)}
        elif kind == "cut":
            middles = [truth[user][len(truth[user]) // 2] if truth[user] else 0 for user in users]
            lengths, removed = arena.cut(slots, np.array(middles, np.int64))
            times = [[time for time in truth[user] if time >= low] for user, low in zip(users, middles, strict=True)]
            newest = [own[len(own) - n :] for own, n in zip(times, lengths.tolist(), strict=True)]
            assert removed["event_time_ms"].tolist() == [time for own in newest for time in own]
            truth |= {user: [t for t in truth[user] if t < low] for user, low in zip(users, middles, strict=True)}
        elif kind == "drop":
            arena.drop(ids)
            truth = {user: times for user, times in truth.items() if user not in users}
        assert arena.bytes_used <= budget_bytes
        for user, own in list(truth.items()):
            held = rows_in(arena, user)
            if held is None:
                assert user not in users, "who was just asked for is not evicted"
                del truth[user]
                continue
            assert len(held) <= 2 * MAX_LEN
            assert held == own[len(own) - len(held) :]
            if len(held) < len(own):
                truth[user] = held  # older ones were left out for good
                assert kind == "cut" or user not in users or len(held) >= MAX_KEPT
        assert arena.num_users == len(truth)


def arena_of_four(num_working_sets: int = 8) -> HistoryArena:
    """Users 0 … 3 with full blocks, touched in that order."""
    arena = HistoryArena(MAX_LEN, num_working_sets * working_set_bytes(MAX_LEN))
    for user in range(4):
        fill(arena, user)
    return arena


def fill(arena: HistoryArena, user: int) -> None:
    offsets, columns = as_columns([list(range(MAX_KEPT))], [user])
    arena.put(np.array([user]), offsets, columns, np.array([100 + user]))


def test_users_touched_longest_ago_are_evicted_first() -> None:
    arena = arena_of_four()
    arena.touch(arena.slots_of(np.array([0])))
    user = 4
    while arena.num_evictions == 0:
        fill(arena, user)
        user += 1
    resident = [other for other in range(user) if rows_in(arena, other) is not None]
    touched_last = [1, 2, 3, 0, *range(4, user)]
    assert sorted(touched_last[-len(resident) :]) == resident
    assert 1 not in resident


def test_how_far_an_evicted_user_had_come_is_remembered_until_it_is_dropped_or_back() -> None:
    arena = arena_of_four()
    user = 4
    while arena.num_evictions < 3:
        fill(arena, user)
        user += 1
    asked = np.array([0, 1, 2, 77])
    slots = arena.slots_of(asked)
    assert slots.tolist() == [-1, -1, -1, -1]
    assert arena.next_seq_of(asked, slots).tolist() == [100, 101, 102, 0]
    arena.drop(np.array([0, 77]))
    fill(arena, 1)
    arena.drop(np.array([1]))
    assert arena.next_seq_of(asked, arena.slots_of(asked)).tolist() == [0, 0, 102, 0]


@pytest.mark.parametrize("num_rows", [MAX_KEPT, 2 * MAX_LEN, 10 * MAX_LEN])
def test_a_block_never_outgrows_twice_max_len_and_keeps_the_newest(num_rows: int) -> None:
    arena = arena_of_four()
    offsets, columns = as_columns([list(range(100, 100 + num_rows))], [2])
    arena.append(arena.slots_of(np.array([2])), offsets, columns, np.array([200]))
    held = rows_in(arena, 2)
    assert held is not None
    assert MAX_KEPT <= len(held) <= 2 * MAX_LEN
    assert held == [*range(MAX_KEPT), *range(100, 100 + num_rows)][-len(held) :]


def test_more_rows_than_are_kept_leave_no_hole_behind_a_few_that_are_there() -> None:
    arena = arena_of_four()
    slots = arena.slots_of(np.array([2]))
    arena.cut(slots, np.array([2]))
    assert arena.capacity[slots] >= 2 + MAX_KEPT
    offsets, columns = as_columns([list(range(100, 101 + MAX_KEPT))], [2])
    arena.append(slots, offsets, columns, np.array([200]))
    assert rows_in(arena, 2) == list(range(101, 101 + MAX_KEPT))
