"""Attached gradients are those of the loss, and the sampled softmax estimates the full one."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from kernels.softmax_loss import form_full_softmax, sampled_softmax_loss
from model.config import LossConfig
from model.losses import attach_gradients, candidate_log_q, draw_distribution, draw_negatives


def leaves(num_positions: int, num_items: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(num_positions)
    shapes: list[tuple[int, ...]] = [(num_positions, 6), (num_items, 6), (num_items,), ()]
    return [torch.randn(s, dtype=torch.float64, generator=generator).requires_grad_() for s in shapes]


def test_attached_gradients_reach_their_tensors_scaled_by_what_comes_from_above() -> None:
    u, unit, _, _ = leaves(3, 4)
    value, of_u, of_unit = torch.tensor(2.5), torch.ones_like(u), torch.full_like(unit, 2)
    attached = attach_gradients(value, (u, of_u), (unit, of_unit))
    assert float(attached.detach()) == 2.5
    torch.autograd.backward(attached * 3)
    assert u.grad is not None
    assert unit.grad is not None
    assert torch.equal(u.grad, 3 * of_u)
    assert torch.equal(unit.grad, 3 * of_unit)


def test_sampling_nearly_everything_gives_nearly_the_full_softmax() -> None:
    u, unit, offset, scale = leaves(13, 11)
    targets = torch.arange(13) % 11
    log_q = candidate_log_q(torch.full((11,), 1 / 11), torch.full((11,), 1 / 11), num_negatives=500, num_targets=13)
    got = sampled_softmax_loss(
        u,
        unit,
        targets,
        torch.arange(11),
        scale=scale,
        offset_V=offset,
        log_q_C=log_q.double(),
        log_q_target_P=log_q.double()[targets],
    )
    want = form_full_softmax(u, unit, targets, scale=scale, offset_V=offset).loss
    torch.testing.assert_close(got.loss.detach(), want, atol=1e-6, rtol=0)


@pytest.mark.parametrize("negatives", ["uniform", "popularity", "in_batch"])
def test_the_chance_of_being_a_candidate_matches_drawing(negatives: Any) -> None:
    generator = torch.Generator().manual_seed(0)
    popularity = torch.tensor([0.5, 0.3, 0.15, 0.05])
    chance = draw_distribution(popularity.log(), LossConfig(kind="sampled", negatives=negatives))
    drawn = torch.zeros(4)
    for _ in range(4000):
        negative = draw_negatives(chance, 2, generator)
        targets = torch.multinomial(popularity, 3, replacement=True, generator=generator)
        drawn[torch.unique(torch.cat([negative, targets]))] += 1
    want = candidate_log_q(popularity, chance, num_negatives=2, num_targets=3).exp()
    assert torch.allclose(drawn / 4000, want, atol=0.025)


def test_negatives_are_drawn_as_the_setting_says() -> None:
    popularity = torch.tensor([0.6, 0.3, 0.1])
    uniform = draw_distribution(popularity.log(), LossConfig(negatives="uniform"))
    torch.testing.assert_close(uniform, torch.full((3,), 1 / 3, dtype=torch.float64))
    by_popularity = draw_distribution(popularity.log(), LossConfig(negatives="popularity", negatives_power=0.5))
    want = popularity.double().sqrt() / popularity.double().sqrt().sum()
    torch.testing.assert_close(by_popularity, want, atol=1e-6, rtol=0)
    counts = torch.bincount(draw_negatives(by_popularity, 40_000, torch.Generator().manual_seed(1)), minlength=3)
    torch.testing.assert_close(counts / 40_000, want.float(), atol=0.01, rtol=0)
    in_batch = draw_distribution(popularity.log(), LossConfig(negatives="in_batch"))
    assert draw_negatives(in_batch, 8, torch.Generator()).shape == (0,)
    assert draw_negatives(in_batch[:0], 8, torch.Generator()).shape == (0,)


@pytest.mark.parametrize("negatives", ["uniform", "popularity"])
def test_the_sampled_loss_comes_to_the_full_one_as_more_is_drawn(negatives: Any) -> None:
    u, unit, offset, scale = leaves(6, 40)
    popularity = torch.softmax(torch.linspace(0, 3, 40), 0)
    targets = torch.tensor([0, 5, 11, 22, 33, 39])
    full = float(form_full_softmax(u, unit, targets, scale=scale, offset_V=offset).loss)
    chance = draw_distribution(popularity.log(), LossConfig(negatives=negatives))
    generator, errors = torch.Generator().manual_seed(2), []
    for count in (10, 80, 2_000):
        found = []
        for _ in range(60):
            candidates = torch.unique(torch.cat([targets, draw_negatives(chance, count, generator)]))
            log_q = candidate_log_q(popularity[candidates], chance[candidates], num_negatives=count, num_targets=6)
            place = torch.searchsorted(candidates, targets)
            loss = sampled_softmax_loss(
                u,
                unit[candidates],
                place,
                torch.arange(len(candidates)),
                scale=scale,
                offset_V=offset[candidates],
                log_q_C=log_q.double(),
                log_q_target_P=log_q.double()[place],
            ).loss
            found.append(float(loss.detach()))
        errors.append(abs(sum(found) / len(found) - full))
    assert errors[2] < 0.02 * full
    assert errors[2] < errors[0]
