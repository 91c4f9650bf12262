"""An HSTU layer that keeps little for its backward pass and computes the rest again there (``model.recompute``).

Shapes: L packed positions, D model width, H heads, A query/key width, V value width, G = H * V.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from kernels.fp8_product import ProductFormat, fp8_product
from kernels.hstu_decode import LayerWeights
from model.config import ModelConfig
from model.initial import NORM_EPS
from model.recomputation import RepeatedPart, leaving_out_outputs

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]
"""From q_LHA, k_LHA, v_LHV to float[L, H, V]."""
Leave = Callable[[Tensor, Tensor, Tensor], Tensor]
"""From what attention returned, float[L, G], u_LG and x_LD to x_LD of the next layer."""


class Entered(NamedTuple):
    """What attention and the gate of a layer read."""

    u_LG: Tensor
    q_LHA: Tensor
    k_LHA: Tensor
    v_LHV: Tensor


def recomputed(
    enter: Callable[[Tensor], Entered],
    attend: Attend,
    leave: Leave,
    x_LD: Tensor,
    weights: LayerWeights,
    *,
    is_fused: bool,
) -> Tensor:
    """A layer that keeps x_LD and what attention returned for its backward pass, and computes the rest again there.

    is_fused: ``leave`` keeps nothing but its inputs anyway.
    """
    tensors = _parameters(weights)
    first = RepeatedPart(enter, kept=(x_LD, *tensors))
    u_LG, q_LHA, k_LHA, v_LHV = first(x_LD)
    with leaving_out_outputs(first):
        attended_LG = attend(q_LHA, k_LHA, v_LHV).flatten(1)
        if is_fused:
            return leave(attended_LG, u_LG, x_LD)
    return _left(leave, attended_LG, u_LG, x_LD, tensors, gate=first)


def recomputed_under_window(
    config: ModelConfig,
    attend: Attend,
    leave: Leave,
    x_LD: Tensor,
    weights: LayerWeights,
    *,
    product: ProductFormat,
) -> Tensor:
    """``recomputed`` in plain PyTorch, where attention is cheap and so the product to u, v, q and k is dear.

    Kept besides is the half of that product which becomes u and v, from which SiLU gives them again; only the half for
    q and k is repeated.
    """
    tensors, split = _parameters(weights), 2 * config.num_heads * config.hidden_dim
    norm_weight, norm_bias = weights.input_norm or (None, None)
    multiplied = fp8_product if product == "fp8" else torch.matmul

    def norm(x_LD: Tensor) -> tuple[Tensor]:
        return (functional.layer_norm(x_LD, (config.embedding_dim,), norm_weight, norm_bias, NORM_EPS),)

    def queries_and_keys(normed_LD: Tensor) -> tuple[Tensor, Tensor]:
        projected = multiplied(normed_LD, weights.uvqk_DE[:, split:])
        q, k = (projected if config.gate_only_activation else functional.silu(projected)).chunk(2, dim=1)
        shape = (-1, config.num_heads, config.attention_dim)
        return q.view(shape), k.view(shape)

    def gate_and_values(projected: Tensor) -> tuple[Tensor, Tensor]:
        if config.gate_only_activation:
            u_LG, v_LG = projected.chunk(2, dim=1)
            u_LG = functional.silu(u_LG)
        else:
            u_LG, v_LG = functional.silu(projected).chunk(2, dim=1)
        return u_LG, v_LG.view(-1, config.num_heads, config.hidden_dim)

    normed = RepeatedPart(norm, kept=(x_LD, *tensors))
    (normed_LD,) = normed(x_LD)
    with leaving_out_outputs(normed):
        projected = multiplied(normed_LD, weights.uvqk_DE[:, :split])
    asked = RepeatedPart(queries_and_keys, kept=tensors, before=normed)
    q_LHA, k_LHA = asked(normed_LD, again=lambda: (normed.output(0).detach().requires_grad_(),))
    told = RepeatedPart(gate_and_values, kept=(projected,))
    u_LG, v_LHV = told(projected)
    with leaving_out_outputs(asked, told):
        attended_LG = attend(q_LHA, k_LHA, v_LHV).flatten(1)
    return _left(leave, attended_LG, u_LG, x_LD, tensors, gate=told)


def _left(
    leave: Leave, attended_LG: Tensor, u_LG: Tensor, x_LD: Tensor, tensors: tuple[Tensor, ...], *, gate: RepeatedPart
) -> Tensor:
    """The output half; gate: what gives u_LG again, as its first output."""
    # Not the tensors themselves: they hold the graph that this is to be a part of.
    attended, x = (one.detach().requires_grad_(one.requires_grad) for one in (attended_LG, x_LD))

    def again() -> tuple[Tensor, Tensor, Tensor]:
        return attended, gate.output(0).detach().requires_grad_(), x

    second = RepeatedPart(lambda *read: (leave(*read),), kept=(attended_LG, x_LD, *tensors), before=gate)
    return second(attended_LG, u_LG, x_LD, again=again)[0]


def _parameters(weights: LayerWeights) -> tuple[Tensor, ...]:
    norms = (*(weights.input_norm or ()), *(weights.output_norm or ()))
    return (weights.uvqk_DE, weights.output_WD, weights.output_bias_D, *norms)
