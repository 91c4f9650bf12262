"""Exact top k on the CPU, a chunk of rows at a time: torch multiplies, C (select.c) finds the best of the scores.

Shapes: B queries, V catalogue rows, R of them in a chunk, D width, K rows wanted, X rows left out.
"""

from __future__ import annotations

import ctypes
from pathlib import Path

import torch
from torch import Tensor

from kernels.jagged import row_index
from kernels.native_build import native_library
from kernels.top_k.keys import LEFT_OUT, empty_keys, keys_of, read_keys
from kernels.top_k.reference import score

_SOURCE = Path(__file__).with_name("select.c")


class _Chunk(ctypes.Structure):
    """``Chunk`` of select.c, field by field."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("scores", "excluded_offsets", "excluded", "left_out", "best")),
        *((name, ctypes.c_int64) for name in ("num_queries", "num_rows", "k", "first_row")),
    ]  # fmt: skip


def top_k_cpu(
    u_BD: Tensor,
    item_VD: Tensor,
    k: int,
    *,
    scale: Tensor,
    offset_V: Tensor | None = None,
    excluded: tuple[Tensor, Tensor] | None = None,
    rows_per_chunk: int,
) -> tuple[Tensor, Tensor]:
    """scores_BK and rows_BK of ``top_k``. excluded: offsets, int64[B + 1], and row_X, int64."""
    num_items, best_BK = item_VD.shape[0], empty_keys(u_BD.shape[0], k, 0, u_BD.device)
    library = native_library(_SOURCE, (), holds_interpreter=True)
    if excluded is not None:
        excluded = _checked(*excluded)
    for start in range(0, num_items if best_BK.numel() else 0, rows_per_chunk):
        part = slice(start, min(start + rows_per_chunk, num_items))
        scores_BR = score(u_BD, item_VD[part], scale, None if offset_V is None else offset_V[part])
        if library is None:
            best_BK = _better_keys(best_BK, scores_BR, start, excluded)
        else:
            _take(library, best_BK, scores_BR, start, excluded)
    return read_keys(best_BK) if library is None else _read(library, best_BK)


def _checked(offsets: Tensor, row_X: Tensor) -> tuple[Tensor, Tensor]:
    """Contiguous; ValueError for what would make the C code read elsewhere."""
    bounds = offsets.tolist()
    if bounds[0] != 0 or bounds[-1] != row_X.shape[0] or bounds != sorted(bounds):
        raise ValueError(f"offsets of excluded must ascend from 0 to its {row_X.shape[0]} rows")
    return offsets.contiguous(), row_X.contiguous()


def _take(
    library: ctypes.CDLL, best_BK: Tensor, scores_BR: Tensor, start: int, excluded: tuple[Tensor, Tensor] | None
) -> None:
    scores_BR = scores_BR.contiguous()
    num_queries, num_rows = scores_BR.shape
    left_out = torch.empty(num_queries, (num_rows + 63) // 64, dtype=torch.int64)
    offsets, row_X = (None, None) if excluded is None else excluded
    tensors = (scores_BR, offsets, row_X, left_out, best_BK)
    pointers = (None if tensor is None else tensor.data_ptr() for tensor in tensors)
    chunk = _Chunk(*pointers, num_queries, num_rows, best_BK.shape[1], start)
    library.top_k_take(ctypes.byref(chunk))


def _read(library: ctypes.CDLL, best_BK: Tensor) -> tuple[Tensor, Tensor]:
    scores_BK, rows_BK = torch.empty(best_BK.shape), torch.empty_like(best_BK)
    sizes = (ctypes.c_int64(size) for size in best_BK.shape)
    best, scores, rows = (ctypes.c_void_p(tensor.data_ptr()) for tensor in (best_BK, scores_BK, rows_BK))
    library.top_k_read(best, *sizes, scores, rows)
    return scores_BK, rows_BK


def _better_keys(best_BK: Tensor, scores_BR: Tensor, start: int, excluded: tuple[Tensor, Tensor] | None) -> Tensor:
    """The same without a compiler: keys of all scores of the chunk, and torch's ``topk`` of them."""
    num_rows = scores_BR.shape[1]
    keys_BR = keys_of(scores_BR, torch.arange(start, start + num_rows))
    if excluded is not None:
        query_X, row_X = row_index(excluded[0], excluded[1].shape[0]), excluded[1]
        inside_X = (row_X >= start) & (row_X < start + num_rows)
        keys_BR[query_X[inside_X], row_X[inside_X] - start] = LEFT_OUT
    return torch.cat([best_BK, keys_BR], 1).topk(best_BK.shape[1], dim=1).values
