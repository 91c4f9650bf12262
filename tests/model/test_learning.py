"""Learning lowers the loss, touches only the rows of a step, and resumes to the last bit."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any, get_args, get_type_hints

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from kernels.softmax_loss import OnLogits
from model.config import LossConfig, ModelConfig, OptimizerConfig
from model.errors import StateMismatchError
from model.learning import supervised_pass
from model.optimizer import RecommenderOptimizer
from model.recommender import Recommender
from model.stochastic_length import Selection, StochasticLength, shortened
from tests.model.study import Study


@pytest.mark.parametrize("alpha", [0.0, 1.2])
@pytest.mark.parametrize("kind", ["full", "sampled"])
def test_resuming_from_saved_state_continues_to_the_last_bit(
    small_config: ModelConfig, kind: str, alpha: float
) -> None:
    whole = Study(small_config, kind=kind, stochastic_length_alpha=alpha)
    whole.learn(4)
    resumed = Study(small_config, kind=kind, stochastic_length_alpha=alpha)
    resumed.recommender.load_dense_state(whole.recommender.dense_state())
    resumed.recommender.items.load_state_dict(whole.recommender.items.state_dict())
    resumed.optimizer.load_state_dict(whole.optimizer.state_dict())
    resumed.generator.set_state(whole.generator.get_state())
    resumed.num_steps = whole.num_steps
    assert resumed.learn(4) == whole.learn(4)
    for name, tensor in whole.recommender.items.state_dict().items():
        assert torch.equal(resumed.recommender.items.state_dict()[name], tensor), name
    for name, tensor in whole.optimizer.state_dict().items():
        assert torch.equal(resumed.optimizer.state_dict()[name], tensor), name


@pytest.mark.parametrize("kind", ["full", "sampled"])
def test_repeating_one_batch_lowers_its_loss(make_study: Callable[[str], Study], kind: str) -> None:
    study = make_study(kind)
    batch, targets = study.histories(3)
    losses = []
    for _ in range(30):
        found = supervised_pass(study.recommender, batch, targets, study.loss_config, generator=study.generator)
        found.backward()
        study.optimizer.step(found.active)
        losses.append(float(found.loss.detach()))
    assert sum(losses[-5:]) < 0.8 * sum(losses[:5])


def test_a_sampled_step_changes_and_marks_only_its_rows(make_study: Callable[[str], Study]) -> None:
    study = make_study("sampled")
    study.learn(5)
    items = study.recommender.items
    items.clear_dirty()
    before = items.state_dict()
    batch, targets = study.histories(0)  # the items of the first step are known already
    items.clear_dirty()
    found = supervised_pass(study.recommender, batch, targets, study.loss_config, generator=study.generator)
    found.backward()
    study.optimizer.step(found.active)
    changed = (items.weight[: items.num_items] != before["weight"]).any(1).nonzero().flatten()
    assert 0 < changed.numel() < items.num_items
    assert set(changed.tolist()) <= set(items.dirty_rows().tolist())
    assert items.dirty_rows().tolist() == found.active.rows_R.tolist()


def keep(shown: list[torch.Tensor]) -> OnLogits:
    return lambda _, logits: shown.append(logits.clone())


def test_logits_shown_are_those_of_the_state_before_the_update(make_study: Callable[[str], Study]) -> None:
    for kind in ("full", "sampled"):
        study = make_study(kind)
        study.learn(2)
        batch, targets = study.histories(2)
        shown: list[torch.Tensor] = []
        generator = torch.Generator().manual_seed(3)
        supervised_pass(
            study.recommender,
            batch,
            targets,
            study.loss_config,
            generator=generator,
            on_logits=keep(shown),
        )
        generator.manual_seed(3)
        if kind == "sampled":
            torch.rand(4, dtype=torch.float64, generator=generator)  # the negatives
        with torch.no_grad():
            u = study.recommender.encode(batch, dropout=generator)[targets.positions_P]
            want = study.recommender.scores(u)
        torch.testing.assert_close(torch.cat(shown), want)


def test_dense_steps_equal_adamw_of_pytorch(study: Study) -> None:
    config = OptimizerConfig(dense_weight_decay=0.1, dense_learning_rate=0.01)
    study.optimizer = RecommenderOptimizer(study.recommender, config)
    twin = Recommender(study.recommender.config)
    theirs = torch.optim.AdamW(
        twin.parameters(), lr=0.01, betas=(config.beta1, config.beta2), eps=config.epsilon, weight_decay=0.1
    )
    for step in range(4):
        batch, targets = study.histories(step)
        found = supervised_pass(study.recommender, batch, targets, study.loss_config, generator=study.generator)
        found.backward()
        for own, other in zip(study.recommender.parameters(), twin.parameters(), strict=True):
            other.grad = None if own.grad is None else own.grad.clone()
        study.optimizer.step(found.active)
        theirs.step()
    for (name, own), other in zip(study.recommender.named_parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(own, other, atol=1e-6, rtol=1e-5, msg=name)


def test_row_steps_follow_adam_with_one_second_moment_a_row(study: Study) -> None:
    items = study.recommender.items
    config = OptimizerConfig(row_learning_rate=0.02, row_weight_decay=0.5)
    optimizer = RecommenderOptimizer(study.recommender, config)
    study.histories(0)
    weight = items.weight[3].clone().double()
    first, second = torch.zeros(8, dtype=torch.float64), 0.0
    generator = torch.Generator().manual_seed(0)
    for step in range(1, 4):
        active = items.activate(torch.tensor([1, 3]))
        active.weight_RD.grad = torch.randn(2, 8, generator=generator)
        active.bias_R.grad = torch.zeros(2)
        gradient = active.weight_RD.grad[1].double()
        optimizer.step(active)
        first = config.beta1 * first + (1 - config.beta1) * gradient
        second = config.beta2 * second + (1 - config.beta2) * float(gradient.square().mean())
        root = (second / (1 - config.beta2**step)) ** 0.5
        weight = weight * (1 - 0.02 * 0.5) - 0.02 * first / (1 - config.beta1**step) / root
    torch.testing.assert_close(items.weight[3].double(), weight, atol=1e-5, rtol=0)
    assert items.bias[3] == 0


def test_optimiser_state_of_another_model_is_refused(study: Study, make_study: Callable[[str], Study]) -> None:
    study.learn(2)
    with pytest.raises(StateMismatchError, match=r"rows\.first"):
        make_study("full").optimizer.load_state_dict(study.optimizer.state_dict())


def test_the_full_pass_has_the_gradients_of_plain_autograd(study: Study) -> None:
    study.learn(6)
    recommender = study.recommender
    batch, targets = study.histories(6)
    config = LossConfig(num_hard_negatives=10_000)
    generator = torch.Generator().manual_seed(5)
    found = supervised_pass(recommender, batch, targets, config, generator=generator)
    found.backward()
    got = {name: parameter.grad for name, parameter in recommender.named_parameters()}
    recommender.zero_grad(set_to_none=True)

    active = recommender.items.activate(torch.arange(recommender.items.num_items))
    u_PD = recommender.encode(batch, active, dropout=generator.manual_seed(5))[targets.positions_P]
    catalogue = recommender.active_catalogue(active)
    loss = functional.cross_entropy(recommender.scale * u_PD @ catalogue.unit_VD.T + catalogue.offset_V, targets.rows_P)
    torch.autograd.backward(loss)
    torch.testing.assert_close(found.loss, loss)
    for name, parameter in recommender.named_parameters():
        torch.testing.assert_close(got[name], parameter.grad, atol=1e-6, rtol=1e-4, msg=name)
    rows_R = found.active.rows_R
    assert rows_R.shape[0] == recommender.items.num_items
    for got_R, want_R in ((found.active.weight_RD, active.weight_RD), (found.active.bias_R, active.bias_R)):
        torch.testing.assert_close(got_R.grad, want_R.grad, atol=1e-6, rtol=1e-4)


def test_a_full_step_changes_the_rows_of_the_batch_and_the_hardest_negatives_only(study: Study) -> None:
    study.recommender.items.admit(np.arange(300))
    study.learn(1)
    items = study.recommender.items
    batch, targets = study.histories(0)
    before = items.state_dict()
    items.clear_dirty()
    config = LossConfig(num_hard_negatives=7)
    found = supervised_pass(study.recommender, batch, targets, config, generator=study.generator)
    found.backward()
    study.optimizer.step(found.active)
    changed = (items.weight[: items.num_items] != before["weight"]).any(1).nonzero().flatten().tolist()
    in_batch = set(torch.cat([batch.rows_L, targets.rows_P]).tolist())
    assert set(changed) == set(items.dirty_rows().tolist())
    assert in_batch <= set(changed)
    assert len(changed) <= len(in_batch) + 7


# Stochastic length


def lengths_encoded(study: Study) -> list[int]:
    """A list that gets the number of positions of every later pass."""
    lengths: list[int] = []

    def count(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        lengths.append(inputs[0].shape[0])

    study.recommender.encoder.register_forward_pre_hook(count)
    return lengths


@pytest.mark.parametrize("kind", ["full", "sampled"])
def test_histories_are_read_whole_unless_stochastic_length_is_on(small_config: ModelConfig, kind: str) -> None:
    study = Study(small_config, kind=kind)
    study.learn(3)
    batch, targets = study.histories(3)
    encoded = lengths_encoded(study)
    state = study.generator.get_state()
    loss = supervised_pass(study.recommender, batch, targets, study.loss_config, generator=study.generator).loss
    assert encoded == [batch.num_positions]
    # The selection alone changes nothing, nor does it draw.
    config = replace(study.loss_config, stochastic_length_selection="uniform")
    study.generator.set_state(state)
    assert torch.equal(supervised_pass(study.recommender, batch, targets, config, generator=study.generator).loss, loss)


@pytest.mark.parametrize("kind", ["full", "sampled"])
@pytest.mark.parametrize("selection", get_args(Selection))
def test_a_shortened_pass_is_the_pass_over_the_shortened_batch(
    small_config: ModelConfig, kind: str, selection: Selection
) -> None:
    study = Study(small_config, kind=kind)
    study.learn(3)
    batch, targets = study.histories(5)
    config = replace(study.loss_config, stochastic_length_alpha=1.2, stochastic_length_selection=selection)
    encoded = lengths_encoded(study)
    shown: list[torch.Tensor] = []
    generator = torch.Generator().manual_seed(8)
    got = supervised_pass(study.recommender, batch, targets, config, generator=generator, on_logits=keep(shown))
    assert encoded[0] < batch.num_positions
    assert bool(got.loss.isfinite())

    generator.manual_seed(8)
    rule = StochasticLength(alpha=1.2, max_len=study.recommender.config.max_len, selection=selection)
    short, moved = shortened(batch, targets, rule, generator=generator)
    assert short.num_positions == encoded[0]
    shown_short: list[torch.Tensor] = []
    want = supervised_pass(
        study.recommender,
        short,
        moved,
        replace(config, stochastic_length_alpha=0.0),
        generator=generator,
        on_logits=keep(shown_short),
    )
    assert torch.equal(got.loss, want.loss)
    assert torch.equal(torch.cat(shown), torch.cat(shown_short))


@pytest.mark.parametrize(
    ("setting", "says"),
    [
        ({"stochastic_length_alpha": 1.0}, "stochastic_length_alpha is 1.0"),
        ({"stochastic_length_alpha": 2.5}, "stochastic_length_alpha is 2.5"),
        ({"stochastic_length_alpha": float("nan")}, "stochastic_length_alpha is nan"),
        ({"stochastic_length_alpha": -1.5}, "stochastic_length_alpha is -1.5"),
        ({"stochastic_length_selection": "oldest"}, "stochastic_length_selection is 'oldest'"),
    ],
)
def test_settings_of_stochastic_length_outside_their_range_are_refused(setting: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        LossConfig(**setting)


def test_the_setting_offers_every_selection_there_is() -> None:
    setting = get_type_hints(LossConfig)["stochastic_length_selection"]
    assert set(get_args(setting)) == set(get_args(Selection))
