"""Keys and values of every layer over packed histories, some of them computed earlier.

Shapes: L packed positions, M of them computed now, B rows, H heads, A query/key width, V value width, W = H * (A + V).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from model.config import ModelConfig


@dataclass(frozen=True, kw_only=True, slots=True)
class KeyValues:
    """What attention reads of packed rows whose newest positions are computed now, the others having been before.

    layers: float[layers, L, W]; those of the M new positions are written as each layer gets to them. offsets:
    int64[B + 1], the rows. query_offsets: int64[B + 1], how the M fall to the rows; None: all are new, M = L.
    new_M: int64[M], packed positions of the new ones. places_M: int64[M], their places in their rows.
    """

    layers: Tensor
    offsets: Tensor
    query_offsets: Tensor | None
    new_M: Tensor
    places_M: Tensor

    @staticmethod
    def width(config: ModelConfig) -> int:
        """W: numbers kept of one position and layer."""
        return config.num_heads * (config.attention_dim + config.hidden_dim)

    def put(self, layer: int, k_MHA: Tensor, v_MHV: Tensor) -> tuple[Tensor, Tensor]:
        """Keep the new positions' keys and values of a layer; returns k_LHA and v_LHV of all positions, as views."""
        kept_LW = self.layers[layer]
        new_MW = torch.cat([k_MHA.flatten(1), v_MHV.flatten(1)], 1)
        if self.query_offsets is None:
            kept_LW.copy_(new_MW)
        else:
            kept_LW.index_copy_(0, self.new_M, new_MW)
        split = k_MHA.shape[1] * k_MHA.shape[2]
        return kept_LW[:, :split].view(-1, *k_MHA.shape[1:]), kept_LW[:, split:].view(-1, *v_MHV.shape[1:])
