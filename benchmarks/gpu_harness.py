"""What the sections of bench_gpu.py share: sizes, a clock for devices, and rows of results."""

from __future__ import annotations

import json
import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch

Row = dict[str, Any]
Calls = Mapping[str, Callable[[], object]]
"""What is timed, by the name of the pass: "forward", "backward" or the only one an operation has."""

PEAK_SIZE = 8192
NOMINAL_BF16_TFLOPS = {"H100": 989.4, "H200": 989.4, "A100": 311.9, "B200": 2250.0}
"""Dense bfloat16 by the vendors' datasheets (SXM parts), by a word of the device's name."""
FLUSH_BYTES = 256 << 20
"""Several times any second-level cache."""
ROUNDS = (4, 20)
"""Repetitions of a case, at least and at most; the median counts."""
SECONDS_PER_CASE = 1.0
"""Repetitions stop here, unless there are too few."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Sizes:
    """Shapes of every section."""

    # attention: lengths in order of importance, since time may run out
    num_heads: int = 8
    head_dims: tuple[int, ...] = (128, 64)
    lengths: tuple[int, ...] = (8192, 2048, 16384, 512, 4096, 1024, 128)
    num_positions: int = 65_536
    """Positions of a batch, whatever its length: short rows come in larger batches."""
    alphas: tuple[float, ...] = (1.8, 1.6)
    """Stochastic lengths; the second only at lengths_compiled."""
    lengths_compiled: tuple[int, ...] = (8192,)
    """Arms that torch.compile makes, which takes it tens of seconds each, run at these and the first head width."""
    eager_bytes_max: int = 60 << 30
    # semi-local
    local_lengths: tuple[int, ...] = (1024, 2048, 4096, 8192, 16384, 32768)
    local_rows: int = 4
    local_head_dim: int = 64
    max_attn_len: int = 256
    num_global: int = 64
    full_len_max: int = 16_384
    # encoder
    width: int = 512
    encoder_heads: int = 8
    num_layers: int = 4
    encoder_lengths: tuple[int, ...] = (8192, 2048, 4096, 1024)
    encoder_positions: int = 32_768
    # input-output
    layer_rows: int = 256
    layer_len: int = 3072
    # fp8
    product_widths: tuple[int, ...] = (512, 1024, 2048)
    product_positions: int = 65_536
    product_len: int = 2048
    # loss
    catalogues: tuple[int, ...] = (100_000, 1_000_000)
    loss_positions: int = 8192
    loss_width: int = 256
    # rows
    sent_rows: int = 20_000
    # top-k
    num_queries: int = 256
    num_wanted: int = 200
    # embedding
    num_ids: int = 1_000_000
    ids_per_call: int = 1_000_000
    table_rows: int = 4_000_000
    rows_per_step: int = 500_000
    row_width: int = 128


FULL = Sizes()
TINY = Sizes(
    num_heads=1,
    head_dims=(16,),
    lengths=(12,),
    num_positions=12,
    alphas=(1.8,),
    lengths_compiled=(12,),
    local_lengths=(8, 16),
    local_rows=1,
    local_head_dim=16,
    max_attn_len=4,
    num_global=2,
    full_len_max=8,
    width=16,
    encoder_heads=1,
    num_layers=1,
    encoder_lengths=(8,),
    encoder_positions=8,
    layer_rows=2,
    layer_len=8,
    product_widths=(16,),
    product_positions=8,
    product_len=8,
    catalogues=(40,),
    loss_positions=5,
    loss_width=16,
    num_queries=3,
    num_wanted=4,
    num_ids=50,
    ids_per_call=20,
    table_rows=30,
    rows_per_step=10,
    row_width=8,
)
"""For a rehearsal on the CPU, where Triton's interpreter runs the kernels."""
TO_COMPILE = Sizes(
    lengths=(128,),
    num_positions=256,
    alphas=(),
    local_lengths=(128,),
    encoder_lengths=(128,),
    encoder_positions=256,
    num_layers=1,
    layer_rows=2,
    layer_len=128,
    product_positions=256,
    product_len=128,
    catalogues=(10_000,),
    loss_positions=256,
    num_queries=16,
    num_ids=1_000,
    ids_per_call=1_000,
    table_rows=1_000,
    rows_per_step=500,
)
"""Full widths, which kernels are compiled for, and few positions."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Arm:
    """One way to do it.

    make: inputs and what is timed, by pass. ours: made of Triton kernels of this repository. alone: holds so much
    memory that it is timed after the others are gone. work: FLOP or bytes by pass, if they differ from the case's.
    patience_s: how long the first calls may take; an arm for which the section has less time left is skipped. extra:
    goes into the rows, read after timing.
    """

    name: str
    make: Callable[[], Calls]
    ours: bool = False
    alone: bool = False
    work: Mapping[str, float] | None = None
    patience_s: float = 0.0
    extra: Callable[[], Mapping[str, Any]] = dict


@dataclass(frozen=True, kw_only=True, slots=True)
class Case:
    """Arms that do the same to the same shape; the first is what the table compares with."""

    shape: Mapping[str, Any]
    arms: Sequence[Arm]
    work: Mapping[str, float]
    rate: Literal["TFLOP/s", "GB/s"] = "TFLOP/s"


@dataclass(kw_only=True)
class Bench:
    """Runs cases and keeps their rows.

    mode: "measure" times every arm; "compile" calls each of ours once. deadline: by time.monotonic, for the section
    at hand.
    """

    device: torch.device
    sizes: Sizes
    dtype: torch.dtype
    mode: Literal["measure", "compile"] = "measure"
    section: str = ""
    deadline: float = math.inf
    peak_tflops: float | None = None
    rows: list[Row] = field(default_factory=list)
    skipped: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._flush = torch.empty(FLUSH_BYTES if self._is_cuda else 0, dtype=torch.int8, device=self.device)

    @property
    def _is_cuda(self) -> bool:
        return self.device.type == "cuda"

    @property
    def time_left_s(self) -> float:
        return self.deadline - time.monotonic()

    def generator(self, seed: int = 0) -> torch.Generator:
        return torch.Generator(self.device).manual_seed(seed)

    def randn(self, *shape: int, std: float = 1.0, dtype: torch.dtype | None = None) -> torch.Tensor:
        """Normal numbers; the same for the same shape."""
        drawn = torch.randn(*shape, device=self.device, generator=self.generator())
        return drawn.mul_(std).to(self.dtype if dtype is None else dtype)

    def run(self, case: Case) -> None:
        """Add a row for each arm and pass; an arm that fails gets a row that says why."""
        if self.time_left_s <= 0:
            self.skipped.append(f"{_text(case.shape)}: out of time")
            return
        together = [arm for arm in case.arms if not arm.alone]
        for arms in (together, *([arm] for arm in case.arms if arm.alone)):
            self._run_arms(case, arms)
            if self._is_cuda:
                torch.cuda.empty_cache()

    def _run_arms(self, case: Case, arms: Sequence[Arm]) -> None:
        ready: dict[str, Calls] = {}
        first: dict[tuple[str, str], Row] = {}
        for arm in arms:
            if self.mode == "compile" and not arm.ours:
                continue
            if self.time_left_s < arm.patience_s:
                self.skipped.append(f"{_text(case.shape)}, {arm.name}: out of time")
                continue
            try:
                calls = arm.make()
                first |= {(arm.name, name): self._first(call) for name, call in calls.items()}
                ready[arm.name] = calls
            except Exception as error:  # noqa: BLE001 - whatever stops one arm is its result; the others go on
                self._failed(case, arm, error)
        if self.mode == "measure":
            self._time(case, [arm for arm in arms if arm.name in ready], ready, first)

    def _failed(self, case: Case, arm: Arm, error: Exception) -> None:
        told = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"[:300]
        self.rows.append({"section": self.section, "arm": arm.name, "shape": dict(case.shape), "error": told})
        if self._is_cuda:
            torch.cuda.empty_cache()

    def _first(self, call: Callable[[], object]) -> Row:
        """Compile and tune; then once more, to see its memory and about how long it takes."""
        start = time.perf_counter()
        call()
        self._synchronize()
        first_s = time.perf_counter() - start
        if not self._is_cuda or self.mode == "compile":
            return {"first_call_s": round(first_s, 6), "peak_bytes": None}
        before = torch.cuda.memory_allocated(self.device)
        torch.cuda.reset_peak_memory_stats(self.device)
        call()
        self._synchronize()
        peak = torch.cuda.max_memory_allocated(self.device) - before
        return {"first_call_s": round(first_s, 6), "peak_bytes": peak}

    def _time(
        self, case: Case, arms: Sequence[Arm], ready: Mapping[str, Calls], first: Mapping[tuple[str, str], Row]
    ) -> None:
        for name in dict.fromkeys(name for calls in ready.values() for name in calls):
            timed = [arm for arm in arms if name in ready[arm.name]]
            if self._is_cuda:
                taken_ms = self.interleaved_ms({arm.name: ready[arm.name][name] for arm in timed})
            else:  # a rehearsal: once is enough
                taken_ms = {arm.name: [first[arm.name, name]["first_call_s"] * 1e3] for arm in timed}
            for arm in timed:
                ms = statistics.median(taken_ms[arm.name])
                self.rows.append(
                    {
                        "section": self.section,
                        "arm": arm.name,
                        "pass": name,
                        "shape": dict(case.shape),
                        "dtype": str(self.dtype).removeprefix("torch."),
                        "ms": round(ms, 5),
                        "ms_min": round(min(taken_ms[arm.name]), 5),
                        "repetitions": len(taken_ms[arm.name]),
                        **self._rate(case, arm, name, ms),
                        **first[arm.name, name],
                        **arm.extra(),
                    }
                )

    def _rate(self, case: Case, arm: Arm, name: str, ms: float) -> Row:
        work = (case.work if arm.work is None else arm.work)[name]
        if case.rate == "GB/s":
            return {"gb_per_s": round(work / ms / 1e6, 3)}
        tflops = work / ms / 1e9
        share = {} if self.peak_tflops is None else {"share_of_peak": round(tflops / self.peak_tflops, 4)}
        return {"tflops": round(tflops, 6), **share}

    def interleaved_ms(self, calls: Calls) -> dict[str, list[float]]:
        """Milliseconds of every call, taking turns, each after a flush of the second-level cache."""
        taken: dict[str, list[float]] = {name: [] for name in calls}
        if not calls:
            return taken
        fewest, most = ROUNDS
        start = time.perf_counter()
        for turn in range(most):
            if turn >= fewest and time.perf_counter() - start > SECONDS_PER_CASE * len(calls):
                break
            for name, call in calls.items():
                taken[name].append(self._once_ms(call))
        return taken

    def _once_ms(self, call: Callable[[], object]) -> float:
        before, after = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        self._flush.zero_()  # the host gets ahead of the device meanwhile, so that launches are not timed
        before.record()
        call()
        after.record()
        after.synchronize()
        return float(before.elapsed_time(after))

    def _synchronize(self) -> None:
        if self._is_cuda:
            torch.cuda.synchronize(self.device)

    def measure_peak(self) -> None:
        """The best of several square bfloat16 products, random data: what shares of the peak refer to."""
        if not self._is_cuda:
            return
        a, b = (self.randn(PEAK_SIZE, PEAK_SIZE, dtype=torch.bfloat16) for _ in range(2))
        out = torch.empty_like(a)
        for _ in range(3):
            torch.matmul(a, b, out=out)
        taken_ms = self.interleaved_ms({"matmul": lambda: torch.matmul(a, b, out=out)})["matmul"]
        self.peak_tflops = 2 * PEAK_SIZE**3 / min(taken_ms) / 1e9


def nominal_tflops(device_name: str) -> float | None:
    """Of the datasheet, None for a device that is not listed."""
    return next((tflops for word, tflops in NOMINAL_BF16_TFLOPS.items() if word in device_name), None)


def passes(
    forward: Callable[[], torch.Tensor], inputs: Sequence[torch.Tensor], *, backward: bool = True
) -> dict[str, Callable[[], object]]:
    """ "forward" and "backward" of a function of inputs that want gradients; the latter over a kept graph."""
    if not backward:
        return {"forward": forward}
    out = forward()
    grad = torch.randn(out.shape, device=out.device, generator=torch.Generator(out.device).manual_seed(1)).to(out.dtype)
    return {
        "forward": forward,
        "backward": lambda: torch.autograd.grad(out, inputs, grad, retain_graph=True),
    }


def print_table(rows: Sequence[Row]) -> None:
    """A line for each row, under its shape; x: how many times the time of the shape's first arm."""
    base: dict[tuple[str, str], float] = {}
    shown = ""
    for row in rows:
        shape, name = _text(row["shape"]), row.get("pass", "")
        if shape != shown:
            print(f"  {shape}")
            shown = shape
        if "error" in row:
            print(f"    {'':<17} {row['arm']:<26} {row['error'][:90]}")
            continue
        times = row["ms"] / base.setdefault((shape, name), row["ms"])
        rate = f"{row['tflops']:8.1f} TFLOP/s" if "tflops" in row else f"{row['gb_per_s']:8.1f} GB/s   "
        memory = "" if row["peak_bytes"] is None else f"{row['peak_bytes'] / 2**20:9.0f} MiB"
        print(f"    {name:<17} {row['arm']:<26} {row['ms']:10.3f} ms {rate} {times:7.2f} x {memory}".rstrip())


def write_section(path: Path, content: Mapping[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=1) + "\n")


def _text(shape: Mapping[str, Any]) -> str:
    return " ".join(f"{name}={value}" for name, value in shape.items())
