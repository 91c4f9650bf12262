"""The recurrent encoder on packed rows is torch's own on each row alone."""

from __future__ import annotations

from dataclasses import replace

import torch

from model.config import ModelConfig
from model.encoder import build_encoder
from model.gru import GRU

CONFIG = ModelConfig(kind="gru", embedding_dim=6, num_layers=2, max_len=7)
LENGTHS = [3, 0, 7, 1, 3]


def encoder() -> GRU:
    built = build_encoder(CONFIG, torch.Generator().manual_seed(1))
    assert isinstance(built, GRU)
    return built


def rows(lengths: list[int]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, tuple[torch.Tensor, torch.Tensor]]:
    """Items, which are known, offsets, and times."""
    total = sum(lengths)
    item_LD = torch.randn(total, 6, generator=torch.Generator().manual_seed(2))
    known_L = torch.arange(total) % 4 != 2
    offsets = torch.tensor([0, *lengths]).cumsum(0)
    times_ms = torch.arange(total) * 1000
    return item_LD, known_L, offsets, (times_ms, times_ms + 1000)


def test_packed_rows_are_each_row_alone() -> None:
    built = encoder()
    item_LD, known_L, offsets, times_ms = rows(LENGTHS)
    u_LD = built(item_LD, known_L, offsets, times_ms)
    for start, end in zip(offsets[:-1].tolist(), offsets[1:].tolist(), strict=True):
        if start == end:
            continue
        part = slice(start, end)
        x_nD = item_LD[part] * 6**0.5 + built.input.position_embedding[: end - start]
        alone_nD, _ = built.recurrent((x_nD * known_L[part][:, None])[:, None])
        torch.testing.assert_close(u_LD[part], torch.nn.functional.normalize(alone_nD[:, 0], dim=1))


def test_no_position_sees_a_later_one() -> None:
    built = encoder()
    item_LD, known_L, offsets, times_ms = rows([6])
    before = built(item_LD, known_L, offsets, times_ms)
    item_LD[4:] += 1.0
    torch.testing.assert_close(built(item_LD, known_L, offsets, times_ms)[:4], before[:4])


def test_gradients_reach_every_weight() -> None:
    built = encoder()
    built(*rows(LENGTHS)).sum().backward()
    assert all(parameter.grad is not None and parameter.grad.abs().sum() > 0 for parameter in built.parameters())


def test_weights_follow_from_the_seed() -> None:
    one, same = encoder(), encoder()
    other = build_encoder(replace(CONFIG, num_layers=2), torch.Generator().manual_seed(9))
    for name, weights in one.state_dict().items():
        assert torch.equal(weights, same.state_dict()[name]), name
        assert "bias" in name or not torch.equal(weights, other.state_dict()[name]), name


def test_no_interactions_give_no_states() -> None:
    assert encoder()(*rows([0, 0])).shape == (0, 6)
