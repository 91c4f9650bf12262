"""What surrounds the softmax losses of kernels/softmax_loss in a training step.

Shapes: V items of the live catalogue, C candidates.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from model.config import LossConfig


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


def draw_distribution(log_popularity_V: Tensor, loss_config: LossConfig) -> Tensor:
    """float64[V]: the chance that one drawn negative is each item; all 0 where none are drawn."""
    if loss_config.negatives == "in_batch":
        return torch.zeros_like(log_popularity_V, dtype=torch.float64)
    power = loss_config.negatives_power if loss_config.negatives == "popularity" else 0.0
    return torch.softmax(power * log_popularity_V.double(), 0)


def draw_negatives(chance_V: Tensor, num_negatives: int, generator: torch.Generator) -> Tensor:
    """int64[num_negatives], with replacement, by a ``draw_distribution`` that is not 0; int64[0] of no items."""
    if chance_V.shape[0] == 0 or float(chance_V.sum()) == 0:
        return torch.empty(0, dtype=torch.int64, device=chance_V.device)
    cumulative_V = chance_V.cumsum(0)
    drawn = torch.rand(num_negatives, dtype=torch.float64, generator=generator).to(chance_V.device) * cumulative_V[-1]
    return torch.searchsorted(cumulative_V, drawn, right=True).clamp(max=chance_V.shape[0] - 1)


def candidate_log_q(popularity_C: Tensor, chance_C: Tensor, *, num_negatives: int, num_targets: int) -> Tensor:
    """float32[C]: log chance that an item is a candidate at least once, as a drawn negative or as someone's target.

    popularity_C: float[C], the chance that one target is this item. chance_C: that one drawn negative is.
    """
    log_absent = num_negatives * torch.log1p(-chance_C.to(torch.float64).clamp(max=0.999))
    log_absent = log_absent + num_targets * torch.log1p(-popularity_C.to(torch.float64).clamp(max=0.999))
    return torch.log(-torch.expm1(log_absent)).to(torch.float32)
