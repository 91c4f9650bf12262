"""``x @ weight`` with both rounded to 8-bit floats: the products of an HSTU layer on GPUs that multiply them faster.

Each row of x and each column of the weight has its own scale, its largest magnitude over that of the format (e4m3), so
that one outlier costs the precision of its own row only. Sums are in float32. In the backward pass the gradient of x is
such a product, too, of rows of the gradient and rows of the weight; the gradient of the weight is not: it sums over all
positions, and small errors that agree would add up. ULTRA-HSTU (arXiv 2602.16986) states such products before and after
attention, not their backward pass.

Shapes: L positions, D width of x, E columns of the weight.
"""

from __future__ import annotations

from typing import Any, Final, Literal

import torch
from torch import Tensor

ProductFormat = Literal["plain", "fp8"]
"""How the product of a half of an HSTU layer is made: in the dtype of its factors, or as here."""
FORMAT: Final = torch.float8_e4m3fn
LARGEST: Final = torch.finfo(FORMAT).max
MULTIPLE: Final = 16
"""What a GPU multiplies: D and E must be multiples of it there."""
CAPABILITY: Final = (8, 9)
"""The compute capability (CUDA) from which on there is such a product."""

_TINY: Final = 1e-12
"""Least magnitude that a scale is made for: a row of zeros stays one."""


def rounded(x_LD: Tensor) -> tuple[Tensor, Tensor]:
    """8-bit floats [L, D] and their scales, float32[L, 1]: what they stand for is one times the other."""
    scale_L1 = x_LD.abs().amax(dim=1, keepdim=True).float().clamp(min=_TINY) / LARGEST
    return (x_LD.float() / scale_L1).to(FORMAT), scale_L1


def fp8_product(x_LD: Tensor, weight_DE: Tensor) -> Tensor:
    """float[L, E], in x's dtype, close to ``x @ weight``; L may be 0.

    x_LD, weight_DE: of one dtype and device; on a GPU bfloat16, D and E multiples of 16. Differentiable once in both.
    """
    product: Tensor = _Product.apply(x_LD, weight_DE)  # type: ignore[no-untyped-call]
    return product


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_LD: Tensor, weight_DE: Tensor) -> Tensor:
        ctx.save_for_backward(x_LD, weight_DE)
        return _multiplied(x_LD, weight_DE)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None]:
        x_LD, weight_DE = ctx.saved_tensors
        (grad_LE,) = grads
        of_x = _multiplied(grad_LE, weight_DE.T) if ctx.needs_input_grad[0] else None
        return of_x, x_LD.T @ grad_LE if ctx.needs_input_grad[1] else None


def _multiplied(x_LD: Tensor, weight_DE: Tensor) -> Tensor:
    if x_LD.shape[0] == 0:
        return x_LD.new_zeros(0, weight_DE.shape[1])
    x_8, x_scale = rounded(x_LD)
    # The second factor of the product lies in memory column by column.
    columns_8, column_scale = rounded(weight_DE.T)
    return torch._scaled_mm(x_8, columns_8.T, scale_a=x_scale, scale_b=column_scale.T, out_dtype=x_LD.dtype)  # noqa: SLF001 - how torch 2 calls it
