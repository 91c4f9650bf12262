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

from kernels.fp8_product import CAPABILITY, MULTIPLE, ProductFormat
from model.config import DeviceChoice, ModelConfig, Precision, RowPrecision


@dataclass(frozen=True, kw_only=True, slots=True)
class Compute:
    """A device, how the encoder computes there, and how item embeddings get there."""

    device: torch.device
    is_bfloat16: bool = False
    product: ProductFormat = "plain"
    row_precision: RowPrecision = "float32"
    """Of item embeddings that are sent (`model.device_rows`)."""

    @classmethod
    def chosen(cls, device: DeviceChoice, precision: Precision, row_precision: RowPrecision = "float32") -> Compute:
        """As the settings say. auto: CUDA where there is a device, and bfloat16 there. ValueError without one, and for
        what needs one.
        """
        has_cuda = torch.cuda.is_available()
        if device == "cuda" and not has_cuda:
            raise ValueError(
                "trainer.device is cuda, but PyTorch finds no CUDA device: install its driver, or set auto"
            )
        found = "cuda" if device == "cuda" or (device == "auto" and has_cuda) else "cpu"
        if row_precision != "float32" and found == "cpu":
            raise ValueError(
                f"trainer.device_rows is {row_precision}, but this computes on the CPU, where rows are sent nowhere:"
                " set trainer.device_rows to float32"
            )
        if precision == "fp8":
            _check_fp8(found)
        return cls(
            device=torch.device(found),
            is_bfloat16=precision in ("bfloat16", "fp8") or (precision == "auto" and found == "cuda"),
            product="fp8" if precision == "fp8" else "plain",
            row_precision=row_precision,
        )

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


def _check_fp8(device: str) -> None:
    capability = torch.cuda.get_device_capability() if device == "cuda" else None
    if capability is None or capability < CAPABILITY:
        found = "the CPU" if capability is None else "a device of capability {}.{}".format(*capability)
        raise ValueError(
            f"trainer.precision is fp8, but this computes on {found}: it needs a CUDA device of compute capability"
            f" {CAPABILITY[0]}.{CAPABILITY[1]} or above; set trainer.precision to auto"
        )


def check_fp8_model(config: ModelConfig) -> None:
    """ValueError for a model whose products cannot be made of 8-bit floats, by the setting to change."""
    if config.kind not in ("hstu", "ultra_hstu"):
        raise ValueError(
            f"trainer.precision is fp8, which is for model.kind hstu and ultra_hstu, not for {config.kind}: set"
            " trainer.precision to auto"
        )
    widths = {
        "embedding_dim": config.embedding_dim,
        "num_heads times model.attention_dim": config.num_heads * config.attention_dim,
        "num_heads times model.hidden_dim": config.num_heads * config.hidden_dim,
    }
    for name, width in widths.items():
        if width % MULTIPLE:
            raise ValueError(
                f"trainer.precision is fp8 and model.{name} is {width}: it must be a multiple of {MULTIPLE}, or set"
                " trainer.precision to auto"
            )


HOST = Compute(device=torch.device("cpu"))
