"""From interactions to action tokens (LLaTTE, arXiv 2601.20083): item, action, time and content in one small network.

``x_t = RMSNorm(MLP(E_item + E_action + E_content))``, the time added to the first half of the dimensions. Time is how
long ago, in the units of a logarithm, and the hour and weekday (UTC): the paper finds attention with a period of a day.
Where it happened (the paper's surface) is part of the action's embedding.

Shapes: L interactions, D token width, E item embedding width, F content width, B users.
"""

from __future__ import annotations

from typing import Final

import torch
from torch import Tensor, nn
from torch.nn import functional

from kernels.jagged import row_index
from model.action_encoder import ActionEncoder, ActionEncoderConfig
from model.initial import INIT_STD, normal, xavier
from model.llatte import RMSNorm

AGE_BUCKETS: Final = 64
"""Two for each doubling of the age in seconds: the last begins at 68 years."""
CONTENT_LOUDNESS: Final = 1 / 6
"""At which scale content, of unit length, starts in a token: a third of items and actions, so that it does not drown
which item it is. (At 1.15, two to three times as loud as these, it costs rankers more than it brings; at a seventeenth
NE is as here: MovieLens-1M, `make study-llatte`.)"""
_HOUR_MS: Final = 3_600_000
_DAY_MS: Final = 24 * _HOUR_MS


class TimeEncoding(nn.Module):
    """Vectors of half the tokens' width for how long ago something was, and at which hour of which weekday (UTC)."""

    def __init__(self, width: int, generator: torch.Generator) -> None:
        super().__init__()
        self.width = max(width // 2, 1)
        self.age = nn.Parameter(normal(generator, AGE_BUCKETS, self.width) * 10)
        self.hour = nn.Parameter(normal(generator, 24, self.width) * 10)
        self.weekday = nn.Parameter(normal(generator, 7, self.width) * 10)

    def forward(self, time_ms_L: Tensor, asked_at_ms_L: Tensor) -> Tensor:
        """float[L, width]. int64[L] epoch milliseconds: when it happened, and when somebody asks about it."""
        return (
            self.age.index_select(0, age_bucket(asked_at_ms_L - time_ms_L))
            + self.hour.index_select(0, time_ms_L // _HOUR_MS % 24)
            + self.weekday.index_select(0, time_ms_L // _DAY_MS % 7)
        )


def age_bucket(age_ms: Tensor) -> Tensor:
    """int64, shape of age_ms: 0 below one second, then two for each doubling; negative ages count as 0."""
    return (2 * torch.log2(1 + age_ms.clamp(min=0).float() / 1000)).long().clamp(max=AGE_BUCKETS - 1)


class ActionTokens(nn.Module):
    """Tokens of interactions, and of candidates, whose action is yet to happen."""

    def __init__(
        self, actions: ActionEncoderConfig, *, item_dim: int, content_dim: int, generator: torch.Generator
    ) -> None:
        super().__init__()
        width = actions.embedding_dim
        self.content_dim = content_dim
        self.actions = ActionEncoder(actions, generator)
        self.item_weight = nn.Parameter(xavier(generator, item_dim, width))
        self.content_weight = nn.Parameter(xavier(generator, content_dim, width)) if content_dim else None
        self._content_scale = CONTENT_LOUDNESS * ((content_dim + width) / 2) ** 0.5  # over xavier's deviation
        self.out_weight = nn.Parameter(xavier(generator, width, width))
        self.out_bias = nn.Parameter(torch.zeros(width))
        self.norm = RMSNorm(width)
        self.time = TimeEncoding(width, generator)

    def forward(
        self,
        item_LE: Tensor,
        content_LF: Tensor | None,
        actions_L: Tensor,
        values_L: Tensor | None,
        times_ms: tuple[Tensor, Tensor],
    ) -> Tensor:
        """float[L, D]. actions_L, values_L: as ``ActionEncoder``. times_ms: int64[L], as ``TimeEncoding``."""
        return self._tokens(item_LE, content_LF, self.actions(actions_L, values_L), times_ms)

    def candidates(self, item_LE: Tensor, content_LF: Tensor | None, asked_at_ms_L: Tensor) -> Tensor:
        """float[L, D] of items that nothing has been done with yet."""
        return self._tokens(item_LE, content_LF, self.actions.no_action(), (asked_at_ms_L, asked_at_ms_L))

    def _tokens(
        self, item_LE: Tensor, content_LF: Tensor | None, action: Tensor, times_ms: tuple[Tensor, Tensor]
    ) -> Tensor:
        # Embeddings and vectors of actions start at INIT_STD: both at the scale of a half. Left small, actions are lost
        # in the mean of a long history; what is louder than items drowns these.
        inner_LD = (item_LE @ self.item_weight + action) / (2 * INIT_STD)
        if self.content_weight is not None:
            if content_LF is None:
                raise ValueError(f"content_LF is None; these weights read content of {self.content_dim} numbers")
            inner_LD = inner_LD + content_LF @ self.content_weight * self._content_scale
        x_LD: Tensor = self.norm(torch.addmm(self.out_bias, functional.silu(inner_LD), self.out_weight))
        time_LD = self.time(*times_ms)
        return x_LD + functional.pad(time_LD, (0, x_LD.shape[1] - time_LD.shape[1]))


def at_rows(times_ms_B: Tensor, offsets: Tensor, num_values: int) -> Tensor:
    """int64[L]: of each packed value, the time of its row."""
    return times_ms_B.index_select(0, row_index(offsets, num_values))
