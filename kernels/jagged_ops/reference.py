"""Copies between packed rows in plain PyTorch, by index arithmetic: the truth, and the path of the CPU.

A segment is a run of values inside one row: B starts and B lengths name one segment per row.
Shapes: B rows, L packed values of the result, N packed values of a source.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from kernels.jagged import position_index, row_index


@dataclass(frozen=True, kw_only=True, slots=True)
class Segments:
    """starts, lengths: int64[B]; segment b is values[starts[b] : starts[b] + lengths[b]] of the packed values."""

    starts: Tensor
    lengths: Tensor


def take_reference(values: Tensor, segments: Segments, num_values: int) -> Tensor:
    """[L, ...]: the segments of values [N, ...], one after the other. num_values: L, the sum of the lengths."""
    offsets = offsets_of(segments.lengths)
    index_L = segments.starts[row_index(offsets, num_values)] + position_index(offsets, num_values)
    return values.index_select(0, index_L)


def join_reference(left: Tensor, left_of: Segments, right: Tensor, right_of: Segments, num_values: int) -> Tensor:
    """[L, ...]: for each row its segment of left, then that of right. num_values: L, the sum of all lengths."""
    offsets = offsets_of(left_of.lengths + right_of.lengths)
    row_L, position_L = row_index(offsets, num_values), position_index(offsets, num_values)
    behind_L = position_L - left_of.lengths[row_L]
    index_L = torch.where(
        behind_L < 0, left_of.starts[row_L] + position_L, left.shape[0] + right_of.starts[row_L] + behind_L
    )
    return torch.cat([left, right]).index_select(0, index_L)


def offsets_of(lengths: Tensor) -> Tensor:
    """int64[B + 1]: where rows of these lengths begin when packed."""
    return torch.nn.functional.pad(lengths.cumsum(0), (1, 0))
