"""HSTU, as in the authors' research code (arXiv 2402.17152); its attention is in kernels/hstu_attention/README.md.

Shapes: L packed positions, D model width, H heads, A query/key width, V value width, N = max_len.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from kernels.hstu_attention import AttentionPlan, KernelName, RelativeBias, hstu_attention, plan_attention
from kernels.jagged import position_index
from model.config import ModelConfig

NORM_EPS = 1e-6
INIT_STD = 0.02


def dropped_out(x: Tensor, share: float, generator: torch.Generator | None) -> Tensor:
    """The tensor with ``share`` of its elements zeroed, the rest scaled up; unchanged without a generator."""
    if generator is None or share == 0.0:
        return x
    keep = torch.empty_like(x).bernoulli_(1.0 - share, generator=generator)
    return x * keep.div_(1.0 - share)


class HSTULayer(nn.Module):
    """One layer: ``x + W_o dropout(u * norm(attention(q, k, v)))`` with ``u, v, q, k = split(silu(W norm(x)))``.

    Both norms have no learned parameters; they are required for stability, since nothing else bounds the sums.
    """

    def __init__(self, config: ModelConfig, generator: torch.Generator) -> None:
        super().__init__()
        self.config = config
        gate, attention = config.num_heads * config.hidden_dim, config.num_heads * config.attention_dim
        self.split_sizes = [gate, gate, attention, attention]
        self.uvqk = nn.Parameter(_normal(generator, config.embedding_dim, 2 * gate + 2 * attention))
        bound = (6 / (gate + config.embedding_dim)) ** 0.5  # Xavier
        self.output_weight = nn.Parameter(
            torch.empty(gate, config.embedding_dim).uniform_(-bound, bound, generator=generator)
        )
        self.output_bias = nn.Parameter(torch.zeros(config.embedding_dim))
        self.position_weight = nn.Parameter(_normal(generator, 2 * config.max_len - 1))
        self.time_weight = nn.Parameter(_normal(generator, config.num_time_buckets + 1))

    def forward(
        self,
        x_LD: Tensor,
        offsets: Tensor,
        times: tuple[Tensor, Tensor],
        *,
        plan: AttentionPlan | None,
        dropout: torch.Generator | None,
        kernel: KernelName = "auto",
    ) -> Tensor:
        """x_LD of the next layer. times: int64 seconds of each position and of its query."""
        config = self.config
        normed_LD = functional.layer_norm(x_LD, (config.embedding_dim,), eps=NORM_EPS)
        u_LG, v_LG, q_LG, k_LG = torch.split(functional.silu(normed_LD @ self.uvqk), self.split_sizes, dim=1)
        o_LHV = hstu_attention(
            q_LG.reshape(-1, config.num_heads, config.attention_dim),
            k_LG.reshape(-1, config.num_heads, config.attention_dim),
            v_LG.reshape(-1, config.num_heads, config.hidden_dim),
            offsets,
            max_len=config.max_len,
            bias=RelativeBias(
                position_weight=self.position_weight,
                time_weight=self.time_weight,
                timestamps_s_L=times[0],
                query_timestamps_s_L=times[1],
            ),
            kernel=kernel,
            plan=plan,
        )
        attended_LG = functional.layer_norm(o_LHV.flatten(1), (u_LG.shape[1],), eps=NORM_EPS)
        gated_LG = dropped_out(u_LG * attended_LG, config.linear_dropout, dropout)
        return x_LD + torch.addmm(self.output_bias, gated_LG, self.output_weight)


class HSTU(nn.Module):
    """Item embeddings of histories to one L2-normalised state per position."""

    def __init__(self, config: ModelConfig, generator: torch.Generator) -> None:
        super().__init__()
        self.config = config
        self.position_embedding = nn.Parameter(_normal(generator, config.max_len, config.embedding_dim))
        self.layers = nn.ModuleList(HSTULayer(config, generator) for _ in range(config.num_layers))

    def forward(
        self,
        item_LD: Tensor,
        known_L: Tensor,
        offsets: Tensor,
        times_ms: tuple[Tensor, Tensor],
        *,
        dropout: torch.Generator | None = None,
        kernel: KernelName = "auto",
    ) -> Tensor:
        """u_LD of unit length.

        item_LD: float[L, D]. known_L: bool[L], False where the input is to read as zeros. times_ms: int64[L] epoch
        ms of each position, and of the next interaction or request. dropout: generator of a training pass, None
        for inference. ValueError if a row is longer than max_len.
        """
        place_L = position_index(offsets, item_LD.shape[0])
        times_s = (times_ms[0] // 1000, times_ms[1] // 1000)
        plan = plan_attention(
            offsets,
            num_positions=item_LD.shape[0],
            max_len=self.config.max_len,
            times=times_s,
            num_buckets=self.config.num_time_buckets,
        )
        x_LD = item_LD * self.config.embedding_dim**0.5 + self.position_embedding.index_select(0, place_L)
        x_LD = dropped_out(x_LD, self.config.input_dropout, dropout) * known_L[:, None]
        for layer in self.layers:
            x_LD = layer(x_LD, offsets, times_s, plan=plan, dropout=dropout, kernel=kernel)
        return functional.normalize(x_LD, dim=1, eps=NORM_EPS)


def _normal(generator: torch.Generator, *shape: int) -> Tensor:
    return torch.empty(*shape).normal_(std=INIT_STD, generator=generator)
