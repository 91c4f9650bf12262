"""LLaTTE's sequence module (arXiv 2601.20083, section 3): action tokens, query tokens behind them, latent attention.

A layer is ``Z = RMSNorm(R + MLA(R)); X = RMSNorm(Z + FFN(Z))``. Multi-head latent attention runs absorbed, in training
too: with ``W_qk = W_up_q W_up_k^T`` and ``W_vo = W_up_v W_out`` it is multi-query attention over one latent of width C,
which costs the same for any number of heads to keep, and is the same function (``LatentAttention.unabsorbed``).

Causal, which the paper leaves open: a token of the history then never depends on what stands behind it, so that it is
computed once for any number of candidates (``read``, then ``behind``), rows need no mask for their padding, and a row
that a layer has trimmed is still the end of the same row.

Shapes: B users, T tokens, M tokens that a layer computes, C candidates (or latent width, after heads H), D width, Q
query tokens of a row, W layers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from kernels.jagged import position_index, row_index
from kernels.latent_attention import latent_attention
from model.initial import NORM_EPS, normal, xavier
from model.llatte_config import LlatteConfig


class RMSNorm(nn.Module):
    """``x / rms(x) * scale``."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        """Shape of x, whose last dimension is normalised."""
        return functional.rms_norm(x, self.scale.shape, self.scale, NORM_EPS)


class LatentAttention(nn.Module):
    """Multi-head latent attention: keys and values of all heads come from one latent of width C."""

    def __init__(self, config: LlatteConfig, generator: torch.Generator) -> None:
        super().__init__()
        width, latent, heads, head = config.width, config.latent_dim, config.num_heads, config.head_dim
        self.num_heads, self.scale = heads, head**-0.5
        self.query_down, self.key_down = (nn.Parameter(xavier(generator, width, latent)) for _ in range(2))
        self.query_norm, self.key_norm = RMSNorm(latent), RMSNorm(latent)
        self.query_up, self.key_up, self.value_up = (
            nn.Parameter(xavier(generator, latent, heads * head).view(latent, heads, head)) for _ in range(3)
        )
        self.out = nn.Parameter(xavier(generator, heads * head, width).view(heads, head, width))

    def keys(self, x_TD: Tensor) -> Tensor:
        """float[T, C]: what later queries read of tokens, and all that has to be kept of them."""
        kept: Tensor = self.key_norm(x_TD @ self.key_down)
        return kept

    def forward(
        self,
        x_MD: Tensor,
        kv_TC: Tensor,
        query_offsets: Tensor,
        key_offsets: Tensor,
        num_targets_B: Tensor | None = None,
    ) -> Tensor:
        """float[M, D]. x: tokens that ask, the last of each row's keys; see ``latent_attention`` for who sees whom."""
        latent_MC = self.query_norm(x_MD @ self.query_down)
        query_key_CHC = torch.einsum("chk,lhk->chl", self.query_up, self.key_up)
        o_MHC = latent_attention(
            (latent_MC @ query_key_CHC.flatten(1)).view(-1, self.num_heads, kv_TC.shape[1]),
            kv_TC,
            query_offsets=query_offsets,
            key_offsets=key_offsets,
            scale=self.scale,
            num_targets_B=num_targets_B,
        )
        value_out_HCD = torch.einsum("chk,hkd->hcd", self.value_up, self.out)
        return o_MHC.flatten(1) @ value_out_HCD.flatten(0, 1)

    def unabsorbed(self, x_TD: Tensor) -> Tensor:
        """float[T, D] of one row: the textbook form, with keys and values of every head. For tests."""
        query_THK = torch.einsum("tc,chk->thk", self.query_norm(x_TD @ self.query_down), self.query_up)
        latent_TC = self.keys(x_TD)
        key_THK, value_THK = (torch.einsum("tc,chk->thk", latent_TC, up) for up in (self.key_up, self.value_up))
        score_HTT = self.scale * torch.einsum("thk,shk->hts", query_THK, key_THK)
        hidden_TT = torch.ones_like(score_HTT[0], dtype=torch.bool).triu(1)
        weight_HTT = torch.softmax(score_HTT.masked_fill(hidden_TT, -torch.inf), 2)
        return torch.einsum("hts,shk,hkd->td", weight_HTT, value_THK, self.out)


class LlatteLayer(nn.Module):
    """Attention and a feed-forward part, each added and normalised."""

    def __init__(self, config: LlatteConfig, generator: torch.Generator) -> None:
        super().__init__()
        self.attention = LatentAttention(config, generator)
        self.attention_norm, self.ffn_norm = RMSNorm(config.width), RMSNorm(config.width)
        self.ffn_in = nn.Parameter(xavier(generator, config.width, config.ffn_dim))
        self.ffn_in_bias = nn.Parameter(torch.zeros(config.ffn_dim))
        self.ffn_out = nn.Parameter(xavier(generator, config.ffn_dim, config.width))
        self.ffn_out_bias = nn.Parameter(torch.zeros(config.width))

    def forward(
        self,
        x_MD: Tensor,
        kv_TC: Tensor,
        query_offsets: Tensor,
        key_offsets: Tensor,
        num_targets_B: Tensor | None = None,
    ) -> Tensor:
        """x_MD of the next layer; arguments as ``LatentAttention.forward``."""
        z_MD = self.attention_norm(x_MD + self.attention(x_MD, kv_TC, query_offsets, key_offsets, num_targets_B))
        inner_MF = functional.silu(torch.addmm(self.ffn_in_bias, z_MD, self.ffn_in))
        out_MD: Tensor = self.ffn_norm(z_MD + torch.addmm(self.ffn_out_bias, inner_MF, self.ffn_out))
        return out_MD


