"""Inputs of HSTU attention, and the formula of its README worked out one pair of places at a time."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from kernels.hstu_attention import CAUSAL, AttentionMask, RelativeBias, hstu_attention

MAX_LEN = 37


@dataclass(frozen=True, kw_only=True, slots=True)
class Case:
    """Rows, their tensors (leaves) and what else the call needs."""

    tensors: dict[str, Tensor]
    offsets: Tensor
    timestamps_s: Tensor
    query_timestamps_s: Tensor
    query_offsets: Tensor | None = None
    mask: AttentionMask = field(default=CAUSAL)
    alpha: float = 1.0

    def arguments(self, **named: Tensor) -> dict[str, Any]:
        """Keyword arguments of hstu_attention, with some tensors replaced."""
        x = {**self.tensors, **named}
        bias = None
        if "position_weight" in x:
            bias = RelativeBias(
                position_weight=x["position_weight"],
                time_weight=x["time_weight"],
                timestamps_s_L=self.timestamps_s,
                query_timestamps_s_M=self.query_timestamps_s,
            )
        return {
            "q_MHA": x["q"],
            "k_LHA": x["k"],
            "v_LHV": x["v"],
            "offsets": self.offsets,
            "max_len": MAX_LEN,
            "alpha": self.alpha,
            "bias": bias,
            "mask": self.mask,
            "query_offsets": self.query_offsets,
        }

    def run(self, kernel: Any = "auto", **named: Tensor) -> Tensor:
        return hstu_attention(**self.arguments(**named), kernel=kernel)

    def gradients(self, out: Tensor) -> dict[str, Tensor]:
        """Of every leaf, for a fixed upstream gradient."""
        upstream = torch.randn(out.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).to(out)
        leaves = list(self.tensors.values())
        found = torch.autograd.grad(out, leaves, upstream, materialize_grads=True, allow_unused=True)
        return dict(zip(self.tensors, found, strict=True))


def make_case(
    lengths: list[int],
    *,
    num_queries: list[int] | None = None,
    mask: AttentionMask = CAUSAL,
    alpha: float = 1.0,
    dtype: torch.dtype = torch.float64,
    num_heads: int = 3,
    widths: tuple[int, int] = (5, 7),
    with_bias: bool = True,
) -> Case:
    """Random rows of these lengths; num_queries: newest positions of each row that have a query, None for all."""
    generator = torch.Generator().manual_seed(sum(lengths) + len(lengths))
    num_keys = sum(lengths)
    queries = lengths if num_queries is None else num_queries

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, dtype=dtype, generator=generator)

    tensors = {
        "q": normal(sum(queries), num_heads, widths[0]),
        "k": normal(num_keys, num_heads, widths[0]),
        "v": normal(num_keys, num_heads, widths[1]),
    }
    if with_bias:
        tensors |= {"position_weight": normal(2 * MAX_LEN - 1), "time_weight": normal(129)}
    times = 1_400_000_000 + (10 ** (torch.rand(num_keys, generator=generator) * 7)).long().cumsum(0)
    newest = [i for end, n in zip(itertools.accumulate(lengths), queries, strict=True) for i in range(end - n, end)]
    return Case(
        tensors={name: tensor.requires_grad_() for name, tensor in tensors.items()},
        offsets=torch.tensor([0, *lengths]).cumsum(0),
        timestamps_s=times,
        query_timestamps_s=times[newest] + torch.randint(0, 10**6, (sum(queries),), generator=generator),
        query_offsets=None if num_queries is None else torch.tensor([0, *queries]).cumsum(0),
        mask=mask,
        alpha=alpha,
    )


def brute_force(case: Case) -> Tensor:
    """o_MHV, pair by pair."""
    x = case.tensors
    rows: list[Tensor] = []
    query_bounds = (case.offsets if case.query_offsets is None else case.query_offsets).tolist()
    for row, (start, end) in enumerate(itertools.pairwise(case.offsets.tolist())):
        length, num_queries = end - start, query_bounds[row + 1] - query_bounds[row]
        for i in range(length - num_queries, length):
            query = query_bounds[row] + i - (length - num_queries)
            total = x["v"].new_zeros(x["v"].shape[1:])
            for j in range(length):
                if sees(case.mask, i, j, length, row):
                    places = place(case.mask, i, length, row), place(case.mask, j, length, row)
                    total = total + pair(case, query, start + j, *places)
            rows.append(total)
    return torch.stack(rows) if rows else x["v"][:0]


def place(mask: AttentionMask, index: int, length: int, row: int) -> int:
    shift = max(mask.contextual_len - 1, 0)
    return min(max(index - shift, 0), history_end(mask, length, row) - shift)


def history_end(mask: AttentionMask, length: int, row: int) -> int:
    return length - (0 if mask.num_targets_B is None else int(mask.num_targets_B[row]))


def sees(mask: AttentionMask, i: int, j: int, length: int, row: int) -> bool:
    """Whether the query at index i sees the key at index j, in words of the mask's docstring."""
    end = history_end(mask, length, row)
    if i == j:
        return True
    if i < mask.contextual_len:
        return j < end
    if j >= end or j > i:
        return False
    if mask.max_attn_len is None:
        return True
    shift = max(mask.contextual_len - 1, 0)
    full = mask.min_full_attn_len > 0 and place(mask, i, length, row) >= end - shift - mask.min_full_attn_len
    near = place(mask, i, length, row) - place(mask, j, length, row) <= mask.max_attn_len
    return full or near or j < mask.num_oldest_keys


def pair(case: Case, query: int, key: int, query_place: int, key_place: int) -> Tensor:
    x = case.tensors
    score = case.alpha * (x["q"][query] * x["k"][key]).sum(-1)
    if "position_weight" in x:
        gap = abs(int(case.query_timestamps_s[query] - case.timestamps_s[key]))
        bucket = min(max(int(math.log(max(gap, 1)) / 0.301), 0), 128)
        score = score + x["position_weight"][key_place - query_place + MAX_LEN - 1] + x["time_weight"][bucket]
    return (score * torch.sigmoid(score) / MAX_LEN)[:, None] * x["v"][key]


MASKS = {
    "causal": CAUSAL,
    "targets": AttentionMask(num_targets_B=torch.tensor([2, 0, 0, 5, 37, 1, 0, 3])),
    "contextual": AttentionMask(contextual_len=2),
    "one contextual": AttentionMask(contextual_len=1),
    "window": AttentionMask(max_attn_len=4),
    "window, newest see all": AttentionMask(max_attn_len=4, min_full_attn_len=3),
    "window, oldest are seen": AttentionMask(max_attn_len=4, num_oldest_keys=3),
    "no window, newest see all": AttentionMask(max_attn_len=0, min_full_attn_len=3),
    "no window, oldest are seen": AttentionMask(max_attn_len=0, num_oldest_keys=3),
    "nothing but itself": AttentionMask(max_attn_len=0),
    "everything": AttentionMask(
        num_targets_B=torch.tensor([2, 0, 0, 5, 30, 1, 0, 1]),
        contextual_len=2,
        max_attn_len=6,
        min_full_attn_len=2,
        num_oldest_keys=3,
    ),
}
"""For the rows of MASKED_LENGTHS."""

MASKED_LENGTHS = [5, 0, 2, 17, 37, 8, 9, 3]


def double(case: Case) -> Case:
    return replace(case, tensors={n: t.detach().double().requires_grad_() for n, t in case.tensors.items()})
