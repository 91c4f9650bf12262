"""Attention in a latent space is a softmax over what each query may see, forward and backward."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from kernels.latent_attention import latent_attention

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
HEADS, WIDTH, SCALE = 3, 5, 0.7
TOLERANCES = {torch.float64: 1e-12, torch.float32: 2e-6}


@dataclass(frozen=True)
class Rows:
    keys: list[int]
    queries: list[int] | None = None
    targets: list[int] | None = None

    @property
    def num_queries(self) -> list[int]:
        return self.keys if self.queries is None else self.queries

    def num_targets(self) -> Tensor | None:
        return None if self.targets is None else torch.tensor(self.targets, dtype=torch.int64, device=DEVICE)


ROWS = {
    "every key is a query": Rows([5, 0, 1, 17, 3]),
    "the newest of each row": Rows([5, 0, 1, 40, 3, 64], [2, 0, 1, 7, 0, 64]),
    "several groups": Rows([31, 64, 48, 1, 47, 30, 0, 14, 13], [3, 3, 3, 1, 3, 3, 0, 3, 3]),
    "targets": Rows([9, 4, 21, 2, 0], [9, 4, 21, 2, 0], [3, 4, 0, 1, 0]),
    "targets alone are queries": Rows([9, 4, 21, 2, 5], [3, 1, 0, 2, 5], [3, 1, 0, 2, 5]),
    "more of them in one row than keys in another": Rows([20, 12], [18, 1], [18, 1]),
    "one position": Rows([1]),
    "all rows empty": Rows([0, 0]),
    "no rows": Rows([]),
}


def offsets_of(lengths: list[int]) -> Tensor:
    return torch.tensor([0, *itertools.accumulate(lengths)], device=DEVICE)


def make_inputs(rows: Rows, dtype: torch.dtype) -> dict[str, Tensor]:
    """Queries and keys between values that are not numbers, which nothing may read."""
    generator, tensors = torch.Generator().manual_seed(sum(rows.keys)), {}
    for name, shape in {"q": (sum(rows.num_queries), HEADS, WIDTH), "kv": (sum(rows.keys), WIDTH)}.items():
        around = torch.full((shape[0] + 40, *shape[1:]), math.nan, dtype=dtype)
        around[20:-20] = torch.randn(shape, generator=generator, dtype=torch.float64)
        tensors[name] = around.to(DEVICE)[20:-20].requires_grad_()
    return tensors


def one_by_one(q_MHC: Tensor, kv_LC: Tensor, rows: Rows) -> Tensor:
    """Every query by itself, with what it sees listed."""
    outputs, first_query, first_key = [q_MHC[:0]], 0, 0
    for number, num_keys in enumerate(rows.keys):
        num_targets = 0 if rows.targets is None else rows.targets[number]
        for at in range(num_keys - rows.num_queries[number], num_keys):
            seen = [key for key in range(at + 1) if key < num_keys - num_targets or key == at]
            seen_nC = kv_LC[[first_key + key for key in seen]]
            weight_Hn = torch.softmax(SCALE * q_MHC[first_query] @ seen_nC.T, dim=1)
            outputs.append((weight_Hn @ seen_nC)[None])
            first_query += 1
        first_key += num_keys
    return torch.cat(outputs)


@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize("rows", ROWS.values(), ids=ROWS.keys())
def test_output_and_gradients_are_those_of_every_query_by_itself(rows: Rows, dtype: torch.dtype) -> None:
    x = make_inputs(rows, dtype)
    exact = {name: tensor.detach().double().requires_grad_() for name, tensor in x.items()}
    found = latent_attention(
        x["q"],
        x["kv"],
        query_offsets=offsets_of(rows.num_queries),
        key_offsets=offsets_of(rows.keys),
        scale=SCALE,
        num_targets_B=rows.num_targets(),
    )
    wanted = one_by_one(exact["q"], exact["kv"], rows)
    torch.testing.assert_close(found.double(), wanted, atol=TOLERANCES[dtype], rtol=TOLERANCES[dtype])
    pull = torch.randn(wanted.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(DEVICE)
    (found * pull.to(dtype)).sum().backward()  # type: ignore[no-untyped-call]
    (wanted * pull).sum().backward()  # type: ignore[no-untyped-call]
    for name, tensor in x.items():
        nothing = torch.zeros_like(exact[name])
        got, want = (nothing if one.grad is None else one.grad.double() for one in (tensor, exact[name]))
        torch.testing.assert_close(got, want, atol=10 * TOLERANCES[dtype], rtol=10 * TOLERANCES[dtype])


def test_wrong_shapes_are_refused() -> None:
    q, kv, offsets = torch.zeros(3, HEADS, WIDTH), torch.zeros(4, WIDTH), torch.tensor([0, 3])
    with pytest.raises(ValueError, match="q must be"):
        latent_attention(q, kv[:, :2], query_offsets=offsets, key_offsets=torch.tensor([0, 4]), scale=1.0)
    with pytest.raises(ValueError, match="more queries than keys"):
        latent_attention(q, kv[:2], query_offsets=offsets, key_offsets=torch.tensor([0, 2]), scale=1.0)
    with pytest.raises(ValueError, match="rows of queries"):
        latent_attention(q, kv, query_offsets=offsets, key_offsets=torch.tensor([0, 2, 4]), scale=1.0)
    with pytest.raises(ValueError, match="run from"):
        latent_attention(q, kv, query_offsets=offsets, key_offsets=torch.tensor([0, 3]), scale=1.0)
