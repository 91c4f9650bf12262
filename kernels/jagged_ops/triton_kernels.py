"""Copies between packed rows in Triton: one kernel that copies a segment per row, and its launchers.

Shapes: B rows, N packed values of the source, L of the target, W elements of one value.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.jagged_ops.reference import Segments, offsets_of
from kernels.triton_support import autotuned, block_size

_BLOCK_W_MAX = 256
_CONFIGS = [triton.Config({"BLOCK_N": size}, num_warps=warps) for size, warps in ((4, 2), (16, 4), (64, 4), (64, 8))]


@autotuned(_CONFIGS, key=["width"])
@triton.jit
def _copy_kernel(
    source_ptr, target_ptr, source_starts_ptr, target_starts_ptr, lengths_ptr, num_sources, num_targets, width,
    BLOCK_N: tl.constexpr, BLOCK_W: tl.constexpr,
):  # fmt: skip
    """target[target_starts[b] + i] = source[source_starts[b] + i] for i < lengths[b]; b is the first grid dimension."""
    row = tl.program_id(0)
    length = tl.load(lengths_ptr + row)
    places = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    columns = tl.program_id(2) * BLOCK_W + tl.arange(0, BLOCK_W)
    from_place = tl.load(source_starts_ptr + row) + places
    to_place = tl.load(target_starts_ptr + row) + places
    # A caller may have given a wrong total: then values are missing, but no foreign memory is touched.
    exists = (places < length) & (from_place < num_sources) & (to_place < num_targets)
    inside = exists[:, None] & (columns < width)[None, :]
    copied = tl.load(source_ptr + from_place[:, None] * width + columns[None, :], mask=inside)
    tl.store(target_ptr + to_place[:, None] * width + columns[None, :], copied, mask=inside)


def take_triton(values: Tensor, segments: Segments, num_values: int, max_len: int) -> Tensor:
    """``take_reference``; no segment is longer than max_len."""
    taken = values.new_empty(num_values, *values.shape[1:])
    _copy(values, segments.starts, taken, offsets_of(segments.lengths)[:-1], segments.lengths, max_len)
    return taken


def join_triton(
    left: Tensor, left_of: Segments, right: Tensor, right_of: Segments, num_values: int, max_len: int
) -> Tensor:
    """``join_reference``; no segment is longer than max_len."""
    joined = left.new_empty(num_values, *left.shape[1:])
    starts = offsets_of(left_of.lengths + right_of.lengths)[:-1]
    _copy(left, left_of.starts, joined, starts, left_of.lengths, max_len)
    _copy(right, right_of.starts, joined, starts + left_of.lengths, right_of.lengths, max_len)
    return joined


def spread_triton(values: Tensor, starts: Tensor, segments: Segments, num_values: int, max_len: int) -> Tensor:
    """[num_values, ...]: ``segments`` of it hold the values that begin at ``starts``, everything else is 0."""
    spread = values.new_zeros(num_values, *values.shape[1:])
    _copy(values, starts, spread, segments.starts, segments.lengths, max_len)
    return spread


def _copy(
    source: Tensor, source_starts: Tensor, target: Tensor, target_starts: Tensor, lengths: Tensor, max_len: int
) -> None:
    assert target.is_contiguous()
    width = source[0].numel() if source.shape[0] else 0
    if not (lengths.shape[0] and width and max_len):
        return
    if source.dtype == torch.bool:
        source, target = source.view(torch.uint8), target.view(torch.uint8)
    block_w = min(_BLOCK_W_MAX, block_size(width, smallest=1))

    def grid(meta: dict[str, int]) -> tuple[int, int, int]:
        return lengths.shape[0], triton.cdiv(max_len, meta["BLOCK_N"]), triton.cdiv(width, block_w)

    _copy_kernel[grid](
        source.contiguous(), target, source_starts.contiguous(), target_starts.contiguous(), lengths.contiguous(),
        source.shape[0], target.shape[0], width, BLOCK_W=block_w,
    )  # fmt: skip
