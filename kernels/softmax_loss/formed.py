"""What a softmax loss leaves behind when its gradients are formed together with it.

Shapes: P supervised positions, V catalogue rows, D width.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True, slots=True)
class LogitSummary:
    """What is known of P positions' logits over the whole catalogue once they are gone; float[P] each, detached.

    log_sum_P: log of the sum of their exponentials. target_P: the target's. top_P: the largest.
    """

    log_sum_P: Tensor
    target_P: Tensor
    top_P: Tensor

    @staticmethod
    def of(logits_PV: Tensor, target_rows_P: Tensor) -> LogitSummary:
        """Of logits at hand, which are not changed."""
        target_P = logits_PV.gather(1, target_rows_P[:, None])[:, 0]
        return LogitSummary(log_sum_P=logits_PV.logsumexp(1), target_P=target_P, top_P=logits_PV.amax(1))

    @staticmethod
    def joined(parts: list[LogitSummary]) -> LogitSummary:
        """Of one part of the positions after the other; at least one part."""
        return LogitSummary(
            log_sum_P=torch.cat([part.log_sum_P for part in parts]),
            target_P=torch.cat([part.target_P for part in parts]),
            top_P=torch.cat([part.top_P for part in parts]),
        )

    def first(self, count: int) -> LogitSummary:
        """Of the first so many positions."""
        return LogitSummary(log_sum_P=self.log_sum_P[:count], target_P=self.target_P[:count], top_P=self.top_P[:count])

    @property
    def loss_P(self) -> Tensor:
        """-log p(target)."""
        return self.log_sum_P - self.target_P


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
