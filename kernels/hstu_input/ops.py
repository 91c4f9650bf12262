"""The entry point of the input half of an HSTU layer, and the torch operators behind it.

Shapes: L packed positions, D model width, G width of u and v, A width of q and k, E = 2 G + 2 A.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, get_args

import torch
from torch import Tensor

from kernels.fp8_product import ProductFormat, fp8_product
from kernels.hstu_input.reference import Activated, HSTUInput, hstu_input_reference
from kernels.implementations import KernelName, choose
from kernels.operators import operator

TRITON_DTYPES = (torch.float16, torch.bfloat16, torch.float32)

Forward = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]
Gradients = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]


def hstu_input(
    x_LD: Tensor,
    weight_DE: Tensor,
    *,
    split_sizes: Sequence[int],
    bias_E: Tensor | None = None,
    norm_weight_D: Tensor | None = None,
    norm_bias_D: Tensor | None = None,
    eps: float = 1e-6,
    activate: Activated = "uvqk",
    recompute: bool = True,
    product: ProductFormat = "plain",
    kernel: KernelName = "auto",
) -> HSTUInput:
    """``u, v, q, k = split(silu(layer_norm(x) @ weight + bias))``; with ``activate="u"`` SiLU is on u only.

    x_LD: float[L, D], L may be 0. weight_DE: float[D, E], columns in the order u, v, q, k. split_sizes: their four
    widths, which sum to E. bias_E: float[E]. norm_weight_D, norm_bias_D: float[D], both or neither (a norm without
    parameters). All of one dtype and device. eps: added to the variance. recompute: keep only x and two numbers a
    position for the backward pass, which then repeats the product; False keeps the normed x and the product (the
    reference keeps what autograd keeps). product: "fp8" rounds both factors to 8-bit floats, between plain PyTorch
    (kernels/fp8_product.py). kernel: "auto" chooses by device; a name forces one (for debugging).
    Differentiable once in every tensor. ValueError for wrong shapes, dtypes or options, KernelUnavailableError for
    a kernel that cannot run here. Source: HSTU (arXiv 2402.17152) eq. 1; ULTRA-HSTU (arXiv 2602.16986) for what is
    recomputed; maths in README.md.
    """
    _check(x_LD, weight_DE, bias_E, norm_weight_D, norm_bias_D)
    _check_options(weight_DE, split_sizes, eps, activate)
    if product == "fp8" or choose(kernel, x_LD.device, has_cpu_path=False) == "reference":
        return hstu_input_reference(
            x_LD,
            weight_DE,
            bias_E=bias_E,
            norm_weight_D=norm_weight_D,
            norm_bias_D=norm_bias_D,
            eps=eps,
            split_sizes=split_sizes,
            activate=activate,
            product=fp8_product if product == "fp8" else torch.matmul,
        )
    if x_LD.dtype not in TRITON_DTYPES:
        raise ValueError(f"x_LD is {x_LD.dtype}; Triton kernels take float16, bfloat16 or float32: use 'reference'")
    num_activated = split_sizes[0] if activate == "u" else weight_DE.shape[1]
    u_LG, v_LG, q_LA, k_LA, *_ = _forward(
        x_LD, weight_DE, bias_E, norm_weight_D, norm_bias_D, eps, list(split_sizes), num_activated, recompute
    )
    return HSTUInput(u_LG=u_LG, v_LG=v_LG, q_LA=q_LA, k_LA=k_LA)


@operator("hstu_input")
def _forward(
    x_LD: Tensor,
    weight_DE: Tensor,
    bias_E: Tensor | None,
    norm_weight_D: Tensor | None,
    norm_bias_D: Tensor | None,
    eps: float,
    split_sizes: Sequence[int],
    num_activated: int,
    recompute: bool,
) -> Forward:
    """u, v, q, k, and what the backward pass reads: mean_L, rstd_L, normed_LD, projected_LE (empty if recomputed)."""
    from kernels.hstu_input.triton_kernels import forward  # noqa: PLC0415 - needs triton, an optional package

    return forward(
        x_LD, weight_DE, bias_E, (norm_weight_D, norm_bias_D), eps, list(split_sizes), num_activated, recompute
    )


@_forward.register_fake
def _(
    x_LD: Tensor,
    weight_DE: Tensor,
    bias_E: Tensor | None,
    norm_weight_D: Tensor | None,
    norm_bias_D: Tensor | None,
    eps: float,
    split_sizes: Sequence[int],
    num_activated: int,
    recompute: bool,
) -> Forward:
    num_positions, width = x_LD.shape
    u_LG, v_LG, q_LA, k_LA = (x_LD.new_empty(num_positions, size) for size in split_sizes)
    mean_L = x_LD.new_empty(num_positions, dtype=torch.float32)
    kept = 0 if recompute else num_positions
    return (
        *(u_LG, v_LG, q_LA, k_LA),
        *(mean_L, torch.empty_like(mean_L)),
        *(x_LD.new_empty(kept, width), x_LD.new_empty(kept, weight_DE.shape[1])),
    )


@operator("hstu_input_backward")
def _backward(
    grads: Sequence[Tensor],
    x_LD: Tensor,
    weight_DE: Tensor,
    bias_E: Tensor | None,
    norm_weight_D: Tensor | None,
    norm_bias_D: Tensor | None,
    state: Sequence[Tensor],
    num_activated: int,
    recompute: bool,
) -> Gradients:
    """Gradients of x, weight, bias, norm weight and norm bias; empty for those that were not given."""
    from kernels.hstu_input.triton_kernels import backward  # noqa: PLC0415 - needs triton, an optional package

    return backward(
        list(grads), x_LD, weight_DE, bias_E, (norm_weight_D, norm_bias_D), list(state), num_activated, recompute
    )


@_backward.register_fake
def _(
    grads: Sequence[Tensor],
    x_LD: Tensor,
    weight_DE: Tensor,
    bias_E: Tensor | None,
    norm_weight_D: Tensor | None,
    norm_bias_D: Tensor | None,
    state: Sequence[Tensor],
    num_activated: int,
    recompute: bool,
) -> Gradients:
    return (
        x_LD.new_empty(x_LD.shape),
        weight_DE.new_empty(weight_DE.shape),
        *(x_LD.new_empty(0 if t is None else t.shape[0]) for t in (bias_E, norm_weight_D, norm_bias_D)),  # type: ignore[return-value]
    )


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Forward) -> None:
    x_LD, weight_DE, bias_E, norm_weight_D, norm_bias_D, _, _, num_activated, recompute = inputs
    state = output[4:]
    ctx.mark_non_differentiable(*state)
    ctx.save_for_backward(x_LD, weight_DE, bias_E, norm_weight_D, norm_bias_D, *state)
    ctx.num_activated, ctx.recompute = num_activated, recompute


def _gradients(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
    x_LD, weight_DE, *given, mean_L, rstd_L, normed_LD, projected_LE = ctx.saved_tensors
    state = [mean_L, rstd_L, normed_LD, projected_LE]
    got = _backward(list(grads[:4]), x_LD, weight_DE, *given, state, ctx.num_activated, ctx.recompute)
    optional = (None if tensor is None else grad for tensor, grad in zip(given, got[2:], strict=True))
    return (*got[:2], *optional, None, None, None, None)


_forward.register_autograd(_gradients, setup_context=_keep)


def _check(
    x_LD: Tensor, weight_DE: Tensor, bias_E: Tensor | None, norm_weight_D: Tensor | None, norm_bias_D: Tensor | None
) -> None:
    if x_LD.dim() != 2 or x_LD.shape[1] == 0 or not x_LD.dtype.is_floating_point:
        raise ValueError(f"x_LD must be float[L, D], got {x_LD.dtype} of shape {list(x_LD.shape)}")
    width = x_LD.shape[1]
    if weight_DE.dim() != 2 or weight_DE.shape[0] != width:
        raise ValueError(f"weight_DE is {list(weight_DE.shape)}; x_LD of width {width} needs [{width}, E]")
    if (norm_weight_D is None) != (norm_bias_D is None):
        raise ValueError("norm_weight_D and norm_bias_D go together: pass both, or neither for a norm without them")
    lengths = {"bias_E": (bias_E, weight_DE.shape[1])}
    lengths |= {"norm_weight_D": (norm_weight_D, width), "norm_bias_D": (norm_bias_D, width)}
    for name, (tensor, length) in lengths.items():
        if tensor is not None and tensor.shape != (length,):
            raise ValueError(f"{name} is {list(tensor.shape)}; it must be [{length}]")
    for name, tensor in {"weight_DE": weight_DE, **{name: tensor for name, (tensor, _) in lengths.items()}}.items():
        if tensor is not None and (tensor.dtype != x_LD.dtype or tensor.device != x_LD.device):
            raise ValueError(f"{name} is {tensor.dtype} on {tensor.device}; x_LD is {x_LD.dtype} on {x_LD.device}")


def _check_options(weight_DE: Tensor, split_sizes: Sequence[int], eps: float, activate: Activated) -> None:
    if len(split_sizes) != 4 or min(split_sizes) < 1 or sum(split_sizes) != weight_DE.shape[1]:
        raise ValueError(
            f"split_sizes is {list(split_sizes)}; it must be the widths of u, v, q and k, four positive numbers that"
            f" sum to the {weight_DE.shape[1]} columns of weight_DE"
        )
    if not eps > 0:
        raise ValueError(f"eps is {eps}; it must be positive")
    if activate not in get_args(Activated):
        raise ValueError(f"activate is {activate!r}; it must be one of {', '.join(get_args(Activated))}")
