"""Tokens of LLaTTE say from the start what was done, and with which item."""

from __future__ import annotations

import torch

from model.action_encoder import ActionEncoderConfig
from model.initial import normal
from model.llatte_tokens import ActionTokens

WIDTH, NUM_ITEMS = 32, 200


def test_neither_what_was_done_nor_with_which_item_drowns_the_other() -> None:
    generator = torch.Generator().manual_seed(0)
    tokens = ActionTokens(
        ActionEncoderConfig(num_actions=32, embedding_dim=WIDTH, value_thresholds=(2.0, 3.0, 4.0, 5.0)),
        item_dim=WIDTH,
        content_dim=0,
        generator=generator,
    )
    item_LE = normal(generator, NUM_ITEMS, WIDTH)
    actions_L, time_ms_L = torch.ones(NUM_ITEMS, dtype=torch.int64), torch.zeros(NUM_ITEMS, dtype=torch.int64)

    def means(value: float) -> tuple[torch.Tensor, torch.Tensor]:
        x_LD = tokens(item_LE, None, actions_L, torch.full((NUM_ITEMS,), value), (time_ms_L, time_ms_L))
        return x_LD.mean(0), x_LD.std(0).mean()

    (low_D, spread), (high_D, _) = means(1.0), means(5.0)
    assert 0.25 < (high_D - low_D).square().mean().sqrt() / spread < 1
