"""The kernels on a GPU, against what torch offers for the same.

    python -m benchmarks.bench_gpu [--only attention encoder …] [--seconds 480] [--out DIRECTORY] [--dry-run]

Needs torch, triton, numpy and safetensors, and nothing else. Sections, in this order, each with its share of the time:

* *attention*: forward and backward over lengths and head widths, dense rows and rows of stochastic length, with and
  without the relative bias; beside it SDPA (FlashAttention-2 and cuDNN), FlexAttention compiled with the same mask and
  bias (a softmax: SiLU cannot be expressed), the eager SiLU form, and that form compiled.
* *encoder*: HSTU forward and backward against a Transformer of equal width (pre-norm, d_ff = 4 D).
* *semi-local*: the cost of a window, and of both readings of its global part, as rows get longer; beside the triangle.
* *input-output*: what one layer keeps for its backward pass, with and without recomputation, and the time of both.
* *fp8*: products of 8-bit floats beside those of bfloat16, alone and in a layer: time, and error.
* *rows*: item rows from host memory, as float32 and rounded.
* *loss*, *top-k*, *embedding*: what touches the whole catalogue.

Arms of a case take turns; every call comes after a flush of the second-level cache and is timed by events; the median
counts. Shares of the peak refer to the best 8192 x 8192 x 8192 bfloat16 product of the same run. A section writes
DIRECTORY/gpu-<section>.json when it ends; sections are independent, so that several runs can share the work. What a
section's time does not allow is listed under "skipped". --dry-run takes tiny shapes on the CPU through every arm, with
TRITON_INTERPRET=1, and writes nothing. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from triton.runtime.autotuner import Autotuner

from benchmarks import gpu_attention, gpu_catalogue, gpu_encoder, gpu_low_bits
from benchmarks.compile_ahead import compile_ahead
from benchmarks.environment import answer, environment
from benchmarks.gpu_harness import FULL, TINY, TO_COMPILE, Bench, Row, nominal_tflops, print_table, write_section
from kernels.triton_support import INTERPRETED

SECTIONS: dict[str, tuple[Callable[[Bench], None], float]] = {
    "attention": (gpu_attention.attention, 12),
    "encoder": (gpu_encoder.encoder, 5),
    "semi-local": (gpu_attention.semi_local, 2),
    "input-output": (gpu_encoder.input_output, 2),
    "fp8": (gpu_low_bits.fp8, 2),
    "rows": (gpu_low_bits.rows, 1),
    "loss": (gpu_catalogue.loss, 2),
    "top-k": (gpu_catalogue.top_k, 1),
    "embedding": (gpu_catalogue.embedding, 1),
}
"""What runs, and its share of the time; what one leaves falls to those after it."""
FLOP_CONVENTION = (
    "attention forward 4*H*A*(visible pairs; causal: sum of n(n+1)/2), backward 2.5 times that; a product of [m,k] and"
    " [k,n] 2mkn, three times that with its backward pass; padding and recomputation do not count"
)
TARGETS = {"forward_share": 0.60, "backward_share": 0.45, "bias_by_no_bias": 0.70}
"""At 8192 dense positions, head width 128: shares of the measured bfloat16 peak; speed with the bias by without."""
COMPILE_PROCESSES_MAX = 12
COMPILE_SHARE_MAX = 0.3
"""Of the run's time."""
_BRIEF = ("targets", "speedup", "growth", "local_speedup", "kept")
"""What a section concludes, for the summary."""


def main() -> None:
    arguments = _arguments()
    start = time.monotonic()
    bench = _dry_bench() if arguments.dry_run else _cuda_bench()
    if not arguments.dry_run and arguments.compile_processes > 0:
        told = compile_ahead(
            compile_sections,
            arguments.only,
            num_processes=arguments.compile_processes,
            seconds=COMPILE_SHARE_MAX * arguments.seconds,
        )
        print(f"compiled ahead in {time.monotonic() - start:.0f} s", *told, sep="\n  ", flush=True)
    bench.measure_peak()
    about = _about(bench, arguments.commit)
    summary: dict[str, Any] = {"benchmark": "gpu", **about, "dry_run": arguments.dry_run, "sections": {}}
    finish = start + arguments.seconds
    for place, name in enumerate(arguments.only):
        content = _run_section(bench, name, arguments.only[place:], finish)
        print_table(content["measured"])
        print(*(f"  skipped: {what}" for what in content["skipped"]), sep="\n", flush=True)
        if not arguments.dry_run:
            write_section(arguments.out / f"gpu-{name}.json", {"benchmark": f"gpu-{name}", **about, **content})
        summary["sections"][name] = _brief(content)
    print(json.dumps(summary))


