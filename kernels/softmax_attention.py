"""Causal softmax attention over jagged rows, for the Transformers HSTU is compared with.

torch's own fused attention does the work; here rows of similar length are only put side by side.

Shapes: L packed positions, H heads, A width of queries, keys and values, G rows of a group, n its longest.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn import functional

from kernels.jagged import check_offsets, check_offsets_shape

FILLED_SHARE_MIN = 0.75
"""A row joins a group if it fills this share of the group's longest row …"""
SIMILAR_LEN = 16
"""… or falls short of it by at most this many positions: short rows cost little when padded."""


def softmax_attention(q_LHA: Tensor, k_LHA: Tensor, v_LHA: Tensor, offsets: Tensor) -> Tensor:
    """o_LHA: ``o[i] = sum over j <= i of softmax_j(q[i] . k[j] / sqrt(A)) * v[j]`` in each row.

    q, k, v: float[L, H, A], same dtype and device. offsets: int64[B + 1]. Differentiable. ValueError for wrong shapes
    or offsets. Reads the offsets, so synchronises a CUDA device.
    """
    if q_LHA.dim() != 3 or not q_LHA.shape == k_LHA.shape == v_LHA.shape:
        shapes = ", ".join(str(tuple(x.shape)) for x in (q_LHA, k_LHA, v_LHA))
        raise ValueError(f"q, k and v must all be [L, H, A], got {shapes}")
    check_offsets_shape(offsets, q_LHA)
    check_offsets(offsets, num_values=q_LHA.shape[0], max_len=q_LHA.shape[0])
    outputs: list[Tensor] = [q_LHA[:0]]
    places: list[Tensor] = [offsets[:0]]
    for index_Gn, inside_Gn in _groups(offsets):
        q_GHnA, k_GHnA, v_GHnA = (x[index_Gn].transpose(1, 2) for x in (q_LHA, k_LHA, v_LHA))
        # Places behind a row's end come after all of it, where a causal query does not look.
        o_GHnA = functional.scaled_dot_product_attention(q_GHnA, k_GHnA, v_GHnA, is_causal=True)
        outputs.append(o_GHnA.transpose(1, 2)[inside_Gn])
        places.append(index_Gn[inside_Gn])
    return torch.empty_like(q_LHA).index_copy(0, torch.cat(places), torch.cat(outputs))


def _groups(offsets: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Packed positions int64[G, n] and whether they lie inside the row bool[G, n], longest rows first."""
    lengths_B, order_B = offsets.diff().sort(descending=True, stable=True)
    lengths = [length for length in lengths_B.tolist() if length > 0]
    first = 0
    while first < len(lengths):
        shortest = min(lengths[first] * FILLED_SHARE_MIN, lengths[first] - SIMILAR_LEN)
        end = next((i for i in range(first, len(lengths)) if lengths[i] < shortest), len(lengths))
        place_n = torch.arange(lengths[first], device=offsets.device)
        last_G1 = lengths_B[first:end, None] - 1
        yield offsets[order_B[first:end], None] + torch.minimum(place_n, last_G1), place_n <= last_G1
        first = end
