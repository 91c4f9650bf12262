"""Softmax attention over jagged rows is a softmax over each row alone, forward and backward."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from torch import Tensor

from kernels.softmax_attention import softmax_attention

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
HEADS, WIDTH = 2, 5
LENGTHS = {
    "mixed rows": [5, 0, 1, 17, 3],
    # 64 and 48 share a group (the shorter fills three quarters of it), 47 opens one with all down to 31.
    "several groups": [31, 64, 48, 1, 47, 30, 0, 14, 13],
    "one row": [7],
    "one position": [1],
    "all rows empty": [0, 0],
    "empty rows at both ends": [0, 4, 0],
    "no rows": [],
}
TOLERANCES = {torch.float64: 1e-12, torch.float32: 2e-6}


def offsets_of(lengths: list[int]) -> Tensor:
    return torch.tensor([0, *itertools.accumulate(lengths)], device=DEVICE)


def make_inputs(lengths: list[int], dtype: torch.dtype) -> dict[str, Tensor]:
    """q, k and v between values that are not numbers, which nothing may read."""
    generator = torch.Generator().manual_seed(sum(lengths))
    tensors = {}
    for name in ("q", "k", "v"):
        around = torch.full((sum(lengths) + 40, HEADS, WIDTH), math.nan, dtype=dtype)
        around[20:-20] = torch.randn(sum(lengths), HEADS, WIDTH, generator=generator, dtype=torch.float64)
        tensors[name] = around.to(DEVICE)[20:-20].requires_grad_()
    return tensors


def dense(q_LHA: Tensor, k_LHA: Tensor, v_LHA: Tensor, lengths: list[int]) -> Tensor:
    """Row by row, with the softmax written out."""
    rows = [v_LHA[:0]]
    for start, end in itertools.pairwise([0, *itertools.accumulate(lengths)]):
        n = end - start
        score_Hnn = torch.einsum("iha,jha->hij", q_LHA[start:end], k_LHA[start:end]) / math.sqrt(WIDTH)
        weight_Hnn = score_Hnn.exp() * torch.ones(n, n, dtype=score_Hnn.dtype, device=DEVICE).tril()
        weight_Hnn = weight_Hnn / weight_Hnn.sum(2, keepdim=True)
        rows.append(torch.einsum("hij,jha->iha", weight_Hnn, v_LHA[start:end]))
    return torch.cat(rows)


@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS.keys())
def test_output_and_gradients_are_those_of_a_dense_softmax(lengths: list[int], dtype: torch.dtype) -> None:
    x = make_inputs(lengths, dtype)
    truth = {name: tensor.detach().double().requires_grad_() for name, tensor in x.items()}
    got = softmax_attention(x["q"], x["k"], x["v"], offsets_of(lengths))
    want = dense(truth["q"], truth["k"], truth["v"], lengths)
    tolerance = TOLERANCES[dtype]
    assert got.dtype == dtype
    torch.testing.assert_close(got.double(), want, atol=tolerance, rtol=tolerance)
    upstream = torch.randn(want.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).to(DEVICE)
    # Without positions no key or value is read, and so none has a gradient.
    gradients = torch.autograd.grad(got, list(x.values()), upstream.to(dtype), materialize_grads=True)
    expected = torch.autograd.grad(want, list(truth.values()), upstream, materialize_grads=True)
    for name, gradient, of_dense in zip(x, gradients, expected, strict=True):
        torch.testing.assert_close(gradient.double(), of_dense, atol=10 * tolerance, rtol=10 * tolerance, msg=name)


def test_a_row_is_the_same_whatever_rows_are_beside_it() -> None:
    lengths = LENGTHS["several groups"]
    x = make_inputs(lengths, torch.float64)
    whole = softmax_attention(x["q"], x["k"], x["v"], offsets_of(lengths))
    for start, end in itertools.pairwise(offsets_of(lengths).tolist()):
        q, k, v = (x[name][start:end] for name in ("q", "k", "v"))
        alone = softmax_attention(q, k, v, offsets_of([end - start]))
        torch.testing.assert_close(alone, whole[start:end], atol=1e-12, rtol=0)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"k": torch.zeros(6, 2, 4)}, r"q, k and v must all be \[L, H, A\]"),
        ({"v": torch.zeros(5, 2, 3)}, r"q, k and v must all be \[L, H, A\]"),
        ({"q": torch.zeros(5, 8), "k": torch.zeros(5, 8), "v": torch.zeros(5, 8)}, r"q, k and v must all be"),
        ({"offsets": torch.tensor([0, 5], dtype=torch.int32)}, r"offsets must be int64\[B \+ 1\]"),
        ({"offsets": torch.tensor([0, 4])}, "they must run from 0 to the 5 values"),
        ({"offsets": torch.tensor([1, 5])}, "they must run from 0 to the 5 values"),
        ({"offsets": torch.tensor([0, 4, 3, 5])}, "offsets descend"),
    ],
)
def test_tensors_that_do_not_fit_together_are_refused(change: dict[str, Tensor], says: str) -> None:
    given: dict[str, Any] = {name: torch.zeros(5, 2, 4) for name in ("q", "k", "v")}
    given |= {"offsets": torch.tensor([0, 3, 5])} | change
    with pytest.raises(ValueError, match=says):
        softmax_attention(given["q"], given["k"], given["v"], given["offsets"])
