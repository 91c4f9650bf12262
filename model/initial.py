"""How weights start, and what encoders share: every random number comes from the generator they are handed."""

from __future__ import annotations

import torch
from torch import Tensor

from kernels.hstu_output import dropout_multiplier

NORM_EPS = 1e-6
INIT_STD = 0.02


def normal(generator: torch.Generator, *shape: int) -> Tensor:
    """Normal with INIT_STD, the research code's start for everything but output matrices."""
    return torch.empty(*shape).normal_(std=INIT_STD, generator=generator)


def xavier(generator: torch.Generator, fan_in: int, fan_out: int) -> Tensor:
    """[fan_in, fan_out], uniform in Glorot and Bengio's bounds."""
    bound = (6 / (fan_in + fan_out)) ** 0.5
    return torch.empty(fan_in, fan_out).uniform_(-bound, bound, generator=generator)


def dropped_out(x: Tensor, share: float, generator: torch.Generator | None) -> Tensor:
    """The tensor with ``share`` of its elements zeroed, the rest scaled up; unchanged without a generator."""
    if generator is None or share == 0.0:
        return x
    multiplier: Tensor = dropout_multiplier(x.detach(), share, dropout_seed(generator))
    return x * multiplier


def dropout_seed(generator: torch.Generator) -> int:
    """What one mask follows from; drawn on the CPU, so that a model on any device drops the same elements."""
    return int(torch.randint(1 << 62, (), generator=generator))
