"""HSTU attention in Triton equals the reference, forward and in every gradient; interpreted where no GPU is."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from kernels.hstu_attention import CAUSAL, AttentionMask, RelativeBias, hstu_attention, time_bucket
from kernels.hstu_attention.triton_kernels import _thresholds
from kernels.implementations import KernelName

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# Interpreted, tl.dot of bfloat16 is wrong: it is tested on a device only.
ATOL = {torch.float32: 2e-6, torch.float16: 4e-3} | ({torch.bfloat16: 3e-2} if DEVICE == "cuda" else {})
MAX_LEN = 37
ROWS = [33, 0, 5]  # three blocks, none and one when interpreted


def targets(*counts: int) -> Tensor:
    return torch.tensor(counts, device=DEVICE)


MASKS = {
    "causal": CAUSAL,
    "targets": AttentionMask(num_targets_B=targets(4, 0, 5)),
    "more targets than a block": AttentionMask(num_targets_B=targets(21, 0, 2)),
    "one contextual position": AttentionMask(contextual_len=1),
    "contextual positions": AttentionMask(contextual_len=4),
    "more contextual positions than a block": AttentionMask(contextual_len=20),
    "window": AttentionMask(max_attn_len=3),
    "window and full newest queries": AttentionMask(max_attn_len=5, min_full_attn_len=2),
    "window and oldest keys": AttentionMask(max_attn_len=2, num_oldest_keys=3),
    "no window, full newest queries": AttentionMask(max_attn_len=0, min_full_attn_len=2),
    "no window, oldest keys": AttentionMask(max_attn_len=0, num_oldest_keys=3),
    "no window, all else": AttentionMask(
        num_targets_B=targets(17, 0, 2), contextual_len=3, max_attn_len=0, min_full_attn_len=2, num_oldest_keys=4
    ),
    "everything": AttentionMask(
        num_targets_B=targets(17, 0, 2), contextual_len=3, max_attn_len=3, min_full_attn_len=2, num_oldest_keys=4
    ),
    "everything but full newest queries": AttentionMask(
        num_targets_B=targets(3, 0, 1), contextual_len=2, max_attn_len=4, num_oldest_keys=1
    ),
}
ROWS_TOO_SHORT_FOR_CONTEXT = {"more contextual positions than a block": [33, 0, 0]}


@dataclass(frozen=True, kw_only=True, slots=True)
class Inputs:
    """tensors: q, k, v and, with a bias, its tables, in float64."""

    tensors: dict[str, Tensor]
    upstream: Tensor
    offsets: Tensor
    query_offsets: Tensor | None
    timestamps_s: Tensor
    query_timestamps_s: Tensor

    def run(self, tensors: dict[str, Tensor], kernel: KernelName, mask: AttentionMask) -> Tensor:
        bias = None
        if "position_weight" in tensors:
            bias = RelativeBias(
                position_weight=tensors["position_weight"],
                time_weight=tensors["time_weight"],
                timestamps_s_L=self.timestamps_s,
                query_timestamps_s_M=self.query_timestamps_s,
            )
        return hstu_attention(
            tensors["q"], tensors["k"], tensors["v"], self.offsets, max_len=MAX_LEN, alpha=0.6, bias=bias, mask=mask,
            query_offsets=self.query_offsets, kernel=kernel,
        )  # fmt: skip

    def results(
        self, tensors: dict[str, Tensor], kernel: KernelName, mask: AttentionMask = CAUSAL
    ) -> dict[str, Tensor]:
        """The output and every gradient."""
        o = self.run(tensors, kernel, mask)
        leaves = list(tensors.values())
        grads = torch.autograd.grad(o, leaves, self.upstream.to(o.dtype), materialize_grads=True, allow_unused=True)
        named = dict(zip(tensors, grads, strict=True))
        return {"o": o.detach(), **{f"gradient of {name}": grad for name, grad in named.items()}}

    def cast(self, dtype: torch.dtype) -> dict[str, Tensor]:
        return {name: x.detach().to(dtype).requires_grad_() for name, x in self.tensors.items()}


def make_inputs(
    lengths: list[int],
    *,
    queries: list[int] | None = None,
    num_heads: int = 1,
    widths: tuple[int, int] = (5, 7),
    with_bias: bool = True,
    num_buckets: int = 128,
    longest_gap_s: float = 1e7,
) -> Inputs:
    generator = torch.Generator().manual_seed(sum(lengths) + num_heads)
    num_keys, num_queries = sum(lengths), sum(lengths if queries is None else queries)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, dtype=torch.float64, generator=generator).to(DEVICE)

    tensors = {
        "q": normal(num_queries, num_heads, widths[0]),
        "k": normal(num_keys, num_heads, widths[0]),
        "v": normal(num_keys, num_heads, widths[1]),
    }
    if with_bias:
        tensors |= {"position_weight": normal(2 * MAX_LEN - 1), "time_weight": normal(num_buckets + 1)}
    gaps = (longest_gap_s ** torch.rand(num_keys, generator=generator, dtype=torch.float64)).long()
    times = 1_400_000_000 + gaps.cumsum(0)
    ends = torch.tensor(lengths).cumsum(0).tolist()
    has_query = [times[end - n : end] for end, n in zip(ends, lengths if queries is None else queries, strict=True)]
    query_times = torch.cat(has_query) + torch.randint(-(10**4), 10**6, (num_queries,), generator=generator)
    return Inputs(
        tensors=tensors,
        upstream=normal(num_queries, num_heads, widths[1]),
        offsets=torch.tensor([0, *lengths]).cumsum(0).to(DEVICE),
        query_offsets=None if queries is None else torch.tensor([0, *queries]).cumsum(0).to(DEVICE),
        timestamps_s=times.to(DEVICE),
        query_timestamps_s=query_times.to(DEVICE),
    )


def assert_equals_the_reference(
    inputs: Inputs, mask: AttentionMask = CAUSAL, dtype: torch.dtype = torch.float32
) -> None:
    rounded = inputs.cast(dtype)
    got = inputs.results(rounded, "triton", mask)
    exact = {name: x.detach().double().requires_grad_() for name, x in rounded.items()}
    want = inputs.results(exact, "reference", mask)
    for name, wanted in want.items():
        torch.testing.assert_close(got[name].double(), wanted, atol=ATOL[dtype], rtol=ATOL[dtype], msg=name)


@pytest.fixture(autouse=True)
def _buffers_start_as_nan() -> Iterator[None]:
    """torch.empty is filled with NaN: what a kernel does not write is seen."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("name", MASKS)
