"""How many floating-point operations an encoder takes, in closed form from its settings and the lengths it reads.

Counted are the matrix products, two operations a multiply-add, as torch's own counter does: the layers' two matrices
and attention's two products. Norms, activations, biases, the lookup of embeddings and the loss are not. A training step
takes three times the forward pass, since each product has two of the same size in the backward pass; what a kernel
computes again instead of keeping it is not counted.

Attention is counted in one of two ways. *masked*: only the pairs of positions that the mask lets through, which is what
kernels compute that skip the rest. *dense*: every pair of a row padded to the longest of its batch, which is what the
reference computes, and what torch's counter sees there.

Shapes: B histories.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Final

import torch
from torch import Tensor

from model.config import ModelConfig
from model.stochastic_length import short_len, whole_probability
from model.transducers import part_config

TRAINING_FACTOR: Final = 3
"""Forward and backward pass over the forward pass alone."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Pattern:
    """Which pairs a causal layer computes: the fields of ``kernels.hstu_attention.AttentionMask``."""

    max_attn_len: int | None = None
    min_full_attn_len: int = 0
    num_oldest_keys: int = 0

    def pairs(self, lengths_B: Tensor) -> Tensor:
        """int64[B]: pairs of a query and a key that it sees, in rows without targets."""
        n_B = lengths_B
        if self.max_attn_len is None:
            return _triangle(n_B)
        reach = self.max_attn_len + 1  # a query's own place, and so many before it
        near_B = (n_B - self.min_full_attn_len).clamp(min=0)
        near_pairs_B = _triangle(near_B.clamp(max=reach)) + (near_B - reach).clamp(min=0) * reach
        beyond_B, oldest = (near_B - reach).clamp(min=0), self.num_oldest_keys
        oldest_pairs_B = _triangle(beyond_B.clamp(max=oldest)) + (beyond_B - oldest).clamp(min=0) * oldest
        return near_pairs_B + oldest_pairs_B + _triangle(n_B) - _triangle(near_B)

    def keys_of_target(self, lengths_B: Tensor) -> Tensor:
        """int64[B]: keys that one candidate behind a history of so many positions sees, itself included."""
        n_B = lengths_B
        if self.max_attn_len is None or self.min_full_attn_len:
            return n_B + 1
        near_B = n_B.clamp(max=self.max_attn_len)
        return near_B + (n_B - near_B).clamp(max=self.num_oldest_keys) + 1


