"""The closed form of an encoder's operations against torch's counter, and its pairs against the masks themselves."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from kernels.hstu_attention import AttentionMask
from model.action_encoder import STORED_ACTIONS, ActionEncoder, ActionEncoderConfig
from model.batch import HistoryBatch
from model.config import ModelConfig
from model.flops import (
    Pattern,
    dense_forward_flops,
    forward_flops,
    mixture_forward_flops,
    scoring_flops,
    segments_of,
    shortened_mean,
    training_flops,
)
from model.mixture import reads
from model.recommender import Recommender
from model.stochastic_length import sampled_lengths
from model.transducers import part_config, with_action_bits

LENGTHS = [7, 1, 12, 0, 5]
CONFIGS = [
    ModelConfig(embedding_dim=8, num_layers=2, num_heads=2, attention_dim=4, hidden_dim=4, max_len=12),
    ModelConfig(
        embedding_dim=10,
        num_layers=3,
        num_heads=3,
        attention_dim=4,
        hidden_dim=6,
        max_len=16,
        concat_output=True,
        relative_bias=False,
    ),
]
TOKENS: dict[str, Any] = {
    "kind": "ultra_hstu",
    "embedding_dim": 8,
    "num_layers": 5,
    "num_heads": 2,
    "attention_dim": 4,
    "hidden_dim": 4,
    "max_len": 12,
    "local_attn_len": 3,
    "global_attn_len": 2,
    "truncated_layers": 2,
    "truncated_len": 6,
    "truncated_hop": 2,
}
ULTRA = [
    ModelConfig(**TOKENS),
    ModelConfig(**TOKENS | {"tokens": "interleaved", "global_attn": "oldest_keys"}),
    ModelConfig(**TOKENS | {"tokens": "items", "attention": "full", "relative_bias": True}),
]


def measured(config: ModelConfig, lengths: list[int], *, backward: bool) -> int:
    """What torch counts for one pass of the reference over histories of these lengths."""
    recommender = Recommender(config)
    items = recommender.items.admit(torch.arange(1, 20).numpy())
    times = torch.arange(sum(lengths)) * 1_000
    batch = HistoryBatch(
        rows_L=torch.from_numpy(items)[times // 1_000 % len(items)],
        timestamps_ms_L=times,
        query_times_ms_L=times,
        offsets=torch.tensor([0, *itertools.accumulate(lengths)]),
        actions_L=torch.ones_like(times),
        values_L=torch.zeros(len(times)),
    )
    active = recommender.items.activate(batch.rows_L)
    with FlopCounterMode(display=False) as counter:
        u_LD = recommender.encode(batch, active, kernel="reference")
        if backward:
            u_LD.sum().backward()  # type: ignore[no-untyped-call]
    return int(counter.get_total_flops())


def of_actions(config: ModelConfig, num_interactions: int) -> int:
    """What the action encoder's two products take, which the closed form leaves out."""
    if not config.plan().reads_actions:
        return 0
    encoder = ActionEncoder(
        ActionEncoderConfig(num_actions=STORED_ACTIONS, embedding_dim=config.embedding_dim),
        torch.Generator(),
    )
    with FlopCounterMode(display=False) as counter:
        encoder(torch.zeros(num_interactions, dtype=torch.int64), torch.zeros(num_interactions))
    return int(counter.get_total_flops())


@pytest.mark.parametrize("config", [*CONFIGS, *ULTRA])
def test_a_pass_forward_is_what_torch_counts_on_the_reference(config: ModelConfig) -> None:
    want = measured(config, LENGTHS, backward=False) - of_actions(config, sum(LENGTHS))
    assert dense_forward_flops(segments_of(config), torch.tensor(LENGTHS)) == want


