"""Copies of ranges are what a loop over their elements gives, for short rows and for long ones."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from feature_store.interactions import COLUMN_DTYPES
from feature_store.jagged import copy_ranges
from feature_store.packed import PackedColumns

NUM_ROWS = 5_000


def random_columns(num_rows: int, seed: int) -> dict[str, NDArray[Any]]:
    random = np.random.default_rng(seed)
    return {
        name: random.integers(0, 200, num_rows * dtype.itemsize, np.uint8).view(dtype)
        for name, dtype in COLUMN_DTYPES.items()
    }


def random_ranges(largest: int, seed: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Ranges that do not overlap, in random order, some of them empty."""
    random = np.random.default_rng(seed)
    starts = random.permutation(np.arange(0, NUM_ROWS - largest, largest))
    return starts, random.integers(0, largest + 1, len(starts)) * (random.random(len(starts)) < 0.9)


@pytest.mark.parametrize("largest", [1, 7, 63, 130, 900])
def test_rows_come_back_as_they_were_written(largest: int) -> None:
    starts, lengths = random_ranges(largest, seed=largest)
    packed = PackedColumns(NUM_ROWS)
    before = random_columns(NUM_ROWS, seed=1)
    packed.write(np.array([0]), np.array([NUM_ROWS]), before)
    new = random_columns(int(lengths.sum()), seed=2)
    packed.write(starts, lengths, new)

    rows = [row for low, n in zip(starts.tolist(), lengths.tolist(), strict=True) for row in range(low, low + n)]
    untouched = np.setdiff1d(np.arange(NUM_ROWS), rows)
    copied = packed.copy(starts, lengths)
    for name, dtype in COLUMN_DTYPES.items():
        assert copied[name].dtype == dtype
        assert copied[name].flags.c_contiguous
        assert copied[name].tobytes() == new[name].tobytes(), name
        assert packed.columns[name][untouched].tobytes() == before[name][untouched].tobytes(), name
        assert not np.shares_memory(copied[name], packed.columns[name])


@pytest.mark.parametrize("largest", [1, 40, 130])
def test_ranges_of_the_last_axis_are_copied_one_after_the_other(largest: int) -> None:
    starts, lengths = random_ranges(largest, seed=largest)
    line = np.random.default_rng(0).random(NUM_ROWS)
    rows = [row for low, n in zip(starts.tolist(), lengths.tolist(), strict=True) for row in range(low, low + n)]
    one, two = copy_ranges((line, np.stack([line, -line])), starts, lengths)
    assert one.tolist() == [line[row] for row in rows]
    assert two.tolist() == [[line[row] for row in rows], [-line[row] for row in rows]]


def test_nothing_is_copied_of_nothing() -> None:
    (nothing,) = copy_ranges((np.arange(3),), np.empty(0, np.int64), np.empty(0, np.int64))
    assert nothing.tolist() == []
