"""Where the retrieval network computes: the host, or a CUDA device beside it.

Only the encoder, its loss and the scores over the catalogue go to a device. The item table, its optimiser's state and
everything that is published stay in host memory, which a table of millions of rows fits into, and which admission,
retirement, snapshots and checkpoints work on. A step sends its rows and the catalogue over; autograd brings the
gradients of rows back, since sending is part of the graph.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from model.config import DeviceChoice, Precision


@dataclass(frozen=True, kw_only=True, slots=True)
class Compute:
    """A device, and whether the encoder computes in bfloat16."""

    device: torch.device
    is_bfloat16: bool = False

    @classmethod
    def chosen(cls, device: DeviceChoice, precision: Precision) -> Compute:
        """As the settings say. auto: CUDA where there is a device, and bfloat16 there. ValueError without one."""
        has_cuda = torch.cuda.is_available()
        if device == "cuda" and not has_cuda:
            raise ValueError(
                "trainer.device is cuda, but PyTorch finds no CUDA device: install its driver, or set auto"
            )
        found = "cuda" if device == "cuda" or (device == "auto" and has_cuda) else "cpu"
        wants_bfloat16 = precision == "bfloat16" or (precision == "auto" and found == "cuda")
        return cls(device=torch.device(found), is_bfloat16=wants_bfloat16)

    def send(self, tensor: Tensor) -> Tensor:
        """The tensor on the device, as part of the graph; itself where it is there."""
        return tensor.to(self.device, non_blocking=True)

    def bring(self, tensor: Tensor) -> Tensor:
        """The tensor on the host; itself where it is there."""
        return tensor.cpu()

    def call(self, module: nn.Module, item_LD: Tensor, *arguments: object, **options: object) -> Tensor:
        """``module(item_LD, …)``, float32; in between, with parameters and items rounded to bfloat16 if that is asked.

        Not torch.autocast: the fused kernels are operators of their own, which it does not reach, and take all of their
        arguments in one dtype. The parameters themselves, and their gradients, stay float32.
        """
        if not self.is_bfloat16:
            computed: Tensor = module(item_LD, *arguments, **options)
            return computed
        rounded = {name: parameter.to(torch.bfloat16) for name, parameter in module.named_parameters()}
        computed = torch.func.functional_call(module, rounded, (item_LD.to(torch.bfloat16), *arguments), dict(options))
        return computed.float()


HOST = Compute(device=torch.device("cpu"))
