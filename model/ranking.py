"""The rank of a target among the live catalogue: exact, never sampled, for the model and any baseline alike.

Tie rule: an item that scores the same as the target ranks before it, so a constant score ranks last. An item whose
score is NaN ranks before it as well.

Shapes: P targets, V rows of the catalogue, S seen rows in all, L packed positions.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from kernels.jagged import row_index

MISS_RANK = 2**53
"""Rank of a target that cannot be hit: outside the catalogue, or filtered because it was seen before."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SeenRows:
    """Jagged rows that each of P targets may not be ranked among: rows_S int64[S] >= 0, offsets int64[P + 1]."""

    rows_S: Tensor
    offsets: Tensor


def ranks(
    logits_PV: Tensor, target_rows_P: Tensor, seen: SeenRows | None = None, *, num_known: int | None = None
) -> Tensor:
    """int64[P]: 1 + the number of unseen items that score at least as high as the target; MISS_RANK for a miss.

    logits_PV: float[P, V], or float[V] for one ranking shared by all targets. target_rows_P: int64[P], -1 or
    >= num_known for an item outside the catalogue. seen: rows filtered out of each ranking; duplicates count once.
    num_known: rank among the first so many rows only (those known before the targets' own items were admitted).

    >>> ranks(torch.tensor([[3.0, 1.0, 2.0]]), torch.tensor([1])).tolist()
    [3]
    """
    num_targets = target_rows_P.shape[0]
    num_rows = logits_PV.shape[-1] if num_known is None else num_known
    if num_rows == 0 or num_targets == 0:
        return torch.full((num_targets,), MISS_RANK, dtype=torch.int64, device=target_rows_P.device)
    inside_P = (target_rows_P >= 0) & (target_rows_P < num_rows)
    rows_P = torch.where(inside_P, target_rows_P, 0)
    shared = logits_PV.dim() == 1
    own_P = logits_PV[rows_P] if shared else logits_PV.gather(1, rows_P[:, None])[:, 0]
    if shared:
        ascending = logits_PV[:num_rows].sort().values
        # Not a number sorts last, and a target that is none must rank behind everything.
        rank_P = num_rows - torch.searchsorted(ascending, own_P).masked_fill(own_P.isnan(), 0)
    else:
        rank_P = num_rows - (logits_PV[:, :num_rows] < own_P[:, None]).sum(1)
    if seen is not None:
        place_S, rows_S = _distinct(seen)
        place_S, rows_S = place_S[rows_S < num_rows], rows_S[rows_S < num_rows]
        score_S = logits_PV[rows_S] if shared else logits_PV[place_S, rows_S]
        before_S = ~(score_S < own_P[place_S])
        rank_P -= torch.bincount(place_S[before_S], minlength=num_targets)
        filtered = place_S[rows_S == rows_P[place_S]]
        inside_P = inside_P.index_fill(0, filtered, value=False)
    return torch.where(inside_P, rank_P, MISS_RANK)


def seen_before(rows_L: Tensor, offsets: Tensor, positions_P: Tensor) -> SeenRows:
    """What each target's user had interacted with: the history up to and including the position that predicts it.

    rows_L: int64[L], item rows of packed histories, -1 (unknown items) is left out. positions_P: int64[P].
    """
    starts_P = offsets[torch.searchsorted(offsets, positions_P, right=True) - 1]
    lengths_P = positions_P + 1 - starts_P
    bounds = torch.zeros(positions_P.shape[0] + 1, dtype=torch.int64, device=offsets.device)
    torch.cumsum(lengths_P, 0, out=bounds[1:])
    total = int(bounds[-1])
    place_S = row_index(bounds, total)
    rows_S = rows_L[starts_P[place_S] + torch.arange(total, device=offsets.device) - bounds[place_S]]
    kept = rows_S >= 0
    counts_P = torch.bincount(place_S[kept], minlength=positions_P.shape[0])
    bounds[1:] = counts_P.cumsum(0)
    return SeenRows(rows_S=rows_S[kept], offsets=bounds)


def _distinct(seen: SeenRows) -> tuple[Tensor, Tensor]:
    place_S = row_index(seen.offsets, seen.rows_S.shape[0])
    num_rows = int(seen.rows_S.max()) + 1 if seen.rows_S.numel() else 1
    key_S = torch.unique(place_S * num_rows + seen.rows_S)
    return key_S // num_rows, key_S % num_rows
