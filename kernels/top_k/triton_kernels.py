"""Exact top k in Triton: a chunk's keys in one kernel (product, offset, key), rows left out in a second, then topk.

Shapes: B queries, V catalogue rows, R of them in a chunk, D width, K rows wanted, X rows left out.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.top_k import keys
from kernels.top_k.keys import empty_keys, read_keys
from kernels.triton_support import autotuned, block_size, dot_precision

_LEFT_OUT = tl.constexpr(keys.LEFT_OUT)
_NOT_A_NUMBER = tl.constexpr(keys.NOT_A_NUMBER)
_LAST_ROW = tl.constexpr(keys.LAST_ROW)
_BLOCK_X = 256

_TILES = [
    triton.Config({"BLOCK_B": block_b, "BLOCK_R": block_r}, num_warps=num_warps)
    for block_b, block_r, num_warps in (
        (16, 16, 2),
        (16, 64, 4),
        (16, 128, 4),
        (32, 128, 4),
        (64, 64, 4),
        (64, 128, 8),
        (128, 128, 8),
    )
]


@autotuned(_TILES, key=["width"])
@triton.jit
def _key_kernel(
    u_ptr, item_ptr, offset_ptr, scale_ptr, out_ptr, num_queries, first_row, end_row, out_stride, width,
    HAS_OFFSET: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_D: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """out[B, R]: keys of rows first_row .. end_row, as kernels/top_k/keys.py makes them."""
    queries = tl.program_id(0) * BLOCK_B + tl.arange(0, BLOCK_B)
    rows = first_row + tl.program_id(1).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    columns = tl.arange(0, BLOCK_D)
    query_mask = (queries < num_queries)[:, None] & (columns < width)[None, :]
    row_mask = (rows < end_row)[:, None] & (columns < width)[None, :]
    u_BD = tl.load(u_ptr + queries.to(tl.int64)[:, None] * width + columns[None, :], mask=query_mask, other=0.0)
    item_RD = tl.load(item_ptr + rows[:, None] * width + columns[None, :], mask=row_mask, other=0.0)
    scores = tl.dot(u_BD, tl.trans(item_RD), input_precision=PRECISION) * tl.load(scale_ptr)
    if HAS_OFFSET:
        scores += tl.load(offset_ptr + rows, mask=rows < end_row, other=0.0)[None, :]
    is_nan = scores != scores  # noqa: PLR0124 - true of NaN alone
    scores = tl.where(scores == 0.0, 0.0, scores)  # -0.0 equals 0.0 and must not come after it
    bits = scores.to(tl.int32, bitcast=True)
    bits = tl.where(is_nan, _NOT_A_NUMBER, bits ^ ((bits >> 31) & 0x7FFFFFFF))
    key = (bits.to(tl.int64) << 32) + (-rows + _LAST_ROW)[None, :]
    places = queries.to(tl.int64)[:, None] * out_stride + (rows - first_row)[None, :]
    tl.store(out_ptr + places, key, mask=(queries < num_queries)[:, None] & (rows < end_row)[None, :])


@triton.jit
def _leave_out_kernel(
    query_ptr, row_ptr, out_ptr, num_excluded, first_row, end_row, out_stride, BLOCK_X: tl.constexpr
):  # fmt: skip
    """Overwrites the keys of the rows left out; one entry may be named twice, and rows of other chunks are skipped."""
    entries = tl.program_id(0).to(tl.int64) * BLOCK_X + tl.arange(0, BLOCK_X)
    query = tl.load(query_ptr + entries, mask=entries < num_excluded, other=0)
    row = tl.load(row_ptr + entries, mask=entries < num_excluded, other=-1)
    inside = (row >= first_row) & (row < end_row) & (entries < num_excluded)
    nothing = tl.full([BLOCK_X], _LEFT_OUT, tl.int64)
    tl.store(out_ptr + query * out_stride + (row - first_row), nothing, mask=inside)


def top_k_triton(
    u_BD: Tensor,
    item_VD: Tensor,
    k: int,
    *,
    scale: Tensor,
    offset_V: Tensor | None,
    excluded: tuple[Tensor, Tensor] | None,
    rows_per_chunk: int,
) -> tuple[Tensor, Tensor]:
    """scores_BK and rows_BK of ``top_k``. excluded: (query_X, row_X), int64."""
    u_BD, item_VD, scale = u_BD.contiguous(), item_VD.contiguous(), scale.float()
    num_queries, width = u_BD.shape
    num_items = item_VD.shape[0]
    keys_BKR = empty_keys(num_queries, k, min(rows_per_chunk, num_items), u_BD.device)
    offset_V = None if offset_V is None else offset_V.float().contiguous()
    if not num_queries:
        return read_keys(keys_BKR[:, :k])
    for start in range(0, num_items, rows_per_chunk):
        end = min(start + rows_per_chunk, num_items)

        def grid(meta: dict[str, int], size: int = end - start) -> tuple[int, int]:
            return triton.cdiv(num_queries, meta["BLOCK_B"]), triton.cdiv(size, meta["BLOCK_R"])

        _key_kernel[grid](
            u_BD, item_VD, offset_V, scale, keys_BKR[:, k:], num_queries, start, end, keys_BKR.stride(0), width,
            HAS_OFFSET=offset_V is not None, BLOCK_D=block_size(width), PRECISION=dot_precision(u_BD.dtype),
        )  # fmt: skip
        if excluded is not None and excluded[0].numel():
            query_X, row_X = excluded[0].contiguous(), excluded[1].contiguous()
            _leave_out_kernel[(triton.cdiv(query_X.numel(), _BLOCK_X),)](
                query_X, row_X, keys_BKR[:, k:], query_X.numel(), start, end, keys_BKR.stride(0), BLOCK_X=_BLOCK_X
            )
        keys_BKR[:, :k] = torch.topk(keys_BKR[:, : k + end - start], k, dim=1).values
    return read_keys(keys_BKR[:, :k])
