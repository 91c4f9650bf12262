"""Actions are encoded flag by flag, and the heads learn several tasks from what is labelled."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from model.action_encoder import ActionEncoder, ActionEncoderConfig
from model.action_heads import ActionHeads, ActionLabels, ActionTask


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


# Encoder

CONFIG = ActionEncoderConfig(num_actions=3, embedding_dim=5, value_thresholds=(1.0, 10.0), action_dim=2)


def encoder_of(config: ActionEncoderConfig = CONFIG) -> ActionEncoder:
    encoder = ActionEncoder(config, seeded()).double()
    torch.nn.init.normal_(encoder.bias, generator=seeded(1))
    return encoder


def test_an_interaction_is_the_sum_of_its_flags_through_one_matrix() -> None:
    encoder = encoder_of()
    actions = torch.tensor([0b000, 0b001, 0b110, 0b111, 0b1000])
    values = torch.tensor([0.5, 1.0, 9.9, 10.0, math.nan], dtype=torch.float64)
    flags = [[], [0, 3], [1, 2, 3], [0, 1, 2, 3, 4], list[int]()]
    got = encoder(actions, values)
    matrix = encoder.matrix_KED.reshape(-1, 5)
    for row, set_flags in zip(got, flags, strict=True):
        concatenated = torch.zeros(5, 2, dtype=torch.float64)
        for flag in set_flags:
            concatenated[flag] = encoder.vector_KE[flag]
        torch.testing.assert_close(row, concatenated.flatten() @ matrix + encoder.bias)


def test_no_action_is_learned_and_is_not_an_interaction_without_actions() -> None:
    encoder = encoder_of()
    want = encoder.dummy_KE.flatten() @ encoder.matrix_KED.reshape(-1, 5) + encoder.bias
    torch.testing.assert_close(encoder.no_action(), want)
    nothing = encoder(torch.zeros(1, dtype=torch.int64), torch.zeros(1))[0]
    assert not torch.allclose(encoder.no_action(), nothing)
    torch.autograd.backward(encoder.no_action().sum())
    assert encoder.dummy_KE.grad is not None
    assert encoder.vector_KE.grad is None


def test_the_highest_action_has_its_bit_too() -> None:
    encoder = ActionEncoder(ActionEncoderConfig(num_actions=62, embedding_dim=4), seeded())
    highest, lowest, none = encoder(torch.tensor([1 << 61, 1, 0]))
    assert not torch.equal(highest, lowest)
    assert torch.equal(none, encoder.bias)


def test_weights_are_a_function_of_the_seed() -> None:
    tasks = [ActionTask(name="like", kind="bce", action_bit=0)]
    for make in (
        lambda seed: ActionEncoder(CONFIG, seeded(seed)),
        lambda seed: ActionHeads(tasks, embedding_dim=4, hidden_dim=3, generator=seeded(seed)),
    ):
        first, again, other = (torch.cat([p.flatten() for p in make(seed).parameters()]) for seed in (1, 1, 2))
        assert torch.equal(first, again)
        assert not torch.equal(first, other)


@pytest.mark.parametrize(
    ("setting", "says"),
    [
        ({"num_actions": 0}, "num_actions is 0"),
        ({"num_actions": 63}, "num_actions is 63"),
        ({"embedding_dim": 0}, "embedding_dim is 0"),
        ({"action_dim": 0}, "action_dim is 0"),
        ({"value_thresholds": (2.0, 1.0)}, "must ascend"),
        ({"value_thresholds": (1.0, 1.0)}, "must ascend"),
        ({"value_thresholds": (math.nan,)}, "must ascend"),
        ({"value_thresholds": (1.0, math.inf)}, "must ascend"),
    ],
)
def test_encoder_settings_outside_their_range_are_refused(setting: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        ActionEncoderConfig(**{"num_actions": 3, "embedding_dim": 5, **setting})


def test_actions_and_values_of_a_wrong_shape_are_refused() -> None:
    with pytest.raises(ValueError, match="actions_L must be int64"):
        encoder_of()(torch.zeros(2))
    with pytest.raises(ValueError, match="values_L must be float"):
        encoder_of()(torch.zeros(2, dtype=torch.int64))
    with pytest.raises(ValueError, match="values_L must be float"):
        encoder_of()(torch.zeros(2, dtype=torch.int64), torch.zeros(3))


# Heads

TASKS = [
    ActionTask(name="like", kind="bce", action_bit=0),
    ActionTask(name="watch", kind="mse", weight=0.5),
    ActionTask(name="share", kind="bce", action_bit=4, weight=2.0),
]


def heads_of(tasks: list[ActionTask] = TASKS) -> ActionHeads:
    return ActionHeads(tasks, embedding_dim=6, hidden_dim=4, generator=seeded()).double()


def states(num: int, seed: int = 5) -> Tensor:
    return torch.randn(num, 6, dtype=torch.float64, generator=seeded(seed))


ACTIONS = torch.tensor([0b00001, 0b10000, 0b10001, 0b01110])
VALUES = torch.tensor([1.5, -2.0, 0.0, 4.0], dtype=torch.float64)


def test_predictions_are_those_of_a_network_with_one_hidden_layer() -> None:
    heads, state, item = heads_of(), states(4), states(4, seed=6)
    hidden = functional.silu((state * item) @ heads.hidden_weight + heads.hidden_bias)
    torch.testing.assert_close(heads(state, item), hidden @ heads.task_weight + heads.task_bias)
    torch.testing.assert_close(heads(state * item), heads(state, item))
    assert heads(state).shape == (4, 3)


def test_labels_are_read_from_the_bits_and_values_of_interactions() -> None:
    labels = heads_of().labels(ACTIONS, VALUES)
    assert labels.values_PK.tolist() == [[1, 1.5, 0], [0, -2, 1], [1, 0, 1], [0, 4, 0]]
    assert bool(labels.labelled_PK.all())


def test_the_loss_is_the_weighted_sum_of_each_tasks_mean() -> None:
    heads = heads_of()
    predictions = heads(states(4))
    labels = heads.labels(ACTIONS, VALUES)
    like, watch, share = predictions.unbind(1)
    by_task = [
        functional.binary_cross_entropy_with_logits(like, labels.values_PK[:, 0]),
        functional.mse_loss(watch, VALUES),
        functional.binary_cross_entropy(torch.sigmoid(share), labels.values_PK[:, 2]),
    ]
    torch.testing.assert_close(heads.task_losses(predictions, labels), torch.stack(by_task))
    torch.testing.assert_close(heads.loss(predictions, labels), by_task[0] + 0.5 * by_task[1] + 2 * by_task[2])


def test_positions_without_a_label_change_neither_loss_nor_gradients() -> None:
    heads, state = heads_of(), states(6).requires_grad_()
    some = torch.tensor([0, 2, 3, 5])
    values = torch.full((6,), math.nan, dtype=torch.float64)
    actions = torch.full((6,), -1)
    values[some], actions[some] = VALUES, ACTIONS
    labelled = torch.zeros(6, dtype=torch.bool)
    labelled[some] = True
    loss = heads.loss(heads(state), heads.labels(actions, values, labelled))
    torch.testing.assert_close(loss, heads.loss(heads(state[some]), heads.labels(ACTIONS, VALUES)))
    (grad,) = torch.autograd.grad(loss, state)
    assert not bool(grad[~labelled].any())
    assert bool(grad[labelled].isfinite().all())
    assert bool(grad[labelled].any())


@pytest.mark.parametrize("num", [0, 3])
def test_a_task_without_labels_costs_nothing(num: int) -> None:
    heads, state = heads_of(), states(num).requires_grad_()
    nothing = torch.zeros(num, dtype=torch.bool)
    labels = heads.labels(torch.zeros(num, dtype=torch.int64), torch.full((num,), math.nan), nothing)
    loss = heads.loss(heads(state), labels)
    assert float(loss.detach()) == 0.0
    torch.autograd.backward(loss)
    assert heads.task_weight.grad is not None
    assert not bool(heads.task_weight.grad.any())


def test_probabilities_are_given_for_bce_tasks_only() -> None:
    heads = heads_of()
    predictions = torch.tensor([[0.0, 7.0, 100.0], [-100.0, 7.0, math.log(3)]], dtype=torch.float64)
    probabilities = heads.probabilities(predictions)
    assert list(probabilities) == ["like", "share"]
    torch.testing.assert_close(probabilities["like"], torch.tensor([0.5, 0.0], dtype=torch.float64))
    torch.testing.assert_close(probabilities["share"], torch.tensor([1.0, 0.75], dtype=torch.float64))


def test_a_few_steps_learn_an_action_from_its_state() -> None:
    heads = ActionHeads(TASKS[:1], embedding_dim=6, hidden_dim=16, generator=seeded())
    state = states(256).float()
    actions = (state[:, 0] * state[:, 1] > 0).long()
    optimizer = torch.optim.Adam(heads.parameters(), lr=0.05)
    for _ in range(150):
        optimizer.zero_grad()
        loss = heads.loss(heads(state), heads.labels(actions))
        torch.autograd.backward(loss)
        optimizer.step()
    assert float(loss.detach()) < 0.2  # log(2) = 0.69 knows nothing


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ([[1.0, math.nan, 0.0]], "labels of watch are NaN"),
        ([[math.nan, 0.0, math.nan]], "labels of like, share are NaN"),
        ([[0.0, math.inf, 0.0]], "labels of watch"),
        ([[2.0, 2.0, 0.0]], "labels of like"),
        ([[0.0, 2.0, -1.0]], "labels of share"),
    ],
)
def test_labels_that_cannot_be_learned_are_refused(values: list[list[float]], says: str) -> None:
    heads, values_PK = heads_of(), torch.tensor(values, dtype=torch.float64)
    labels = ActionLabels(values_PK=values_PK, labelled_PK=torch.ones(1, 3, dtype=torch.bool))
    with pytest.raises(ValueError, match=says):
        heads.loss(heads(states(1)), labels)
    unlabelled = ActionLabels(values_PK=values_PK, labelled_PK=torch.zeros(1, 3, dtype=torch.bool))
    assert float(heads.loss(heads(states(1)), unlabelled).detach()) == 0.0


def test_labels_and_predictions_of_a_wrong_shape_are_refused() -> None:
    heads = heads_of()
    with pytest.raises(ValueError, match="values_P is None"):
        heads.labels(ACTIONS)
    with pytest.raises(ValueError, match=r"predictions_PK is \[4, 3\] and the labels are \[2, 3\]"):
        heads.loss(heads(states(4)), heads.labels(ACTIONS[:2], VALUES[:2]))
    with pytest.raises(ValueError, match="item_PD must be of shape"):
        heads(states(4), states(3))
    with pytest.raises(ValueError, match="values_PK must be float"):
        ActionLabels(values_PK=torch.zeros(2), labelled_PK=torch.zeros(2, dtype=torch.bool))
    with pytest.raises(ValueError, match="labelled_PK must be bool"):
        ActionLabels(values_PK=torch.zeros(2, 1), labelled_PK=torch.zeros(2, 1))


@pytest.mark.parametrize(
    ("setting", "says"),
    [
        ({"kind": "hinge"}, "kind of task 'like' is 'hinge'"),
        ({"action_bit": None}, "a bce task names an action_bit"),
        ({"kind": "mse"}, "an mse task neither"),
        ({"action_bit": 62}, "action_bit of task 'like' is 62"),
        ({"weight": -1.0}, "weight of task 'like' is -1.0"),
    ],
)
def test_a_task_that_makes_no_sense_is_refused(setting: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        ActionTask(**{"name": "like", "kind": "bce", "action_bit": 0, **setting})


@pytest.mark.parametrize("tasks", [[], [TASKS[0], TASKS[0]]])
def test_tasks_need_names_of_their_own(tasks: list[ActionTask]) -> None:
    with pytest.raises(ValueError, match="tasks are named"):
        heads_of(tasks)


def test_a_value_is_learned_less_its_center_by_its_scale_and_answered_in_its_own_unit() -> None:
    tasks = (ActionTask(name="click", kind="bce", action_bit=0), ActionTask(name="s", kind="mse", center=60, scale=20))
    heads = ActionHeads(tasks, embedding_dim=4, hidden_dim=3, generator=seeded())
    labels = heads.labels(torch.tensor([1, 1, 0]), torch.tensor([100.0, math.nan, math.nan]))
    assert labels.labelled_PK[:, 1].tolist() == [True, False, False]
    assert labels.values_PK[0].tolist() == [1.0, 2.0]
    answers = heads.answers(torch.tensor([[0.0, 2.0], [3.0, -1.0]]))
    torch.testing.assert_close(answers, torch.tensor([[0.5, 100.0], [torch.sigmoid(torch.tensor(3.0)).item(), 40.0]]))
    predictions = torch.tensor([[0.0, 1.5]])
    assert heads.task_losses(predictions, heads.labels(torch.tensor([1]), torch.tensor([100.0])))[1] == 0.25


@pytest.mark.parametrize("changes", [{"scale": 0.0}, {"scale": math.inf}, {"center": math.nan}])
def test_a_unit_that_is_none_is_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="both must be finite, and the scale above 0"):
        ActionTask(name="s", kind="mse", **changes)
