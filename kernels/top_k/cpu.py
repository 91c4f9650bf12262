"""Exact top k on the CPU, a chunk of rows at a time: only scores that may be among the best are made keys of.

Shapes: B queries, V catalogue rows, R of them in a chunk, H of those that may be among the best (N of all queries
together), D width, K rows wanted, X rows left out.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from kernels.top_k.keys import LEFT_OUT, empty_keys, keys_of, read_keys
from kernels.top_k.reference import score


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
    """scores_BK and rows_BK of ``top_k``. excluded: (query_X, row_X), int64."""
    num_items, best_BK = item_VD.shape[0], empty_keys(u_BD.shape[0], k, 0, u_BD.device)
    if 0 < k < num_items <= rows_per_chunk and (found := _all_different(u_BD, item_VD, k, scale, offset_V, excluded)):
        return found
    for start in range(0, num_items if best_BK.numel() else 0, rows_per_chunk):
        end = min(start + rows_per_chunk, num_items)
        scores_BR = score(u_BD, item_VD[start:end], scale, None if offset_V is None else offset_V[start:end])
        left_out = None
        if excluded is not None:
            query_X, row_X = excluded
            inside_X = (row_X >= start) & (row_X < end)
            left_out = query_X[inside_X], row_X[inside_X] - start
        keys_BH = _better_keys(scores_BR, start, best_BK, left_out)
        best_BK = torch.cat([best_BK, keys_BH], 1).topk(k, dim=1).values
    return read_keys(best_BK)


def _all_different(
    u_BD: Tensor,
    item_VD: Tensor,
    k: int,
    scale: Tensor,
    offset_V: Tensor | None,
    excluded: tuple[Tensor, Tensor] | None,
) -> tuple[Tensor, Tensor] | None:
    """The answer where the k + 1 best scores of every query are different finite numbers: then it needs no keys."""
    scores_BV = score(u_BD, item_VD, scale, offset_V)
    if excluded is not None:
        query_X, row_X = excluded
        inside_X = (row_X >= 0) & (row_X < item_VD.shape[0])
        scores_BV[query_X[inside_X], row_X[inside_X]] = -torch.inf
    best = scores_BV.topk(k + 1, dim=1)
    values = best.values.numpy()  # few numbers: each operation of torch would cost more than it does
    if not np.isfinite(values).all() or (values[:, 1:] >= values[:, :-1]).any():
        return None
    return best.values[:, :k], best.indices[:, :k]


def _better_keys(scores_BR: Tensor, first_row: int, best_BK: Tensor, left_out: tuple[Tensor, Tensor] | None) -> Tensor:
    """int64[B, H]: the keys of a chunk that may be among the best; H is R only where they cannot be told by scores.

    left_out: (query, place in the chunk). The scores are overwritten.
    """
    worst_B1, worst_rows_B1 = read_keys(best_BK[:, -1:])
    has_best = not bool(worst_B1.isnan().any() or (worst_rows_B1 < 0).any())
    if left_out is not None and has_best:
        scores_BR[left_out] = -torch.inf
    # Rows come in ascending order: one that only equals the worst of the best is too late.
    better_BR = scores_BR > worst_B1 if has_best else _not_below_the_kth(scores_BR, best_BK.shape[1], left_out)
    if better_BR is None:
        keys_BR = keys_of(scores_BR, torch.arange(first_row, first_row + scores_BR.shape[1]))
        if left_out is not None:
            keys_BR[left_out] = LEFT_OUT
        return keys_BR
    query_N, place_N = better_BR.nonzero(as_tuple=True)
    num_better_B = torch.bincount(query_N, minlength=scores_BR.shape[0])
    first_B = num_better_B.cumsum(0) - num_better_B
    keys_BH = empty_keys(scores_BR.shape[0], 0, int(num_better_B.max()), scores_BR.device)
    order_N = torch.arange(query_N.shape[0]) - first_B[query_N]
    keys_BH[query_N, order_N] = keys_of(scores_BR[query_N, place_N], place_N + first_row)
    return keys_BH


def _not_below_the_kth(scores_BR: Tensor, k: int, left_out: tuple[Tensor, Tensor] | None) -> Tensor | None:
    """bool[B, R]: the k best of this chunk and what equals the last of them; None if they cannot be told like that.

    left_out: (query, place in the chunk).
    """
    if scores_BR.shape[1] < k or bool(scores_BR.isnan().any()):
        return None
    kept_BR = scores_BR if left_out is None else scores_BR.index_put(left_out, scores_BR.new_tensor(-torch.inf))
    kth_B1 = kept_BR.topk(k, dim=1).values[:, -1:]
    if not bool(kth_B1.isfinite().all()):  # what is left out could not be told from what scores -inf
        return None
    return kept_BR >= kth_B1
