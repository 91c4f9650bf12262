"""Sampled and full softmax losses over the catalogue: gradients formed in the forward pass, logits never whole."""

from __future__ import annotations

from kernels.softmax_loss.cpu import OnLogits, form_full_softmax
from kernels.softmax_loss.formed import FormedSoftmax, SoftmaxLoss
from kernels.softmax_loss.ops import full_softmax_loss, sampled_softmax_loss

__all__ = [
    "FormedSoftmax",
    "OnLogits",
    "SoftmaxLoss",
    "form_full_softmax",
    "full_softmax_loss",
    "sampled_softmax_loss",
]
