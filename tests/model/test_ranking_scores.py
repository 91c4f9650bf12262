"""Candidates scored behind a history that was run once are scored as one at a time, whatever their number."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

from model.action_heads import ActionTask
from model.config import ModelConfig
from model.ranking_network import Engagements, RankingConfig, RankingNetwork
from model.ranking_scores import score_candidates
from model.sequence import Candidates
from model.transducers import Transducer
from tests.model.weights import far_from_start

WIDTH = 16
START_MS = 1_700_000_000_000
TASKS = (
    ActionTask(name="like", kind="bce", action_bit=0),
    ActionTask(name="good", kind="bce", value_at_least=0.5),
)
RANKING = RankingConfig(tasks=TASKS, num_actions=3, value_thresholds=(0.5,), task_hidden_dim=8, max_candidates=4)
MODEL = ModelConfig(embedding_dim=WIDTH, num_layers=3, num_heads=2, attention_dim=8, hidden_dim=8, max_len=20)


def network_of(tokens: Any, model: ModelConfig = MODEL, *, surfaces: bool = False) -> RankingNetwork:
    config = replace(RANKING, tokens=tokens, surfaces=surfaces)
    return far_from_start(RankingNetwork(model, config, torch.Generator().manual_seed(0))).float()


def offsets_of(lengths: list[int]) -> Tensor:
    return torch.tensor([0, *lengths]).cumsum(0)


def engagements_of(lengths: list[int]) -> Engagements:
    generator, num = torch.Generator().manual_seed(2), sum(lengths)
    return Engagements(
        item_LD=torch.randn(num, WIDTH, generator=generator),
        actions_L=torch.randint(8, (num,), generator=generator),
        timestamps_ms_L=START_MS + torch.randint(10**7, (num,), generator=generator).cumsum(0),
        offsets=offsets_of(lengths),
        values_L=torch.rand(num, generator=generator),
    )


def candidates_of(numbers: list[int]) -> Candidates:
    generator = torch.Generator().manual_seed(3)
    return Candidates(
        item_CD=torch.randn(sum(numbers), WIDTH, generator=generator),
        request_times_ms_B=START_MS + 10**9 + torch.randint(10**9, (len(numbers),), generator=generator),
        offsets=offsets_of(numbers),
    )


def one_at_a_time(network: RankingNetwork, history: Engagements, candidates: Candidates) -> Tensor:
    """Every candidate in a pass of its own, behind the history of its user."""
    found = []
    bounds = candidates.offsets.tolist()
    for user, (start, end) in enumerate(pairwise(bounds)):
        for place in range(start, end):
            offsets = torch.zeros_like(candidates.offsets)
            offsets[user + 1 :] = 1
            alone = Candidates(
                item_CD=candidates.item_CD[place : place + 1],
                request_times_ms_B=candidates.request_times_ms_B,
                offsets=offsets,
            )
            found.append(network(history, alone).candidates_CK)
    return torch.cat(found) if found else torch.empty(0, len(TASKS))


@pytest.mark.parametrize("tokens", ["interleaved", "merged"])
@pytest.mark.parametrize(
    ("lengths", "numbers"),
    [([7], [1]), ([20], [37]), ([0], [5]), ([3, 0, 1, 20], [4, 9, 0, 13]), ([5, 6], [0, 0]), ([1, 2, 3], [8, 8, 8])],
)
@torch.no_grad()
def test_any_number_of_candidates_scores_as_one_at_a_time(tokens: str, lengths: list[int], numbers: list[int]) -> None:
    network, history, candidates = network_of(tokens), engagements_of(lengths), candidates_of(numbers)
    scores = score_candidates(network, history, candidates)
    assert scores.shape == (sum(numbers), len(TASKS))
    torch.testing.assert_close(scores, one_at_a_time(network, history, candidates), atol=1e-5, rtol=1e-5)


MIXTURE = (
    Transducer(name="odd", actions=("a",), mask=1, max_len=6, num_layers=1),
    Transducer(name="even", actions=("b", "c"), mask=6),
)
ULTRA: dict[str, dict[str, Any]] = {
    "newest queries see all": {"attention": "semi_local", "local_attn_len": 3, "global_attn_len": 2},
    "all see oldest keys": {
        "attention": "semi_local",
        "local_attn_len": 3,
        "global_attn_len": 2,
        "global_attn": "oldest_keys",
    },
    "no window, newest queries see all": {"attention": "semi_local", "local_attn_len": 0, "global_attn_len": 3},
    "no window, all see oldest keys": {
        "attention": "semi_local",
        "local_attn_len": 0,
        "global_attn_len": 3,
        "global_attn": "oldest_keys",
    },
    "truncated": {"truncated_layers": 2, "truncated_len": 6, "truncated_hop": 4},
    "mixture": {"transducers": MIXTURE},
    "mixture of all": {
        "kind": "ultra_hstu",
        "transducers": MIXTURE,
        "local_attn_len": 1,
        "global_attn_len": 2,
        "truncated_len": 5,
        "truncated_hop": 2,
    },
    "all": {
        "kind": "ultra_hstu",
        "local_attn_len": 2,
        "global_attn_len": 3,
        "truncated_len": 5,
        "truncated_hop": 2,
    },
}


@pytest.mark.parametrize("options", ULTRA.values(), ids=ULTRA.keys())
@pytest.mark.parametrize("tokens", ["interleaved", "merged"])
@torch.no_grad()
def test_it_holds_for_each_part_of_ultra_hstu(options: dict[str, Any], tokens: str) -> None:
    network, numbers = network_of(tokens, replace(MODEL, **options)), [4, 9, 0, 13, 2]
    history, candidates = engagements_of([3, 0, 1, 20, 7]), candidates_of(numbers)
    scores = score_candidates(network, history, candidates)
    torch.testing.assert_close(scores, one_at_a_time(network, history, candidates), atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_where_tokens_depend_on_the_time_of_the_request_the_history_is_run_again() -> None:
    network = network_of("merged", replace(MODEL, time_embedding=True))
    history, candidates = engagements_of([9, 2]), candidates_of([11, 3])
    expected = one_at_a_time(network, history, candidates)
    torch.testing.assert_close(score_candidates(network, history, candidates), expected, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_scores_depend_on_the_history_and_on_when_it_is_asked() -> None:
    network, candidates = network_of("merged"), candidates_of([6])
    scores = score_candidates(network, engagements_of([9]), candidates)
    assert not torch.allclose(scores, score_candidates(network, engagements_of([8]), candidates), atol=1e-3)
    later = replace(candidates, request_times_ms_B=candidates.request_times_ms_B + 10**10)
    assert not torch.allclose(scores, score_candidates(network, engagements_of([9]), later), atol=1e-4)


@pytest.mark.parametrize("tokens", ["interleaved", "merged"])
@torch.no_grad()
def test_scores_depend_on_where_the_history_happened_with_surfaces_alone(tokens: str) -> None:
    history, candidates = engagements_of([3, 0, 9]), candidates_of([4, 2, 5])
    elsewhere = replace(history, actions_L=history.actions_L | 3 << 32)
    for surfaces in (False, True):
        network = network_of(tokens, surfaces=surfaces)
        scores, moved = (score_candidates(network, one, candidates) for one in (history, elsewhere))
        torch.testing.assert_close(scores, one_at_a_time(network, history, candidates), atol=1e-5, rtol=1e-5)
        differs = ((moved - scores).abs().amax(1) > 1e-5).tolist()
        assert differs == [surfaces] * 4 + [False] * 2 + [surfaces] * 5


def test_a_history_longer_than_max_len_is_refused() -> None:
    with pytest.raises(ValueError, match="max_len is 20"):
        score_candidates(network_of("merged"), engagements_of([21]), candidates_of([1]))
