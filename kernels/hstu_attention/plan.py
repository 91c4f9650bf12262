"""Which rows the reference computes together: groups of similar length, so that little padding is computed.

Shapes: L packed positions, G rows of a group, n its longest row.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from kernels.hstu_attention.bias import time_bucket
from kernels.jagged import check_offsets

SHORTEST_CLASS_LEN = 8
"""Rows up to this many positions share one group: below it, per-call overhead costs more than padding."""
SCORES_PER_GROUP_MAX = 1 << 21
"""Scores (G * n * n) computed at once; bounds the temporaries at about 8 MiB of fp32 a head."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RowGroup:
    """Rows computed as one padded block.

    index_Gn: int64[G, n], packed position of each place; places behind a row's end repeat its last position, so
    that no other row is ever read. inside_Gn: bool[G, n]. bucket_Gnn: int32[G, n, n] time buckets, or None.
    """

    index_Gn: Tensor
    inside_Gn: Tensor
    bucket_Gnn: Tensor | None


@dataclass(frozen=True, kw_only=True, slots=True)
class AttentionPlan:
    """Row groups of one batch, and ``restore_L``: where in the groups' concatenated output each position lies."""

    groups: tuple[RowGroup, ...]
    restore_L: Tensor


def plan_attention(
    offsets: Tensor,
    *,
    num_positions: int,
    max_len: int,
    times: tuple[Tensor, Tensor] | None = None,
    num_buckets: int = 128,
) -> AttentionPlan:
    """Group rows by length class (powers of two). times: (timestamps_s_L, query_timestamps_s_L), int64 seconds.

    ValueError if the offsets are inconsistent or a row is longer than max_len.
    """
    check_offsets(offsets, num_values=num_positions, max_len=max_len)
    starts, lengths = offsets[:-1], offsets.diff()
    groups: list[RowGroup] = []
    low = 0
    high = SHORTEST_CLASS_LEN
    while low < max_len:
        members = ((lengths > low) & (lengths <= high)).nonzero().flatten()
        if members.numel():
            longest = int(lengths[members].max())
            rows_at_once = max(1, SCORES_PER_GROUP_MAX // (longest * longest))
            groups += [
                _row_group(starts[some], lengths[some], times, num_buckets)
                for some in torch.split(members, rows_at_once)
            ]
        low, high = high, high * 2
    order_L = torch.cat([g.index_Gn[g.inside_Gn] for g in groups]) if groups else offsets[:0]
    restore_L = torch.empty_like(order_L)
    restore_L[order_L] = torch.arange(order_L.shape[0], device=offsets.device)
    return AttentionPlan(groups=tuple(groups), restore_L=restore_L)


def _row_group(starts_G: Tensor, lengths_G: Tensor, times: tuple[Tensor, Tensor] | None, num_buckets: int) -> RowGroup:
    places_n = torch.arange(int(lengths_G.max()), device=starts_G.device)
    index_Gn = starts_G[:, None] + torch.minimum(places_n, lengths_G[:, None] - 1)
    bucket_Gnn = None
    if times is not None:
        keys_s, queries_s = times
        bucket_Gnn = time_bucket(queries_s[index_Gn][:, :, None] - keys_s[index_Gn][:, None, :], num_buckets)
    return RowGroup(index_Gn=index_Gn, inside_Gn=places_n < lengths_G[:, None], bucket_Gnn=bucket_Gnn)
