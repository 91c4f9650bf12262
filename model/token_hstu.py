"""HSTU over tokens that say what was done with an item, to predict the next one.

*Merged* (ULTRA-HSTU, arXiv 2602.16986): item + action in one token, whose output predicts the next item. *Interleaved*
(HSTU, arXiv 2402.17152): item, action, item, action, …; the next item is predicted where all of an interaction is
known, at its action's token, as HSTU's retrieval predicts it from the pair of both. In either form the action on the
item that is predicted comes behind the position that predicts it, and nothing there sees it.

Shapes: L packed interactions, T tokens of them, D width.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.nn import functional

from kernels.implementations import KernelName
from model.action_encoder import STORED_ACTIONS, ActionEncoder, ActionEncoderConfig
from model.config import ModelConfig
from model.hstu import HSTU
from model.initial import NORM_EPS


@dataclass(frozen=True, kw_only=True, slots=True)
class Acts:
    """What was done in each of L interactions. actions_L: int64[L], bits, and above them where it was done
    (``ActionEncoder``). values_L: float32[L], NaN where unknown.
    """

    actions_L: Tensor
    values_L: Tensor

    def take(self, index_K: Tensor) -> Acts:
        """Those of an index."""
        return Acts(actions_L=self.actions_L[index_K], values_L=self.values_L[index_K])


class TokenHSTU(nn.Module):
    """As ``HSTU``, and ``acts``: one L2-normalised state per interaction. config: lengths count interactions."""

    def __init__(self, config: ModelConfig, generator: torch.Generator) -> None:
        super().__init__()
        plan = config.plan()
        self.config, self.plan, self.each = config, plan, plan.tokens_per_interaction
        self.actions = ActionEncoder(
            ActionEncoderConfig(
                num_actions=STORED_ACTIONS,
                embedding_dim=config.embedding_dim,
                value_thresholds=tuple(config.value_thresholds),
                has_surfaces=config.surfaces,
            ),
            generator,
        )
        self.encoder = HSTU(replace(config, max_len=self.each * config.max_len, **plan.in_tokens()), generator)

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
        """u_LD of unit length; arguments as ``HSTU.forward``."""
        x_TD = self.encoder.hidden_states(
            self.tokens(item_LD, acts),
            known_L.repeat_interleave(self.each),
            self.each * offsets,
            self.token_times(times_ms),
            dropout=dropout,
            kernel=kernel,
        )
        return functional.normalize(x_TD[self.each - 1 :: self.each], dim=1, eps=NORM_EPS)

    def tokens(self, item_LD: Tensor, acts: Acts) -> Tensor:
        """float[T, D]."""
        action_LD: Tensor = self.actions(acts.actions_L, acts.values_L)
        if self.plan.tokens == "merged":
            return item_LD + action_LD
        return torch.stack([item_LD, action_LD], dim=1).flatten(0, 1)

    def token_times(self, times_ms: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """int64[T] each: when a token happened, and when what it predicts does: an item's action at its own time."""
        if self.plan.tokens == "merged":
            return times_ms
        return times_ms[0].repeat_interleave(2), torch.stack(times_ms, dim=1).flatten()


__all__ = ["Acts", "TokenHSTU"]
