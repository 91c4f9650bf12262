"""The newest positions of cached histories in one call of C: equal to the layers' own kernels, one after the other."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from kernels.errors import KernelUnavailableError
from kernels.hstu_attention import CAUSAL, AttentionMask
from kernels.hstu_decode import LayerForm, LayerWeights, hstu_decode, is_available
from kernels.hstu_decode.reference import hstu_decode_reference

CPU = torch.device("cpu")
needs_compiler = pytest.mark.skipif(not is_available(torch.float32, CPU), reason="no C compiler")

MAX_LEN, BUCKETS = 23, 40


def weights(
    generator: torch.Generator,
    dtype: torch.dtype,
    sizes: tuple[int, int, int, int],
    *,
    norms: bool,
    bias: bool,
    concat: bool,
) -> LayerWeights:
    width, heads, attention, hidden = sizes
    gate = heads * hidden

    def random(*shape: int) -> Tensor:
        drawn = torch.randn(*shape, generator=generator, dtype=torch.float64)
        return torch.div(drawn, shape[0] ** 0.5).to(dtype)

    return LayerWeights(
        uvqk_DE=random(width, 2 * gate + 2 * heads * attention),
        output_WD=random(gate * (3 if concat else 1), width),
        output_bias_D=random(width),
        input_norm=(1 + random(width), random(width)) if norms else None,
        output_norm=(1 + random(gate), random(gate)) if norms else None,
        position_weight=random(2 * MAX_LEN - 1) if bias else None,
        time_weight=random(BUCKETS + 1) if bias else None,
    )


def arguments(
    dtype: torch.dtype, sizes: tuple[int, int, int, int], lengths: list[tuple[int, int]], **options: Any
) -> dict[str, Any]:
    """lengths: of each row, its positions and how many of them are new."""
    width, heads, attention, hidden = sizes
    generator = torch.Generator().manual_seed(5)
    total, new = (sum(each[which] for each in lengths) for which in (0, 1))
    concat = options.get("concat", False)
    layers = [
        weights(
            generator, dtype, sizes, norms=options.get("norms", False), bias=options.get("bias", True), concat=concat
        )
        for _ in range(3)
    ]
    times_L = torch.cat([torch.randint(0, 10**6, (n,), generator=generator).sort().values for n, _ in lengths])
    return {
        "x_MD": torch.randn(new, width, generator=generator, dtype=torch.float64).to(dtype),
        "kept_layers_LW": torch.randn(3, total, heads * (attention + hidden), generator=generator).to(dtype),
        "layers": layers,
        "offsets": torch.tensor([0, *(n for n, _ in lengths)]).cumsum(0),
        "query_offsets": torch.tensor([0, *(m for _, m in lengths)]).cumsum(0),
        # Some queries come before keys: clocks differ.
        "times_s": (times_L, torch.randint(0, 2 * 10**6, (new,), generator=generator)),
        "form": LayerForm(
            heads=heads,
            attention_dim=attention,
            hidden_dim=hidden,
            max_len=MAX_LEN,
            alpha=options.get("alpha", 1.0),
            eps=1e-6,
            gate_only=options.get("gate_only", False),
            concat=concat,
        ),
        "mask": options.get("mask", CAUSAL),
    }


def compare(given: dict[str, Any], tolerance: float) -> None:
    kept = given["kept_layers_LW"]
    expected_kept, found_kept, entered = kept.clone(), kept.clone(), given["x_MD"].clone()
    expected = hstu_decode_reference(**{**given, "kept_layers_LW": expected_kept})
    found = hstu_decode(**{**given, "kept_layers_LW": found_kept})
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(found_kept, expected_kept, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(given["x_MD"], entered, rtol=0, atol=0)


ROWS = [(7, 2), (15, 12), (1, 1), (MAX_LEN, 1), (5, 5), (0, 0), (MAX_LEN, 4), (9, 0)]


@needs_compiler
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 2e-5), (torch.float64, 1e-12)])
@pytest.mark.parametrize("sizes", [(64, 2, 32, 32), (7, 3, 5, 2), (16, 1, 1, 17)])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"bias": False},
        {"norms": True, "gate_only": True, "concat": True, "alpha": 0.3},
        {"norms": True, "concat": True},
        {"mask": AttentionMask(max_attn_len=4)},
        {"mask": AttentionMask(max_attn_len=3, min_full_attn_len=2), "bias": False},
        {"mask": AttentionMask(max_attn_len=2, num_oldest_keys=5)},
        {"mask": AttentionMask(max_attn_len=0, num_oldest_keys=5)},
        {"mask": AttentionMask(max_attn_len=0, min_full_attn_len=3)},
    ],
)
def test_it_equals_the_layers_one_after_the_other(
    dtype: torch.dtype, tolerance: float, sizes: tuple[int, int, int, int], options: dict[str, Any]
) -> None:
    compare(arguments(dtype, sizes, ROWS, **options), tolerance)


@needs_compiler
def test_large_scores_and_numbers_that_are_none_come_out_as_they_do_there() -> None:
    given = arguments(torch.float32, (8, 2, 4, 4), [(6, 1), (6, 1)])
    given["layers"] = [replace(layer, uvqk_DE=60 * layer.uvqk_DE) for layer in given["layers"]]
    given["kept_layers_LW"][:, 8] = torch.nan  # of the second row
    found = hstu_decode(**{**given, "kept_layers_LW": given["kept_layers_LW"].clone()})
    expected = hstu_decode_reference(**given)
    torch.testing.assert_close(found[0], expected[0], rtol=1e-4, atol=1e-4)
    assert bool(found[1].isnan().all()) and bool(expected[1].isnan().all())  # noqa: PT018


@needs_compiler
@pytest.mark.parametrize(
    ("name", "wrong", "message"),
    [
        ("offsets", torch.tensor([0, 4, 11]), "offsets must ascend from 0 to 12"),
        ("query_offsets", torch.tensor([0, 1, 3]), "query_offsets must ascend from 0 to 2"),
        ("offsets", torch.tensor([0, 13, 12]), "offsets must ascend from 0 to 12"),
        ("mask", AttentionMask(contextual_len=1), "no contextual positions"),
        ("form", {"max_len": 5}, "the longest has 6 positions"),
        ("form", {"max_len": 40}, "position_weight must fit max_len 40"),
        ("query_offsets", torch.tensor([0, 2]), "query_offsets must be contiguous int64"),
        ("kept_layers_LW", torch.zeros(3, 12, 15), r"kept_layers_LW must be contiguous \[3, 12, 16\]"),
        ("times_s", (torch.zeros(12, dtype=torch.int64), torch.zeros(3, dtype=torch.int64)), "3 query times for 2 new"),
    ],
)
def test_what_does_not_fit_is_refused(name: str, wrong: Any, message: str) -> None:
    given = arguments(torch.float32, (8, 2, 4, 4), [(6, 1), (6, 1)])
    if name == "form":
        wrong = replace(given["form"], **wrong)
    with pytest.raises(ValueError, match=message):
        hstu_decode(**{**given, name: wrong})


def test_elsewhere_it_says_what_to_do() -> None:
    given = arguments(torch.float32, (8, 2, 4, 4), [(6, 1)])
    assert not is_available(torch.bfloat16, CPU)
    assert not is_available(torch.float32, torch.device("meta"))
    with pytest.raises(KernelUnavailableError, match="go through the layers"):
        hstu_decode(**{**given, "x_MD": given["x_MD"].to("meta")})