@dataclass(frozen=True, kw_only=True, slots=True)
class Segment:
    """Layers that are alike and read the same positions.

    per_position: operations of one layer for one position besides attention. per_pair: of one layer for one pair.
    tokens_each: positions of one interaction. latest: only so many of the newest interactions are read, which move on
    in hops; 0: all.
    """

    num_layers: int
    per_position: float
    per_pair: float
    pattern: Pattern
    tokens_each: int = 1
    latest: int = 0
    hop: int = 1

    def positions(self, lengths_B: Tensor) -> Tensor:
        """int64[B]: what is read of histories of so many interactions."""
        if not self.latest:
            return self.tokens_each * lengths_B
        beyond_B = (lengths_B - self.latest).clamp(min=0)
        return self.tokens_each * (lengths_B - (beyond_B + self.hop - 1) // self.hop * self.hop)

    def with_pair_cost(self, of_position: float) -> Segment:
        """The same, a pair costing so much of what a position costs."""
        return replace(self, per_pair=self.per_position * of_position)


def segments_of(config: ModelConfig) -> tuple[Segment, ...]:
    """What the encoder of a configuration consists of; ValueError for kinds other than hstu and ultra_hstu, and for a
    mixture of transducers, which is counted by ``mixture_forward_flops``.

    Of the action encoder of merged and interleaved tokens, one small matrix for each interaction is not counted.
    """
    if config.kind not in ("hstu", "ultra_hstu"):
        raise ValueError(f"kind is {config.kind!r}; operations are counted for hstu and ultra_hstu")
    if config.transducers:
        raise ValueError("transducers each read their own part of a history: count them with mixture_forward_flops")
    plan = config.plan()
    gate, attention = config.num_heads * config.hidden_dim, config.num_heads * config.attention_dim
    output = gate * (3 if config.concat_output else 1)
    is_of_queries, each = plan.global_attn == "newest_queries", plan.tokens_per_interaction
    pattern = Pattern()
    if plan.local_len is not None:
        pattern = Pattern(
            max_attn_len=each * plan.local_len,
            min_full_attn_len=each * plan.global_len if is_of_queries else 0,
            num_oldest_keys=0 if is_of_queries else each * plan.global_len,
        )
    whole = Segment(
        num_layers=config.num_layers - plan.num_truncated,
        per_position=2 * config.embedding_dim * (2 * gate + 2 * attention + output),
        per_pair=2 * (attention + gate),
        pattern=pattern,
        tokens_each=each,
    )
    if not plan.num_truncated:
        return (whole,)
    newest = replace(whole, num_layers=plan.num_truncated, latest=plan.truncated_len, hop=plan.truncated_hop)
    return (whole, newest)


def forward_flops(segments: tuple[Segment, ...], lengths_B: Tensor, *, num_candidates: int = 0) -> Tensor:
    """float64[B]: operations to read each history, and to read candidates behind it that see the history only.

    lengths_B: int64[B], interactions. Attention as masked.
    """
    total_B = torch.zeros(lengths_B.shape, dtype=torch.float64)
    for one in segments:
        n_B = one.positions(lengths_B)
        positions_B = n_B + num_candidates
        pairs_B = one.pattern.pairs(n_B) + num_candidates * one.pattern.keys_of_target(n_B)
        total_B += one.num_layers * (positions_B.double() * one.per_position + pairs_B.double() * one.per_pair)
    return total_B


def mixture_forward_flops(config: ModelConfig, lengths_TB: Sequence[Tensor], num_positions_B: Tensor) -> Tensor:
    """float64[B]: of a mixture of transducers, whose T encoders each read their own part of a history.

    lengths_TB: int64[B] of each transducer, the interactions that it reads (``model.mixture.reads``).
    num_positions_B: int64[B], positions whose states are fused, which takes one product of T * D by D each.
    """
    parts = [segments_of(part_config(config, one)) for one in config.transducers]
    total_B = num_positions_B.double() * (2 * len(parts) * config.embedding_dim**2)
    for segments, lengths_B in zip(parts, lengths_TB, strict=True):
        total_B = total_B + forward_flops(segments, lengths_B)
    return total_B


def dense_forward_flops(segments: tuple[Segment, ...], lengths_B: Tensor) -> float:
    """Of a batch by the reference: attention over every pair of each row, padded to the batch's longest."""
    total = 0.0
    for one in segments:
        n_B = one.positions(lengths_B)
        padded_pairs = len(n_B) * int(n_B.max()) ** 2
        total += one.num_layers * (int(n_B.sum()) * one.per_position + padded_pairs * one.per_pair)
    return total


def shortened_mean(cost: Callable[[Tensor], Tensor], lengths_B: Tensor, *, alpha: float, max_len: int) -> Tensor:
    """float64[B]: expectation of ``cost`` of each history when stochastic length draws what is read of it."""
    short_B = lengths_B.clamp(max=short_len(alpha=alpha, max_len=max_len))
    whole_B = whole_probability(lengths_B, alpha=alpha, max_len=max_len)
    return whole_B * cost(lengths_B) + (1 - whole_B) * cost(short_B)


def training_flops(segments: tuple[Segment, ...], lengths_B: Tensor, *, alpha: float = 0.0, max_len: int = 0) -> Tensor:
    """float64[B]: forward and backward pass over each history; expected, where stochastic length shortens (alpha)."""
    if not alpha:
        return TRAINING_FACTOR * forward_flops(segments, lengths_B)
    read = shortened_mean(lambda n_B: forward_flops(segments, n_B), lengths_B, alpha=alpha, max_len=max_len)
    return TRAINING_FACTOR * read


def scoring_flops(config: ModelConfig, num_states: int, num_items: int) -> int:
    """Of scoring states against the catalogue, forward."""
    return 2 * config.embedding_dim * num_states * num_items


def _triangle(n: Tensor) -> Tensor:
    return n * (n + 1) // 2