@dataclass(frozen=True, kw_only=True, slots=True)
class ReadRows:
    """B rows as the layers have read them.

    queries_BQD: float[B, Q, D], the last layer's output at each row's query tokens. kept: of each layer what later
    tokens read, float[T, C], and its offsets, int64[B + 1].
    """

    queries_BQD: Tensor
    kept: Sequence[tuple[Tensor, Tensor]]


class LlatteEncoder(nn.Module):
    """Layers over rows of tokens, the last ``num_queries`` of each row its query tokens."""

    def __init__(self, config: LlatteConfig, generator: torch.Generator) -> None:
        super().__init__()
        self.config = config
        self.layers = nn.ModuleList(LlatteLayer(config, generator) for _ in range(config.num_layers))

    def read(self, x_TD: Tensor, offsets: Tensor, *, num_queries: int) -> ReadRows:
        """Rows without candidates, every one with at least its num_queries query tokens. offsets: int64[B + 1]."""
        kept = []
        for layer, kept_len in zip(self.layers, self.config.kept_lens(), strict=True):
            assert isinstance(layer, LlatteLayer)
            kv_TC = layer.attention.keys(x_TD)
            kept.append((kv_TC, offsets))
            index_M, query_offsets = newest_of_rows(offsets, kept_len + num_queries, num_values=x_TD.shape[0])
            x_TD = layer(x_TD.index_select(0, index_M), kv_TC, query_offsets, offsets)
            offsets = query_offsets
        return ReadRows(queries_BQD=x_TD.view(offsets.shape[0] - 1, num_queries, x_TD.shape[1]), kept=kept)

    def behind(self, rows: ReadRows, x_CD: Tensor, candidate_offsets: Tensor) -> Tensor:
        """float[C, D]: candidates behind rows that were read, each as if it were alone. Offsets: int64[B + 1]."""
        for layer, (kv_TC, offsets) in zip(self.layers, rows.kept, strict=True):
            assert isinstance(layer, LlatteLayer)
            joined, key_offsets = joined_rows(kv_TC, offsets, layer.attention.keys(x_CD), candidate_offsets)
            x_CD = layer(x_CD, joined, candidate_offsets, key_offsets, candidate_offsets.diff())
        return x_CD


class LowRankReadout(nn.Module):
    """``silu(x W_1) W_2 + b`` through a narrow middle (the paper's LoRA MLP): from flattened tokens to one vector."""

    def __init__(self, inputs: int, rank: int, outputs: int, generator: torch.Generator) -> None:
        super().__init__()
        self.first = nn.Parameter(xavier(generator, inputs, rank))
        self.second = nn.Parameter(xavier(generator, rank, outputs))
        self.bias = nn.Parameter(torch.zeros(outputs))

    def forward(self, x_PI: Tensor) -> Tensor:
        """float[P, outputs] from float[P, inputs]."""
        return torch.addmm(self.bias, functional.silu(x_PI @ self.first), self.second)


def learned_queries(config: LlatteConfig, generator: torch.Generator) -> nn.Parameter:
    """float[Q, D], one start for each query token; as large as tokens are, so that they differ from the first."""
    return nn.Parameter(normal(generator, config.num_queries, config.width) / 0.02)


def newest_of_rows(offsets: Tensor, most: int, *, num_values: int) -> tuple[Tensor, Tensor]:
    """The last ``most`` of each row: int64[M] packed positions, and their offsets."""
    lengths_B = offsets.diff()
    place_T = position_index(offsets, num_values)
    is_kept_T = place_T >= (lengths_B - most)[row_index(offsets, num_values)]
    return is_kept_T.nonzero().flatten(), _offsets_of(lengths_B.clamp(max=most))


def joined_rows(first_TX: Tensor, offsets: Tensor, then_CX: Tensor, then_offsets: Tensor) -> tuple[Tensor, Tensor]:
    """Rows of the second behind those of the first: packed values, and their offsets."""
    row_T, row_C = row_index(offsets, first_TX.shape[0]), row_index(then_offsets, then_CX.shape[0])
    # A value moves back by what stands before its own row of the other.
    moved_T = torch.arange(first_TX.shape[0], device=row_T.device) + then_offsets[row_T]
    moved_C = torch.arange(then_CX.shape[0], device=row_C.device) + offsets[row_C + 1]
    values = torch.cat([first_TX, then_CX])
    return torch.empty_like(values).index_copy(0, torch.cat([moved_T, moved_C]), values), offsets + then_offsets


def _offsets_of(lengths_B: Tensor) -> Tensor:
    return torch.cat([lengths_B.new_zeros(1), lengths_B.cumsum(0)])
