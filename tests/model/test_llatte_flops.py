"""LLaTTE's operations in closed form against torch's counter, but for the pairs that the mask hides."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from model.action_heads import ActionTask
from model.config import ModelConfig
from model.item_table import CONTENT_DIM
from model.llatte_config import LlatteConfig, LlatteSettings
from model.llatte_flops import ranking_flops, upstream_flops
from model.llatte_ranker import LlatteRanker
from model.llatte_ranking_config import LlatteRankingConfig
from model.ranking_network import Engagements
from model.sequence import Candidates
from model.upstream_config import UpstreamConfig, UpstreamModelConfig
from model.upstream_input import UpstreamVectors
from model.upstream_model import UpstreamModel, UserBatch

TASKS = (ActionTask(name="like", kind="bce", action_bit=0), ActionTask(name="high", kind="bce", value_at_least=4.0))
THRESHOLDS = (2.0, 4.0)
TRIMMINGS: list[dict[str, Any]] = [
    {"trimming": "full", "num_layers": 3},
    {"trimming": "pyramid", "num_layers": 4},
    {"trimming": "cross_attention", "num_layers": 2},
    {"trimming": "full", "num_layers": 1},
]


def hidden_pairs(network: LlatteConfig, length: int, num_queries: int) -> int:
    """Operations on pairs that a padded product computes and the mask hides: of M queries, M (M - 1) / 2 a layer."""
    total = 0
    for kept in network.kept_lens():
        computed = min(length, kept) + num_queries
        total += computed * (computed - 1) // 2
    return total * 4 * network.num_heads * network.latent_dim


def upstream_config(**changed: Any) -> UpstreamModelConfig:
    upstream = UpstreamConfig(
        width=7,
        embedding_dim=6,
        num_heads=3,
        latent_dim=5,
        head_dim=4,
        ffn_dim=10,
        num_queries=2,
        readout_rank=4,
        max_len=12,
        **changed,
    )
    return UpstreamModelConfig(upstream=upstream, tasks=TASKS, num_actions=3, value_thresholds=THRESHOLDS)


def counted_vector(model: UpstreamModel, length: int) -> int:
    time_ms = 1_000 * torch.arange(length)
    users = UserBatch(
        rows_L=torch.zeros(length, dtype=torch.int64),
        actions_L=torch.ones(length, dtype=torch.int64),
        values_L=torch.ones(length),
        timestamps_ms_L=time_ms,
        offsets=torch.tensor([0, length]),
        as_of_ms_B=torch.tensor([1_000 * length]),
    )
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        model.user_vectors(users)
    return int(counter.get_total_flops())


@pytest.mark.parametrize("changed", TRIMMINGS)
def test_a_vector_takes_what_torch_counts(changed: dict[str, Any]) -> None:
    config = upstream_config(**changed)
    model, network = UpstreamModel(config), config.upstream.network()
    model.items.admit(torch.tensor([1]).numpy())
    # Products of weights alone are of every pass, and no part of what reading more takes.
    first, of_first = counted_vector(model, 0), float(upstream_flops(config, torch.tensor([0])))
    constant = first - hidden_pairs(network, 0, 2) - of_first
    assert constant >= 0
    for length in (1, 5, 12):
        want = counted_vector(model, length) - hidden_pairs(network, length, 2) - constant
        assert float(upstream_flops(config, torch.tensor([length]))) == want


def test_the_constant_part_is_of_weights_alone() -> None:
    config = upstream_config(num_layers=2)
    model = UpstreamModel(config)
    upstream = config.upstream
    heads = upstream.num_heads * upstream.latent_dim * upstream.head_dim
    absorbed = upstream.num_layers * 2 * heads * (upstream.latent_dim + upstream.embedding_dim)
    actions = 2 * 8 * 5 * upstream.embedding_dim  # flags' vectors, 8 wide, through their matrices
    hidden = hidden_pairs(upstream.network(), 0, 2)
    assert counted_vector(model, 0) - hidden - float(upstream_flops(config, torch.tensor([0]))) == absorbed + actions


def counted_request(ranker: LlatteRanker, length: int, num_candidates: int) -> int:
    width, content = 6, ranker.config.llatte.content
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        ranker(
            Engagements(
                item_LD=torch.randn(length, width),
                actions_L=torch.ones(length, dtype=torch.int64),
                timestamps_ms_L=1_000 * torch.arange(length),
                offsets=torch.tensor([0, length]),
                values_L=torch.ones(length),
                content_LF=torch.randn(length, CONTENT_DIM) if content else None,
            ),
            Candidates(
                item_CD=torch.randn(num_candidates, width),
                request_times_ms_B=torch.tensor([1_000 * length]),
                offsets=torch.tensor([0, num_candidates]),
                content_CF=torch.randn(num_candidates, CONTENT_DIM) if content else None,
            ),
            UpstreamVectors(vector_BW=torch.randn(1, 9), age_s_B=torch.ones(1)),
        )
    return int(counter.get_total_flops())


@pytest.mark.parametrize("changed", [*TRIMMINGS, {"content": True}])
def test_a_request_and_its_candidates_take_what_torch_counts(changed: dict[str, Any]) -> None:
    settings = LlatteSettings(
        num_heads=3,
        latent_dim=5,
        head_dim=4,
        ffn_dim=10,
        readout_rank=4,
        sequence_dim=3,
        backbone_dim=8,
        **changed,
    )
    model = ModelConfig(embedding_dim=6, max_len=12)
    config = LlatteRankingConfig(
        tasks=TASKS, num_actions=3, llatte=settings, upstream_width=9, value_thresholds=THRESHOLDS
    )
    ranker = LlatteRanker(model, config, torch.Generator().manual_seed(0))
    network, num_queries = settings.network(width=6, max_len=12), settings.num_queries + 1
    pair = 4 * network.num_heads * network.latent_dim

    def left_over(length: int, num_candidates: int) -> float:
        """Counted by torch less the closed form: nothing but what does not depend on either."""
        flops = ranking_flops(model, config, torch.tensor([length]))
        others = num_candidates * (num_candidates - 1) * pair * settings.num_layers  # candidates never see each other
        hidden = hidden_pairs(network, length, num_queries) + others
        formula = float(flops.request) + num_candidates * float(flops.candidate)
        assert float(flops.each(num_candidates)) * num_candidates == pytest.approx(formula)
        return counted_request(ranker, length, num_candidates) - hidden - formula

    constant = left_over(0, 1)
    assert constant >= 0
    assert {left_over(length, count) for length in (0, 1, 5, 12) for count in (1, 4)} == {constant}
