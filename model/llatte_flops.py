"""How many floating-point operations LLaTTE's two stages take, in closed form, as ``model.flops`` counts an encoder's.

Counted are matrix products forward, two operations a multiply-add; attention over the pairs that the mask lets through.
Not counted: norms, activations, the lookup of embeddings, and products of weights alone (the absorbed matrices of
attention), which do not grow with what is read.

Shapes: B histories.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from model.config import ModelConfig
from model.item_table import CONTENT_DIM
from model.llatte_config import LlatteConfig
from model.llatte_ranking_config import LlatteRankingConfig
from model.upstream_config import UpstreamModelConfig


@dataclass(frozen=True, kw_only=True, slots=True)
class _Layer:
    """Operations of a ``LlatteLayer``: for a token that is read, for one that is computed, for a pair of the two."""

    read: int
    computed: int
    pair: int

    @classmethod
    def of(cls, network: LlatteConfig) -> _Layer:
        width, latent = network.width, network.latent_dim
        all_heads = network.num_heads * latent
        return cls(
            read=2 * width * latent,
            computed=2 * (width * latent + latent * all_heads + all_heads * width + 2 * width * network.ffn_dim),
            pair=4 * all_heads,
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class RankingFlops:
    """float64[B] each. request: what all candidates behind a history share. candidate: one of them."""

    request: Tensor
    candidate: Tensor

    def each(self, num_candidates: int) -> Tensor:
        """float64[B]: of one candidate, where so many share a request."""
        return self.request / num_candidates + self.candidate


def upstream_flops(config: UpstreamModelConfig, lengths_B: Tensor) -> Tensor:
    """float64[B]: of one vector from each history. lengths_B: int64[B], interactions, at most upstream.max_len."""
    upstream, network = config.upstream, config.upstream.network()
    num_flags = config.num_actions + len(config.value_thresholds)
    token = _token(network.width, item_dim=upstream.embedding_dim, num_flags=num_flags, content_dim=0)
    readout = 2 * upstream.readout_rank * (network.num_queries * network.width + upstream.width)
    return lengths_B.double() * token + _read(network, lengths_B, network.num_queries) + readout


def ranking_flops(model: ModelConfig, config: LlatteRankingConfig, lengths_B: Tensor) -> RankingFlops:
    """Of the online ranker. model: the recommender it is part of. lengths_B: int64[B], at most model.max_len."""
    settings, width = config.llatte, model.embedding_dim
    network = settings.network(width=width, max_len=model.max_len)
    content_dim = CONTENT_DIM if settings.content else 0
    num_flags = config.num_actions + len(config.value_thresholds)
    num_queries, time_dim, dense = settings.num_queries + 1, max(width // 2, 1), 4
    request_B = lengths_B.double() * _token(width, item_dim=width, num_flags=num_flags, content_dim=content_dim)
    request_B += _read(network, lengths_B, num_queries)
    request_B += 2 * config.upstream_width * width + 2 * num_queries * width * settings.readout_rank
    request_B += 2 * (time_dim + dense + width) * settings.backbone_dim

    layer, candidate_B = _Layer.of(network), torch.zeros(lengths_B.shape, dtype=torch.float64)
    for tokens_B in _tokens_read(network, lengths_B, num_queries):
        candidate_B += layer.read + layer.computed + layer.pair * (tokens_B + 1).double()
    candidate_B += _token(width, item_dim=width, num_flags=0, content_dim=content_dim)
    joined = settings.readout_rank * (width + settings.sequence_dim)
    joined += (settings.sequence_dim + width) * settings.backbone_dim
    joined += 3 * settings.backbone_layers * settings.backbone_dim**2
    joined += config.task_hidden_dim * (settings.backbone_dim + len(config.tasks))
    return RankingFlops(request=request_B, candidate=candidate_B + 2 * joined)


def _token(width: int, *, item_dim: int, num_flags: int, content_dim: int) -> int:
    """Of one token of ``ActionTokens``; num_flags: 0 for a candidate, whose action is yet to happen."""
    return 2 * width * (item_dim + num_flags + content_dim + width)


def _tokens_read(network: LlatteConfig, lengths_B: Tensor, num_queries: int) -> list[Tensor]:
    """int64[B] of each layer: tokens that it reads."""
    kept = (network.max_len, *network.kept_lens()[:-1])
    return [lengths_B.clamp(max=one) + num_queries for one in kept]


def _read(network: LlatteConfig, lengths_B: Tensor, num_queries: int) -> Tensor:
    """float64[B]: of ``LlatteEncoder.read``."""
    layer, total_B = _Layer.of(network), torch.zeros(lengths_B.shape, dtype=torch.float64)
    read_tokens = _tokens_read(network, lengths_B, num_queries)
    for read_B, kept_len in zip(read_tokens, network.kept_lens(), strict=True):
        computed_B = torch.minimum(read_B, lengths_B.clamp(max=kept_len) + num_queries)
        # The newest tokens are computed; each sees what stands before it, and itself.
        pairs_B = computed_B * read_B - computed_B * (computed_B - 1) // 2
        total_B += (layer.read * read_B + layer.computed * computed_B + layer.pair * pairs_B).double()
    return total_B
