"""GRU4Rec's encoder (Hidasi et al., ICLR 2016) in HSTU's frame: the same input, states, scores and loss.

Shapes: L packed positions, B rows, D model width.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils.rnn import PackedSequence

from kernels.implementations import KernelName
from kernels.jagged import position_index, row_index
from model.config import ModelConfig
from model.history_input import HistoryInput
from model.initial import NORM_EPS, dropped_out, xavier


class GRU(nn.Module):
    """As ``HSTU``: item embeddings of histories to one L2-normalised state per position."""

    def __init__(self, config: ModelConfig, generator: torch.Generator) -> None:
        super().__init__()
        self.config = config
        self.input = HistoryInput(config, generator)
        width = config.embedding_dim
        self.recurrent = nn.GRU(width, width, config.num_layers)
        with torch.no_grad():
            for name, parameter in self.recurrent.named_parameters():
                parameter.copy_(xavier(generator, 3 * width, width) if "weight" in name else torch.zeros(3 * width))

    def forward(
        self,
        item_LD: Tensor,
        known_L: Tensor,
        offsets: Tensor,
        times_ms: tuple[Tensor, Tensor],
        *,
        dropout: torch.Generator | None = None,
        kernel: KernelName = "auto",  # noqa: ARG002 - torch's recurrent net chooses by itself
    ) -> Tensor:
        """u_LD of unit length; arguments as ``HSTU.forward``."""
        times_s = (times_ms[0] // 1000, times_ms[1] // 1000)
        x_LD: Tensor = self.input(item_LD, known_L, offsets, times_s, dropout=dropout)
        if x_LD.shape[0] == 0:
            return x_LD
        by_place, batch_sizes = _by_place(offsets, x_LD.shape[0])
        packed, _ = self.recurrent(PackedSequence(x_LD[by_place], batch_sizes))
        state_LD = torch.empty_like(packed.data).index_copy(0, by_place, packed.data)
        state_LD = dropped_out(state_LD, self.config.linear_dropout, dropout)
        return functional.normalize(state_LD, dim=1, eps=NORM_EPS)


def _by_place(offsets: Tensor, num_positions: int) -> tuple[Tensor, Tensor]:
    """int64[L], positions by their place in the row, the longest rows first; how many rows reach each place (CPU)."""
    places_L, rows_L = position_index(offsets, num_positions), row_index(offsets, num_positions)
    rank_B = torch.argsort(torch.argsort(offsets.diff(), descending=True, stable=True))
    by_place = torch.argsort(places_L * (len(offsets)) + rank_B[rows_L])
    return by_place, torch.bincount(places_L).cpu()
