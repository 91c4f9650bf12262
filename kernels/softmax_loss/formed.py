"""What a softmax loss leaves behind when its gradients are formed together with it.

Shapes: P supervised positions, V catalogue rows, D width.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, kw_only=True, slots=True)
class FormedSoftmax:
    """``loss = sum over p of weights_P * loss_P`` and its gradients, formed in one pass without autograd.

    loss: scalar, loss_P: float[P], both float32 (float64 for float64 inputs). u_PD, item_VD, offset_V, scale: gradients
    of ``loss`` with respect to the inputs of the same names, in their dtypes; offset_V is empty where no offset was
    given, and all four are where no gradient was asked for.
    """

    loss: Tensor
    loss_P: Tensor
    u_PD: Tensor
    item_VD: Tensor
    offset_V: Tensor
    scale: Tensor


@dataclass(frozen=True, kw_only=True, slots=True)
class SoftmaxLoss:
    """loss: scalar, differentiable. loss_P: float[P], the loss of each position, detached (for metrics)."""

    loss: Tensor
    loss_P: Tensor


def without_gradients(loss: Tensor, loss_P: Tensor) -> FormedSoftmax:
    """The result of a pass that formed none."""
    u_PD, item_VD, offset_V, scale = (
        loss.new_empty(0) for _ in range(4)
    )  # an operator's outputs may not be one tensor
    return FormedSoftmax(loss=loss, loss_P=loss_P, u_PD=u_PD, item_VD=item_VD, offset_V=offset_V, scale=scale)
