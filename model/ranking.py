"""The rank of a target among the live catalogue: exact, never sampled.

Tie rule: an item that scores the same as the target ranks before it, so a constant score ranks last. An item whose
score is NaN ranks before it as well.

Shapes: P targets, V rows of the catalogue, S seen rows in all, L packed positions.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
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

    def distinct(self) -> SeenPairs:
        """Each row once per target."""
        place_S = row_index(self.offsets, self.rows_S.shape[0])
        num_rows = int(self.rows_S.max()) + 1 if self.rows_S.numel() else 1
        key_S = _distinct(place_S * num_rows + self.rows_S)
        return SeenPairs(place_S=key_S // num_rows, rows_S=key_S % num_rows)


@dataclass(frozen=True, kw_only=True, slots=True)
class SeenPairs:
    """SeenRows as distinct pairs, ascending: place_S int64[S] is the target's number, rows_S int64[S] the row."""

    place_S: Tensor
    rows_S: Tensor

    def of_targets(self, part: slice, *, device: torch.device) -> SeenPairs:
        """The pairs of targets part.start ... part.stop - 1, which are numbered from 0 there."""
        bounds = torch.searchsorted(self.place_S, torch.tensor([part.start, part.stop], device=self.place_S.device))
        inside = slice(int(bounds[0]), int(bounds[1]))
        return SeenPairs(place_S=(self.place_S[inside] - part.start).to(device), rows_S=self.rows_S[inside].to(device))


def ranks(
    logits_PV: Tensor, target_rows_P: Tensor, seen: SeenRows | SeenPairs | None = None, *, num_known: int | None = None
) -> Tensor:
    """int64[P]: 1 + the number of unseen items that score at least as high as the target; MISS_RANK for a miss.

    logits_PV: float[P, V]. target_rows_P: int64[P], -1 or >= num_known for an item outside the catalogue. seen: rows
    filtered out of each ranking; duplicates count once. num_known: rank among the first so many rows only (those known
    before the targets' own items were admitted).

    >>> ranks(torch.tensor([[3.0, 1.0, 2.0]]), torch.tensor([1])).tolist()
    [3]
    """
    num_targets = target_rows_P.shape[0]
    num_rows = logits_PV.shape[1] if num_known is None else num_known
    if num_rows == 0 or num_targets == 0:
        return torch.full((num_targets,), MISS_RANK, dtype=torch.int64, device=target_rows_P.device)
    inside_P = (target_rows_P >= 0) & (target_rows_P < num_rows)
    rows_P = torch.where(inside_P, target_rows_P, 0)
    own_P = logits_PV.gather(1, rows_P[:, None])[:, 0]
    rank_P = num_rows - _num_below(logits_PV[:, :num_rows], own_P)
    if seen is not None:
        pairs = seen.distinct() if isinstance(seen, SeenRows) else seen
        is_known_S = pairs.rows_S < num_rows
        place_S, rows_S = pairs.place_S[is_known_S], pairs.rows_S[is_known_S]
        before_S = ~(logits_PV[place_S, rows_S] < own_P[place_S])
        rank_P -= torch.bincount(place_S[before_S], minlength=num_targets)
        filtered = place_S[rows_S == rows_P[place_S]]
        inside_P = inside_P.index_fill(0, filtered, value=False)
    return torch.where(inside_P, rank_P, MISS_RANK)


def _num_below(logits_PV: Tensor, own_P: Tensor) -> Tensor:
    """int64[P]: in each row, the logits below the target's."""
    if logits_PV.device.type != "cpu" or logits_PV.dtype not in {torch.float32, torch.float64}:
        below_P: Tensor = (logits_PV < own_P[:, None]).sum(1)
        return below_P
    # Row by row the booleans stay in the cache, and numpy counts them eight at a time: a tenth of the time.
    logits, own = logits_PV.detach().numpy(), own_P.detach().numpy()
    below_V, num_below = np.empty(logits.shape[1], bool), np.empty(len(own), np.int64)
    for place, score in enumerate(own):
        num_below[place] = np.count_nonzero(np.less(logits[place], score, out=below_V))
    return torch.from_numpy(num_below)


def _distinct(keys: Tensor) -> Tensor:
    """torch.unique, which on a CPU takes ten times as long as numpy's sort."""
    if keys.device.type != "cpu":
        distinct: Tensor = torch.unique(keys)
        return distinct
    ascending = np.sort(keys.numpy())
    is_first = np.ones(len(ascending), bool)
    np.not_equal(ascending[1:], ascending[:-1], out=is_first[1:])
    return torch.from_numpy(ascending[is_first])


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