def test_each_mask_equals_the_reference(name: str) -> None:
    assert_equals_the_reference(make_inputs(ROWS_TOO_SHORT_FOR_CONTEXT.get(name, ROWS)), MASKS[name])


@pytest.mark.parametrize("name", ["causal", "everything"])
def test_each_mask_equals_the_reference_without_a_bias(name: str) -> None:
    assert_equals_the_reference(make_inputs(ROWS, with_bias=False, num_heads=2), MASKS[name])


@pytest.mark.parametrize("name", ["causal", "window and oldest keys", "everything"])
def test_cached_histories_equal_the_reference(name: str) -> None:
    assert_equals_the_reference(make_inputs(ROWS, queries=[18, 0, 1]), MASKS[name])


@pytest.mark.parametrize("widths", [(20, 16), (1, 33)], ids=str)
def test_head_widths_that_are_no_powers_of_two_equal_the_reference(widths: tuple[int, int]) -> None:
    assert_equals_the_reference(make_inputs([18, 1], widths=widths, num_heads=3))


@pytest.mark.parametrize("lengths", [[1], [0], [0, 0], [16], [17, 2, 16]], ids=str)
def test_awkward_rows_equal_the_reference(lengths: list[int]) -> None:
    assert_equals_the_reference(make_inputs(lengths))


@pytest.mark.parametrize("dtype", [dtype for dtype in ATOL if dtype != torch.float32], ids=str)
def test_half_precision_stays_close_to_the_reference(dtype: torch.dtype) -> None:
    assert_equals_the_reference(make_inputs([20, 3], num_heads=2, widths=(16, 16)), dtype=dtype)


@pytest.mark.parametrize("num_buckets", [0, 30, 200])
def test_gaps_of_centuries_fall_into_the_buckets_of_the_reference(num_buckets: int) -> None:
    """Gaps far beyond 32 bits, in both directions, with fewer buckets than they need and with more."""
    assert_equals_the_reference(make_inputs([21], num_buckets=num_buckets, longest_gap_s=1e17))


@pytest.mark.parametrize("num_buckets", [1, 128, 300])
def test_thresholds_are_the_borders_of_the_buckets(num_buckets: int) -> None:
    borders = _thresholds(num_buckets, torch.device("cpu"))[1:-1]
    numbers = torch.arange(1, borders.shape[0] + 1, dtype=torch.int32)
    assert bool((time_bucket(borders, num_buckets) >= numbers).all())  # above, if no whole second is in the bucket
    assert bool((time_bucket(borders - 1, num_buckets) < numbers).all())


