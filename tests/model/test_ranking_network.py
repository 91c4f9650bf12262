"""Candidates are ranked together as alone, from the past only, and the network learns what actions depend on."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from model.action_heads import ActionTask
from model.config import ModelConfig
from model.ranking_network import ActionPredictions, Engagements, RankingConfig, RankingNetwork
from model.sequence import Candidates
from tests.model.weights import far_from_start

WIDTH = 8
START_MS = 1_700_000_000_000
TASKS = (
    ActionTask(name="like", kind="bce", action_bit=0),
    ActionTask(name="watch", kind="mse", weight=0.5),
    ActionTask(name="share", kind="bce", action_bit=2),
)
RANKING = RankingConfig(
    tasks=TASKS, num_actions=3, value_thresholds=(0.5,), action_dim=4, task_hidden_dim=6, max_candidates=5
)
LENGTHS = [3, 0, 1, 6]
both = pytest.mark.parametrize("tokens", ["interleaved", "merged"])


@pytest.fixture(scope="module")
def model_config() -> ModelConfig:
    return ModelConfig(embedding_dim=WIDTH, num_layers=2, num_heads=2, attention_dim=4, hidden_dim=4, max_len=6)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def network_of(model: ModelConfig, tokens: Any) -> RankingNetwork:
    return far_from_start(RankingNetwork(model, replace(RANKING, tokens=tokens), seeded()))


def offsets_of(lengths: list[int]) -> Tensor:
    return torch.tensor([0, *lengths]).cumsum(0)


def engagements_of(lengths: list[int] = LENGTHS) -> Engagements:
    generator, num = seeded(2), sum(lengths)
    return Engagements(
        item_LD=torch.randn(num, WIDTH, dtype=torch.float64, generator=generator),
        actions_L=torch.randint(8, (num,), generator=generator),
        timestamps_ms_L=START_MS + torch.randint(10**7, (num,), generator=generator).cumsum(0),
        offsets=offsets_of(lengths),
        values_L=torch.rand(num, dtype=torch.float64, generator=generator),
    )


def candidates_of(numbers: list[int]) -> Candidates:
    generator = seeded(3)
    return Candidates(
        item_CD=torch.randn(sum(numbers), WIDTH, dtype=torch.float64, generator=generator),
        request_times_ms_B=START_MS + 10**9 + torch.randint(10**9, (len(numbers),), generator=generator),
        offsets=offsets_of(numbers),
    )


@both
@pytest.mark.parametrize("number", [1, 2, 3, 4, 5])
@pytest.mark.parametrize("time_embedding", [False, True])
def test_candidates_together_score_as_each_alone(
    model_config: ModelConfig, tokens: str, number: int, time_embedding: bool
) -> None:
    network = network_of(replace(model_config, time_embedding=time_embedding), tokens)
    history, candidates = engagements_of(), candidates_of([number] * len(LENGTHS))
    together = network(history, candidates).candidates_CK.view(len(LENGTHS), number, len(TASKS))
    for place in range(number):
        alone = Candidates(
            item_CD=candidates.item_CD[place::number],
            request_times_ms_B=candidates.request_times_ms_B,
            offsets=torch.arange(len(LENGTHS) + 1),
        )
        torch.testing.assert_close(network(history, alone).candidates_CK, together[:, place], atol=1e-10, rtol=0)


def test_what_interactions_predict_does_not_depend_on_the_candidates(model_config: ModelConfig) -> None:
    network = network_of(model_config, "interleaved")
    without = network(engagements_of())
    assert without.candidates_CK.shape == (0, len(TASKS))
    behind = network(engagements_of(), candidates_of([1, 5, 0, 2]))
    torch.testing.assert_close(behind.interactions_LK, without.interactions_LK, atol=1e-10, rtol=0)


# What may be seen


def is_at(index: int, like: Tensor) -> Tensor:
    return (torch.arange(like.shape[0]) == index).view(-1, *[1] * (like.dim() - 1))


def with_other_value(engagements: Engagements, index: int) -> Tensor:
    """On the other side of the threshold."""
    assert engagements.values_L is not None
    return torch.where(is_at(index, engagements.values_L), 1 - engagements.values_L, engagements.values_L)


CHANGES: dict[str, Callable[[Engagements, int], Engagements]] = {
    "item": lambda e, i: replace(e, item_LD=torch.where(is_at(i, e.item_LD), -e.item_LD, e.item_LD)),
    "action": lambda e, i: replace(e, actions_L=e.actions_L ^ (0b101 * is_at(i, e.actions_L))),
    "value": lambda e, i: replace(e, values_L=with_other_value(e, i)),
    "time": lambda e, i: replace(e, timestamps_ms_L=e.timestamps_ms_L + 10**10 * is_at(i, e.timestamps_ms_L)),
}
"""Of interaction i."""


def differing_rows(got: Tensor, want: Tensor) -> list[int]:
    return ((got - want).abs().amax(1) > 1e-9).nonzero().flatten().tolist()


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("index", [0, 2, 3, 6, 9])
def test_an_interaction_is_predicted_from_its_item_and_what_came_before(
    model_config: ModelConfig, change: str, index: int
) -> None:
    network = network_of(model_config, "interleaved")
    history, candidates = engagements_of(), candidates_of([1] * len(LENGTHS))
    row = int((history.offsets <= index).sum()) - 1
    before, after = network(history, candidates), network(CHANGES[change](history, index), candidates)
    end = int(history.offsets[row + 1])
    # Its own action, and the value that comes with it, are what is predicted; its item and time are known.
    first = index if change in ("item", "time") else index + 1
    if change == "time" and index == int(history.offsets[row]):
        first += 1  # nothing came before, so there is no gap to see
    assert differing_rows(after.interactions_LK, before.interactions_LK) == list(range(first, end))
    assert differing_rows(after.candidates_CK, before.candidates_CK) == [row]


@pytest.mark.parametrize("change", CHANGES)
def test_merged_candidates_see_all_of_their_own_history(model_config: ModelConfig, change: str) -> None:
    network = network_of(model_config, "merged")
    history, candidates = engagements_of(), candidates_of([1, 2, 0, 2])
    before, after = network(history, candidates), network(CHANGES[change](history, 6), candidates)
    assert before.interactions_LK is None
    assert differing_rows(after.candidates_CK, before.candidates_CK) == [3, 4]


@both
def test_users_without_a_history_get_finite_predictions(model_config: ModelConfig, tokens: Any) -> None:
    network = RankingNetwork(model_config, replace(RANKING, tokens=tokens), seeded())
    history = engagements_of([0, 0])
    history = replace(history, item_LD=history.item_LD.float(), values_L=torch.zeros(0))
    asked = candidates_of([3, 0])
    predictions = network(history, replace(asked, item_CD=asked.item_CD.float()))
    assert predictions.candidates_CK.shape == (3, len(TASKS))
    assert bool(predictions.candidates_CK.isfinite().all())
    nobody = network(history)
    assert nobody.candidates_CK.shape == (0, len(TASKS))


# Learning


def all_labels_loss(network: RankingNetwork, history: Engagements, candidates: Candidates) -> Tensor:
    predictions = network(history, candidates, dropout=seeded(4))
    num = candidates.item_CD.shape[0]
    asked = network.heads.labels(torch.arange(num), torch.ones(num, dtype=torch.float64))
    own = network.heads.labels(history.actions_L, history.values_L) if network.config.tokens == "interleaved" else None
    return network.loss(predictions, candidates=asked, interactions=own)


@both
@pytest.mark.parametrize(
    "options",
    [{}, {"relative_bias": False, "time_embedding": True, "affine_norms": True, "concat_output": True}],
    ids=["research", "production"],
)
def test_gradients_reach_every_parameter(model_config: ModelConfig, tokens: str, options: dict[str, Any]) -> None:
    model = replace(model_config, input_dropout=0.1, linear_dropout=0.1, **options)
    network = network_of(model, tokens)
    torch.autograd.backward(all_labels_loss(network, engagements_of(), candidates_of([2, 1, 0, 3])))
    without = {name for name, p in network.named_parameters() if p.grad is None or not bool(p.grad.any())}
    # Interleaved candidates carry no action, so there is nothing to put in its place.
    assert without == ({"actions.dummy_KE"} if tokens == "interleaved" else set())


def test_the_loss_is_the_mean_over_candidates_and_interactions_alike(model_config: ModelConfig) -> None:
    network = network_of(model_config, "interleaved")
    history, candidates = engagements_of(), candidates_of([2, 1, 0, 3])
    predictions = network(history, candidates)
    own = network.heads.labels(history.actions_L, history.values_L)
    labelled = torch.tensor([True, False, True, True, False, False])
    asked = network.heads.labels(torch.arange(6), torch.zeros(6, dtype=torch.float64), labelled)
    alone = network.loss(predictions, interactions=own)
    torch.testing.assert_close(alone, network.heads.loss(predictions.interactions_LK, own))
    want = (10 * alone + 3 * network.loss(predictions, candidates=asked)) / 13
    torch.testing.assert_close(network.loss(predictions, candidates=asked, interactions=own), want)


NUM_ITEMS = 6
RULE = replace(
    RANKING,
    tasks=(ActionTask(name="like", kind="bce", action_bit=0),),
    num_actions=1,
    value_thresholds=(),
    action_dim=8,
)


NUM_USERS = 24
LENGTH = 4


def made_up(generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Items and actions [users, places]: an item of the first half turns like into dislike and back.

    Fair coins decide about the first, so that half of all is liked, whatever the item.
    """
    items = torch.randint(NUM_ITEMS, (NUM_USERS, LENGTH), generator=generator)
    coin = torch.randint(2, (NUM_USERS, 1), generator=generator)
    turns = torch.cat([coin, (items[:, 1:] < NUM_ITEMS // 2).long()], dim=1)
    return items, turns.cumsum(1) % 2


def rule_loss(network: RankingNetwork, table: Tensor, generator: torch.Generator) -> Tensor:
    """On new users: of all interactions but the coins', or of the newest one as a candidate."""
    items, actions = made_up(generator)
    is_interleaved = network.config.tokens == "interleaved"
    length = LENGTH if is_interleaved else LENGTH - 1
    times = START_MS + 60_000 * torch.arange(LENGTH).expand(NUM_USERS, LENGTH)
    history = Engagements(
        item_LD=table[items[:, :length].flatten()],
        actions_L=actions[:, :length].flatten(),
        timestamps_ms_L=times[:, :length].flatten(),
        offsets=torch.arange(NUM_USERS + 1) * length,
    )
    if is_interleaved:
        is_ruled = (torch.arange(LENGTH) > 0).repeat(NUM_USERS)
        return network.loss(network(history), interactions=network.heads.labels(actions.flatten(), labelled_P=is_ruled))
    asked = Candidates(
        item_CD=table[items[:, -1]], request_times_ms_B=times[:, -1], offsets=torch.arange(NUM_USERS + 1)
    )
    return network.loss(network(history, asked), candidates=network.heads.labels(actions[:, -1]))


@both
def test_a_rule_of_item_and_previous_action_is_learned(model_config: ModelConfig, tokens: Any) -> None:
    network = RankingNetwork(replace(model_config, num_layers=1), replace(RULE, tokens=tokens), seeded())
    table = torch.nn.Parameter(torch.randn(NUM_ITEMS, WIDTH, generator=seeded(5)) * 0.02)
    optimizer = torch.optim.Adam([*network.parameters(), table], lr=0.01)
    generator = seeded(6)
    losses = []
    for _ in range(120):
        loss = rule_loss(network, table, generator)
        optimizer.zero_grad()
        torch.autograd.backward(loss)
        optimizer.step()
        losses.append(float(loss.detach()))
    base_rate = math.log(2)  # of a fair coin
    assert sum(losses[:5]) / 5 > 0.9 * base_rate
    assert sum(losses[-20:]) / 20 < 0.2 * base_rate


# What is refused


@pytest.mark.parametrize(
    ("setting", "says"),
    [
        ({"tokens": "both"}, "tokens is 'both'"),
        ({"task_hidden_dim": 0}, "task_hidden_dim is 0"),
        ({"max_candidates": 0}, "max_candidates is 0"),
        ({"num_actions": 2}, "action_bit of task 'share' is 2; num_actions is 2"),
    ],
)
def test_settings_outside_their_range_are_refused(setting: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        replace(RANKING, **setting)


@pytest.mark.parametrize(
    "setting", [{"kind": "sasrec"}, {"attention_activation": "softmax", "relative_bias": False}], ids=str
)
def test_encoders_without_target_aware_attention_are_refused(
    model_config: ModelConfig, setting: dict[str, Any]
) -> None:
    with pytest.raises(ValueError, match="ranking needs hstu or ultra_hstu with silu"):
        RankingNetwork(replace(model_config, **setting), RANKING, seeded())


@both
def test_too_long_histories_and_too_many_candidates_are_refused(model_config: ModelConfig, tokens: Any) -> None:
    network = network_of(model_config, tokens)
    with pytest.raises(ValueError, match="a user has 7 interactions; max_len is 6"):
        network(engagements_of([1, 7]), candidates_of([1, 0]))
    with pytest.raises(ValueError, match="a user has 6 candidates; max_candidates is 5"):
        network(engagements_of([1, 2]), candidates_of([6, 0]))


def test_labels_without_predictions_are_refused(model_config: ModelConfig) -> None:
    network = network_of(model_config, "merged")
    history = engagements_of()
    predictions: ActionPredictions = network(history, candidates_of([1, 1, 1, 1]))
    with pytest.raises(ValueError, match="merged tokens and those of transducers"):
        network.loss(predictions, interactions=network.heads.labels(history.actions_L, history.values_L))
    with pytest.raises(ValueError, match="there are no labels"):
        network.loss(predictions)
