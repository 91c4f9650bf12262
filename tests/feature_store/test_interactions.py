"""Columns are checked once, when they are put together."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from feature_store.interactions import AppendResult, Interactions, JaggedHistories
from tests.feature_store.truth import Row, batch

ROWS = [Row(1, 10, 5), Row(2, 20, 6), Row(1, 30, 7)]


def test_a_column_of_another_type_is_refused_with_the_fix() -> None:
    good = batch(ROWS)
    with pytest.raises(ValueError, match=r"Interactions.action must be uint32\[3\], not int64\[3\]: convert"):
        dataclasses.replace(good, action=good.action.astype(np.int64))


def test_columns_of_different_lengths_are_refused() -> None:
    good = batch(ROWS)
    with pytest.raises(ValueError, match=r"event_key must be uint64\[3\], not uint64\[2\]"):
        dataclasses.replace(good, event_key=good.event_key[:2])


def test_rows_are_taken_by_index_mask_or_slice() -> None:
    good = batch(ROWS)
    assert good.take(np.array([2, 0])).event_time_ms.tolist() == [30, 10]
    assert good.take(good.user_id == 1).event_time_ms.tolist() == [10, 30]
    assert good.take(slice(1, None)).event_time_ms.tolist() == [20, 30]


def test_parts_are_put_together_in_order() -> None:
    whole = Interactions.concat([batch(ROWS[:1]), Interactions.empty(), batch(ROWS[1:])])
    assert whole.event_time_ms.tolist() == [10, 20, 30]
    assert len(Interactions.concat([])) == 0


def test_offsets_that_do_not_bound_the_columns_are_refused() -> None:
    empty = JaggedHistories.empty(np.array([1, 2]))
    assert empty.lengths().tolist() == [0, 0]
    with pytest.raises(ValueError, match=r"must be int64\[1\], not int64\[0\]"):
        dataclasses.replace(empty, offsets=np.array([0, 1, 1]))
    with pytest.raises(ValueError, match="never fall"):
        dataclasses.replace(empty, offsets=np.array([0, 1, 0]))


def test_what_was_accepted_carries_its_seq() -> None:
    result = AppendResult(
        accepted=np.array([True, False, True]),
        seq=np.array([4, 0, 5], np.uint32),
        late=np.zeros(3, np.bool_),
        expired=np.zeros(3, np.bool_),
    )
    accepted = result.accepted_from(batch(ROWS))
    assert accepted.event_time_ms.tolist() == [10, 30]
    assert accepted.seq.tolist() == [4, 5]
