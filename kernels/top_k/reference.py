"""Exact top k in plain PyTorch: the truth the other implementations are compared with; sorts whole rows of scores.

Shapes: B queries, V catalogue rows, D width, K rows wanted, X = rows left out, of all queries together.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional


def top_k_reference(
    u_BD: Tensor,
    item_VD: Tensor,
    k: int,
    *,
    scale: Tensor,
    offset_V: Tensor | None = None,
    excluded: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """scores_BK and rows_BK of ``top_k``. excluded: (query_X, row_X), int64."""
    scores_BV = score(u_BD, item_VD, scale, offset_V)
    # Tiers: numbers, then NaN, then rows left out. Sorting by score and then by tier, both stable, leaves lower row
    # numbers first among equals.
    tier_BV = scores_BV.isnan().to(torch.int8)
    if excluded is not None:
        query_X, row_X = excluded
        inside_X = (row_X >= 0) & (row_X < item_VD.shape[0])
        tier_BV[query_X[inside_X], row_X[inside_X]] = 2
    sortable_BV = scores_BV.masked_fill(scores_BV.isnan(), -torch.inf)
    by_score_BV = sortable_BV.sort(dim=1, descending=True, stable=True).indices
    by_tier_BV = tier_BV.gather(1, by_score_BV).sort(dim=1, stable=True).indices
    rows_BK = by_score_BV.gather(1, by_tier_BV)[:, :k]
    left_out_BK = tier_BV.gather(1, rows_BK) == 2
    missing = (0, k - rows_BK.shape[1])
    scores_BK = scores_BV.gather(1, rows_BK).masked_fill(left_out_BK, -torch.inf)
    return (
        functional.pad(scores_BK, missing, value=-torch.inf),
        functional.pad(rows_BK.masked_fill(left_out_BK, -1), missing, value=-1),
    )


def score(u_BD: Tensor, item_VD: Tensor, scale: Tensor, offset_V: Tensor | None) -> Tensor:
    """float32[B, V]: ``scale * u . item + offset``, computed in float32, or float64 for float64 inputs."""
    dtype = torch.float64 if u_BD.dtype == torch.float64 else torch.float32
    query_BD, items_VD = u_BD.to(dtype) * scale.to(dtype), item_VD.to(dtype)
    if offset_V is None:
        return (query_BD @ items_VD.T).to(torch.float32)
    return torch.addmm(offset_V.to(dtype), query_BD, items_VD.T).to(torch.float32)
