"""What came next is counted as a dictionary would, within its bounds."""

from __future__ import annotations

from collections import defaultdict

import numpy as np
import pytest

from online_trainer.followers import Followers
from tests.online_trainer.row_moves import moves_without


def content(followers: Followers, num_rows: int) -> dict[int, dict[int, float]]:
    found = followers.of(np.arange(num_rows))
    table: dict[int, dict[int, float]] = defaultdict(dict)
    for place, row, weight in zip(found.place_S, found.rows_S, found.log_weight_S, strict=True):
        table[int(place)][int(row)] = float(np.exp(weight))
    return dict(table)


def add(followers: Followers, *pairs: tuple[int, int, float]) -> None:
    rows, next_rows, counts = np.array(pairs).T
    followers.add(rows.astype(np.int64), next_rows.astype(np.int64), np.log(counts))


def test_within_its_bounds_it_is_a_dictionary_of_sums() -> None:
    rng = np.random.default_rng(0)
    followers = Followers(max_items=400, per_item=60)
    expected: dict[int, dict[int, float]] = defaultdict(lambda: defaultdict(float))
    for _ in range(30):
        rows, next_rows = rng.integers(-1, 300, 40), rng.integers(-1, 50, 40)
        counts = rng.uniform(0.1, 3, 40)
        followers.add(rows, next_rows, np.log(counts))
        for row, next_row, count in zip(rows.tolist(), next_rows.tolist(), counts.tolist(), strict=True):
            if row >= 0 and next_row >= 0 and row != next_row:
                expected[row][next_row] += count
    assert content(followers, 300) == {
        row: pytest.approx({next_row: pytest.approx(count) for next_row, count in of_row.items()})
        for row, of_row in sorted(expected.items())
    }


def test_a_newcomer_takes_the_place_of_the_lightest() -> None:
    followers = Followers(max_items=10, per_item=2)
    add(followers, (0, 1, 5.0), (0, 2, 3.0))
    add(followers, (0, 3, 1.0))
    assert content(followers, 4) == {0: pytest.approx({1: 5.0, 3: 1.0})}


def test_of_more_newcomers_than_places_the_heaviest_stay() -> None:
    followers = Followers(max_items=10, per_item=2)
    add(followers, (0, 1, 1.0), (0, 2, 2.0), (0, 3, 3.0), (0, 1, 0.5), (5, 2, 1.0))
    assert content(followers, 6) == {0: pytest.approx({2: 2.0, 3: 3.0}), 5: pytest.approx({2: 1.0})}


def test_beyond_its_items_those_followed_longest_ago_make_room() -> None:
    followers = Followers(max_items=16, per_item=2)
    for row in range(16):
        add(followers, (row, 100, 1.0))
    add(followers, (0, 101, 1.0))
    add(followers, (50, 100, 1.0))
    # An eighth of sixteen is two: the oldest but for 0, which was followed again.
    assert sorted(content(followers, 60)) == [0, *range(3, 16), 50]


def test_a_batch_of_more_items_than_it_holds_ends_with_as_many() -> None:
    followers = Followers(max_items=8, per_item=2)
    followers.add(np.arange(30), np.full(30, 99), np.zeros(30))
    assert len(content(followers, 30)) <= 8
    assert len(followers.state()["row_of_slot"]) == 8


def test_a_removed_item_neither_is_followed_nor_follows_and_the_last_row_takes_its_place() -> None:
    followers = Followers(max_items=10, per_item=3)
    add(followers, (0, 1, 1.0), (0, 2, 1.0), (1, 0, 1.0), (2, 0, 1.0), (2, 1, 1.0))
    followers.follow(moves_without([1], num_before=3))
    assert content(followers, 3) == {0: pytest.approx({1: 1.0}), 1: pytest.approx({0: 1.0})}, "what was 2 is 1"
    add(followers, (2, 1, 4.0))
    assert content(followers, 3)[2] == pytest.approx({1: 4.0}), "a newcomer begins with nothing"
    followers.follow(moves_without([0, 1, 2], num_before=3))
    assert content(followers, 3) == {}


def random_add(followers: Followers, rng: np.random.Generator, times: int) -> None:
    for _ in range(times):
        followers.add(rng.integers(0, 60, 20), rng.integers(0, 30, 20), rng.normal(size=20))


def test_restored_it_continues_bit_by_bit() -> None:
    followers, again = Followers(max_items=20, per_item=4), Followers(max_items=20, per_item=4)
    random_add(followers, np.random.default_rng(1), 20)
    again.load_state(followers.state())
    for each in (followers, again):
        random_add(each, np.random.default_rng(2), 20)
    for name, array in followers.state().items():
        np.testing.assert_array_equal(array, again.state()[name])


@pytest.mark.parametrize(("max_items", "per_item"), [(20, 2), (7, 4), (7, 2), (90, 9)])
def test_restored_under_other_bounds_it_keeps_the_heaviest_and_the_newest(max_items: int, per_item: int) -> None:
    followers = Followers(max_items=20, per_item=4)
    random_add(followers, np.random.default_rng(1), 20)
    before = content(followers, 60)
    again = Followers(max_items=max_items, per_item=per_item)
    again.load_state(followers.state())
    after = content(again, 60)
    assert len(after) == min(len(before), max_items)
    for row, of_row in after.items():
        heaviest = sorted(before[row], key=lambda follower: -before[row][follower])[:per_item]
        assert of_row == {follower: before[row][follower] for follower in sorted(of_row)}
        assert sorted(of_row) == sorted(heaviest)
    random_add(again, np.random.default_rng(2), 5)
    assert len(content(again, 60)) <= max_items
