"""The output half of an HSTU layer in plain PyTorch: ``x + dropout(u * norm(attended)) @ weight + bias``.

Shapes: L packed positions, D model width, G width of u and of what attention returned (all heads), H groups the norm
treats apart, W width of the product's input: G, or 3 G where u and attended are appended.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional

from kernels.hstu_output.dropout import dropout_multiplier


def hstu_output_reference(
    attended_LG: Tensor,
    u_LG: Tensor,
    x_LD: Tensor,
    weight_WD: Tensor,
    *,
    bias_D: Tensor | None,
    norm_weight_G: Tensor | None,
    norm_bias_G: Tensor | None,
    num_groups: int,
    eps: float,
    concat: bool,
    dropout_p: float,
    seed: int | None,
    product: Callable[[Tensor, Tensor], Tensor] = torch.matmul,
) -> Tensor:
    """The truth the kernels are tested against; differentiable by autograd, any floating dtype."""
    grouped_LHV = attended_LG.reshape(-1, num_groups, attended_LG.shape[1] // num_groups)
    normed_LG = functional.layer_norm(grouped_LHV, grouped_LHV.shape[2:], eps=eps).flatten(1)
    if norm_weight_G is not None and norm_bias_G is not None:
        normed_LG = normed_LG * norm_weight_G + norm_bias_G
    y_LW = u_LG * normed_LG
    if concat:
        y_LW = torch.cat([u_LG, attended_LG, y_LW], dim=1)
    if seed is not None and dropout_p > 0.0:
        y_LW = y_LW * dropout_multiplier(y_LW.detach(), dropout_p, seed)
    out_LD = x_LD + product(y_LW, weight_WD)
    return out_LD if bias_D is None else out_LD + bias_D
