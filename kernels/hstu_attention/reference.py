"""HSTU attention in plain PyTorch: the truth the other implementations are compared with, and the CPU path.

Shapes: L packed positions, H heads, A query/key width, V value width, N = max_len, G rows of a group, n its longest.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from kernels.hstu_attention.bias import RelativeBias
from kernels.hstu_attention.plan import AttentionPlan, RowGroup, plan_attention


def hstu_attention_reference(
    q_LHA: Tensor,
    k_LHA: Tensor,
    v_LHV: Tensor,
    offsets: Tensor,
    *,
    max_len: int,
    bias: RelativeBias | None = None,
    plan: AttentionPlan | None = None,
) -> Tensor:
    """o_LHV of ``hstu_attention``; rows of similar length are padded together, never to max_len."""
    if plan is None:
        plan = plan_attention(
            offsets,
            num_positions=q_LHA.shape[0],
            max_len=max_len,
            times=None if bias is None else (bias.timestamps_s_L, bias.query_timestamps_s_L),
            num_buckets=128 if bias is None else bias.num_buckets,
        )
    if not plan.groups:
        return v_LHV * 0  # keeps the shape, dtype and gradient of an all-empty batch
    outputs = [_attend(q_LHA, k_LHA, v_LHV, group, max_len, bias) for group in plan.groups]
    return torch.cat(outputs)[plan.restore_L]


def _attend(
    q_LHA: Tensor, k_LHA: Tensor, v_LHV: Tensor, group: RowGroup, max_len: int, bias: RelativeBias | None
) -> Tensor:
    """float[positions inside the group, H, V]."""
    num_rows, longest = group.index_Gn.shape
    flat = group.index_Gn.flatten()
    q_GHnA, k_GHnA, v_GHnV = (
        x.index_select(0, flat).view(num_rows, longest, *x.shape[1:]).transpose(1, 2) for x in (q_LHA, k_LHA, v_LHV)
    )
    score_GHnn = q_GHnA @ k_GHnA.transpose(2, 3)
    if bias is not None:
        score_GHnn = score_GHnn + _group_bias(bias, group, max_len)[:, None]
    # The mask comes after the activation: silu(-inf) is NaN, and a masked score must weigh exactly 0.
    weight_nn = torch.ones(longest, longest, dtype=score_GHnn.dtype, device=score_GHnn.device).tril() / max_len
    o_GnHV = ((functional.silu(score_GHnn) * weight_nn) @ v_GHnV).transpose(1, 2)
    return o_GnHV[group.inside_Gn]


def _group_bias(bias: RelativeBias, group: RowGroup, max_len: int) -> Tensor:
    assert group.bucket_Gnn is not None, "the plan was made without times, but a bias is given"
    longest = group.index_Gn.shape[1]
    place_n = torch.arange(longest, device=group.index_Gn.device)
    distance_nn = place_n[None, :] - place_n[:, None] + (max_len - 1)
    return _look_up(bias.position_weight, distance_nn) + _look_up(bias.time_weight, group.bucket_Gnn)


def _look_up(table_K: Tensor, index: Tensor) -> Tensor:
    found: Tensor = _TableLookup.apply(table_K, index)  # type: ignore[no-untyped-call]
    return found


class _TableLookup(torch.autograd.Function):
    """``table[index]`` whose gradient is one counting pass: far faster than a scatter-add into a tiny table."""

    @staticmethod
    def forward(ctx: Any, table_K: Tensor, index: Tensor) -> Tensor:
        ctx.save_for_backward(index)
        ctx.num_entries = table_K.shape[0]
        return table_K.index_select(0, index.flatten()).view(index.shape)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (index,) = ctx.saved_tensors
        if grad.is_cuda:  # bincount with weights is not deterministic there, and no faster
            table = grad.new_zeros(ctx.num_entries).index_add_(0, index.flatten(), grad.flatten())
            return table, None
        counted = torch.bincount(index.flatten(), weights=grad.flatten(), minlength=ctx.num_entries)
        return counted.to(grad.dtype), None
