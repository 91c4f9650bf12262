"""Attention on a GPU: dense and jagged rows, with and without the relative bias; semi-local attention by length.

FLOP convention: 4 * H * A for every pair of a query and a key that it sees, forward (causal: n (n + 1) / 2 pairs of a
row of n); 2.5 times as many backward. Pairs that an arm computes for nothing do not count.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend

from benchmarks import yardsticks
from benchmarks.gpu_harness import Arm, Bench, Calls, Case, passes
from benchmarks.growth import exponent, visible_pairs
from kernels.hstu_attention import CAUSAL, AttentionMask, RelativeBias, hstu_attention
from kernels.implementations import KernelName
from kernels.jagged import JaggedTensor
from model.stochastic_length import sampled_lengths, short_len

TABLE_3_SPARSITY = {
    1.6: {1024: 0.715, 2048: 0.761, 4096: 0.805, 8192: 0.844},
    1.8: {1024: 0.402, 2048: 0.453, 4096: 0.541, 8192: 0.664},
}
"""Of stochastic length at each longest length, by alpha: HSTU (arXiv 2402.17152) table 3. Sparsity: the share of the
padded positions that are empty."""
BACKWARD_BY_FORWARD = 2.5
NUM_TIME_BUCKETS = 128
COMPILE_S = 45.0
"""What an arm of torch.compile may take before it is timed."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Rows:
    """A batch. offsets: int64[B + 1] on the device. name: dense, or the alpha of the stochastic length."""

    name: str
    length: int
    lengths: list[int]
    offsets: Tensor

    @property
    def num_positions(self) -> int:
        return sum(self.lengths)

    @property
    def is_dense(self) -> bool:
        return self.name == "dense"

    @property
    def sparsity(self) -> float:
        return 1 - self.num_positions / (len(self.lengths) * self.length)

    @property
    def causal_pairs(self) -> int:
        return sum(n * (n + 1) // 2 for n in self.lengths)

    def shape(self, **more: Any) -> dict[str, Any]:
        sparsity = {} if self.is_dense else {"sparsity": round(self.sparsity, 3)}
        return {"rows": self.name, "B": len(self.lengths), "N": self.length, **more, **sparsity}

    def positions(self) -> JaggedTensor:
        """float32 zeros in this layout."""
        values = torch.zeros(self.num_positions, device=self.offsets.device)
        return JaggedTensor(values=values, offsets=self.offsets, max_len=self.length)


def dense_rows(bench: Bench, length: int, num_positions: int) -> Rows:
    return _rows(bench, "dense", length, [length] * max(1, num_positions // length))


def stochastic_rows(bench: Bench, length: int, num_positions: int, alpha: float) -> Rows:
    """Lengths as stochastic length leaves them, about num_positions in all, as sparse as the paper's table says.

    Histories are n = N * v^k long, v uniform in (0, 1), before they are shortened; k is such that the expected sparsity
    is the table's, of the nearest length it has. The draw is the same in every run.
    """
    table = TABLE_3_SPARSITY[alpha]
    share = 1 - table[min(table, key=lambda known: abs(math.log2(known / length)))]
    exponent = _exponent(length, alpha, share)
    num_rows = max(2, round(num_positions / (share * length)))
    history = (length * ((torch.arange(num_rows) + 0.5) / num_rows) ** exponent).round().long().clamp(1, length)
    generator = torch.Generator().manual_seed(1)
    lengths = sampled_lengths(history, alpha=alpha, max_len=length, generator=generator)
    shuffled = lengths[torch.randperm(num_rows, generator=generator)]
    return _rows(bench, f"alpha={alpha}", length, [int(n) for n in shuffled.tolist()])


def _exponent(length: int, alpha: float, share: float) -> float:
    """By bisection: the longer the exponent, the shorter the histories."""
    v = (torch.arange(4096, dtype=torch.float64) + 0.5) / 4096
    short = short_len(alpha=alpha, max_len=length)
    low, high = 1e-3, 50.0
    for _ in range(60):
        middle = math.sqrt(low * high)
        n = length * v**middle
        whole = (length**alpha / n.square()).clamp(max=1.0)
        expected = torch.where(n <= short, n, whole * n + (1 - whole) * short)
        low, high = (middle, high) if float(expected.mean()) > share * length else (low, middle)
    return low


def _rows(bench: Bench, name: str, length: int, lengths: list[int]) -> Rows:
    offsets = torch.tensor([0, *lengths]).cumsum(0).to(bench.device)
    return Rows(name=name, length=length, lengths=lengths, offsets=offsets)


def relative_bias(bench: Bench, rows: Rows, dtype: torch.dtype = torch.float32) -> RelativeBias:
    """Random tables; gaps between interactions from seconds to weeks (log-normal about an hour)."""
    device, generator = bench.device, bench.generator(2)
    gaps_s = torch.empty(rows.num_positions + 1, device=device).log_normal_(8.0, 2.0, generator=generator).long()
    times = gaps_s.cumsum(0)
    tables = (
        torch.randn(size, device=device, generator=generator).mul_(0.02).to(dtype).requires_grad_()
        for size in (2 * rows.length - 1, NUM_TIME_BUCKETS + 1)
    )
    position, time = tables
    return RelativeBias(
        position_weight=position, time_weight=time, timestamps_s_L=times[:-1], query_timestamps_s_M=times[1:]
    )


# ----------------------------------------------------------------------------------------------------------------------
# Dense and jagged rows


def attention(bench: Bench) -> None:
    """Every arm at every length."""
    for case in attention_cases(bench):
        bench.run(case)


def attention_cases(bench: Bench) -> Iterator[Case]:
    sizes = bench.sizes
    for length in sizes.lengths:
        for head_dim in sizes.head_dims:
            yield _dense_case(bench, dense_rows(bench, length, sizes.num_positions), head_dim)
            alphas = sizes.alphas if length in sizes.lengths_compiled else sizes.alphas[:1]
            for alpha in alphas:
                yield _jagged_case(bench, stochastic_rows(bench, length, sizes.num_positions, alpha), head_dim)


def _dense_case(bench: Bench, rows: Rows, head_dim: int) -> Case:
    packed = functools.partial(_packed, bench, rows, head_dim)
    padded = functools.partial(_padded, bench, rows, head_dim)
    arms = [
        Arm(name="headrace", ours=True, make=functools.partial(packed, bias=False)),
        Arm(name="headrace, bias", ours=True, make=functools.partial(packed, bias=True)),
        Arm(name="SDPA FlashAttention-2", make=lambda: padded(yardsticks.sdpa(SDPBackend.FLASH_ATTENTION))),
        Arm(name="SDPA cuDNN", make=lambda: padded(yardsticks.sdpa(SDPBackend.CUDNN_ATTENTION))),
    ]
    if rows.causal_pairs * 2 * bench.sizes.num_heads * 12 <= bench.sizes.eager_bytes_max:
        arms += [
            Arm(name="eager SiLU", alone=True, make=functools.partial(packed, bias=False, kernel="reference")),
            Arm(name="eager SiLU, bias", alone=True, make=functools.partial(packed, bias=True, kernel="reference")),
        ]
    if _is_compiled(bench, rows, head_dim):
        arms += [
            Arm(name="FlexAttention", patience_s=COMPILE_S, make=lambda: _flex(bench, rows, head_dim)),
            Arm(name="FlexAttention, bias", patience_s=COMPILE_S, make=lambda: _flex(bench, rows, head_dim, bias=True)),
            Arm(name="compiled SiLU", alone=True, patience_s=COMPILE_S, make=lambda: padded(_compiled_silu(bench))),
        ]
    return _case(bench, rows, head_dim, arms)


def _jagged_case(bench: Bench, rows: Rows, head_dim: int) -> Case:
    packed = functools.partial(_packed, bench, rows, head_dim)
    padded = functools.partial(_padded, bench, rows, head_dim)
    lengths_B = rows.offsets.diff()
    arms = [
        Arm(name="headrace", ours=True, make=functools.partial(packed, bias=False)),
        Arm(name="headrace, bias", ours=True, make=functools.partial(packed, bias=True)),
        Arm(name="varlen FlashAttention-2", make=lambda: _varlen(bench, rows, head_dim)),
        Arm(name="padded FlashAttention-2", make=lambda: padded(yardsticks.sdpa(SDPBackend.FLASH_ATTENTION))),
    ]
    if _is_compiled(bench, rows, head_dim):
        flex = functools.partial(_flex, bench, rows, head_dim, lengths_B=lengths_B)
        arms.append(Arm(name="padded FlexAttention", patience_s=COMPILE_S, make=flex))
    return _case(bench, rows, head_dim, arms)


def _is_compiled(bench: Bench, rows: Rows, head_dim: int) -> bool:
    return rows.length in bench.sizes.lengths_compiled and head_dim == bench.sizes.head_dims[0]


def _case(bench: Bench, rows: Rows, head_dim: int, arms: list[Arm]) -> Case:
    forward = 4.0 * bench.sizes.num_heads * head_dim * rows.causal_pairs
    return Case(
        shape=rows.shape(H=bench.sizes.num_heads, A=head_dim),
        arms=arms,
        work={"forward": forward, "backward": BACKWARD_BY_FORWARD * forward},
    )


def _packed(
    bench: Bench, rows: Rows, head_dim: int, *, bias: bool, kernel: KernelName = "triton", mask: AttentionMask = CAUSAL
) -> Calls:
    q, k, v = _qkv(bench, (rows.num_positions, bench.sizes.num_heads, head_dim))
    # The eager arm adds the bias to its scores, which have the dtype of q.
    table_dtype = bench.dtype if kernel == "reference" else torch.float32
    relative = relative_bias(bench, rows, table_dtype) if bias else None
    tables = [] if relative is None else [relative.position_weight, relative.time_weight]
    return passes(
        lambda: hstu_attention(
            q,
            k,
            v,
            rows.offsets,
            max_len=rows.length,
            alpha=head_dim**-0.5,
            bias=relative,
            mask=mask,
            kernel=kernel,
        ),
        [q, k, v, *tables],
    )


def _padded(bench: Bench, rows: Rows, head_dim: int, attend: yardsticks.Attention) -> Calls:
    q, k, v = _qkv(bench, (len(rows.lengths), bench.sizes.num_heads, rows.length, head_dim))
    return passes(lambda: attend(q, k, v), [q, k, v])


def _varlen(bench: Bench, rows: Rows, head_dim: int) -> Calls:
    q, k, v = _qkv(bench, (rows.num_positions, bench.sizes.num_heads, head_dim))
    attend = yardsticks.varlen(rows.offsets, rows.length)
    return passes(lambda: attend(q, k, v), [q, k, v])


def _flex(bench: Bench, rows: Rows, head_dim: int, *, bias: bool = False, lengths_B: Tensor | None = None) -> Calls:
    shape = (len(rows.lengths), bench.sizes.num_heads, rows.length, head_dim)
    relative = relative_bias(bench, rows) if bias else None
    attend = yardsticks.flex(num_rows=shape[0], length=rows.length, lengths_B=lengths_B, bias=relative)
    q, k, v = _qkv(bench, shape)
    tables = [] if relative is None else [relative.position_weight, relative.time_weight]
    if bench.device.type == "cuda":
        return passes(lambda: attend(q, k, v), [q, k, v, *tables])

    def without_gradients() -> Tensor:  # all that FlexAttention offers on a CPU
        with torch.no_grad():
            return attend(q.detach(), k.detach(), v.detach())

    return passes(without_gradients, [], backward=False)


def _compiled_silu(bench: Bench) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    if bench.device.type != "cuda":
        return yardsticks.silu_attention
    compiled: Callable[[Tensor, Tensor, Tensor], Tensor] = torch.compile(yardsticks.silu_attention, dynamic=False)
    return compiled


def _qkv(bench: Bench, shape: tuple[int, ...]) -> list[Tensor]:
    drawn = (torch.randn(shape, device=bench.device, generator=bench.generator(seed)) for seed in range(3))
    return [x.to(bench.dtype).requires_grad_() for x in drawn]


# ----------------------------------------------------------------------------------------------------------------------
# Semi-local


def semi_local(bench: Bench) -> None:
    """A window and both readings of its global part, beside the whole triangle, as rows get longer."""
    sizes = bench.sizes
    readings = {
        "newest see all": AttentionMask(max_attn_len=sizes.max_attn_len, min_full_attn_len=sizes.num_global),
        "oldest are seen": AttentionMask(max_attn_len=sizes.max_attn_len, num_oldest_keys=sizes.num_global),
    }
    for length in sizes.local_lengths:
        rows = dense_rows(bench, length, length * sizes.local_rows)
        packed = functools.partial(_packed, bench, rows, sizes.local_head_dim)
        masks = readings | ({"causal": CAUSAL} if length <= sizes.full_len_max else {})
        arms = [
            _local_arm(
                bench, rows, f"{name}{', bias' if bias else ''}", mask, functools.partial(packed, mask=mask, bias=bias)
            )
            for name, mask in masks.items()
            for bias in (False, True)
        ]
        shape = rows.shape(H=sizes.num_heads, A=sizes.local_head_dim, K1=sizes.max_attn_len, K2=sizes.num_global)
        bench.run(Case(shape=shape, arms=arms, work={}))


def _local_arm(bench: Bench, rows: Rows, name: str, mask: AttentionMask, make: Callable[[], Calls]) -> Arm:
    pairs = len(rows.lengths) * visible_pairs(mask, rows.length)
    forward = 4.0 * bench.sizes.num_heads * bench.sizes.local_head_dim * pairs
    return Arm(name=name, ours=True, make=make, work={"forward": forward, "backward": BACKWARD_BY_FORWARD * forward})


def growth(rows: list[dict[str, Any]]) -> Mapping[str, float]:
    """By arm and pass: the exponent p of ms ~ N^p by least squares over lengths of 2048 and more; 1 is linear."""
    points: dict[str, list[tuple[float, float]]] = {}
    for row in rows:
        if "error" not in row and row["shape"]["N"] >= 2048:
            points.setdefault(f"{row['arm']}, {row['pass']}", []).append((row["shape"]["N"], row["ms"]))
    return {name: round(exponent(known), 3) for name, known in points.items() if len(known) > 1}


def local_speedup(rows: list[dict[str, Any]]) -> Mapping[str, float]:
    """By arm and pass: how many times as fast as the triangle it is, at the longest rows the triangle was run at."""
    known = {(row["shape"]["N"], row["arm"], row["pass"]): row["ms"] for row in rows if "error" not in row}
    whole = {key: ms for key, ms in known.items() if key[1].startswith("causal")}
    if not whole:
        return {}
    longest = max(length for length, _, _ in whole)
    return {
        f"{arm}, {name}": round(whole[length, full, name] / ms, 2)
        for (length, arm, name), ms in known.items()
        if length == longest and (length, full := f"causal{arm[arm.find(',') :] if ',' in arm else ''}", name) in whole
    }
