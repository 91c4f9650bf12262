"""Tokens of LLaTTE say from the start what was done, and with which item."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional

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


@pytest.mark.parametrize("width", [32, 64, 256])
def test_what_items_are_does_not_drown_which_they_are(width: int) -> None:
    generator = torch.Generator().manual_seed(0)
    tokens = ActionTokens(
        ActionEncoderConfig(num_actions=32, embedding_dim=width),
        item_dim=width,
        content_dim=64,
        generator=generator,
    )
    item_LE = normal(generator, NUM_ITEMS, width)
    content_LF = functional.normalize(normal(generator, NUM_ITEMS, 64), dim=1)
    time_ms_L = torch.zeros(NUM_ITEMS, dtype=torch.int64)

    def spread(item_LE: torch.Tensor, content_LF: torch.Tensor) -> torch.Tensor:
        return tokens.candidates(item_LE, content_LF, time_ms_L).std(0).mean()

    of_items = spread(item_LE, content_LF[:1].expand(NUM_ITEMS, -1))
    of_content = spread(item_LE[:1].expand(NUM_ITEMS, -1), content_LF)
    assert 0.25 < of_content / of_items < 0.5
