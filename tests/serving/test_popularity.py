"""Decayed popularity, the fallback order."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from model.item_table import ItemTable
from serving.popularity import LivePopularity, PopularItems
from tests.serving.building import MODEL, NOW_MS

HOUR_MS = 3_600_000


def live(items_max: int = 1_000) -> LivePopularity:
    return LivePopularity(half_life_s=MODEL.trend_half_life_s, floor=MODEL.trend_floor, items_max=items_max)


@given(st.lists(st.tuples(st.integers(0, 40), st.integers(0, 5_000)), max_size=60))
def test_what_a_worker_counts_is_what_the_models_trend_would_say(events: list[tuple[int, int]]) -> None:
    counted, table = live(), ItemTable(MODEL)
    for item_id, hours in events:
        ids, times = np.array([item_id]), np.array([NOW_MS + hours * HOUR_MS])
        counted.add(ids, times)
        table.observe(table.admit(ids), times)
    found, expected = counted.items(), PopularItems.of_table(table)
    assert found.item_ids.tolist() == expected.item_ids.tolist()
    np.testing.assert_allclose(found.scores, expected.scores, rtol=1e-5)


def test_recent_interactions_count_more_than_old_ones() -> None:
    counted = live()
    counted.add(np.array([1, 1, 2]), np.array([NOW_MS - 100 * 24 * HOUR_MS] * 2 + [NOW_MS]))
    assert counted.items().item_ids.tolist() == [2, 1]


def test_equally_popular_items_come_in_order_of_their_ids() -> None:
    counted = live()
    counted.add(np.array([9, 4, 7]), np.full(3, NOW_MS))
    assert counted.items().item_ids.tolist() == [4, 7, 9]


def test_items_left_out_make_room_for_the_next_best() -> None:
    counted = live()
    counted.add(np.repeat(np.arange(5), [5, 4, 3, 2, 1]), np.full(15, NOW_MS))
    found, _ = counted.items().first(2, without=np.array([0, 2, 99]))
    assert found.tolist() == [1, 3]


def test_an_item_nobody_interacted_with_is_known_but_not_popular() -> None:
    table = ItemTable(MODEL)
    table.admit(np.array([1, 2]))
    table.observe(table.lookup(np.array([2])), np.array([NOW_MS]))
    popular = PopularItems.of_table(table)
    assert popular.item_ids.tolist() == [2]
    scores = popular.scores_of(np.array([1, 2, 3]))
    assert scores[0] == pytest.approx(np.log(MODEL.trend_floor))
    assert scores[1] > scores[0]
    assert np.isnan(scores[2])


def test_the_number_of_items_counted_has_a_limit() -> None:
    counted = live(items_max=3)
    for item_id in range(5):
        counted.add(np.array([item_id]), np.array([NOW_MS + item_id]))
    assert sorted(counted.items().item_ids.tolist()) == [0, 1, 2]


def test_nothing_seen_means_nothing_to_recommend() -> None:
    found, scores = live().items().first(3, without=np.empty(0, np.int64))
    assert (len(found), len(scores)) == (0, 0)
    assert np.isnan(live().items().scores_of(np.array([1]))).all()
