"""Many interactions in two matrices, one for the columns of 8 bytes and one for those of 4.

A row of a matrix is a column of the interactions, so every column is contiguous, and one slice of a matrix copies
several columns at once: half the work of a gather is the copying of 512 values at a time, not the counting of them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from feature_store.interactions import COLUMN_DTYPES, Columns
from feature_store.jagged import concat_ranges, copy_ranges

_WIDE: Final = {name: dtype for name, dtype in COLUMN_DTYPES.items() if dtype.itemsize == 8}
_NARROW: Final = {name: dtype for name, dtype in COLUMN_DTYPES.items() if dtype.itemsize == 4}
_LONG: Final = 96
"""Mean length from which a slice assignment per row and column beats an index per element (measured)."""


class PackedColumns:
    """The seven columns of R interactions; what is in them at first is undefined."""

    def __init__(self, num_rows: int) -> None:
        # Reserved address space: the operating system gives memory only to the part that has been written.
        self._wide = np.empty((len(_WIDE), num_rows), np.uint64)
        self._narrow = np.empty((len(_NARROW), num_rows), np.uint32)
        self.columns: Mapping[str, NDArray[Any]] = _unpacked(self._wide, self._narrow)
        """The columns, each R long; writing to them writes here."""

    def copy(self, starts: NDArray[np.int64], lengths: NDArray[np.int64]) -> dict[str, NDArray[Any]]:
        """The columns of the rows `[starts[b], starts[b] + lengths[b])`, back to back, in new memory."""
        wide, narrow = copy_ranges((self._wide, self._narrow), starts, lengths)
        return _unpacked(wide, narrow)

    def write(self, starts: NDArray[np.int64], lengths: NDArray[np.int64], columns: Columns) -> None:
        """Set the rows `[starts[b], starts[b] + lengths[b])` to the columns' rows, which lie back to back."""
        if lengths.sum() <= _LONG * len(lengths):
            index = concat_ranges(starts, lengths)
            for name, column in self.columns.items():
                column[index] = columns[name]
            return
        source_ends = np.cumsum(lengths)
        spans = list(
            zip(
                starts.tolist(),
                (starts + lengths).tolist(),
                (source_ends - lengths).tolist(),
                source_ends.tolist(),
                strict=True,
            )
        )
        for name, column in self.columns.items():
            source = columns[name]
            for low, high, source_low, source_high in spans:
                column[low:high] = source[source_low:source_high]


def _unpacked(wide: NDArray[np.uint64], narrow: NDArray[np.uint32]) -> dict[str, NDArray[Any]]:
    columns = {name: row.view(dtype) for (name, dtype), row in zip(_WIDE.items(), wide, strict=True)}
    return columns | {name: row.view(dtype) for (name, dtype), row in zip(_NARROW.items(), narrow, strict=True)}
