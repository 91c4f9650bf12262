"""HSTU attention equals the formula, forward and in every gradient, on every awkward shape."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from kernels.errors import KernelUnavailableError
from kernels.hstu_attention import RelativeBias, hstu_attention, plan_attention, time_bucket

ATOL = {torch.float64: 1e-12, torch.float32: 2e-5}
MAX_LEN = 37

SHAPES = {
    "mixed rows": [5, 0, 1, 17, 37, 8, 9, 3],
    "one row": [13],
    "one position": [1],
    "one empty row": [0],
    "all rows empty": [0, 0, 0],
    "empty rows at both ends": [0, 4, 0],
    "every row full": [37, 37],
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Inputs:
    tensors: dict[str, Tensor]
    offsets: Tensor
    timestamps_s: Tensor
    query_timestamps_s: Tensor

    def run(self, **named: Tensor) -> Tensor:
        x = {**self.tensors, **named}
        bias = None
        if "position_weight" in x:
            bias = RelativeBias(
                position_weight=x["position_weight"],
                time_weight=x["time_weight"],
                timestamps_s_L=self.timestamps_s,
                query_timestamps_s_L=self.query_timestamps_s,
            )
        return hstu_attention(x["q"], x["k"], x["v"], self.offsets, max_len=MAX_LEN, bias=bias)


def make_inputs(
    lengths: list[int], *, dtype: torch.dtype = torch.float64, num_heads: int = 3, with_bias: bool = True
) -> Inputs:
    generator = torch.Generator().manual_seed(sum(lengths) + len(lengths))
    num_positions = sum(lengths)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, dtype=dtype, generator=generator)

    tensors = {
        "q": normal(num_positions, num_heads, 5),
        "k": normal(num_positions, num_heads, 5),
        "v": normal(num_positions, num_heads, 7),
    }
    if with_bias:
        tensors |= {"position_weight": normal(2 * MAX_LEN - 1), "time_weight": normal(129)}
    gaps = (10 ** (torch.rand(num_positions, generator=generator) * 7)).long()
    times = 1_400_000_000 + gaps.cumsum(0)
    return Inputs(
        tensors={name: tensor.requires_grad_() for name, tensor in tensors.items()},
        offsets=torch.tensor([0, *lengths]).cumsum(0),
        timestamps_s=times,
        query_timestamps_s=times + torch.randint(0, 10**6, (num_positions,), generator=generator),
    )


def brute_force(inputs: Inputs, **named: Tensor) -> Tensor:
    """The formula of the README, one pair of places at a time."""
    x = {**inputs.tensors, **named}
    _, num_heads, width = x["v"].shape
    rows = []
    bounds = inputs.offsets.tolist()
    for start, end in itertools.pairwise(bounds):
        for i in range(start, end):
            total = x["v"].new_zeros(num_heads, width)
            for j in range(start, i + 1):
                score = (x["q"][i] * x["k"][j]).sum(-1)
                if "position_weight" in x:
                    gap = abs(int(inputs.query_timestamps_s[i] - inputs.timestamps_s[j]))
                    bucket = min(max(int(math.log(max(gap, 1)) / 0.301), 0), 128)
                    score = score + x["position_weight"][j - i + MAX_LEN - 1] + x["time_weight"][bucket]
                total = total + (score * torch.sigmoid(score) / MAX_LEN)[:, None] * x["v"][j]
            rows.append(total)
    return torch.stack(rows) if rows else x["v"] * 0


@pytest.mark.parametrize("with_bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("lengths", SHAPES.values(), ids=SHAPES.keys())
def test_output_and_every_gradient_equal_the_formula(lengths: list[int], *, with_bias: bool) -> None:
    inputs = make_inputs(lengths, with_bias=with_bias)
    want, got = brute_force(inputs), inputs.run()
    torch.testing.assert_close(got, want, atol=ATOL[torch.float64], rtol=0)
    upstream = torch.randn(want.shape, dtype=want.dtype, generator=torch.Generator().manual_seed(1))
    leaves = list(inputs.tensors.values())
    want_grads = torch.autograd.grad(want, leaves, upstream, materialize_grads=True, allow_unused=True)
    got_grads = torch.autograd.grad(got, leaves, upstream, materialize_grads=True, allow_unused=True)
    for name, want_grad, got_grad in zip(inputs.tensors, want_grads, got_grads, strict=True):
        assert torch.allclose(got_grad, want_grad, atol=ATOL[torch.float64], rtol=0), f"gradient of {name}"


def test_single_precision_stays_close_to_double() -> None:
    inputs = make_inputs(SHAPES["mixed rows"])
    single = {name: tensor.float() for name, tensor in inputs.tensors.items()}
    torch.testing.assert_close(inputs.run(**single).double(), inputs.run(), atol=ATOL[torch.float32], rtol=0)


def test_a_row_poisoned_with_nan_does_not_reach_its_neighbours() -> None:
    inputs = make_inputs([4, 9, 6, 0, 9])
    clean = inputs.run()
    poisoned = {}
    for name in ("q", "k", "v"):
        tensor = inputs.tensors[name].detach().clone()
        tensor[4:13] = float("nan")
        poisoned[name] = tensor.requires_grad_()
    got = inputs.run(**poisoned)
    others = torch.ones(28, dtype=torch.bool)
    others[4:13] = False
    assert torch.equal(got[others], clean[others])
    assert bool(got[4:13].isnan().all())
    torch.autograd.backward(got[others].sum())
    for name, tensor in poisoned.items():
        assert tensor.grad is not None, name
        assert bool(tensor.grad[others].isfinite().all()), f"gradient of {name} is poisoned"


def test_later_positions_do_not_change_earlier_outputs() -> None:
    inputs = make_inputs([11, 37])
    clean = inputs.run()
    changed = {}
    for name in ("q", "k", "v"):
        tensor = inputs.tensors[name].detach().clone()
        tensor[11 + 20 :] *= -3
        changed[name] = tensor
    got = inputs.run(**changed)
    assert torch.equal(got[: 11 + 20], clean[: 11 + 20])
    assert not torch.equal(got[11 + 20 :], clean[11 + 20 :])


def test_a_row_gives_the_same_output_alone_as_in_a_batch() -> None:
    inputs = make_inputs([9, 30, 2])
    alone = Inputs(
        tensors={n: t[9:39] if n in ("q", "k", "v") else t for n, t in inputs.tensors.items()},
        offsets=torch.tensor([0, 30]),
        timestamps_s=inputs.timestamps_s[9:39],
        query_timestamps_s=inputs.query_timestamps_s[9:39],
    )
    torch.testing.assert_close(alone.run(), inputs.run()[9:39], atol=1e-14, rtol=0)


def test_a_shared_plan_changes_nothing() -> None:
    inputs = make_inputs(SHAPES["mixed rows"])
    plan = plan_attention(
        inputs.offsets,
        num_positions=80,
        max_len=MAX_LEN,
        times=(inputs.timestamps_s, inputs.query_timestamps_s),
    )
    x = inputs.tensors
    bias = RelativeBias(
        position_weight=x["position_weight"],
        time_weight=x["time_weight"],
        timestamps_s_L=inputs.timestamps_s,
        query_timestamps_s_L=inputs.query_timestamps_s,
    )
    got = hstu_attention(x["q"], x["k"], x["v"], inputs.offsets, max_len=MAX_LEN, bias=bias, plan=plan)
    assert torch.equal(got, inputs.run())


def test_time_buckets_follow_the_formula_at_every_border() -> None:
    borders = {round(math.exp(0.301 * b)) + d for b in range(90) for d in (-1, 0, 1)}
    gaps = sorted({gap for gap in borders if gap >= 0} | {0, 1, 2, 2**62})
    want = [min(int(math.log(max(gap, 1)) / 0.301), 128) for gap in gaps]
    assert time_bucket(torch.tensor(gaps), 128).tolist() == want
    assert time_bucket(-torch.tensor(gaps), 128).tolist() == want


def test_asking_for_triton_says_that_it_is_not_built() -> None:
    inputs = make_inputs([3])
    x = inputs.tensors
    with pytest.raises(KernelUnavailableError, match="no Triton implementation"):
        hstu_attention(x["q"], x["k"], x["v"], inputs.offsets, max_len=MAX_LEN, kernel="triton")


def test_forcing_the_reference_equals_choosing_by_device() -> None:
    inputs = make_inputs([3, 5], with_bias=False)
    x = inputs.tensors
    forced = hstu_attention(x["q"], x["k"], x["v"], inputs.offsets, max_len=MAX_LEN, kernel="reference")
    assert torch.equal(forced, inputs.run())


def test_a_row_longer_than_max_len_is_refused() -> None:
    inputs = make_inputs([3, MAX_LEN + 1], with_bias=False)
    with pytest.raises(ValueError, match="max_len is 37"):
        inputs.run()


def test_bias_tables_of_the_wrong_length_are_refused() -> None:
    inputs = make_inputs([3])
    with pytest.raises(ValueError, match=r"needs \[73\]"):
        inputs.run(position_weight=torch.zeros(12, dtype=torch.float64))
