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
    new_M: int64[M], packed positions of the new ones. places_M: int64[M], their places in their rows. newest: what the
    truncated layers read, where there are any; ``layers`` are then those before them.
    """

    layers: Tensor
    offsets: Tensor
    query_offsets: Tensor | None
    new_M: Tensor
    places_M: Tensor
    newest: NewestStates | None = None

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


@dataclass(frozen=True, kw_only=True, slots=True)
class NewestStates:
    """The newest positions of each row, W in all, which the truncated layers read.

    places_W: int64[W], where they are packed among all L. states_WD: float[W, D], what the layers before give of each;
    of those computed now, written as they come. from_M: int64, which of the M new positions are among the W. to_W:
    int64, their places there. kept: keys and values of the truncated layers over these rows; new to it are those of
    from_M, or all where the rows begin elsewhere than before.
    """

    places_W: Tensor
    states_WD: Tensor
    from_M: Tensor
    to_W: Tensor
    kept: KeyValues

    def put(self, x_MD: Tensor) -> Tensor:
        """Write what the layers before gave of the new positions; float[M', D], what the truncated ones read now."""
        self.states_WD.index_copy_(0, self.to_W, x_MD.index_select(0, self.from_M))
        return self.states_WD.index_select(0, self.kept.new_M)


def packed_places(starts_B: Tensor, counts_B: Tensor) -> Tensor:
    """int64: starts_B[b], starts_B[b] + 1, …, counts_B[b] of them, row by row."""
    offsets = torch.cat([counts_B.new_zeros(1), counts_B.cumsum(0)])
    moved_B = starts_B - offsets[:-1]
    return torch.arange(int(offsets[-1]), device=starts_B.device) + torch.repeat_interleave(moved_B, counts_B)
