"""HSTU attention equals the formula, forward and in every gradient, on every awkward shape and under every mask."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from kernels.hstu_attention import AttentionMask, RelativeBias, cpu, hstu_attention, ops, tiles, time_bucket
from tests.kernels.attention_case import MASKED_LENGTHS, MASKS, MAX_LEN, Case, brute_force, double, make_case

ATOL = {torch.float64: 1e-12, torch.float32: 2e-5, torch.float16: 2e-3, torch.bfloat16: 2e-2}
HOST_KERNELS = ("reference", "cpu", "native")
"""A machine that runs this suite has a C compiler."""

SHAPES = {
    "mixed rows": [5, 0, 1, 17, 37, 8, 9, 3],
    "one row": [13],
    "one position": [1],
    "one empty row": [0],
    "all rows empty": [0, 0, 0],
    "empty rows at both ends": [0, 4, 0],
    "every row full": [37, 37],
}


def check(case: Case, kernel: str) -> None:
    want, got = brute_force(case), case.run(kernel)
    torch.testing.assert_close(got, want, atol=ATOL[torch.float64], rtol=0)
    want_gradients, got_gradients = case.gradients(want), case.gradients(got)
    for name, gradient in got_gradients.items():
        assert torch.allclose(gradient, want_gradients[name], atol=ATOL[torch.float64], rtol=0), f"gradient of {name}"


@pytest.fixture(params=[True, False], ids=["small tiles", "default tiles"])
def small_tiles(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows as short as these fit into one tile; smaller tiles make them cross every border."""
    if request.param:
        monkeypatch.setattr(tiles, "SCORES_PER_TILE", 1 << 7)
        monkeypatch.setattr(tiles, "QUERIES_PER_TILE", 5)
        monkeypatch.setattr(tiles, "KEYS_PER_TILE_MIN", 7)


@pytest.mark.parametrize("kernel", HOST_KERNELS)
@pytest.mark.parametrize("with_bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("lengths", SHAPES.values(), ids=SHAPES.keys())
def test_output_and_every_gradient_equal_the_formula(
    lengths: list[int], kernel: str, small_tiles: None, *, with_bias: bool
) -> None:
    check(make_case(lengths, with_bias=with_bias, alpha=0.7), kernel)


@pytest.mark.parametrize("with_bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("kernel", HOST_KERNELS)
@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS.keys())
def test_every_mask_equals_the_formula(mask: AttentionMask, kernel: str, small_tiles: None, *, with_bias: bool) -> None:
    check(make_case(MASKED_LENGTHS, mask=mask, with_bias=with_bias), kernel)


@pytest.mark.parametrize("kernel", HOST_KERNELS)
@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS.keys())
def test_queries_of_the_newest_positions_alone_equal_the_formula(
    mask: AttentionMask, kernel: str, small_tiles: None
) -> None:
    check(make_case(MASKED_LENGTHS, num_queries=[1, 0, 2, 6, 20, 0, 9, 3], mask=mask), kernel)


