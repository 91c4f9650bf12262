"""The chunked softmax equals the plain one, and the sampled one estimates it."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional

from model.losses import attach_gradients, candidate_log_q, form_full_softmax, sampled_softmax_loss
from model.recommender import Catalogue


def leaves(num_positions: int, num_items: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(num_positions)
    shapes: list[tuple[int, ...]] = [(num_positions, 6), (num_items, 6), (num_items,), ()]
    return [torch.randn(s, dtype=torch.float64, generator=generator).requires_grad_() for s in shapes]


@pytest.mark.parametrize(("num_positions", "chunk"), [(13, 4), (4, 4), (1, 8), (13, 100)])
def test_chunked_softmax_and_every_gradient_equal_cross_entropy(num_positions: int, chunk: int) -> None:
    u, unit, offset, scale = leaves(num_positions, 11)
    targets = torch.arange(num_positions) * 7 % 11
    seen: list[tuple[slice, torch.Tensor]] = []
    formed = form_full_softmax(
        u,
        targets,
        Catalogue(unit_VD=unit, offset_V=offset),
        scale,
        positions_per_chunk=chunk,
        on_logits=lambda part, logits: seen.append((part, logits.clone())),
    )
    got = attach_gradients(
        formed.loss, (u, formed.u_PD), (unit, formed.unit_VD), (offset, formed.offset_V), (scale, formed.scale)
    )
    logits = scale * u @ unit.T + offset
    want = functional.cross_entropy(logits, targets)
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(torch.cat([shown for _, shown in seen]), logits.detach())
    got_grads = torch.autograd.grad(got * 3, [u, unit, offset, scale])
    want_grads = torch.autograd.grad(want * 3, [u, unit, offset, scale])
    for name, a, b in zip(("u", "unit", "offset", "scale"), got_grads, want_grads, strict=True):
        assert torch.allclose(a, b, atol=1e-12), f"gradient of {name}"


def test_no_positions_give_a_loss_and_gradient_of_zero() -> None:
    u, unit, offset, scale = leaves(0, 11)
    none = torch.empty(0, dtype=torch.int64)
    catalogue = Catalogue(unit_VD=unit, offset_V=offset)
    formed = form_full_softmax(u, none, catalogue, scale)
    full = attach_gradients(formed.loss, (u, formed.u_PD), (unit, formed.unit_VD))
    for loss in (full, sampled_softmax_loss(u, none, catalogue, scale, torch.zeros(11))):
        assert float(loss.detach()) == 0.0
        torch.autograd.backward(loss)
    assert unit.grad is not None
    assert not bool(unit.grad.any())


def test_sampling_nearly_everything_gives_nearly_the_full_softmax() -> None:
    u, unit, offset, scale = leaves(13, 11)
    targets = torch.arange(13) % 11
    catalogue = Catalogue(unit_VD=unit, offset_V=offset)
    log_q = candidate_log_q(torch.full((11,), 1 / 11), num_items=11, num_negatives=500, num_targets=13)
    got = sampled_softmax_loss(u, targets, catalogue, scale, log_q)
    want = form_full_softmax(u, targets, catalogue, scale).loss
    torch.testing.assert_close(got.detach(), want, atol=1e-6, rtol=0)


def test_the_chance_of_being_a_candidate_matches_drawing() -> None:
    generator = torch.Generator().manual_seed(0)
    popularity = torch.tensor([0.5, 0.3, 0.15, 0.05])
    drawn = torch.zeros(4)
    for _ in range(4000):
        uniform = torch.randint(4, (2,), generator=generator)
        targets = torch.multinomial(popularity, 3, replacement=True, generator=generator)
        drawn[torch.unique(torch.cat([uniform, targets]))] += 1
    want = candidate_log_q(popularity, num_items=4, num_negatives=2, num_targets=3).exp()
    assert torch.allclose(drawn / 4000, want, atol=0.025)
