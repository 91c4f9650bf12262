"""Row-wise Adagrad, schedules and clipping against references; what a change of the row optimiser does."""

from __future__ import annotations

import logging

import pytest
import torch

from model.config import OptimizerConfig
from model.learning import supervised_pass
from model.optimizer import RecommenderOptimizer
from model.schedule import learning_rate_factor
from tests.model.study import Study


def test_row_steps_by_adagrad_follow_its_definition(study: Study) -> None:
    items = study.recommender.items
    config = OptimizerConfig(row_optimizer="adagrad", row_learning_rate=0.05, row_weight_decay=0.2)
    optimizer = RecommenderOptimizer(study.recommender, config)
    study.histories(0)
    weight, bias = items.weight[3].clone().double(), items.bias[3].clone().double()
    untouched = items.weight[2].clone()
    second, bias_second = 0.0, 0.0
    generator = torch.Generator().manual_seed(0)
    for _ in range(4):
        active = items.activate(torch.tensor([1, 3]))
        active.weight_RD.grad, active.bias_R.grad = torch.randn(2, 8, generator=generator), torch.randn(2)
        gradient, of_bias = active.weight_RD.grad[1].double(), active.bias_R.grad[1].double()
        items.clear_dirty()
        optimizer.step(active)
        assert items.dirty_rows().tolist() == [1, 3]
        second += float(gradient.square().mean())
        bias_second += float(of_bias.square())
        weight = weight * (1 - 0.05 * 0.2) - 0.05 * gradient / second**0.5
        bias = bias - 0.05 * of_bias / bias_second**0.5
    torch.testing.assert_close(items.weight[3].double(), weight, atol=1e-5, rtol=0)
    torch.testing.assert_close(items.bias[3].double(), bias, atol=1e-5, rtol=0)
    assert torch.equal(items.weight[2], untouched)


def test_adagrad_keeps_two_numbers_a_row_and_continues_from_them(study: Study) -> None:
    config = OptimizerConfig(row_optimizer="adagrad")
    study.optimizer = RecommenderOptimizer(study.recommender, config)
    study.learn(2)
    state = study.optimizer.state_dict()
    assert {name for name in state if name.startswith("rows.")} == {"rows.second", "rows.bias_second"}
    restarted = RecommenderOptimizer(study.recommender, config)
    restarted.load_state_dict(state)
    for name, tensor in restarted.state_dict().items():
        assert torch.equal(tensor, state[name]), name


def test_the_state_of_another_row_optimiser_is_not_used_and_that_is_said(
    study: Study, caplog: pytest.LogCaptureFixture
) -> None:
    study.learn(2)
    state = study.optimizer.state_dict()
    other = RecommenderOptimizer(study.recommender, OptimizerConfig(row_optimizer="adagrad"))
    with caplog.at_level(logging.WARNING):
        other.load_state_dict(state)
    assert "row_optimizer" in caplog.text
    found = other.state_dict()
    assert not found["rows.second"].any()
    assert torch.equal(found["step"], state["step"])
    for name in (name for name in state if name.startswith("dense.")):
        assert torch.equal(found[name], state[name]), name


def test_learning_rates_rise_and_then_stay() -> None:
    config = OptimizerConfig(warm_up_steps=4)
    assert [learning_rate_factor(config, step) for step in (1, 2, 3, 4, 5, 10**9)] == [0.25, 0.5, 0.75, 1, 1, 1]
    assert learning_rate_factor(OptimizerConfig(), 1) == 1


def test_learning_rates_fall_with_the_root_of_the_steps_to_a_floor() -> None:
    config = OptimizerConfig(warm_up_steps=100, schedule="inverse_sqrt", schedule_floor=0.1)
    assert learning_rate_factor(config, 50) == 0.5
    assert learning_rate_factor(config, 100) == 1
    assert learning_rate_factor(config, 400) == pytest.approx(0.5)
    assert learning_rate_factor(config, 10_000) == pytest.approx(0.1)
    assert learning_rate_factor(config, 10**9) == 0.1


def test_the_schedule_scales_dense_and_row_steps_alike(study: Study) -> None:
    weights = study.recommender.items.weight.clone()[:1], study.recommender.log_scale.detach().clone()
    moved = []
    for config in (OptimizerConfig(), OptimizerConfig(warm_up_steps=2)):
        study.recommender.items.weight[:1] = weights[0]
        with torch.no_grad():
            study.recommender.log_scale.copy_(weights[1])
        optimizer = RecommenderOptimizer(study.recommender, config)
        study.histories(0)
        active = study.recommender.items.activate(torch.tensor([0]))
        active.weight_RD.grad, active.bias_R.grad = torch.ones(1, 8), torch.ones(1)
        study.recommender.log_scale.grad = torch.tensor(1.0)
        before = study.recommender.items.weight[0].clone()
        optimizer.step(active)
        moved.append((study.recommender.items.weight[0] - before, study.recommender.log_scale.detach() - weights[1]))
    torch.testing.assert_close(moved[1][0], moved[0][0] / 2)
    torch.testing.assert_close(moved[1][1], moved[0][1] / 2)


@pytest.mark.parametrize("max_norm", [1e-3, 1e6])
def test_clipping_is_that_of_pytorch_over_dense_parameters_and_rows_together(study: Study, max_norm: float) -> None:
    batch, targets = study.histories(0)
    found = supervised_pass(study.recommender, batch, targets, study.loss_config, generator=study.generator)
    found.backward()
    leaves = [*study.recommender.parameters(), found.active.weight_RD, found.active.bias_R]
    gradients = [leaf.grad.clone() for leaf in leaves if leaf.grad is not None]
    total = float(torch.stack([gradient.norm() for gradient in gradients]).norm())
    want = [gradient * min(1.0, max_norm / (total + 1e-6)) for gradient in gradients]
    seen: list[torch.Tensor] = []

    class Watched(RecommenderOptimizer):
        def zero_grad(self) -> None:
            seen.extend(leaf.grad.clone() for leaf in leaves if leaf.grad is not None)
            super().zero_grad()

    Watched(study.recommender, OptimizerConfig(max_gradient_norm=max_norm)).step(found.active)
    assert len(seen) == len(want)
    for got, expected in zip(seen, want, strict=True):
        torch.testing.assert_close(got, expected)
