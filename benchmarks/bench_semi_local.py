"""Semi-local attention on a CPU: time and memory by the length of a row, beside the whole triangle.

    python -m benchmarks.bench_semi_local [--lengths 2048 16384] [--kernels native] [--steps 3] [--results FILE]

One row of each length; arms: *causal*, the whole triangle; *newest see all* and *oldest are seen*, a window of 256 with
the two readings of ULTRA-HSTU's global part (64 newest queries that see everything, 64 oldest keys that all see). Each
with the relative bias and without, in the compiled kernel and in torch's tiles (for machines without a C compiler).

Every measurement is a process of its own on one thread. Times are the CPU's, the least of the steps: they hold on a
machine that others use, too. Peak memory is what the process grew by. The last line is one JSON object: rows, for each
arm the exponent p of time ~ length^p, and how many times as fast as the triangle it is at the greatest length.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.environment import environment
from benchmarks.growth import exponent, visible_pairs
from kernels.host_memory import keep_freed_memory
from kernels.hstu_attention import CAUSAL, AttentionMask, RelativeBias, hstu_attention

WINDOW, GLOBAL = 256, 64
NUM_HEADS, WIDTH = 2, 32
TARGET = 8.0
"""Times as fast as the triangle at 16,384 positions."""
ARMS = {
    "causal": CAUSAL,
    "newest see all": AttentionMask(max_attn_len=WINDOW, min_full_attn_len=GLOBAL),
    "oldest are seen": AttentionMask(max_attn_len=WINDOW, num_oldest_keys=GLOBAL),
}
PASSES = ("forward", "forward and backward")


def main() -> None:
    options = _options()
    if options.measure:
        print(json.dumps(_measure(json.loads(options.measure), options.steps)))
        return
    rows = []
    print(f"{'':36s} {'length':>7s} {'forward':>12s} {'and backward':>13s} {'peak, MiB':>16s}")
    for kernel in options.kernels:
        for bias in (True, False):
            for length in options.lengths:
                rows += [_row({"kernel": kernel, "bias": bias, "length": length, "arm": arm}, options) for arm in ARMS]
    result: dict[str, Any] = {"benchmark": "semi-local", "target": TARGET}
    result |= {"shape": {"H": NUM_HEADS, "A": WIDTH, "K1": WINDOW, "K2": GLOBAL}}
    result |= {"rows": rows, "exponents": exponents(rows), "speedup": speedups(rows)}
    for name in ("exponents", "speedup"):
        for each, value in result[name].items():
            print(f"{name:10s} {each:64s} {value:6.2f}")
    result |= environment()
    if options.results:
        options.results.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(result))


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--lengths", type=int, nargs="+", default=[2048, 4096, 8192, 16_384])
    parser.add_argument("--kernels", nargs="+", choices=("native", "cpu"), default=["native", "cpu"])
    parser.add_argument("--steps", type=int, default=3, help="timed steps of a process, after one to warm up")
    parser.add_argument("--results", type=Path, help="JSON file to write")
    parser.add_argument("--measure", help=argparse.SUPPRESS)
    return parser.parse_args()


def _row(case: dict[str, Any], options: argparse.Namespace) -> dict[str, Any]:
    command = [sys.executable, "-m", "benchmarks.bench_semi_local", "--measure", json.dumps(case)]
    command += ["--steps", str(options.steps)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"a measuring process failed:\n{done.stderr}")
    row: dict[str, Any] = case | json.loads(done.stdout.splitlines()[-1])
    name = f"{case['kernel']}, {'bias' if case['bias'] else 'no bias'}, {case['arm']}"
    cpu, peak = row["cpu_s"], row["peak_mib"]
    print(
        f"{name:36s} {case['length']:7d} {1000 * cpu[PASSES[0]]:9.1f} ms {1000 * cpu[PASSES[1]]:10.1f} ms"
        f" {peak[PASSES[0]]:8.1f} {peak[PASSES[1]]:7.1f}",
        flush=True,
    )
    return row


def _measure(case: dict[str, Any], steps: int) -> dict[str, Any]:
    torch.set_num_threads(1)
    keep_freed_memory()
    length, generator = case["length"], torch.Generator().manual_seed(0)
    q, k, v, upstream = (torch.randn(length, NUM_HEADS, WIDTH, generator=generator) for _ in range(4))
    leaves = [x.requires_grad_() for x in (q, k, v)]
    bias = None
    if case["bias"]:
        times = (10 ** (torch.rand(length, generator=generator) * 4)).long().cumsum(0)
        tables = [torch.randn(size, generator=generator).requires_grad_() for size in (2 * length - 1, 129)]
        leaves += tables
        bias = RelativeBias(
            position_weight=tables[0],
            time_weight=tables[1],
            timestamps_s_L=times,
            query_timestamps_s_M=times + 100,
        )
    mask, offsets = ARMS[case["arm"]], torch.tensor([0, length])

    def step(name: str) -> None:
        if bias is not None:
            bias.timestamps_s_L.sub_(1)  # another batch: nothing is left of the step before
        out: Tensor = hstu_attention(
            q, k, v, offsets, max_len=length, alpha=WIDTH**-0.5, bias=bias, mask=mask, kernel=case["kernel"]
        )
        if name == PASSES[1]:
            torch.autograd.grad(out, leaves, upstream)

    before_mib = _peak_mib()
    cpu_s, peak_mib = {}, {}
    for name in PASSES:  # the smaller one first: a process knows the peak of its life only
        step(name)
        cpu_s[name] = min(_cpu_seconds(step, name) for _ in range(steps))
        peak_mib[name] = _peak_mib() - before_mib
    return {"pairs": visible_pairs(mask, length), "cpu_s": cpu_s, "peak_mib": peak_mib}


def _cpu_seconds(step: Any, name: str) -> float:
    started = time.process_time()
    step(name)
    return time.process_time() - started


def _peak_mib() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def exponents(rows: list[dict[str, Any]]) -> dict[str, float]:
    """By kernel, bias, arm and pass: p of CPU time ~ length^p."""
    found = {}
    for name in PASSES:
        for row in rows:
            same = [(one["length"], one["cpu_s"][name]) for one in rows if _name(one) == _name(row)]
            if len(same) > 1:
                found[f"{_name(row)}, {name}"] = round(exponent(same), 3)
    return found


def speedups(rows: list[dict[str, Any]]) -> dict[str, float]:
    """By kernel, bias, arm and pass: CPU time of the triangle by that of the arm, at the greatest length."""
    longest = max(row["length"] for row in rows)
    found = {}
    for name in PASSES:
        for row in rows:
            if row["length"] != longest or row["arm"] == "causal":
                continue
            (whole,) = (
                one for one in rows if one["length"] == longest and _name(one) == _name({**row, "arm": "causal"})
            )
            found[f"{_name(row)}, {name}"] = round(whole["cpu_s"][name] / row["cpu_s"][name], 2)
    return found


def _name(row: dict[str, Any]) -> str:
    return f"{row['kernel']}, {'bias' if row['bias'] else 'no bias'}, {row['arm']}"


if __name__ == "__main__":
    main()
