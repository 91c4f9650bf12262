"""The entry point of the output half of an HSTU layer, and the torch operators behind it.

Shapes: L packed positions, D model width, G width of u and of what attention returned, H groups of the norm, W = G or
3 G.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from kernels.fp8_product import ProductFormat, fp8_product
from kernels.hstu_output.reference import hstu_output_reference
from kernels.implementations import KernelName, choose
from kernels.operators import operator

TRITON_DTYPES = (torch.float16, torch.bfloat16, torch.float32)

Forward = tuple[Tensor, Tensor, Tensor, Tensor]
Gradients = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]


def hstu_output(
    attended_LG: Tensor,
    u_LG: Tensor,
    x_LD: Tensor,
    weight_WD: Tensor,
    *,
    bias_D: Tensor | None = None,
    norm_weight_G: Tensor | None = None,
    norm_bias_G: Tensor | None = None,
    num_groups: int = 1,
    eps: float = 1e-6,
    concat: bool = False,
    dropout_p: float = 0.0,
    seed: int | None = None,
    recompute: bool = True,
    product: ProductFormat = "plain",
    kernel: KernelName = "auto",
) -> Tensor:
    """float[L, D]: ``x + dropout(y) @ weight + bias`` with ``y = u * norm(attended)``.

    attended_LG: float[L, G], what attention returned, L may be 0. u_LG: float[L, G], its gate. x_LD: float[L, D], the
    layer's input. weight_WD: float[W, D]; W is G, or 3 G with ``concat``, where ``y = [u, attended, u * norm]``.
    bias_D: float[D]. norm_weight_G, norm_bias_G: float[G], both or neither. All of one dtype and device.
    num_groups: G is normed in that many equal parts, e.g. one per head. eps: added to the variance.
    dropout_p: share of the elements of y set to zero, in [0, 1); seed: int in [0, 2**63) the mask follows from, a new
    one for every layer and step, or None for a pass without dropout. recompute: keep no y for the backward pass.
    product: "fp8" rounds both factors to 8-bit floats, between plain PyTorch (kernels/fp8_product.py).
    kernel: "auto" chooses by device; a name forces one (for debugging).
    Differentiable once in every tensor. ValueError for wrong shapes, dtypes or options, KernelUnavailableError for
    a kernel that cannot run here. Source: HSTU (arXiv 2402.17152) eq. 3; ULTRA-HSTU (arXiv 2602.16986) for what is
    recomputed; maths in README.md.
    """
    _check(attended_LG, u_LG, x_LD, weight_WD, concat=concat)
    _check_parameters(attended_LG, u_LG, x_LD, weight_WD, bias_D, norm_weight_G, norm_bias_G)
    _check_options(attended_LG, num_groups, eps, dropout_p, seed)
    if product == "fp8" or choose(kernel, x_LD.device, has_cpu_path=False) == "reference":
        return hstu_output_reference(
            attended_LG,
            u_LG,
            x_LD,
            weight_WD,
            bias_D=bias_D,
            norm_weight_G=norm_weight_G,
            norm_bias_G=norm_bias_G,
            num_groups=num_groups,
            eps=eps,
            concat=concat,
            dropout_p=dropout_p,
            seed=seed,
            product=fp8_product if product == "fp8" else torch.matmul,
        )
    if x_LD.dtype not in TRITON_DTYPES:
        raise ValueError(f"x_LD is {x_LD.dtype}; Triton kernels take float16, bfloat16 or float32: use 'reference'")
    if seed is None:
        seed, dropout_p = 0, 0.0
    tensors = (attended_LG, u_LG, x_LD, weight_WD, bias_D, norm_weight_G, norm_bias_G)
    out_LD: Tensor = _forward(*tensors, num_groups, eps, concat, dropout_p, seed, recompute)[0]
    return out_LD


@operator("hstu_output")
def _forward(
    attended_LG: Tensor,
    u_LG: Tensor,
    x_LD: Tensor,
    weight_WD: Tensor,
    bias_D: Tensor | None,
    norm_weight_G: Tensor | None,
    norm_bias_G: Tensor | None,
    num_groups: int,
    eps: float,
    concat: bool,
    dropout_p: float,
    seed: int,
    recompute: bool,
) -> Forward:
    """The output, then what the backward pass reads: mean_LH, rstd_LH and y_LW (empty if recomputed)."""
    from kernels.hstu_output.triton_kernels import Gate, forward  # noqa: PLC0415 - needs triton, an optional package

    gate = Gate.of((norm_weight_G, norm_bias_G), num_groups, concat=concat, dropout_p=dropout_p, seed=seed)
    return forward(attended_LG, u_LG, x_LD, weight_WD, bias_D, gate, eps, recompute)


@_forward.register_fake
def _(
    attended_LG: Tensor,
    u_LG: Tensor,
    x_LD: Tensor,
    weight_WD: Tensor,
    bias_D: Tensor | None,
    norm_weight_G: Tensor | None,
    norm_bias_G: Tensor | None,
    num_groups: int,
    eps: float,
    concat: bool,
    dropout_p: float,
    seed: int,
    recompute: bool,
) -> Forward:
    num_positions = x_LD.shape[0]
    mean_LH = x_LD.new_empty(num_positions, num_groups, dtype=torch.float32)
    return (
        x_LD.new_empty(x_LD.shape),
        *(mean_LH, torch.empty_like(mean_LH)),
        x_LD.new_empty(0 if recompute else num_positions, weight_WD.shape[0]),
    )


@operator("hstu_output_backward")
def _backward(
    grad_LD: Tensor,
    attended_LG: Tensor,
    u_LG: Tensor,
    weight_WD: Tensor,
    norm_weight_G: Tensor | None,
    norm_bias_G: Tensor | None,
    mean_LH: Tensor,
    rstd_LH: Tensor,
    y_LW: Tensor,
    has_bias: bool,
    concat: bool,
    dropout_p: float,
    seed: int,
    recompute: bool,
) -> Gradients:
    """Gradients of attended, u, weight, bias, norm weight and norm bias; empty for those that were not given."""
    from kernels.hstu_output.triton_kernels import Gate, backward  # noqa: PLC0415 - needs triton, an optional package

    norm = (norm_weight_G, norm_bias_G)
    gate = Gate.of(norm, mean_LH.shape[1], concat=concat, dropout_p=dropout_p, seed=seed)
    grad_bias_D = grad_LD.sum(0) if has_bias else grad_LD.new_empty(0)
    grad_attended_LG, grad_u_LG, grad_weight_WD, grad_norm_weight_G, grad_norm_bias_G = backward(
        grad_LD, attended_LG, u_LG, weight_WD, gate, (mean_LH, rstd_LH), None if recompute else y_LW
    )
    return grad_attended_LG, grad_u_LG, grad_weight_WD, grad_bias_D, grad_norm_weight_G, grad_norm_bias_G


@_backward.register_fake
def _(
    grad_LD: Tensor,
    attended_LG: Tensor,
    u_LG: Tensor,
    weight_WD: Tensor,
    norm_weight_G: Tensor | None,
    norm_bias_G: Tensor | None,
    mean_LH: Tensor,
    rstd_LH: Tensor,
    y_LW: Tensor,
    has_bias: bool,
    concat: bool,
    dropout_p: float,
    seed: int,
    recompute: bool,
) -> Gradients:
    norm_width = 0 if norm_weight_G is None else norm_weight_G.shape[0]
    return (
        attended_LG.new_empty(attended_LG.shape),
        u_LG.new_empty(u_LG.shape),
        weight_WD.new_empty(weight_WD.shape),
        grad_LD.new_empty(weight_WD.shape[1] if has_bias else 0),
        grad_LD.new_empty(norm_width),
        grad_LD.new_empty(norm_width),
    )


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Forward) -> None:
    attended_LG, u_LG, _, weight_WD, bias_D, norm_weight_G, norm_bias_G, *options = inputs
    state = output[1:]
    ctx.mark_non_differentiable(*state)
    ctx.save_for_backward(attended_LG, u_LG, weight_WD, norm_weight_G, norm_bias_G, *state)
    _, _, concat, dropout_p, seed, recompute = options
    ctx.has_bias = bias_D is not None
    ctx.options = (ctx.has_bias, concat, dropout_p, seed, recompute)


def _gradients(ctx: Any, grad_LD: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
    saved = ctx.saved_tensors  # once: activation checkpointing recomputes them for every read
    norm_weight_G = saved[3]
    got = _backward(grad_LD, *saved, *ctx.options)
    grad_attended_LG, grad_u_LG, grad_weight_WD, *optional = got
    given = (ctx.has_bias, norm_weight_G is not None, norm_weight_G is not None)
    of_optional = (grad if is_given else None for is_given, grad in zip(given, optional, strict=True))
    return (grad_attended_LG, grad_u_LG, grad_LD, grad_weight_WD, *of_optional, *[None] * 6)


_forward.register_autograd(_gradients, setup_context=_keep)


def _check(attended_LG: Tensor, u_LG: Tensor, x_LD: Tensor, weight_WD: Tensor, *, concat: bool) -> None:
    if attended_LG.dim() != 2 or attended_LG.shape[1] == 0 or not attended_LG.dtype.is_floating_point:
        raise ValueError(f"attended_LG must be float[L, G], got {attended_LG.dtype} of {list(attended_LG.shape)}")
    num_positions, width = attended_LG.shape
    if u_LG.shape != attended_LG.shape:
        raise ValueError(f"u_LG is {list(u_LG.shape)}; it must be {list(attended_LG.shape)}, as attended_LG")
    if x_LD.dim() != 2 or x_LD.shape[0] != num_positions:
        raise ValueError(f"x_LD is {list(x_LD.shape)}; it must be [{num_positions}, D]")
    expected = [3 * width if concat else width, x_LD.shape[1]]
    if list(weight_WD.shape) != expected:
        raise ValueError(f"weight_WD is {list(weight_WD.shape)}; with concat={concat} it must be {expected}")


def _check_parameters(
    attended_LG: Tensor,
    u_LG: Tensor,
    x_LD: Tensor,
    weight_WD: Tensor,
    bias_D: Tensor | None,
    norm_weight_G: Tensor | None,
    norm_bias_G: Tensor | None,
) -> None:
    if (norm_weight_G is None) != (norm_bias_G is None):
        raise ValueError("norm_weight_G and norm_bias_G go together: pass both, or neither for a norm without them")
    width = attended_LG.shape[1]
    lengths = {"bias_D": (bias_D, x_LD.shape[1])}
    lengths |= {"norm_weight_G": (norm_weight_G, width), "norm_bias_G": (norm_bias_G, width)}
    for name, (tensor, length) in lengths.items():
        if tensor is not None and tensor.shape != (length,):
            raise ValueError(f"{name} is {list(tensor.shape)}; it must be [{length}]")
    tensors = {"attended_LG": attended_LG, "u_LG": u_LG, "weight_WD": weight_WD}
    for name, tensor in {**tensors, **{name: tensor for name, (tensor, _) in lengths.items()}}.items():
        if tensor is not None and (tensor.dtype != x_LD.dtype or tensor.device != x_LD.device):
            raise ValueError(f"{name} is {tensor.dtype} on {tensor.device}; x_LD is {x_LD.dtype} on {x_LD.device}")


def _check_options(attended_LG: Tensor, num_groups: int, eps: float, dropout_p: float, seed: int | None) -> None:
    width = attended_LG.shape[1]
    if num_groups < 1 or width % num_groups != 0:
        raise ValueError(f"num_groups is {num_groups}; it must divide the width {width} of attended_LG")
    if not eps > 0:
        raise ValueError(f"eps is {eps}; it must be positive")
    if not 0.0 <= dropout_p < 1.0:
        raise ValueError(f"dropout_p is {dropout_p}; it must be at least 0 and below 1")
    if seed is not None and not 0 <= seed < 2**63:
        raise ValueError(f"seed is {seed}; it must be in [0, 2**63), or None for a pass without dropout")
