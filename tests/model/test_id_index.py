"""The id index behaves like a dictionary."""

from __future__ import annotations

import numpy as np

from model.id_index import IdIndex


def test_random_adds_and_removals_leave_what_a_dictionary_would_hold() -> None:
    rng = np.random.default_rng(3)
    index, truth = IdIndex(num_slots=4), dict[int, int]()
    next_row = 0
    for _ in range(60):
        ids = np.unique(rng.integers(0, 5000, size=rng.integers(0, 80)))
        new = np.array([i for i in ids.tolist() if i not in truth], dtype=np.int64)
        index.put(new, np.arange(next_row, next_row + len(new)))
        truth |= dict(zip(new.tolist(), range(next_row, next_row + len(new)), strict=True))
        next_row += len(new)
        gone = rng.choice(ids, size=len(ids) // 3, replace=False) if len(ids) else ids
        index.remove(gone)
        for i in gone.tolist():
            truth.pop(i)
    everything = np.arange(-3, 5000)
    assert index.find(everything).tolist() == [truth.get(i, -1) for i in everything.tolist()]


def test_ids_that_share_a_slot_are_all_found() -> None:
    index = IdIndex(num_slots=2)
    ids = np.array([2**62, 2**62 + 1, 0, 2**63 - 1])
    index.put(ids, np.arange(4))
    assert index.find(ids).tolist() == [0, 1, 2, 3]


def test_an_index_that_grows_answers_alike_while_its_ids_move() -> None:
    rng = np.random.default_rng(5)
    index, truth = IdIndex(num_slots=1 << 16), dict[int, int]()
    ids = rng.permutation(1 << 17)[:60_000]
    moving = 0
    for number, some in enumerate(np.split(ids, 600)):
        rows = np.arange(number * 100, number * 100 + 100)
        index.put(some, rows)
        truth |= dict(zip(some.tolist(), rows.tolist(), strict=True))
        gone = rng.choice(ids[: (number + 1) * 100], 20)
        index.remove(np.unique(gone))
        for i in gone.tolist():
            truth.pop(i, None)
        back = np.array([i for i in np.unique(gone[:5]).tolist() if i not in truth])
        index.put(back, back)
        truth |= dict(zip(back.tolist(), back.tolist(), strict=True))
        if index._old is not None:
            moving += 1
            everything = np.arange(0, 1 << 17, 7)
            assert index.find(everything).tolist() == [truth.get(i, -1) for i in everything.tolist()]
            copy = index.roomier(1 << 17)
            assert copy is not None
            assert copy.find(everything).tolist() == index.find(everything).tolist()
    assert moving > 5
    everything = np.arange(1 << 17)
    assert index.find(everything).tolist() == [truth.get(i, -1) for i in everything.tolist()]


def test_slots_found_beforehand_are_those_that_put_would_take() -> None:
    rng = np.random.default_rng(3)
    ahead, direct = IdIndex(num_slots=64), IdIndex(num_slots=64)
    ids = rng.choice(1 << 62, 30, replace=False)
    for some in (ids[:20], ids[20:20], ids[20:]):
        rows = np.arange(len(some))
        slots = ahead.free_slots(some)
        assert (ahead.find(some) == -1).all(), "looking for slots changes nothing"
        ahead.fill(slots, some, rows)
        direct.put(some, rows)
    assert ahead.find(ids).tolist() == direct.find(ids).tolist()
    assert ahead.roomier(2) is None
    roomier = ahead.roomier(3)
    assert roomier is not None
    assert roomier.find(ids).tolist() == ahead.find(ids).tolist()
