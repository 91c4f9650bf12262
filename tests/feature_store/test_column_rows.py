"""Copies of ranges are what a loop over their elements gives, for short rows and for long ones."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from feature_store.column_rows import ColumnRows
from feature_store.interactions import COLUMN_DTYPES
from feature_store.jagged import copy_ranges

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
    held = ColumnRows(NUM_ROWS)
    before = random_columns(NUM_ROWS, seed=1)
    held.write(np.array([0]), np.array([NUM_ROWS]), before)
    new = random_columns(int(lengths.sum()), seed=2)
    held.write(starts, lengths, new)

    rows = [row for low, n in zip(starts.tolist(), lengths.tolist(), strict=True) for row in range(low, low + n)]
    untouched = np.setdiff1d(np.arange(NUM_ROWS), rows)
    copied = held.copy(starts, lengths)
    for name, dtype in COLUMN_DTYPES.items():
        assert copied[name].dtype == dtype
        assert copied[name].flags.c_contiguous
        assert copied[name].flags.writeable
        assert copied[name].tobytes() == new[name].tobytes(), name
        assert held.columns[name][untouched].tobytes() == before[name][untouched].tobytes(), name
        assert not np.shares_memory(copied[name], held.columns[name])


def test_nothing_is_copied_of_nothing() -> None:
    (nothing,) = copy_ranges((np.arange(3),), np.empty(0, np.int64), np.empty(0, np.int64))
    assert nothing.tolist() == []
