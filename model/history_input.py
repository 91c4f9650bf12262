"""From item embeddings to the first layer: scale, places, ages, dropout.

Shapes: L packed positions, B rows, D model width, N = max_len.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from kernels.jagged import position_index, row_index
from model.config import ModelConfig
from model.initial import dropped_out, normal

AGE_UNIT_S = 60.0
NUM_AGE_BUCKETS = 2048
"""The root of the age in minutes, cut here: 2048 ** 2 minutes are eight years."""


class HistoryInput(nn.Module):
    """``dropout(sqrt(D) * item + place [+ age])``, zeros where the item is not known."""

    def __init__(self, config: ModelConfig, generator: torch.Generator) -> None:
        super().__init__()
        self.config = config
        self.position_embedding = nn.Parameter(normal(generator, config.max_len, config.embedding_dim))
        self.age_embedding = (
            nn.Parameter(normal(generator, NUM_AGE_BUCKETS, config.embedding_dim)) if config.time_embedding else None
        )

    def forward(
        self,
        item_LD: Tensor,
        known_L: Tensor | None,
        offsets: Tensor,
        times_s: tuple[Tensor, Tensor],
        *,
        places_L: Tensor | None = None,
        dropout: torch.Generator | None,
    ) -> Tensor:
        """x_LD. times_s: int64[L], of each position and of its query. ValueError for a place from max_len on.

        known_L: bool[L], None: all are. places_L: int64[L], None: the index of each position in its row.
        """
        if places_L is None:
            places_L = position_index(offsets, item_LD.shape[0])
        if places_L.numel() and places_L.device.type == "cpu" and int(places_L.max()) >= self.config.max_len:
            longest = int(places_L.max()) + 1
            raise ValueError(f"the longest row has {longest} places; max_len is {self.config.max_len}")
        x_LD = item_LD * self.config.embedding_dim**0.5 + self.position_embedding.index_select(0, places_L)
        if self.age_embedding is not None:
            x_LD = x_LD + self.age_embedding.index_select(0, age_bucket(offsets, times_s))
        x_LD = dropped_out(x_LD, self.config.input_dropout, dropout)
        return x_LD if known_L is None else x_LD * known_L[:, None]


def age_bucket(offsets: Tensor, times_s: tuple[Tensor, Tensor]) -> Tensor:
    """int64[L]: root of each position's age in minutes when its row ends (at the time of the row's last query)."""
    last_L = offsets[1:].index_select(0, row_index(offsets, times_s[0].shape[0])) - 1
    age_s = (times_s[1].index_select(0, last_L) - times_s[0]).clamp(min=0)
    return (age_s / AGE_UNIT_S).sqrt().long().clamp(max=NUM_AGE_BUCKETS - 1)