def test_every_border_of_a_bucket_is_met_exactly() -> None:
    """Targets that look back to one key, by a border and by a second less: the output is the weight of their bucket.

    One long row a size of integer, whose tiles hold many buckets; short rows, whose tiles hold two; and one.
    """
    borders = _thresholds(128, torch.device("cpu"))[1:-1]
    around = torch.stack([borders - 1, borders], dim=1)
    rows = [around[:70].flatten(), around[70:].flatten(), *around[::9], *borders[5::9, None]]
    gaps = [torch.cat([row[:1], row]) for row in rows]  # the key's own query first
    offsets = torch.tensor([0, *(len(row) for row in gaps)]).cumsum(0)
    query_times = torch.cat(gaps).to(DEVICE)
    is_first = torch.zeros(query_times.shape[0], 1, 1, device=DEVICE)
    is_first[offsets[:-1].to(DEVICE)] = 1
    bias = RelativeBias(
        position_weight=torch.zeros(511, device=DEVICE),
        time_weight=torch.arange(129.0, device=DEVICE) + 50,  # silu(x) = x in float32
        timestamps_s_L=torch.zeros_like(query_times),
        query_timestamps_s_M=query_times,
    )
    o = hstu_attention(
        0 * is_first, 0 * is_first, is_first, offsets.to(DEVICE), max_len=256, bias=bias, kernel="triton",
        mask=AttentionMask(num_targets_B=(offsets.diff() - 1).to(DEVICE)),
    )  # fmt: skip
    assert torch.equal(o[:, 0, 0] * 256, time_bucket(query_times, 128).float() + 50)


def test_slices_of_one_buffer_equal_the_reference_and_their_neighbours_are_never_read() -> None:
    inputs = make_inputs([18, 3], num_heads=2, widths=(6, 6))
    buffer = torch.full((1 + 21 + 1, 3, 14), torch.nan, device=DEVICE)
    views = {}
    for place, name in enumerate(("q", "k", "v")):
        views[name] = buffer[1:-1, place, 1:13].view(21, 2, 6)
        views[name].copy_(inputs.tensors[name])
    tables = {name: inputs.tensors[name].float() for name in ("position_weight", "time_weight")}
    leaves = {name: x.requires_grad_() for name, x in {**views, **tables}.items()}
    want = inputs.results({name: x.detach().double().requires_grad_() for name, x in leaves.items()}, "reference")
    for name, got in inputs.results(leaves, "triton").items():
        torch.testing.assert_close(got.double(), want[name], atol=ATOL[torch.float32], rtol=0, msg=name)


def test_vectors_that_are_not_contiguous_equal_the_reference() -> None:
    inputs = make_inputs([17], with_bias=False)
    turned = {name: x.float().mT.contiguous().mT.requires_grad_() for name, x in inputs.tensors.items()}
    assert turned["q"].stride(-1) != 1 or turned["q"].shape[-2] == 1
    want = inputs.results({name: x.detach().double().requires_grad_() for name, x in turned.items()}, "reference")
    for name, got in inputs.results(turned, "triton").items():
        torch.testing.assert_close(got.double(), want[name], atol=ATOL[torch.float32], rtol=0, msg=name)


def test_a_row_of_nan_does_not_reach_the_others() -> None:
    inputs = make_inputs([5, 17, 3])
    clean, poisoned = inputs.cast(torch.float32), inputs.cast(torch.float32)
    with torch.no_grad():
        for name in ("q", "k", "v"):
            poisoned[name][5:22] = torch.nan
    want, got = inputs.results(clean, "triton"), inputs.results(poisoned, "triton")
    others = torch.tensor([*range(5), *range(22, 25)], device=DEVICE)
    for name in ("o", "gradient of q", "gradient of k", "gradient of v"):
        assert torch.equal(got[name][others], want[name][others]), name


def test_two_runs_give_equal_bits() -> None:
    inputs = make_inputs([18, 3])
    first, second = (inputs.results(inputs.cast(torch.float32), "triton", MASKS["window"]) for _ in range(2))
    for name, x in first.items():
        assert torch.equal(x, second[name]), name


def test_the_operator_passes_the_checks_of_torch() -> None:
    inputs = make_inputs([2, 0, 1])
    x = inputs.cast(torch.float32)
    arguments = (
        x["q"], x["k"], x["v"], inputs.offsets, None, None, x["position_weight"], x["time_weight"],
        inputs.timestamps_s, inputs.query_timestamps_s, [MAX_LEN, 0, 0, 0, 0], 1.0, "triton",
    )  # fmt: skip
    torch.library.opcheck(torch.ops.headrace.hstu_attention, arguments)


