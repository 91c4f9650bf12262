"""SASRec (Kang and McAuley, ICDM 2018) in HSTU's frame: the same input, states, scores and loss, another encoder.

Shapes: L packed positions, D model width, H heads.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from kernels.implementations import KernelName
from kernels.softmax_attention import softmax_attention
from model.config import ModelConfig
from model.history_input import HistoryInput
from model.initial import NORM_EPS, dropped_out, xavier


class SASRecLayer(nn.Module):
    """``h = norm(x) + attention(norm(x), x, x)``, then ``h' + ffn(h')`` with ``h' = norm(h)``.

    The feed-forward part is as wide as the model, with a ReLU.
    """

    def __init__(self, config: ModelConfig, generator: torch.Generator) -> None:
        super().__init__()
        width = config.embedding_dim
        if width % config.num_heads:
            raise ValueError(f"embedding_dim is {width}; sasrec needs a multiple of num_heads ({config.num_heads})")
        self.config = config
        self.attention_norm = nn.LayerNorm(width, eps=NORM_EPS)
        self.ffn_norm = nn.LayerNorm(width, eps=NORM_EPS)
        for name in ("query", "key", "value", "output", "ffn_in", "ffn_out"):
            setattr(self, f"{name}_weight", nn.Parameter(xavier(generator, width, width)))
            setattr(self, f"{name}_bias", nn.Parameter(torch.zeros(width)))

    def forward(self, x_LD: Tensor, offsets: Tensor, *, dropout: torch.Generator | None) -> Tensor:
        """x_LD of the next layer."""
        share, heads = self.config.linear_dropout, (-1, self.config.num_heads, x_LD.shape[1] // self.config.num_heads)
        normed_LD = self.attention_norm(x_LD)
        o_LHA = softmax_attention(
            self._linear("query", normed_LD).view(heads),
            self._linear("key", x_LD).view(heads),
            self._linear("value", x_LD).view(heads),
            offsets,
        )
        h_LD = self.ffn_norm(normed_LD + self._linear("output", o_LHA.flatten(1)))
        inner_LD = dropped_out(functional.relu(self._linear("ffn_in", h_LD)), share, dropout)
        out: Tensor = h_LD + dropped_out(self._linear("ffn_out", inner_LD), share, dropout)
        return out

    def _linear(self, name: str, x_LD: Tensor) -> Tensor:
        return torch.addmm(getattr(self, f"{name}_bias"), x_LD, getattr(self, f"{name}_weight"))


class SASRec(nn.Module):
    """As ``HSTU``: item embeddings of histories to one L2-normalised state per position."""

    def __init__(self, config: ModelConfig, generator: torch.Generator) -> None:
        super().__init__()
        self.input = HistoryInput(config, generator)
        self.layers = nn.ModuleList(SASRecLayer(config, generator) for _ in range(config.num_layers))

    def forward(
        self,
        item_LD: Tensor,
        known_L: Tensor,
        offsets: Tensor,
        times_ms: tuple[Tensor, Tensor],
        *,
        dropout: torch.Generator | None = None,
        kernel: KernelName = "auto",  # noqa: ARG002 - torch's attention chooses by itself
    ) -> Tensor:
        """u_LD of unit length; arguments as ``HSTU.forward``."""
        times_s = (times_ms[0] // 1000, times_ms[1] // 1000)
        x_LD = self.input(item_LD, known_L, offsets, times_s, dropout=dropout)
        for layer in self.layers:
            x_LD = layer(x_LD, offsets, dropout=dropout)
        return functional.normalize(x_LD, dim=1, eps=NORM_EPS)
