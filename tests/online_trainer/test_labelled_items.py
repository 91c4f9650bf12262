"""What the ranking head is shown: histories of what had happened and had arrived before, and nothing else."""

from __future__ import annotations

import numpy as np
import pytest

from feature_store.hot import HotHistories
from feature_store.interactions import Interactions
from feature_store.store import FeatureStore
from online_trainer.labelled_items import LabelledItems, histories_before
from tests.online_trainer.conftest import HOT, record_stream, walks

NEVER = np.iinfo(np.int64).max


def one_user(times_ms: list[int], arrivals_ms: list[int]) -> Interactions:
    """Items 0, 1, 2 … in order of arrival."""
    num = len(times_ms)
    return Interactions(
        user_id=np.full(num, 7),
        item_id=np.arange(num),
        event_time_ms=np.array(times_ms, np.int64),
        action=np.ones(num, np.uint32),
        value=np.full(num, np.nan, np.float32),
        event_key=np.arange(num, dtype=np.uint64) + 1,
        seq=np.zeros(num, np.uint32),
        arrival_ms=np.array(arrivals_ms, np.int64),
    )


def shown(moments: list[tuple[int, int, int]], lengths: list[int] | None = None) -> LabelledItems:
    """Rows of user 7: (shown at, arrived before, arrival number below)."""
    columns = np.array(moments, np.int64).T
    lengths = lengths or [1] * len(moments)
    num = sum(lengths)
    return LabelledItems(
        user_id=np.full(len(moments), 7),
        shown_at_ms=columns[0],
        known_before_ms=columns[1],
        written_before_ms=columns[1],
        below_seq=columns[2],
        surface=np.arange(len(moments), dtype=np.uint8),
        offsets=np.concatenate([[0], np.cumsum(lengths)]),
        item_id=np.arange(num),
        action=np.arange(num, dtype=np.uint32),
        value=np.zeros(num, np.float32),
        is_measured=np.ones(num, np.bool_),
    )


def items_before(store: FeatureStore, moments: list[tuple[int, int, int]], *, max_len: int = 4) -> list[list[int]]:
    found = histories_before(shown(moments), HotHistories(store, HOT), max_len=max_len)
    return [part.tolist() for part in np.split(found.item_id, found.offsets[1:-1])]


def test_a_history_ends_strictly_before_the_items_were_shown(store: FeatureStore) -> None:
    record_stream(store, one_user([10, 20, 30, 40], [10, 20, 30, 40]))
    assert items_before(store, [(30, NEVER, NEVER), (31, NEVER, NEVER), (10, NEVER, NEVER)]) == [[0, 1], [0, 1, 2], []]


def test_what_happened_before_and_arrived_after_is_left_out(store: FeatureStore) -> None:
    # Item 2 happened first and arrived last: nobody knew of it at 35.
    record_stream(store, one_user([10, 20, 5], [10, 20, 50]))
    assert items_before(store, [(35, 35, NEVER), (60, 60, NEVER), (35, NEVER, 2)]) == [[0, 1], [2, 0, 1], [0, 1]]


def test_of_a_long_history_the_newest_are_read(store: FeatureStore) -> None:
    record_stream(store, one_user(list(range(10, 16)), list(range(10, 16))))
    assert items_before(store, [(14, NEVER, NEVER)], max_len=2) == [[2, 3]]


def test_interactions_are_items_met_when_they_happened(store: FeatureStore) -> None:
    new = record_stream(store, walks(60, num_users=3)).updates[-1].interactions
    found = histories_before(LabelledItems.of_interactions(new), HotHistories(store, HOT), max_len=4)
    for row, (user, time_ms) in enumerate(zip(new.user_id.tolist(), new.event_time_ms.tolist(), strict=True)):
        part = slice(found.offsets[row], found.offsets[row + 1])
        assert found.user_ids[row] == user
        assert (found.event_time_ms[part] < time_ms).all()
        assert part.stop - part.start == 4


def test_long_rows_are_cut_and_empty_ones_go() -> None:
    items = shown([(10, NEVER, NEVER), (20, NEVER, NEVER), (30, NEVER, NEVER)], [5, 1, 2])
    kept = items.take(np.array([1, 1, 0, 1, 1, 0, 1, 1], np.bool_), max_items=3)
    assert kept.item_id.tolist() == [0, 1, 3, 4, 6, 7]
    assert kept.offsets.tolist() == [0, 3, 4, 6]
    assert kept.shown_at_ms.tolist() == [10, 10, 30]
    assert kept.surface.tolist() == [0, 0, 2]
    assert len(items.take(np.zeros(8, np.bool_), max_items=3)) == 0


def test_rows_of_several_parts_follow_each_other() -> None:
    joined = LabelledItems.concat([shown([(10, 1, 2)], [2]), shown([(20, 3, 4), (30, 5, 6)], [1, 3])])
    assert joined.offsets.tolist() == [0, 2, 3, 6]
    assert joined.known_before_ms.tolist() == [1, 3, 5]
    assert joined.as_interactions().event_time_ms.tolist() == [10, 10, 20, 30, 30, 30]
    assert joined.as_interactions().surface.tolist() == [0, 0, 0, 1, 1, 1]


@pytest.mark.parametrize("name", ["item_id", "action", "value"])
def test_a_file_gets_what_was_shown_item_by_item(name: str) -> None:
    items = shown([(10, 1, 2), (20, 1, 2)], [1, 2])
    assert getattr(items.as_interactions(), name).tolist() == getattr(items, name).tolist()
