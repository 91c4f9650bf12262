"""Exact maximum inner product search; which implementation runs is decided here.

Shapes: B queries, V catalogue rows, D width, K rows wanted, X rows left out, of all queries together.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from kernels.implementations import KernelName, choose
from kernels.jagged import JaggedTensor, row_index
from kernels.operators import operator
from kernels.top_k.cpu import top_k_cpu
from kernels.top_k.reference import top_k_reference

ROWS_PER_CHUNK = 8192
"""Rows scored at once at least: 64 KiB of keys per query."""
SCORES_PER_CHUNK = 1 << 18
"""Few queries take more rows at once, up to so many scores together (1 MiB): a chunk costs some 0.2 ms besides."""
ROWS_MAX = 1 << 32
"""Row numbers fill the lower half of a key."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TopK:
    """scores_BK: float32[B, K], descending. rows_BK: int64[B, K]. -inf and -1 where fewer than k rows remain."""

    scores_BK: Tensor
    rows_BK: Tensor


@torch.no_grad()
def top_k(
    u_BD: Tensor,
    item_VD: Tensor,
    k: int,
    *,
    scale: Tensor | float = 1.0,
    offset_V: Tensor | None = None,
    excluded: JaggedTensor | None = None,
    rows_per_chunk: int | None = None,
    kernel: KernelName = "auto",
) -> TopK:
    """The k rows v with the largest ``scale * u . item[v] + offset[v]`` for each query, exactly; equals by lower row.

    u_BD, item_VD: float[B, D] and float[V, D] of one dtype and device. scale: float or scalar tensor. offset_V:
    float[V]. excluded: jagged int64, B rows of row numbers a query must not get (already seen); numbers outside the
    catalogue are ignored. Scores are float32; -inf ranks last among numbers, and NaN after it. No more than
    rows_per_chunk scores per query exist at once (the reference, for debugging, holds all), by default 8,192, or more
    for few queries. No gradient.
    ValueError for wrong shapes, dtypes or devices.
    """
    _check(u_BD, item_VD, k, offset_V, excluded)
    if rows_per_chunk is None:
        rows_per_chunk = max(ROWS_PER_CHUNK, SCORES_PER_CHUNK // max(1, u_BD.shape[0]))
    if rows_per_chunk < 1:
        raise ValueError(f"rows_per_chunk is {rows_per_chunk}; it must be 1 or more rows")
    if not isinstance(scale, Tensor):
        scale = torch.full((), scale, dtype=torch.float64, device=u_BD.device)
    elif scale.dim() or not scale.is_floating_point() or scale.device != u_BD.device:
        raise ValueError(
            f"scale must be a float or a scalar tensor on {u_BD.device}, got {scale.dtype}{list(scale.shape)} on"
            f" {scale.device}"
        )
    implementation = choose(kernel, u_BD.device, has_cpu_path=True)
    if implementation == "triton" and u_BD.dtype == torch.float64:
        raise ValueError("u_BD and item_VD are float64; kernel='triton' takes float32 or smaller: use 'reference'")
    offsets, row_X = (None, None) if excluded is None else (excluded.offsets, excluded.values)
    scores_BK, rows_BK = _top_k(u_BD, item_VD, k, scale, offset_V, offsets, row_X, rows_per_chunk, implementation)
    return TopK(scores_BK=scores_BK, rows_BK=rows_BK)


@operator("top_k")
def _top_k(
    u: Tensor,
    item: Tensor,
    k: int,
    scale: Tensor,
    offset: Tensor | None,
    excluded_offsets: Tensor | None,
    excluded_rows: Tensor | None,
    rows_per_chunk: int,
    implementation: str,
) -> tuple[Tensor, Tensor]:
    excluded = None
    if excluded_offsets is not None and excluded_rows is not None:
        excluded = (excluded_offsets, excluded_rows)
    if implementation == "cpu":
        return top_k_cpu(u, item, k, scale=scale, offset_V=offset, excluded=excluded, rows_per_chunk=rows_per_chunk)
    if excluded is not None:
        excluded = (row_index(excluded[0], excluded[1].shape[0]), excluded[1])
    if implementation == "reference":
        return top_k_reference(u, item, k, scale=scale, offset_V=offset, excluded=excluded)
    from kernels.top_k.triton_kernels import top_k_triton  # noqa: PLC0415 - needs triton, an optional package

    return top_k_triton(u, item, k, scale=scale, offset_V=offset, excluded=excluded, rows_per_chunk=rows_per_chunk)


@_top_k.register_fake
def _fake(
    u: Tensor,
    item: Tensor,
    k: int,
    scale: Tensor,
    offset: Tensor | None,
    excluded_offsets: Tensor | None,
    excluded_rows: Tensor | None,
    rows_per_chunk: int,
    implementation: str,
) -> tuple[Tensor, Tensor]:
    shape = (u.shape[0], k)
    return u.new_empty(shape, dtype=torch.float32), u.new_empty(shape, dtype=torch.int64)


def _check(u_BD: Tensor, item_VD: Tensor, k: int, offset_V: Tensor | None, excluded: JaggedTensor | None) -> None:
    if u_BD.dim() != 2 or not u_BD.is_floating_point():
        raise ValueError(f"u_BD must be float[B, D], got {u_BD.dtype}{list(u_BD.shape)}")
    if item_VD.dim() != 2 or item_VD.shape[1] != u_BD.shape[1] or item_VD.dtype != u_BD.dtype:
        raise ValueError(
            f"item_VD must be {u_BD.dtype}[V, {u_BD.shape[1]}] like u_BD, got {item_VD.dtype}{list(item_VD.shape)}"
        )
    if item_VD.device != u_BD.device:
        raise ValueError(f"item_VD is on {item_VD.device} and u_BD on {u_BD.device}; move them together")
    if item_VD.shape[0] > ROWS_MAX:
        raise ValueError(f"item_VD has {item_VD.shape[0]} rows; at most {ROWS_MAX} can be numbered")
    if k < 0:
        raise ValueError(f"k is {k}; it must be 0 or more rows")
    if offset_V is not None and (
        not offset_V.is_floating_point() or offset_V.shape != item_VD.shape[:1] or offset_V.device != u_BD.device
    ):
        raise ValueError(
            f"offset_V must be float[{item_VD.shape[0]}] on {u_BD.device}, got {offset_V.dtype}{list(offset_V.shape)}"
            f" on {offset_V.device}"
        )
    if excluded is None:
        return
    rows = excluded.values
    if rows.dtype != torch.int64 or rows.dim() != 1 or rows.device != u_BD.device:
        raise ValueError(
            f"excluded must hold int64 row numbers on {u_BD.device}, got {rows.dtype}{list(rows.shape)} on"
            f" {rows.device}"
        )
    if excluded.num_rows != u_BD.shape[0]:
        raise ValueError(f"excluded has {excluded.num_rows} rows; u_BD has {u_BD.shape[0]} queries")
