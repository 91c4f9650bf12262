"""What surrounds the softmax losses of kernels/softmax_loss in a training step.

Shapes: C candidates.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


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


def candidate_log_q(popularity_C: Tensor, *, num_items: int, num_negatives: int, num_targets: int) -> Tensor:
    """float32[C]: log chance that an item is drawn at least once, as a uniform negative or as someone's target.

    popularity_C: float[C], the chance that one target is this item.
    """
    log_absent = num_negatives * torch.log1p(torch.tensor(-1.0 / max(num_items, 2), dtype=torch.float64))
    log_absent = log_absent + num_targets * torch.log1p(-popularity_C.to(torch.float64).clamp(max=0.999))
    return torch.log(-torch.expm1(log_absent)).to(torch.float32)