@pytest.mark.parametrize("config", ULTRA)
def test_truncated_layers_are_counted_for_what_they_read_and_the_mask_for_what_it_lets_through(
    config: ModelConfig,
) -> None:
    segments, plan = segments_of(config), config.plan()
    assert [one.num_layers for one in segments] == [3, 2]
    for length in range(13):
        n_B = torch.tensor([length])
        each = plan.tokens_per_interaction
        assert int(segments[0].positions(n_B)) == each * length
        assert int(segments[1].positions(n_B)) == each * (length - plan.truncated_start(length))
    pairs = int(segments[0].pattern.pairs(segments[0].positions(torch.tensor([12]))))
    tokens = 12 * plan.tokens_per_interaction
    assert (pairs < tokens * (tokens + 1) // 2) == (plan.local_len is not None)


@pytest.mark.parametrize("config", [*CONFIGS, ULTRA[2]])
def test_forward_and_backward_are_three_times_a_pass_forward(config: ModelConfig) -> None:
    assert measured(config, LENGTHS, backward=True) == 3 * measured(config, LENGTHS, backward=False)


def test_a_history_alone_is_counted_like_the_reference_but_for_the_pairs_that_the_mask_forbids() -> None:
    config = CONFIGS[0]
    (segment,) = segments_of(config)
    length = torch.tensor([12])
    forbidden = 12 * 12 - 12 * 13 // 2
    dense = dense_forward_flops((segment,), length)
    assert float(forward_flops((segment,), length)) == dense - segment.num_layers * forbidden * segment.per_pair


PATTERNS = [
    Pattern(),
    Pattern(max_attn_len=3),
    Pattern(max_attn_len=3, min_full_attn_len=4),
    Pattern(max_attn_len=2, num_oldest_keys=3),
    Pattern(max_attn_len=4, min_full_attn_len=2, num_oldest_keys=5),
    Pattern(max_attn_len=0, min_full_attn_len=4),
    Pattern(max_attn_len=0, num_oldest_keys=3),
    Pattern(max_attn_len=50, min_full_attn_len=9, num_oldest_keys=1),
]


def visible(pattern: Pattern, length: int, num_targets: int) -> torch.Tensor:
    mask = AttentionMask(
        num_targets_B=torch.tensor([num_targets]),
        max_attn_len=pattern.max_attn_len,
        min_full_attn_len=pattern.min_full_attn_len,
        num_oldest_keys=pattern.num_oldest_keys,
    )
    index = torch.arange(length + num_targets)[None]
    lengths = torch.tensor([length + num_targets])
    return mask.visible(index, index, lengths, torch.tensor([num_targets]))[0]


@pytest.mark.parametrize("pattern", PATTERNS)
def test_pairs_are_those_of_the_mask(pattern: Pattern) -> None:
    for length in (0, 1, 2, 3, 4, 5, 8, 13, 30):
        n_B = torch.tensor([length])
        seen = visible(pattern, length, 3)
        assert int(pattern.pairs(n_B)) == int(seen[:length, :length].sum()), length
        assert [int(pattern.keys_of_target(n_B))] * 3 == seen[length:].sum(1).tolist(), length


def test_a_mixture_is_its_transducers_on_what_they_read_and_the_fusion() -> None:
    parts = [{"name": "a", "actions": ["click"], "num_layers": 1}, {"name": "b", "actions": ["like"], "max_len": 4}]
    config = with_action_bits(ModelConfig(**TOKENS | {"transducers": parts}), ("click", "like"))
    lengths = torch.tensor([9])
    actions_L, offsets = torch.tensor([1, 2, 1, 1, 3, 2, 0, 2, 1]), torch.tensor([0, 9])
    read = [reads(one, part_config(config, one).max_len, actions_L, offsets).sum()[None] for one in config.transducers]
    assert [int(one) for one in read] == [6, 4]
    alone = [segments_of(part_config(config, one)) for one in config.transducers]
    want = sum(float(forward_flops(part, num)) for part, num in zip(alone, read, strict=True))
    assert float(mixture_forward_flops(config, read, lengths)) == want + 9 * 2 * (2 * 8) * 8
    with pytest.raises(ValueError, match="mixture_forward_flops"):
        segments_of(config)


def test_candidates_add_their_own_positions_and_the_keys_they_see() -> None:
    (segment,) = segments_of(CONFIGS[0])
    lengths = torch.tensor([6, 11])
    added = forward_flops((segment,), lengths, num_candidates=4) - forward_flops((segment,), lengths)
    want = [segment.num_layers * 4 * (segment.per_position + (n + 1) * segment.per_pair) for n in (6, 11)]
    assert added.tolist() == want


def test_the_expectation_under_stochastic_length_is_the_mean_over_draws() -> None:
    segments, lengths = segments_of(CONFIGS[0]), torch.tensor([3, 40, 70, 100])
    generator = torch.Generator().manual_seed(0)
    drawn = torch.stack([sampled_lengths(lengths, alpha=1.5, max_len=100, generator=generator) for _ in range(20_000)])
    costs = 3 * forward_flops(segments, drawn)
    spread = costs.std(0) / len(drawn) ** 0.5
    expected = training_flops(segments, lengths, alpha=1.5, max_len=100)
    assert bool(((costs.mean(0) - expected).abs() <= 4 * spread).all())
    assert torch.equal(training_flops(segments, lengths), 3 * forward_flops(segments, lengths))
    whole = shortened_mean(lambda n: n.double(), lengths, alpha=2.0, max_len=100)
    assert torch.equal(whole, lengths.double())


def test_scoring_is_one_product() -> None:
    with FlopCounterMode(display=False) as counter:
        torch.randn(5, 8) @ torch.randn(8, 30)
    assert scoring_flops(CONFIGS[0], 5, 30) == counter.get_total_flops()


def test_encoders_whose_operations_are_not_known_are_refused_by_name() -> None:
    with pytest.raises(ValueError, match="kind is 'gru'"):
        segments_of(ModelConfig(kind="gru"))
