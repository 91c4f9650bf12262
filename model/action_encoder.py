"""What a user did with an item, as an embedding: one learned vector for each kind of action, and for each threshold.

Where it was done, the surface, may be one more: a number that stands above the bits of the actions, so that it goes
wherever they go.

Shapes: L interactions, K flags (kinds of action, then thresholds), S surfaces, E width of a flag's vector, D model
width.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import pairwise
from typing import Final

import torch
from torch import Tensor, nn

from model.initial import INIT_STD

STORED_ACTIONS: Final = 32
"""Bits of an interaction's actions. All have a place in the network from the start, so that an action that is declared
later needs no new model."""


NUM_SURFACES: Final = 256
"""Numbers of surfaces; 0: not told. All have a vector from the start, as actions have."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ActionEncoderConfig:
    """Which actions there are and how wide they are held."""

    num_actions: int
    """Kinds of action; kind k is bit k of an interaction's actions. At most 62."""
    embedding_dim: int
    """Width D of what comes out: that of the item embeddings."""
    value_thresholds: tuple[float, ...] = ()
    """An interaction's value (such as seconds watched) sets one more flag for each threshold that it reaches."""
    action_dim: int = 8
    """Width E of a flag's own vector, before the matrix to D."""
    has_surfaces: bool = False
    """Whether bits STORED_ACTIONS and up of an interaction's actions say where it happened; else they are ignored."""

    def __post_init__(self) -> None:
        if not 1 <= self.num_actions <= 62:
            raise ValueError(f"num_actions is {self.num_actions}; it must be 1 to 62, the bits of an int64")
        if self.has_surfaces and self.num_actions > STORED_ACTIONS:
            raise ValueError(f"num_actions is {self.num_actions}; beside surfaces it must be 1 to {STORED_ACTIONS}")
        for name in ("embedding_dim", "action_dim"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be 1 or more")
        bounds = (-math.inf, *self.value_thresholds, math.inf)
        if not all(low < high for low, high in pairwise(bounds)):
            raise ValueError(f"value_thresholds is {self.value_thresholds}; it must ascend and be finite")

    @property
    def num_flags(self) -> int:
        """K."""
        return self.num_actions + len(self.value_thresholds)


class ActionEncoder(nn.Module):
    """``sum over the flags k that are set of vector_k @ matrix_k, + bias [+ surface]``; the matrices are one linear map
    to D.

    ``no_action`` takes K learned vectors of its own through the same map. It stands where an action is not known, which
    is not the same as an interaction without any action (the bias alone).
    """

    thresholds_T: Tensor

    def __init__(self, config: ActionEncoderConfig, generator: torch.Generator) -> None:
        super().__init__()
        self.config = config
        num_flags, width = config.num_flags, config.action_dim
        self.vector_KE = nn.Parameter(torch.empty(num_flags, width).normal_(std=INIT_STD, generator=generator))
        self.dummy_KE = nn.Parameter(torch.empty(num_flags, width).normal_(std=INIT_STD, generator=generator))
        bound = (6 / (num_flags * width + config.embedding_dim)) ** 0.5  # Xavier, of the map from K * E to D
        self.matrix_KED = nn.Parameter(
            torch.empty(num_flags, width, config.embedding_dim).uniform_(-bound, bound, generator=generator)
        )
        self.bias = nn.Parameter(torch.zeros(config.embedding_dim))
        if config.has_surfaces:
            self.surface_SE = nn.Parameter(torch.empty(NUM_SURFACES, width).normal_(std=INIT_STD, generator=generator))
            bound = (6 / (width + config.embedding_dim)) ** 0.5
            self.surface_ED = nn.Parameter(
                torch.empty(width, config.embedding_dim).uniform_(-bound, bound, generator=generator)
            )
        thresholds = torch.tensor(config.value_thresholds, dtype=torch.float32)
        self.register_buffer("thresholds_T", thresholds, persistent=False)

    def forward(self, actions_L: Tensor, values_L: Tensor | None = None) -> Tensor:
        """float[L, D]. actions_L: int64[L], a bit for each kind of action; bits from num_actions on are ignored, the
        surface apart.

        values_L: float[L], NaN where unknown (reaches no threshold); needed where there are thresholds.
        """
        flags_LK = self._flags(actions_L, values_L).to(self.bias.dtype)
        # Projecting K vectors once, instead of each interaction's, gives the same sums.
        found_LD = torch.addmm(self.bias, flags_LK, torch.einsum("ke,ked->kd", self.vector_KE, self.matrix_KED))
        if self.config.has_surfaces:
            found_LD = found_LD + self.surface((actions_L >> STORED_ACTIONS) % NUM_SURFACES)
        return found_LD

    def surface(self, surfaces_B: Tensor) -> Tensor:
        """float[B, D]: what a place alone says, of int64[B]; where it is known before anything is done there."""
        return (self.surface_SE @ self.surface_ED).index_select(0, surfaces_B)

    def no_action(self) -> Tensor:
        """float[D]: what a candidate carries, whose action is yet to happen."""
        return self.bias + torch.einsum("ke,ked->d", self.dummy_KE, self.matrix_KED)

    def _flags(self, actions_L: Tensor, values_L: Tensor | None) -> Tensor:
        if actions_L.dtype != torch.int64 or actions_L.dim() != 1:
            raise ValueError(f"actions_L must be int64[L], got {actions_L.dtype} of shape {tuple(actions_L.shape)}")
        kinds = torch.arange(self.config.num_actions, device=actions_L.device)
        set_LA = ((actions_L[:, None] >> kinds) & 1).bool()
        if not self.config.value_thresholds:
            return set_LA
        if values_L is None or values_L.shape != actions_L.shape:
            shape = None if values_L is None else tuple(values_L.shape)
            raise ValueError(f"values_L must be float[{actions_L.shape[0]}] for value_thresholds, got {shape}")
        return torch.cat([set_LA, values_L[:, None] >= self.thresholds_T], dim=1)


__all__ = ["NUM_SURFACES", "STORED_ACTIONS", "ActionEncoder", "ActionEncoderConfig"]
