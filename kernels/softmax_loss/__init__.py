"""Sampled and full softmax losses over the catalogue: gradients formed in the forward pass, logits never whole."""

from __future__ import annotations

from kernels.softmax_loss.catalogue import CatalogueSoftmax, OnLogits, form_catalogue_softmax
from kernels.softmax_loss.cpu import form_full_softmax
from kernels.softmax_loss.formed import FormedSoftmax, LogitSummary, SoftmaxLoss
from kernels.softmax_loss.ops import full_softmax_loss, sampled_softmax_loss

__all__ = [
    "CatalogueSoftmax",
    "FormedSoftmax",
    "LogitSummary",
    "OnLogits",
    "SoftmaxLoss",
    "form_catalogue_softmax",
    "form_full_softmax",
    "full_softmax_loss",
    "sampled_softmax_loss",
]
