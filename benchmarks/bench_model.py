"""A training step of HSTU on a CPU, packed as headrace does it, against the padded eager formulation.

    python benchmarks/bench_model.py [--rounds 3] [--only step attention]

*step*: forward, loss with 128 negatives a position, backward and optimiser, on batches with the row lengths of ML-1M
(128 users; a lognormal cut at 200 unless --data names the data). *attention*: forward and backward of one head of
width 50 on rows of equal length, with the relative bias and without. Arms: *packed*; *padded*, the same mathematics as
most public code has it (benchmarks/padded_hstu.py); *padded, memory kept*, which is given the allocator setting that
headrace's trainer makes for itself (kernels/host_memory.py).

Every measurement is a process of its own, so that memory can be told apart; arms alternate. Peak memory is what the
process grew by while it stepped. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.environment import environment
from benchmarks.leave_one_out import Run, Sequences, TrainingPlan, read_ml1m, windows
from benchmarks.padded_hstu import padded_loss
from benchmarks.table_ml1m import model_config
from kernels.host_memory import keep_freed_memory
from kernels.hstu_attention import RelativeBias, hstu_attention

ARMS = ("packed", "padded", "padded, memory kept")
MODELS = ("hstu", "hstu-large")
ATTENTION_LENS = (200, 400, 1000)
POSITIONS = 12_800
"""Positions of a batch in the attention arms, whatever the length."""


def main() -> None:
    options = _options()
    if options.measure:
        print(json.dumps(_measure(json.loads(options.measure), options)))
        return
    cases: list[dict[str, Any]] = [{"kind": "step", "model": model} for model in MODELS if "step" in options.only]
    if "attention" in options.only:
        cases += [
            {"kind": "attention", "length": length, "bias": bias} for length in ATTENTION_LENS for bias in (True, False)
        ]
    rows = [_compare(case, options) for case in cases]
    result = {"benchmark": "model", "threads": options.threads, "rows": rows, **environment()}
    if options.results:
        options.results.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(result))


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Training steps of HSTU, packed against padded.")
    parser.add_argument("--only", nargs="+", choices=("step", "attention"), default=["step", "attention"])
    parser.add_argument("--rounds", type=int, default=3, help="processes of each arm")
    parser.add_argument("--steps", type=int, default=4, help="timed steps of a process, after one to warm up")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--data", type=Path, help="folder of MovieLens-1M, for its lengths and times")
    parser.add_argument("--results", type=Path, help="JSON file to write")
    parser.add_argument("--measure", help=argparse.SUPPRESS)
    return parser.parse_args()


def _compare(case: dict[str, Any], options: argparse.Namespace) -> dict[str, Any]:
    measured: dict[str, list[dict[str, float]]] = {arm: [] for arm in ARMS}
    for _ in range(options.rounds):
        for arm in ARMS:
            measured[arm].append(_in_a_process({**case, "arm": arm}, options))
    name = " ".join(str(value) for value in case.values())
    row: dict[str, Any] = {**case, "arms": {}}
    for arm, found in measured.items():
        row["arms"][arm] = {key: statistics.median(one[key] for one in found) for key in found[0]}
    packed = row["arms"]["packed"]
    for arm, of_arm in row["arms"].items():
        of_arm["time_ratio"] = of_arm["s"] / packed["s"]
        of_arm["memory_ratio"] = of_arm["peak_mib"] / packed["peak_mib"]
        print(
            f"{name:26s} {arm:20s} {1000 * of_arm['s']:8.1f} ms {of_arm['positions'] / of_arm['s']:8.0f} positions/s,"
            f" {of_arm['peak_mib']:6.0f} MiB; {of_arm['time_ratio']:5.2f} x time, {of_arm['memory_ratio']:5.2f} x MiB",
            flush=True,
        )
    return row


def _in_a_process(case: dict[str, Any], options: argparse.Namespace) -> dict[str, float]:
    command = [sys.executable, __file__, "--measure", json.dumps(case), "--threads", str(options.threads)]
    command += ["--steps", str(options.steps), *(["--data", str(options.data)] if options.data else [])]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"a measuring process failed:\n{done.stderr}")
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def _measure(case: dict[str, Any], options: argparse.Namespace) -> dict[str, float]:
    torch.set_num_threads(options.threads)
    if case["arm"] != "padded":
        keep_freed_memory()
    if case["kind"] == "step":
        step, positions = _training_step(case, options)
    else:
        step, positions = _attention(case)
    before_mib = _rss_mib()
    step(0)
    times = []
    for i in range(1, options.steps + 1):
        started = time.perf_counter()
        step(i)
        times.append(time.perf_counter() - started)
    peak_mib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024 - before_mib
    return {"s": statistics.median(times), "positions": positions, "peak_mib": peak_mib}


def _rss_mib() -> float:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize() / 2**20


def _training_step(case: dict[str, Any], options: argparse.Namespace) -> tuple[Callable[[int], None], float]:
    data = read_ml1m(options.data) if options.data else _made_up()
    run = Run(config=model_config(case["model"], seed=42), plan=TrainingPlan(), data=data, device=torch.device("cpu"))
    users = torch.randperm(data.num_users, generator=torch.Generator().manual_seed(1))
    batches = [
        windows(data, users[i * 128 : (i + 1) * 128], window=200, held_out=1, device=run.device)
        for i in range(options.steps + 1)
    ]
    positions = statistics.mean(batch.rows_L.shape[0] for batch in batches[1:])

    def packed(i: int) -> None:
        run.step(batches[i])

    def padded(i: int) -> None:
        run.optimizer.zero_grad(set_to_none=True)
        negative_rows = torch.randint(data.num_items, (batches[i].rows_L.shape[0], 128), generator=run.generator)
        padded_loss(run.model, batches[i], negative_rows, dropout=True).backward()  # type: ignore[no-untyped-call]
        run.optimizer.step()

    return (packed if case["arm"] == "packed" else padded), positions


def _made_up() -> Sequences:
    """2,000 users whose cut lengths have the mean (108) and the share of full windows (26 %) of ML-1M."""
    generator = torch.Generator().manual_seed(0)
    lengths = torch.exp(4.6 + 0.95 * torch.randn(2000, generator=generator)).long().clamp(20, 2000)
    starts = torch.zeros(2001, dtype=torch.int64)
    torch.cumsum(lengths, 0, out=starts[1:])
    total = int(starts[-1])
    gaps = (10 ** (torch.rand(total, generator=generator) * 4)).long()
    return Sequences(
        rows=torch.randint(3706, (total,), generator=generator),
        times_s=950_000_000 + gaps.cumsum(0),
        starts=starts,
        num_items=3706,
        note="made up",
    )


def _attention(case: dict[str, Any]) -> tuple[Callable[[int], None], float]:
    length, generator = case["length"], torch.Generator().manual_seed(0)
    num_rows = POSITIONS // length
    total = num_rows * length
    offsets = torch.arange(num_rows + 1) * length
    q, k, v, upstream = (torch.randn(total, 1, 50, generator=generator) for _ in range(4))
    leaves = [x.requires_grad_() for x in (q, k, v)]
    bias = None
    if case["bias"]:
        times = (10 ** (torch.rand(total, generator=generator) * 4)).long().cumsum(0)
        tables = [torch.randn(n, generator=generator).requires_grad_() for n in (2 * length - 1, 129)]
        leaves += tables
        bias = RelativeBias(
            position_weight=tables[0],
            time_weight=tables[1],
            timestamps_s_L=times,
            query_timestamps_s_M=times + 100,
        )
    kernel: Any = "auto" if case["arm"] == "packed" else "reference"

    def step(_i: int) -> None:
        if bias is not None:
            bias.timestamps_s_L.sub_(1)  # another batch: nothing is left of the step before
        out: Tensor = hstu_attention(q, k, v, offsets, max_len=length, bias=bias, kernel=kernel)
        torch.autograd.grad(out, leaves, upstream)

    return step, total


if __name__ == "__main__":
    main()
