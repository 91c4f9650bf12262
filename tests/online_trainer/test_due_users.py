"""Who is due when, and how far the log counts as done: checked against a plain model as well."""

from __future__ import annotations

from typing import Any

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from feature_store.interactions import Interactions
from online_trainer.due_users import DueUsers
from stream.messages import HistoryUpdate

BUY = 2


def update(*rows: tuple[int, int], action: int = BUY, append_ms: int = 0, forgotten: tuple[int, ...] = ()) -> Any:
    """One message that announces (user, seq)."""
    n = len(rows)
    user_id, seq = np.array(rows, np.int64).reshape(-1, 2).T
    interactions = Interactions(
        user_id=user_id.copy(),
        item_id=np.zeros(n, np.int64),
        event_time_ms=np.full(n, 5, np.int64),
        action=np.full(n, action, np.uint32),
        value=np.zeros(n, np.float32),
        event_key=np.zeros(n, np.uint64),
        seq=seq.astype(np.uint32),
        arrival_ms=np.zeros(n, np.int64),
    )
    return HistoryUpdate(
        log_id="main",
        partition=0,
        first_offset=0,
        last_offset=n,
        watermark_ms=0,
        offsets=np.arange(n),
        append_ms=np.full(n, append_ms, np.int64),
        interactions=interactions,
        forgotten=forgotten,
    )


def due_users(debounce_ms: int = 1_000) -> DueUsers:
    due = DueUsers(action_mask=BUY, debounce_ms=debounce_ms)
    due.begin({0: 0, 1: 0})
    return due


def ids(users: Any) -> list[int]:
    return [one.user_id for one in users]


def test_only_the_actions_that_matter_make_somebody_due() -> None:
    due = due_users()
    due.add(0, 0, update((1, 0), action=1), now_s=0, now_ms=0)
    due.add(0, 1, update((2, 0), action=3), now_s=0, now_ms=0)
    assert ids(due.take(10, 10)) == [2]
    assert due.num_asked == 1


def test_a_user_waits_a_debounce_from_its_first_event_and_is_computed_once_for_all() -> None:
    due = due_users()
    due.add(0, 0, update((1, 0)), now_s=0, now_ms=0)
    due.add(0, 1, update((1, 1), (1, 2)), now_s=0.9, now_ms=0)
    assert due.take(0.99, 10) == []
    (one,) = due.take(1.0, 10)
    assert (one.user_id, one.below_seq, one.event_time_ms) == (1, 3, [5, 5, 5])
    due.done([one])
    assert due.num_waiting == 0
    assert due.positions() == {0: 2, 1: 0}


def test_what_has_waited_in_the_log_waits_no_longer() -> None:
    due = due_users()
    due.add(0, 0, update((1, 0), append_ms=100), now_s=50, now_ms=700)
    due.add(0, 1, update((2, 0), append_ms=-9_999), now_s=50, now_ms=700)
    due.add(0, 2, update((3, 0), append_ms=9_999), now_s=50, now_ms=700)  # a broker whose clock runs ahead
    assert due.first_due_s() == 50
    assert ids(due.take(50, 10)) == [2]
    due.done([])
    due.put_back()
    assert ids(due.take(50.4, 10)) == [2, 1]
    due.put_back()
    assert ids(due.take(51, 10)) == [2, 1, 3]


def test_the_log_is_done_up_to_whoever_still_waits() -> None:
    due = due_users()
    due.add(0, 0, update((1, 0)), now_s=0, now_ms=0)
    due.add(0, 1, update((2, 0)), now_s=0, now_ms=0)
    due.add(1, 0, update((1, 1)), now_s=0, now_ms=0)
    due.add(0, 2, update((1, 2)), now_s=0, now_ms=0)
    first = due.take(5, 1)
    assert ids(first) == [1]
    assert due.positions() == {0: 0, 1: 0}
    assert due.positions(first) == {0: 1, 1: 1}
    assert due.positions() == {0: 0, 1: 0}  # asking changes nothing
    due.add(0, 3, update((1, 3)), now_s=0, now_ms=0)
    due.done(first)
    assert due.positions() == {0: 1, 1: 1}
    second = due.take(5, 1)
    due.done(second)
    assert due.positions() == {0: 3, 1: 1}


def test_messages_read_again_and_forgotten_users_ask_for_nothing() -> None:
    due = due_users()
    due.begin({0: 5})
    due.add(0, 4, update((1, 0)), now_s=0, now_ms=0)
    due.add(0, 5, update((2, 0), (3, 0)), now_s=0, now_ms=0)
    due.add(0, 6, update(forgotten=(2,)), now_s=0, now_ms=0)
    assert ids(due.take(9, 9)) == [3]
    due.forget([3])
    assert due.positions() == {0: 7}
    assert due.oldest_append_ms() is None


def test_until_a_user_is_forgotten_further_on_nothing_is_asked_of_it() -> None:
    due = due_users()
    due.forget_ahead(0, (2,), 2)
    due.add(0, 0, update((2, 5)), now_s=0, now_ms=0)
    due.add(0, 1, update((2, 6), (3, 0)), now_s=0, now_ms=0)
    due.add(1, 0, update((2, 7)), now_s=0, now_ms=0)  # of another partition, where that is not yet to come
    assert {(one.user_id, one.below_seq) for one in due.take(9, 9)} == {(3, 1), (2, 8)}
    due.put_back()
    due.add(0, 2, update(forgotten=(2,)), now_s=0, now_ms=0)
    due.add(0, 3, update((2, 0)), now_s=0, now_ms=0)
    assert {(one.user_id, one.below_seq) for one in due.take(9, 9)} == {(3, 1), (2, 1)}


@given(
    st.lists(
        st.one_of(
            st.tuples(st.just("add"), st.integers(0, 1), st.integers(0, 4)),
            st.tuples(st.just("take"), st.integers(1, 3), st.booleans()),
            st.tuples(st.just("forget"), st.integers(0, 4), st.just(0)),
        ),
        max_size=40,
    )
)
def test_positions_are_those_of_a_plain_model(steps: list[tuple[str, int, int]]) -> None:
    due = due_users(debounce_ms=0)
    waiting: dict[int, dict[int, int]] = {}  # user → partition → first offset
    read = {0: 0, 1: 0}
    for step, first, second in steps:
        if step == "add":
            due.add(first, read[first], update((second, 0)), now_s=0, now_ms=0)
            waiting.setdefault(second, {}).setdefault(first, read[first])
            read[first] += 1
        elif step == "take":
            users = due.take(0, first)
            assert len(users) == min(first, len(waiting))
            if second:
                due.done(users)
                for one in users:
                    del waiting[one.user_id]
            due.put_back()
        else:
            due.forget([first])
            waiting.pop(first, None)
        expected = {p: min([at[p] for at in waiting.values() if p in at], default=read[p]) for p in read}
        assert due.positions() == expected
        assert due.num_waiting == len(waiting)
