"""Weights far from their small start, so that whatever a result depends on shows in it."""

from __future__ import annotations

from typing import TypeVar

import torch
from torch import nn

Module = TypeVar("Module", bound=nn.Module)


def far_from_start(module: Module, *, seed: int = 1) -> Module:
    """The module in float64, noise added to every parameter."""
    module.double()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(torch.randn(parameter.shape, dtype=torch.float64, generator=generator), alpha=0.3)
    return module
