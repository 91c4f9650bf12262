"""Index arithmetic on jagged rows, without loops over rows."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray


def offsets_of(lengths: NDArray[np.integer[Any]]) -> NDArray[np.int64]:
    """Row boundaries i64[B + 1] of rows with these lengths."""
    offsets = np.zeros(len(lengths) + 1, np.int64)
    np.cumsum(lengths, out=offsets[1:])
    return offsets


def concat_ranges(starts: NDArray[np.int64], lengths: NDArray[np.int64]) -> NDArray[np.int64]:
    """`starts[0], starts[0] + 1, …, starts[0] + lengths[0] - 1, starts[1], …`: the indices of all rows' elements."""
    offsets = offsets_of(lengths)
    index = np.arange(offsets[-1])
    index += np.repeat(starts - offsets[:-1], lengths)
    return index


def rank_in_group(groups: NDArray[np.int64], num_groups: int) -> NDArray[np.int64]:
    """For sorted group numbers i64[N]: how many earlier elements belong to the same group."""
    starts = offsets_of(np.bincount(groups, minlength=num_groups))
    return np.arange(len(groups)) - starts[groups]
