"""Softmax losses over the live catalogue.

Shapes: P supervised positions, V catalogue rows, C candidates, D width.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from model.recommender import Catalogue

OnLogits = Callable[[slice, Tensor], None]
"""Called with a slice of the P positions and their logits, float32[p, V]; must not keep or change them."""


@dataclass(frozen=True, kw_only=True, slots=True)
class FormedSoftmax:
    """A softmax loss, mean over P, and its gradients, formed in one pass without autograd.

    loss, scale: scalars. u_PD, unit_VD, offset_V: gradients of the inputs of the same names.
    """

    loss: Tensor
    u_PD: Tensor
    unit_VD: Tensor
    offset_V: Tensor
    scale: Tensor


@torch.no_grad()
def form_full_softmax(
    u_PD: Tensor,
    target_rows_P: Tensor,
    catalogue: Catalogue,
    scale: Tensor,
    *,
    positions_per_chunk: int = 256,
    on_logits: OnLogits | None = None,
) -> FormedSoftmax:
    """Mean over P of ``-log softmax(scale * u . unit + offset)[target]`` with its gradients; 0 when P is 0.

    The gradient is formed during the forward pass, chunk by chunk, so that no more than
    ``positions_per_chunk`` x V logits exist at once.
    """
    num_positions = u_PD.shape[0]
    unit_VD, offset_V = catalogue.unit_VD, catalogue.offset_V
    grad_u_PD = torch.empty_like(u_PD)
    grad_unit_VD, grad_offset_V = torch.zeros_like(unit_VD), torch.zeros_like(offset_V)
    grad_scale, loss = torch.zeros_like(scale), u_PD.new_zeros(())
    for start in range(0, num_positions, positions_per_chunk):
        part = slice(start, min(start + positions_per_chunk, num_positions))
        u_pD, targets_p1 = u_PD[part], target_rows_P[part, None]
        logits_pV = torch.addmm(offset_V, u_pD * scale, unit_VD.T)
        if on_logits is not None:
            on_logits(part, logits_pV)
        target_p1 = logits_pV.gather(1, targets_p1)
        top_p1 = logits_pV.amax(1, keepdim=True)
        exp_pV = logits_pV.sub_(top_p1).exp_()
        sum_p1 = exp_pV.sum(1, keepdim=True)
        loss += (sum_p1.log() + top_p1 - target_p1).sum()
        # d loss / d logits = (softmax - one at the target) / P
        grad_pV = exp_pV.div_(sum_p1 * num_positions)
        grad_pV.scatter_add_(1, targets_p1, grad_pV.new_full(targets_p1.shape, -1 / num_positions))
        by_item_pD = grad_pV @ unit_VD
        grad_u_PD[part] = by_item_pD * scale
        grad_scale += (by_item_pD * u_pD).sum()
        grad_unit_VD.addmm_(grad_pV.T, u_pD * scale)
        grad_offset_V += grad_pV.sum(0)
    return FormedSoftmax(
        loss=loss / max(num_positions, 1),
        u_PD=grad_u_PD,
        unit_VD=grad_unit_VD,
        offset_V=grad_offset_V,
        scale=grad_scale,
    )


def attach_gradients(loss: Tensor, *pairs: tuple[Tensor, Tensor]) -> Tensor:
    """The value ``loss`` as a function of the first tensor of each pair, whose gradient is the second."""
    inputs, gradients = zip(*pairs, strict=True)
    attached: Tensor = _Attached.apply(loss, gradients, *inputs)  # type: ignore[no-untyped-call]
    return attached


class _Attached(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, loss: Tensor, gradients: tuple[Tensor, ...], *_inputs: Tensor) -> Tensor:
        ctx.save_for_backward(*gradients)
        return loss.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return (None, None, *(saved * grad for saved in ctx.saved_tensors))


def sampled_softmax_loss(
    u_PD: Tensor, target_index_P: Tensor, catalogue: Catalogue, scale: Tensor, log_q_C: Tensor
) -> Tensor:
    """Softmax over shared candidates whose logits are corrected by -log_q_C, the log chance of being a candidate.

    target_index_P: int64[P], place of each target among the C rows of catalogue. Source: Bengio & Senecal 2008;
    shared in-batch candidates with log-Q correction as in Yi et al., RecSys 2019.
    """
    if u_PD.shape[0] == 0:
        return u_PD.sum()
    logits_PC = torch.addmm(catalogue.offset_V - log_q_C, u_PD * scale, catalogue.unit_VD.T)
    return functional.cross_entropy(logits_PC, target_index_P)


def candidate_log_q(popularity_C: Tensor, *, num_items: int, num_negatives: int, num_targets: int) -> Tensor:
    """float32[C]: log chance that an item is drawn at least once, as a uniform negative or as someone's target.

    popularity_C: float[C], the chance that one target is this item.
    """
    log_absent = num_negatives * torch.log1p(torch.tensor(-1.0 / max(num_items, 2), dtype=torch.float64))
    log_absent = log_absent + num_targets * torch.log1p(-popularity_C.to(torch.float64).clamp(max=0.999))
    return torch.log(-torch.expm1(log_absent)).to(torch.float32)
