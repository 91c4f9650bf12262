"""The table of slots is a dictionary, whatever is added and removed."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from feature_store.slot_table import SlotTable

USERS = st.one_of(st.integers(0, 30), st.integers(0, 2**63 - 1))


@given(st.lists(st.tuples(st.booleans(), st.lists(USERS, max_size=12, unique=True)), max_size=12))
def test_it_finds_what_a_dictionary_finds(steps: list[tuple[bool, list[int]]]) -> None:
    table, truth = SlotTable(), dict[int, int]()
    for is_added, users in steps:
        if is_added:
            new = [user for user in users if user not in truth]
            slots = list(range(len(truth), len(truth) + len(new)))
            table.add(np.array(new, np.int64), np.array(slots, np.int64))
            truth |= dict(zip(new, slots, strict=True))
        else:
            freed = table.remove(np.array(users + users, np.int64))
            assert sorted(freed.tolist()) == sorted(truth[user] for user in users if user in truth)
            truth = {user: slot for user, slot in truth.items() if user not in users}
        asked = [*truth, *users, 31, 2**62 + 1]
        assert table.find(np.array(asked, np.int64)).tolist() == [truth.get(user, -1) for user in asked]
        assert sorted(table.slots.tolist()) == sorted(truth.values())
        assert len(table) == len(truth)


def test_it_grows_and_stays_right_under_much_coming_and_going() -> None:
    random = np.random.default_rng(0)
    table, truth = SlotTable(), dict[int, int]()
    for step in range(60):
        new = np.setdiff1d(random.integers(0, 20_000, 600), list(truth))
        slots = np.arange(len(new)) + 1_000 * step
        table.add(new, slots)
        truth |= dict(zip(new.tolist(), slots.tolist(), strict=True))
        gone = random.integers(0, 20_000, 500)
        table.remove(gone)
        for user in gone.tolist():
            truth.pop(user, None)
    everyone = np.arange(20_000)
    assert table.find(everyone).tolist() == [truth.get(user, -1) for user in everyone.tolist()]


def test_a_number_that_is_no_user_id_has_no_slot() -> None:
    table = SlotTable()
    table.add(np.arange(100), np.arange(100))
    table.remove(np.arange(50))
    assert table.find(np.array([-1, -2, -3])).tolist() == [-1, -1, -1]
