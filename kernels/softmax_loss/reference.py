"""Sampled and full softmax losses in plain PyTorch: the truth the other implementations are compared with.

Shapes: P supervised positions, V catalogue rows, C negatives, D width.
"""

from __future__ import annotations

import torch
from torch import Tensor


def sampled_softmax_reference(
    u_PD: Tensor,
    item_VD: Tensor,
    target_rows_P: Tensor,
    negative_rows: Tensor,
    *,
    scale: Tensor,
    offset_V: Tensor | None = None,
    log_q_C: Tensor | None = None,
    log_q_target_P: Tensor | None = None,
) -> Tensor:
    """loss_P of ``sampled_softmax_loss``; gathers [P, C + 1, D]."""
    dtype = accumulation_dtype(u_PD)
    num_positions, num_negatives = target_rows_P.shape[0], negative_rows.shape[-1]
    negative_rows_PC = negative_rows.expand(num_positions, num_negatives)
    rows_PC1 = torch.cat([target_rows_P[:, None], negative_rows_PC], dim=1)
    logits_PC1 = (u_PD.to(dtype)[:, None] * item_VD.to(dtype)[rows_PC1]).sum(-1) * scale.to(dtype)
    if offset_V is not None:
        logits_PC1 = logits_PC1 + offset_V.to(dtype)[rows_PC1]
    target_P, negatives_PC = logits_PC1[:, 0], logits_PC1[:, 1:]
    if log_q_C is not None:
        negatives_PC = negatives_PC - log_q_C.to(dtype)
    if log_q_target_P is not None:
        target_P = target_P - log_q_target_P.to(dtype)
    negatives_PC = negatives_PC.masked_fill(negative_rows_PC == target_rows_P[:, None], -torch.inf)
    return torch.cat([target_P[:, None], negatives_PC], dim=1).logsumexp(1) - target_P


def full_softmax_reference(
    u_PD: Tensor, item_VD: Tensor, target_rows_P: Tensor, *, scale: Tensor, offset_V: Tensor | None = None
) -> Tensor:
    """loss_P of ``full_softmax_loss``; holds the whole [P, V] of logits."""
    dtype = accumulation_dtype(u_PD)
    logits_PV = scale.to(dtype) * (u_PD.to(dtype) @ item_VD.to(dtype).T)
    if offset_V is not None:
        logits_PV = logits_PV + offset_V.to(dtype)
    return logits_PV.logsumexp(1) - logits_PV.gather(1, target_rows_P[:, None])[:, 0]


def accumulation_dtype(u_PD: Tensor) -> torch.dtype:
    """Logits, losses and sums are float32, or float64 for float64 inputs."""
    return torch.float64 if u_PD.dtype == torch.float64 else torch.float32