@pytest.mark.parametrize("num_kept", [0, 300, 1 << 20], ids=["none", "some tiles", "all"])
def test_time_buckets_kept_from_a_pass_are_those_of_its_own_times(
    num_kept: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One plan for both; first the same tensor written to, then another tensor of other times."""
    monkeypatch.setattr(tiles, "SCORES_PER_TILE", 1 << 7)
    monkeypatch.setattr(cpu, "PAIRS_KEPT_MAX", num_kept)
    monkeypatch.setattr(cpu, "_kept_buckets", cpu._KeptBuckets())
    case = make_case([20, 9, 30])
    for _ in range(2):
        check(case, "cpu")  # the second time, and in each backward pass, they are there already
    case.timestamps_s.mul_(3)
    check(case, "cpu")
    check(replace(case, query_timestamps_s=case.query_timestamps_s * 7), "cpu")
    strided = torch.stack([case.timestamps_s, case.timestamps_s * 5], 1)
    check(replace(case, timestamps_s=strided[:, 0]), "cpu")
    check(replace(case, timestamps_s=strided.view(-1)[: strided.shape[0]]), "cpu")
    with torch.inference_mode():
        times = case.timestamps_s + 1  # nothing counts what is written to it
        for factor in (1, 5):
            times.mul_(factor)
            moved = replace(case, timestamps_s=times)
            torch.testing.assert_close(moved.run("cpu"), brute_force(moved), atol=1e-12, rtol=0)


@pytest.mark.parametrize("num_heads", [1, 2])
def test_any_number_of_heads_shares_the_bias(num_heads: int) -> None:
    check(make_case([9, 30], num_heads=num_heads, widths=(4, 4)), "cpu")


def test_cached_histories_give_what_the_whole_would() -> None:
    whole = make_case([20, 33, 4], mask=AttentionMask(num_targets_B=torch.tensor([3, 5, 0]), max_attn_len=9))
    newest = torch.tensor([*range(14, 20), *range(46, 53), *range(56, 57)])
    cached = replace(
        whole,
        tensors={**whole.tensors, "q": whole.tensors["q"][newest]},
        query_offsets=torch.tensor([0, 6, 13, 14]),
        query_timestamps_s=whole.query_timestamps_s[newest],
    )
    torch.testing.assert_close(cached.run(), whole.run()[newest], atol=1e-14, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("kernel", HOST_KERNELS)
def test_lower_precision_stays_close_to_double(dtype: torch.dtype, kernel: str) -> None:
    case = make_case(SHAPES["mixed rows"], dtype=dtype)
    got, exact = case.run(kernel), double(case)
    want = exact.run("reference")
    assert got.dtype == dtype
    torch.testing.assert_close(got.double(), want, atol=ATOL[dtype], rtol=ATOL[dtype])
    want_gradients = exact.gradients(want)
    for name, gradient in case.gradients(got).items():
        assert gradient.dtype == dtype, name
        scale = float(want_gradients[name].abs().max())
        assert float((gradient.double() - want_gradients[name]).abs().max()) < 10 * ATOL[dtype] * scale, name


@pytest.mark.parametrize("kernel", HOST_KERNELS)
def test_a_row_poisoned_with_nan_does_not_reach_its_neighbours(kernel: str) -> None:
    case = make_case([4, 9, 6, 0, 9])
    clean = case.run(kernel)
    poisoned = {}
    for name in ("q", "k", "v"):
        tensor = case.tensors[name].detach().clone()
        tensor[4:13] = float("nan")
        poisoned[name] = tensor.requires_grad_()
    got = case.run(kernel, **poisoned)
    others = torch.ones(28, dtype=torch.bool)
    others[4:13] = False
    assert torch.equal(got[others], clean[others])
    assert bool(got[4:13].isnan().all())
    torch.autograd.backward(got[others].sum())
    for name, tensor in poisoned.items():
        assert tensor.grad is not None, name
        assert bool(tensor.grad[others].isfinite().all()), f"gradient of {name} is poisoned"


@pytest.mark.parametrize("kernel", HOST_KERNELS)
def test_later_positions_do_not_change_earlier_outputs(kernel: str) -> None:
    case = make_case([11, 37])
    clean = case.run(kernel)
    changed = {}
    for name in ("q", "k", "v"):
        tensor = case.tensors[name].detach().clone()
        tensor[11 + 20 :] *= -3
        changed[name] = tensor
    got = case.run(kernel, **changed)
    assert torch.equal(got[: 11 + 20], clean[: 11 + 20])
    assert not torch.equal(got[11 + 20 :], clean[11 + 20 :])


def test_a_row_gives_the_same_output_alone_as_in_a_batch() -> None:
    case = make_case([9, 30, 2])
    alone = replace(
        case,
        tensors={n: t[9:39] if n in ("q", "k", "v") else t for n, t in case.tensors.items()},
        offsets=torch.tensor([0, 30]),
        timestamps_s=case.timestamps_s[9:39],
        query_timestamps_s=case.query_timestamps_s[9:39],
    )
    torch.testing.assert_close(alone.run(), case.run()[9:39], atol=1e-14, rtol=0)


def test_targets_in_any_order_and_number_score_as_they_would_alone() -> None:
    case = make_case([12], mask=AttentionMask(num_targets_B=torch.tensor([4])), num_heads=1)
    together = case.run()[8:]
    for target in range(4):
        kept = torch.tensor([*range(8), 8 + target])
        alone = replace(
            case,
            tensors={n: t[kept] if n in ("q", "k", "v") else t for n, t in case.tensors.items()},
            offsets=torch.tensor([0, 9]),
            timestamps_s=case.timestamps_s[kept],
            query_timestamps_s=case.query_timestamps_s[kept],
            mask=AttentionMask(num_targets_B=torch.tensor([1])),
        )
        torch.testing.assert_close(alone.run()[8], together[target], atol=1e-14, rtol=0)


@pytest.mark.parametrize("kernel", HOST_KERNELS)
def test_slices_of_one_buffer_are_read_in_place(kernel: str) -> None:
    case = make_case([5, 9], widths=(4, 4))
    buffer = torch.cat([case.tensors[n].detach().flatten(1) for n in ("v", "q", "k")], dim=1)
    v, q, k = (part.view(14, 3, 4) for part in torch.split(buffer, 12, dim=1))
    assert torch.equal(case.run(kernel, q=q, k=k, v=v), case.run(kernel))


def test_time_buckets_follow_the_formula_at_every_border() -> None:
    borders = {round(math.exp(0.301 * b)) + d for b in range(90) for d in (-1, 0, 1)}
    gaps = sorted({gap for gap in borders if gap >= 0} | {0, 1, 2, 2**62})
    want = [min(int(math.log(max(gap, 1)) / 0.301), 128) for gap in gaps]
    assert time_bucket(torch.tensor(gaps), 128).tolist() == want
    assert time_bucket(-torch.tensor(gaps), 128).tolist() == want


def operator_arguments(case: Case) -> tuple[Any, ...]:
    bias: RelativeBias = case.arguments()["bias"]
    mask = case.mask
    limits = [MAX_LEN, mask.contextual_len, mask.limit, mask.min_full_attn_len, mask.num_oldest_keys]
    return (
        *(case.tensors[n] for n in ("q", "k", "v")), case.offsets, case.query_offsets, mask.num_targets_B,
        bias.position_weight, bias.time_weight, bias.timestamps_s_L, bias.query_timestamps_s_M, limits, case.alpha,
        "cpu",
    )  # fmt: skip


def test_the_operator_passes_torchs_own_checks() -> None:
    case = make_case(MASKED_LENGTHS, mask=MASKS["everything"], num_queries=[1, 0, 2, 6, 20, 0, 9, 3])
    torch.library.opcheck(ops.attention_forward.overload, operator_arguments(case))


def test_compiled_and_exported_code_calls_the_operator() -> None:
    case = make_case([5, 9, 3])

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return hstu_attention(**case.arguments(q=q, k=k, v=v)) * 2

    compiled = torch.compile(attend, fullgraph=True, backend="aot_eager")
    inputs = [case.tensors[n] for n in ("q", "k", "v")]
    got, want = compiled(*inputs), attend(*inputs)
    assert torch.equal(got, want)
    for name, gradient in case.gradients(got).items():
        assert torch.equal(gradient, case.gradients(attend(*inputs))[name]), f"gradient of {name}"


def bad(**changes: Any) -> dict[str, Any]:
    return {**make_case([3, 4]).arguments(), **changes}


@pytest.mark.parametrize(
    ("message", "arguments"),
    [
        ("max_len is 37", make_case([3, MAX_LEN + 1], with_bias=False).arguments()),
        (r"needs \[73\]", make_case([3]).arguments(position_weight=torch.zeros(12, dtype=torch.float64))),
        ("position_weight must be", None),
        ("q and k must be", bad(q_MHA=torch.zeros(7, 3))),
        ("v must be", bad(v_LHV=torch.zeros(6, 3, 7))),
        ("share a float dtype", bad(q_MHA=torch.zeros(7, 3, 5, dtype=torch.float16))),
        ("pass query_offsets", bad(q_MHA=torch.zeros(6, 3, 5, dtype=torch.float64))),
        ("max_len is 0", bad(max_len=0, bias=None)),
        ("offsets must be int64", bad(offsets=torch.tensor([0, 3, 7], dtype=torch.int32))),
        ("offsets descend", bad(offsets=torch.tensor([0, 8, 7]))),
        ("must run from 0 to the 7", bad(offsets=torch.tensor([0, 3, 6]))),
        ("query_offsets has 1 rows", bad(query_offsets=torch.tensor([0, 7]))),
        ("more queries than", bad(query_offsets=torch.tensor([0, 4, 7]))),
        ("num_targets_B has 1 entries", bad(mask=AttentionMask(num_targets_B=torch.tensor([1])))),
        ("row 0 has 3 positions", bad(mask=AttentionMask(num_targets_B=torch.tensor([4, 0])))),
        ("negative entry", bad(mask=AttentionMask(num_targets_B=torch.tensor([-1, 0])))),
        ("kernel is 'fast'", bad(kernel="fast")),
    ],
)
def test_bad_input_is_named(message: str, arguments: dict[str, Any] | None) -> None:
    with pytest.raises(ValueError, match=message):
        hstu_attention(**arguments) if arguments else bad_bias()


def bad_bias() -> None:
    times = torch.arange(3)
    RelativeBias(
        position_weight=torch.zeros(2, 2),
        time_weight=torch.zeros(129),
        timestamps_s_L=times,
        query_timestamps_s_M=times,
    )


@pytest.mark.parametrize("field", ["contextual_len", "max_attn_len", "min_full_attn_len", "num_oldest_keys"])
def test_a_negative_limit_is_refused(field: str) -> None:
    with pytest.raises(ValueError, match=f"{field} is -1"):
        AttentionMask(**{field: -1})  # type: ignore[arg-type]


def test_widening_a_window_that_is_not_there_is_refused() -> None:
    with pytest.raises(ValueError, match="set max_attn_len"):
        AttentionMask(min_full_attn_len=3)


def test_a_bias_table_that_holds_a_nan_is_refused() -> None:
    times = torch.arange(3)
    bias = RelativeBias(
        position_weight=torch.tensor([0.0, torch.nan, 0.0]),
        time_weight=torch.zeros(129),
        timestamps_s_L=times,
        query_timestamps_s_M=times,
    )
    with pytest.raises(ValueError, match=r"position_weight\[1\] is not a number"):
        bias.checked()
