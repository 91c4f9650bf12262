"""What our kernels are compared with: torch's own operations, put together the usual way.

Shapes: B rows, H heads, N padded length, A head width, L packed positions, D model width.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel

from kernels.hstu_attention.bias import BUCKET_WIDTH, RelativeBias

Attention = Callable[[Tensor, Tensor, Tensor], Tensor]


def sdpa(backend: SDPBackend) -> Attention:
    """Causal softmax attention of [B, H, N, A] by one backend; on the CPU by the only one there."""

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        with only(backend, q):
            return functional.scaled_dot_product_attention(q, k, v, is_causal=True)

    return attend


def only(backend: SDPBackend, x: Tensor) -> AbstractContextManager[Any]:
    return sdpa_kernel(backend) if x.is_cuda else nullcontext()


def varlen(offsets: Tensor, max_len: int) -> Attention:
    """Causal softmax attention of packed [L, H, A] by FlashAttention-2; row by row on the CPU, which has none."""
    if not offsets.is_cuda:
        return _row_by_row(offsets)
    from torch.nn.attention.varlen import varlen_attn

    starts = offsets.to(torch.int32)
    causal: dict[str, Any] = {"window_size": (-1, 0)}
    if "is_causal" in inspect.signature(varlen_attn).parameters:  # torch 2.10
        causal = {"is_causal": True}

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = varlen_attn(q, k, v, starts, starts, max_len, max_len, **causal)
        assert isinstance(out, Tensor)
        return out

    return attend


def _row_by_row(offsets: Tensor) -> Attention:
    lengths = offsets.diff().tolist()

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = []
        for rows in zip(*(torch.split(x, lengths) for x in (q, k, v)), strict=True):
            q_HnA, k_HnA, v_HnA = (x.transpose(0, 1) for x in rows)
            out.append(functional.scaled_dot_product_attention(q_HnA, k_HnA, v_HnA, is_causal=True).transpose(0, 1))
        return torch.cat(out)

    return attend


def flex(*, num_rows: int, length: int, lengths_B: Tensor | None = None, bias: RelativeBias | None = None) -> Attention:
    """Causal softmax attention of [B, H, N, A] by FlexAttention, compiled on a GPU.

    The relative bias is its score_mod, the ends of rows are in its block mask. SiLU cannot be had: a score_mod stands
    before the softmax. bias: of rows that all have N positions.
    """
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    if lengths_B is None:
        mask = create_block_mask(lambda _b, _h, i, j: i >= j, None, None, length, length, device=_device(bias))
    else:
        mask = create_block_mask(
            lambda b, _h, i, j: (i >= j) & (i < lengths_B[b]), num_rows, None, length, length, device=lengths_B.device
        )
    score_mod = None if bias is None else _bias_score_mod(bias, num_rows, length)
    call: Any = torch.compile(flex_attention, dynamic=False) if torch.cuda.is_available() else flex_attention
    return lambda q, k, v: call(q, k, v, block_mask=mask, score_mod=score_mod)


def _device(bias: RelativeBias | None) -> torch.device:
    if bias is not None:
        return bias.position_weight.device
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def _bias_score_mod(bias: RelativeBias, num_rows: int, length: int) -> Callable[..., Tensor]:
    queries_BN = bias.query_timestamps_s_M.view(num_rows, length)
    keys_BN = bias.timestamps_s_L.view(num_rows, length)
    position, time, last = bias.position_weight, bias.time_weight, bias.num_buckets

    def score_mod(score: Tensor, b: Tensor, _h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        gap = (queries_BN[b, i] - keys_BN[b, j]).abs().clamp(min=1)
        bucket = (gap.to(torch.float32).log() * (1 / BUCKET_WIDTH)).to(torch.int32).clamp(max=last)
        return score + position[j - i + length - 1] + time[bucket]

    return score_mod


def silu_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """HSTU's attention of [B, H, N, A] without bias, as one writes it down; for torch.compile to fuse."""
    length = q.shape[2]
    visible = torch.ones(length, length, dtype=torch.bool, device=q.device).tril()
    return (functional.silu(q @ k.transpose(2, 3)) / length * visible) @ v


class TransformerLayer(nn.Module):
    """Pre-norm, d_ff = 4 D, GELU. x is [B, N, D] for an attention of [B, H, N, A], [L, D] for a packed one."""

    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.attention_norm, self.ffn_norm = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.output = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.ffn_in, self.ffn_out = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor, attend: Attention) -> Tensor:
        q, k, v = (
            part.unflatten(-1, (self.num_heads, -1)) for part in self.qkv(self.attention_norm(x)).chunk(3, dim=-1)
        )
        if x.dim() == 3:
            o = attend(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)).transpose(1, 2)
        else:
            o = attend(q, k, v)
        x = x + self.output(o.flatten(-2))
        out: Tensor = x + self.ffn_out(functional.gelu(self.ffn_in(self.ffn_norm(x))))
        return out


class Transformer(nn.Module):
    """Layers of equal width, to compare encoders with."""

    def __init__(self, *, width: int, num_heads: int, num_layers: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(TransformerLayer(width, num_heads) for _ in range(num_layers))

    def forward(self, x: Tensor, attend: Attention) -> Tensor:
        for layer in self.layers:
            x = layer(x, attend)
        return functional.normalize(x, dim=-1)


def cross_entropy(u_PD: Tensor, item_VD: Tensor, target_rows_P: Tensor, scale: float) -> Tensor:
    """Full softmax loss over logits that exist whole."""
    return functional.cross_entropy(u_PD @ item_VD.T * scale, target_rows_P)


class SortedIndex:
    """Ids to rows by binary search: what torch has for it."""

    def __init__(self, ids: Tensor, rows: Tensor) -> None:
        self.ids, order = ids.sort()
        self.rows = rows[order]

    def find(self, ids: Tensor) -> Tensor:
        """int64: -1 for unknown ids."""
        place = torch.searchsorted(self.ids, ids).clamp_(max=self.ids.shape[0] - 1)
        return torch.where(self.ids[place] == ids, self.rows[place], -1)


def accumulate_by_unique(rows: Tensor, grad: Tensor) -> tuple[Tensor, Tensor]:
    """Distinct rows and the sums of their gradients by unique and index_add_, which adds in any order on a GPU."""
    distinct, place = torch.unique(rows, return_inverse=True)
    total = torch.zeros(distinct.shape[0], grad.shape[1], dtype=torch.float32, device=grad.device)
    return distinct, total.index_add_(0, place, grad.float())
