"""A mixture of transducers: an encoder for each kind of signal, fused (ULTRA-HSTU, arXiv 2602.16986).

Each transducer reads the interactions of a history in which its actions were done, with a length and depth of its own:
many views need not crowd out a few purchases, and neither pays for the other's attention. The state after an
interaction is that of every transducer after the newest of *its* interactions so far, side by side through one matrix.

Shapes: B users, L interactions, K of them read by one transducer, D width, T transducers.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from kernels.implementations import KernelName
from kernels.jagged import position_index, row_index
from model.config import ModelConfig
from model.hstu import HSTU
from model.initial import INIT_STD, NORM_EPS
from model.token_hstu import Acts, TokenHSTU
from model.transducers import ALL_ACTIONS, Transducer, hop_of, part_config


class Fusion(nn.Module):
    """``concat(states) @ weight``, which starts near their mean; a state of its own where a transducer read nothing."""

    def __init__(self, num_parts: int, width: int, generator: torch.Generator) -> None:
        super().__init__()
        mean = torch.eye(width).repeat(num_parts, 1) / num_parts
        noise = torch.empty(num_parts * width, width).normal_(std=INIT_STD, generator=generator)
        self.weight = nn.Parameter(mean + noise)
        self.absent_TD = nn.Parameter(torch.empty(num_parts, width).normal_(std=INIT_STD, generator=generator))

    def forward(self, states: Sequence[Tensor]) -> Tensor:
        """float[P, D], from float[P, D] of each transducer."""
        return torch.cat(list(states), dim=1) @ self.weight


class TransducerMixture(nn.Module):
    """As ``HSTU``, and ``acts``: one L2-normalised state per interaction. config: one with transducers."""

    def __init__(self, config: ModelConfig, generator: torch.Generator) -> None:
        super().__init__()
        self.config, self.transducers = config, checked_transducers(config)
        configs = [part_config(config, one) for one in self.transducers]
        self.parts = nn.ModuleList(
            TokenHSTU(one, generator) if one.plan().tokens != "items" else HSTU(one, generator) for one in configs
        )
        self.fusion = Fusion(len(configs), config.embedding_dim, generator)

    def encoders(self) -> list[HSTU | TokenHSTU]:
        """One for each transducer."""
        return cast("list[HSTU | TokenHSTU]", list(self.parts))

    def forward(
        self,
        item_LD: Tensor,
        known_L: Tensor,
        offsets: Tensor,
        times_ms: tuple[Tensor, Tensor],
        *,
        acts: Acts,
        dropout: torch.Generator | None = None,
        kernel: KernelName = "auto",
    ) -> Tensor:
        """u_LD of unit length; arguments as ``HSTU.forward``. A position keeps its query's time in every transducer."""
        states = []
        row_L = row_index(offsets, item_LD.shape[0])
        for number, (transducer, part) in enumerate(zip(self.transducers, self.encoders(), strict=True)):
            reads_L = reads(transducer, part.config.max_len, acts.actions_L, offsets)
            kept_K = reads_L.nonzero().flatten()
            own_offsets = torch.searchsorted(kept_K, offsets)
            own_times_ms = (times_ms[0][kept_K], times_ms[1][kept_K])
            read = (item_LD.index_select(0, kept_K), known_L[kept_K], own_offsets, own_times_ms)
            own_acts = {} if isinstance(part, HSTU) else {"acts": acts.take(kept_K)}
            u_KD: Tensor = part(*read, **own_acts, dropout=dropout, kernel=kernel)
            # The newest that it has read so far, counted from 1; 0 where that is nothing.
            newest_L = reads_L.cumsum(0)
            newest_L = torch.where(newest_L > own_offsets[row_L], newest_L, 0)
            absent_1D = self.fusion.absent_TD[number : number + 1].to(u_KD.dtype)
            states.append(torch.cat([absent_1D, u_KD]).index_select(0, newest_L))
        return functional.normalize(self.fusion(states), dim=1, eps=NORM_EPS)


def reads(transducer: Transducer, max_len: int, actions_L: Tensor, offsets: Tensor) -> Tensor:
    """bool[L]: the newest of each row that are a transducer's own; from max_len on they move in hops.

    An interaction of which no action is told (0) is everybody's. As ``read_by``, of packed rows.
    """
    own_L = (actions_L & ALL_ACTIONS == 0) | (actions_L & transducer.mask != 0)
    kept_K = own_L.nonzero().flatten()
    own_offsets = torch.searchsorted(kept_K, offsets)
    hop = hop_of(max_len)
    beyond_B = (own_offsets.diff() - max_len).clamp(min=0)
    start_B = (beyond_B + hop - 1) // hop * hop
    is_newest_K = position_index(own_offsets, kept_K.shape[0]) >= start_B[row_index(own_offsets, kept_K.shape[0])]
    found_L = torch.zeros_like(own_L)
    found_L[kept_K] = is_newest_K
    return found_L


def checked_transducers(config: ModelConfig) -> tuple[Transducer, ...]:
    """Those of the model. ValueError if their bits are not set."""
    for one in config.transducers:
        if one.mask == 0:
            raise ValueError(f"transducers: the actions of {one.name} have no bits yet (with_action_bits)")
    return config.transducers