def test_double_precision_is_refused() -> None:
    inputs = make_inputs([3])
    with pytest.raises(ValueError, match="float64; the Triton kernels take"):
        inputs.run(inputs.tensors, "triton", CAUSAL)


def test_heads_wider_than_a_block_are_refused() -> None:
    inputs = make_inputs([3], widths=(300, 4))
    with pytest.raises(ValueError, match="heads are 300 and 4 wide"):
        inputs.run(inputs.cast(torch.float32), "triton", CAUSAL)


COMPILE = """
import json, sys
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from kernels.hstu_attention import triton_backward, triton_forward, triton_tables

INT64 = ("order", "offsets", "query_offsets", "num_targets", "thresholds", "key_times", "query_times")
FLOAT32 = ("position", "time", "position_sums", "time_sums")
KERNELS = {
    "forward": triton_forward.forward_kernel, "query": triton_backward.query_gradient_kernel,
    "key": triton_backward.key_gradient_kernel, "tables": triton_tables.table_gradient_kernel,
}

def kind(name):
    if not name.endswith("_ptr"):
        return "fp32" if name == "alpha" else "i32"
    stem = name.removesuffix("_ptr")
    return "*i64" if stem in INT64 else "*fp32" if stem in FLOAT32 else "*bf16"

folder, cases = sys.argv[1], json.loads(sys.argv[2])
for name, width, with_bias in cases:
    kernel = KERNELS[name]
    config = next(config for config in kernel.configs if config.num_warps == 8)
    constants = dict(
        WIDTH_A=width, WIDTH_V=width, BLOCK_A=width, BLOCK_V=width, HAS_BIAS=with_bias, MAX_BUCKET=128,
        BLOCK_BUCKETS=256, HAS_TARGETS=False, CONTEXTUAL_LEN=0, MAX_ATTN_LEN=0, MIN_FULL_ATTN_LEN=0,
        NUM_OLDEST_KEYS=0, FAST_SIGMOID=True, PRECISION="ieee", **config.kwargs,
    )
    names = kernel.fn.arg_names
    constants = {name: value for name, value in constants.items() if name in names}
    signature = {name: "constexpr" if name in constants else kind(name) for name in names}
    aligned = {(i,): [["tt.divisibility", 16]] for i, n in enumerate(names) if n.endswith("_ptr") or "stride" in n}
    options = dict(num_warps=config.num_warps, num_stages=config.num_stages)
    source = ASTSource(kernel.fn, signature, constants, aligned)
    compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
    assert "wgmma.mma_async" in compiled.asm["ptx"], f"{name} does not use the tensor cores"
    with open(f"{folder}/{name}-{width}-{with_bias}.cubin", "wb") as file:
        file.write(compiled.asm["cubin"])
"""
EVERY_CASE = [
    (name, width, bias)
    for width in (64, 128)
    for bias in (False, True)
    for name in ("forward", "query", "key", "tables")
    if bias or name != "tables"
]


@pytest.mark.skipif(find_spec("triton.backends.nvidia") is None, reason="needs Triton's compiler for NVIDIA devices")
@pytest.mark.parametrize(
    "cases",
    [
        pytest.param([("forward", 64, True), ("key", 64, False)], id="a few"),
        pytest.param(EVERY_CASE, id="all", marks=[pytest.mark.slow, pytest.mark.timeout(600)]),
    ],
)
def test_kernels_compile_for_hopper_and_64_wide_heads_fit_into_registers(
    cases: list[tuple[str, int, bool]], tmp_path: Path
) -> None:
    import triton

    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {"TRITON_CACHE_DIR": str(tmp_path / "cache"), "PYTHONPATH": str(Path(__file__).parents[2])}
    command = [sys.executable, "-c", COMPILE, str(tmp_path), json.dumps(cases)]
    subprocess.run(command, env=environment, check=True)
    dumper = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    for path in sorted(tmp_path.glob("*.cubin")):
        usage = subprocess.run([dumper, "-res-usage", path], capture_output=True, text=True, check=True).stdout
        found = re.search(r"REG:(\d+) STACK:(\d+)", usage)
        assert found is not None, usage
        if "-64-" in path.name:
            assert int(found[2]) == 0, f"{path.name} spills registers: {usage}"
