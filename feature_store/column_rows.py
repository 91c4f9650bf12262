"""The seven columns of many interactions, read and written in ranges of rows."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from feature_store.interactions import COLUMN_DTYPES, Columns
from feature_store.jagged import concat_ranges, copy_ranges, offsets_of

_LONG: Final = 96
"""Mean length from which a slice assignment per range and column beats an index per element (measured)."""


class ColumnRows:
    """The columns of R interactions; what is in them at first is undefined."""

    def __init__(self, num_rows: int) -> None:
        # Reserved address space: the operating system gives memory only to the part that has been written.
        self.columns: Mapping[str, NDArray[Any]] = {n: np.empty(num_rows, dtype) for n, dtype in COLUMN_DTYPES.items()}
        """The columns, each R long; writing to them writes here."""

    def copy(self, starts: NDArray[np.int64], lengths: NDArray[np.int64]) -> dict[str, NDArray[Any]]:
        """The columns of the rows `[starts[b], starts[b] + lengths[b])`, back to back, in new memory."""
        return dict(zip(self.columns, copy_ranges(self.columns.values(), starts, lengths), strict=True))

    def write(self, starts: NDArray[np.int64], lengths: NDArray[np.int64], columns: Columns) -> None:
        """Set the rows `[starts[b], starts[b] + lengths[b])` to the columns' rows, which lie back to back."""
        if lengths.sum() <= _LONG * len(lengths):
            index = concat_ranges(starts, lengths)
            for name, column in self.columns.items():
                column[index] = columns[name]
            return
        bounds = offsets_of(lengths).tolist()
        targets = list(map(slice, starts.tolist(), (starts + lengths).tolist()))
        sources = list(map(slice, bounds[:-1], bounds[1:]))
        for name, column in self.columns.items():
            given = columns[name]
            for target, source in zip(targets, sources, strict=True):
                column[target] = given[source]
