"""The input half of an HSTU layer in plain PyTorch: ``split(silu(norm(x) @ weight + bias))``.

Shapes: L packed positions, D model width, G width of u and of v (all heads), A width of q and of k (all heads),
E = 2 G + 2 A. The four widths may also differ from one another.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional

Activated = Literal["uvqk", "u"]
"""Which parts pass through SiLU: all of them (arXiv 2402.17152, eq. 1), or the gate only (its production layer)."""


@dataclass(frozen=True, kw_only=True, slots=True)
class HSTUInput:
    """What attention and the gate of one layer read: gate u, values v, queries q, keys k, each float[L, width]."""

    u_LG: Tensor
    v_LG: Tensor
    q_LA: Tensor
    k_LA: Tensor


def hstu_input_reference(
    x_LD: Tensor,
    weight_DE: Tensor,
    *,
    bias_E: Tensor | None,
    norm_weight_D: Tensor | None,
    norm_bias_D: Tensor | None,
    eps: float,
    split_sizes: Sequence[int],
    activate: Activated,
    product: Callable[[Tensor, Tensor], Tensor] = torch.matmul,
) -> HSTUInput:
    """The truth the kernels are tested against; differentiable by autograd, any floating dtype."""
    normed_LD = functional.layer_norm(x_LD, (x_LD.shape[1],), norm_weight_D, norm_bias_D, eps)
    projected_LE = product(normed_LD, weight_DE)
    if bias_E is not None:
        projected_LE = projected_LE + bias_E
    if activate == "uvqk":
        u_LG, v_LG, q_LA, k_LA = torch.split(functional.silu(projected_LE), list(split_sizes), dim=1)
    else:
        u_LG, v_LG, q_LA, k_LA = torch.split(projected_LE, list(split_sizes), dim=1)
        u_LG = functional.silu(u_LG)
    return HSTUInput(u_LG=u_LG, v_LG=v_LG, q_LA=q_LA, k_LA=k_LA)
