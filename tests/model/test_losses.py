"""Attached gradients are those of the loss, and the sampled softmax estimates the full one."""

from __future__ import annotations

import torch

from kernels.softmax_loss import form_full_softmax, sampled_softmax_loss
from model.losses import attach_gradients, candidate_log_q


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
    log_q = candidate_log_q(torch.full((11,), 1 / 11), num_items=11, num_negatives=500, num_targets=13)
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
