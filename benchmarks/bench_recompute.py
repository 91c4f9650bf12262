"""One HSTU layer on a CPU with and without ``model.recompute``: what it keeps for its gradients, and its time.

    python -m benchmarks.bench_recompute [--steps 3] [--results FILE]

Forward and backward of one row with the relative bias, heads of width 64, one thread; both arms take turns in one
process, times are the CPU's, the least of the steps. kept: bytes of all that the forward pass saves, its input
included, parameters not. Both arms must give the same gradients: bit by bit, under a window to rounding, since a
product is made in two halves there. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch

from benchmarks.environment import environment
from benchmarks.kept_memory import kept_storages
from kernels.host_memory import keep_freed_memory
from kernels.hstu_attention import CAUSAL, AttentionMask
from model.config import ModelConfig
from model.hstu import HSTULayer

CASES: tuple[tuple[int, int, Literal["full", "semi-local"]], ...] = (
    (256, 2048, "full"),
    (256, 4096, "full"),
    (256, 8192, "full"),
    (512, 4096, "full"),
    (512, 8192, "full"),
    (256, 8192, "semi-local"),
    (512, 8192, "semi-local"),
)
"""Width, positions, attention."""
SEMI_LOCAL = AttentionMask(max_attn_len=256, min_full_attn_len=64)
ROUNDING = 1e-5
"""Of a gradient's norm: how far the two may be apart under a window."""
TARGETS = {"kept_saved": 0.60, "time_ratio": 1.10}


def main() -> None:
    options = _options()
    torch.set_num_threads(1)
    keep_freed_memory()
    rows = []
    for width, length, attention in CASES:
        row = measure(width, length, attention, steps=options.steps)
        rows.append(row)
        print(
            f"D {width} x {length:5d} {attention:10s} kept {row['kept_mib'][0]:6.1f} -> {row['kept_mib'][1]:5.1f} MiB"
            f" (-{100 * row['kept_saved']:.0f} %), {1000 * row['cpu_s'][0]:7.0f} -> {1000 * row['cpu_s'][1]:7.0f} ms"
            f" ({row['time_ratio']:.3f} x)",
            flush=True,
        )
    result = {"benchmark": "recompute", "targets": TARGETS, "rows": rows, **environment()}
    if options.results:
        options.results.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(result))


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=3, help="timed steps of each arm, after one to warm up")
    parser.add_argument("--results", type=Path, help="JSON file to write")
    return parser.parse_args()


def measure(width: int, length: int, attention: str, *, steps: int) -> dict[str, Any]:
    """Without and with recomputation, in this order."""
    head = min(64, width)
    config = ModelConfig(
        embedding_dim=width, num_heads=width // head, attention_dim=head, hidden_dim=head, max_len=length, num_layers=1
    )
    layers = [
        HSTULayer(replace(config, recompute=recompute), torch.Generator().manual_seed(1)) for recompute in (False, True)
    ]
    generator = torch.Generator().manual_seed(0)
    x_LD = torch.randn(length, width, generator=generator, requires_grad=True)
    upstream = torch.randn(length, width, generator=generator)
    times = (10 ** (torch.rand(length, generator=generator) * 4)).long().cumsum(0)
    offsets, mask = torch.tensor([0, length]), CAUSAL if attention == "full" else SEMI_LOCAL

    kept, seconds, gradients = [], [float("inf"), float("inf")], []
    for step in range(steps + 1):
        for arm, layer in enumerate(layers):
            weights = {one.untyped_storage().data_ptr() for one in layer.parameters()}
            started = time.process_time()
            with kept_storages() as found:
                out = layer(x_LD, offsets, (times, times + 100), mask=mask, dropout=None)
            found_gradients = torch.autograd.grad(out, [x_LD, *layer.parameters()], upstream)
            if step:
                seconds[arm] = min(seconds[arm], time.process_time() - started)
                continue
            kept.append(sum(size for address, size in found.items() if address not in weights))
            gradients.append(found_gradients)
    allowed = 0.0 if attention == "full" else ROUNDING
    if not all((one - other).norm() <= allowed * one.norm() for one, other in zip(*gradients, strict=True)):
        raise SystemExit("the two arms disagree")
    return {
        "width": width,
        "length": length,
        "attention": attention,
        "kept_mib": [round(size / 2**20, 2) for size in kept],
        "kept_saved": round(1 - kept[1] / kept[0], 3),
        "cpu_s": [round(each, 4) for each in seconds],
        "time_ratio": round(seconds[1] / seconds[0], 3),
    }


if __name__ == "__main__":
    main()