def _run_section(bench: Bench, name: str, remaining: Sequence[str], finish: float) -> dict[str, Any]:
    run, share = SECTIONS[name]
    begin = time.monotonic()
    bench.section, bench.rows, bench.skipped = name, [], []
    bench.deadline = begin + (finish - begin) * share / sum(SECTIONS[other][1] for other in remaining)
    try:
        run(bench)
    except Exception as error:  # noqa: BLE001 - the other sections go on, and what was measured is kept
        bench.skipped.append(f"the rest, stopped by {type(error).__name__}: {error}"[:300])
    seconds = time.monotonic() - begin
    print(f"\n{name} ({seconds:.0f} s)")
    content = {"seconds": round(seconds, 1), "skipped": bench.skipped, "measured": bench.rows}
    if name == "attention":
        content["targets"] = targets(bench.rows)
    if name == "encoder":
        content["speedup"] = gpu_encoder.speedup(bench.rows)
    if name == "input-output":
        content["kept"] = {row["arm"]: [row["kept_bytes"], row["ms"]] for row in bench.rows if "error" not in row}
    if name == "semi-local":
        content["growth"] = gpu_attention.growth(bench.rows)
        content["local_speedup"] = gpu_attention.local_speedup(bench.rows)
    return content | {"tuned": _tuned()}


def _brief(content: dict[str, Any]) -> dict[str, Any]:
    rows = content["measured"]
    brief: dict[str, Any] = {
        "rows": len(rows),
        "failed": sorted({row["arm"] for row in rows if "error" in row}),
        "skipped": len(content["skipped"]),
        "seconds": content["seconds"],
    }
    return brief | {name: content[name] for name in _BRIEF if name in content}


def targets(rows: Sequence[Row]) -> dict[str, Any]:
    """What was aimed at and what was reached, at the shape the targets are for; {} if it was not measured."""
    known = {
        (row["arm"], row["pass"]): row
        for row in rows
        if "error" not in row and (row["shape"]["rows"], row["shape"]["N"], row["shape"]["A"]) == ("dense", 8192, 128)
    }
    reached: dict[str, Any] = {}
    for name in ("forward", "backward"):
        plain, biased = known.get(("headrace", name)), known.get(("headrace, bias", name))
        if plain is not None and "share_of_peak" in plain:
            reached[f"{name}_share"] = {"target": TARGETS[f"{name}_share"], "reached": plain["share_of_peak"]}
        if plain is not None and biased is not None:
            speed = round(plain["ms"] / biased["ms"], 4)
            reached[f"{name}_bias_by_no_bias"] = {"target": TARGETS["bias_by_no_bias"], "reached": speed}
    return reached


def _tuned() -> dict[str, dict[str, str]]:
    """The configuration chosen for each autotuned kernel and shape so far; Triton keeps them on disk as well."""
    chosen: dict[str, dict[str, str]] = {}
    for module_name, module in list(sys.modules.items()):
        for kernel in vars(module).values() if module_name.startswith("kernels.") else ():
            if isinstance(kernel, Autotuner):
                name = f"{kernel.base_fn.__module__}.{kernel.base_fn.__name__}"
                chosen[name] = {str(key): str(config) for key, config in kernel.cache.items()}
    return chosen


def compile_sections(sections: Sequence[str]) -> None:
    """Call each of our arms once, at the widths that are benchmarked and few positions."""
    bench = Bench(device=torch.device("cuda"), sizes=TO_COMPILE, dtype=torch.bfloat16, mode="compile")
    for name in sections:
        bench.section = name
        SECTIONS[name][0](bench)


def _cuda_bench() -> Bench:
    if not torch.cuda.is_available() or INTERPRETED:
        raise SystemExit("no CUDA device, or TRITON_INTERPRET is set: only --dry-run can be had here")
    import torch._functorch.config as compiled_functions

    compiled_functions.donated_buffer = False  # a backward pass is timed over and over on one graph
    return Bench(device=torch.device("cuda"), sizes=FULL, dtype=torch.bfloat16)


def _dry_bench() -> Bench:
    if not INTERPRETED:
        raise SystemExit("a dry run needs TRITON_INTERPRET=1 in the environment")
    return Bench(device=torch.device("cpu"), sizes=TINY, dtype=torch.float32)


def _about(bench: Bench, commit: str | None) -> dict[str, Any]:
    about = environment()
    if commit is not None:
        about["commit"] = commit
    if bench.device.type == "cuda":
        device = torch.cuda.get_device_properties(bench.device)
        about["device"] = {
            "name": device.name,
            "memory_bytes": device.total_memory,
            "multiprocessors": device.multi_processor_count,
            "driver": answer("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"),
            "cuda": torch.version.cuda,
            "bf16_tflops_measured": None if bench.peak_tflops is None else round(bench.peak_tflops, 1),
            "bf16_tflops_nominal": nominal_tflops(device.name),
        }
    return about | {"flop_convention": FLOP_CONVENTION}


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", choices=SECTIONS, default=list(SECTIONS), metavar="SECTION")
    parser.add_argument("--seconds", type=float, default=480.0, help="the whole run's, compiling included")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    parser.add_argument("--commit", help="where the working tree has no repository to ask")
    parser.add_argument("--compile-processes", type=int, default=min(COMPILE_PROCESSES_MAX, (os.cpu_count() or 2) - 2))
    parser.add_argument("--dry-run", action="store_true")
    return parser.parse_args()


if __name__ == "__main__":
    main()
