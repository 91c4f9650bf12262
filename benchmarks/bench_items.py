"""How long admitting new items stops the trainer, and how much memory an item takes.

    python benchmarks/bench_items.py [--items 1000000] [--width 64] [--per-call 1000]

Ids are random 62-bit numbers, new in every call. Arms: *reserved* is what the item table and its optimiser do;
*doubling* is the ordinary way: columns that are copied into twice the room, and an index built anew. Every arm is a
process of its own. A call is what a training step pays for its new items: rows and the optimiser's state of them,
touched once. Memory is what the process grew by, at the end and at its peak. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from benchmarks.environment import environment
from kernels.host_memory import keep_freed_memory
from model.config import ModelConfig, OptimizerConfig
from model.id_index import IdIndex
from model.item_table import initial_embeddings
from model.optimizer import RecommenderOptimizer
from model.recommender import Recommender

Int64s = NDArray[np.int64]


class Table(Protocol):
    """One arm."""

    def admit(self, ids: Int64s) -> None: ...


class Reserved:
    """The table and the optimiser of the trainer."""

    def __init__(self, config: ModelConfig) -> None:
        self.recommender = Recommender(config)
        self.optimizer = RecommenderOptimizer(self.recommender, OptimizerConfig())

    def admit(self, ids: Int64s) -> None:
        items = self.recommender.items
        items.admit(ids)
        active = items.activate(torch.from_numpy(items.lookup(ids)))
        active.weight_RD.grad, active.bias_R.grad = torch.ones_like(active.weight_RD), torch.ones_like(active.bias_R)
        self.optimizer.step(active)


class Doubling:
    """The same columns, copied whenever they are full, and an index that is built anew when half its slots are used."""

    def __init__(self, config: ModelConfig) -> None:
        self.config, self.num_items, self.index = config, 0, IdIndex()
        self.columns = self._columns(1024)

    def _columns(self, capacity: int) -> list[torch.Tensor]:
        wide = [torch.zeros(capacity, self.config.embedding_dim) for _ in range(2)]
        flat = [torch.zeros(capacity) for _ in range(5)]
        return [*wide, *flat, *(torch.zeros(capacity, dtype=torch.int64) for _ in range(3))]

    def admit(self, ids: Int64s) -> None:
        end = self.num_items + len(ids)
        if end > len(self.columns[0]):
            grown = self._columns(2 * end)
            for new, old in zip(grown, self.columns, strict=True):
                new[: self.num_items] = old[: self.num_items]
            self.columns = grown
        self.index = self.index.roomier(len(ids)) or self.index
        self.index.put(ids, np.arange(self.num_items, end))
        self.columns[0][self.num_items : end] = initial_embeddings(ids, self.config)
        for column in self.columns[1:]:
            column[self.num_items : end] = 1
        self.num_items = end


ARMS: dict[str, type[Reserved] | type[Doubling]] = {"reserved": Reserved, "doubling": Doubling}


def main() -> None:
    options = _options()
    if options.measure:
        print(json.dumps(_measure(options)))
        return
    rows = {arm: _in_a_process(arm, options) for arm in ARMS}
    for arm, row in rows.items():
        print(
            f"{arm:9s} {options.items:,} items: a call {row['mean_ms']:.2f} ms, p99 {row['p99_ms']:.1f}, longest"
            f" {row['max_ms']:.0f} ms; {row['bytes_per_item']:.0f} bytes an item, {row['peak_bytes_per_item']:.0f} at"
            " the peak"
        )
    shape = {"items": options.items, "width": options.width, "per_call": options.per_call}
    print(json.dumps({"benchmark": "items", **shape, "arms": rows, **environment()}))


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Growth of the item table.")
    parser.add_argument("--items", type=int, default=1_000_000)
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--per-call", type=int, default=1_000, help="new items of one step")
    parser.add_argument("--measure", choices=ARMS, help=argparse.SUPPRESS)
    return parser.parse_args()


def _in_a_process(arm: str, options: argparse.Namespace) -> dict[str, Any]:
    command = [sys.executable, __file__, "--measure", arm, "--items", str(options.items)]
    command += ["--width", str(options.width), "--per-call", str(options.per_call)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"a measuring process failed:\n{done.stderr}")
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def _measure(options: argparse.Namespace) -> dict[str, float]:
    torch.set_num_threads(1)
    keep_freed_memory()
    config = ModelConfig(embedding_dim=options.width, max_items=max(4_000_000, 2 * options.items))
    rng, table = np.random.default_rng(0), ARMS[options.measure](config)
    table.admit(rng.integers(0, 1 << 62, options.per_call))
    before, seconds = _rss(), []
    for _ in range(options.items // options.per_call):
        ids = rng.integers(0, 1 << 62, options.per_call)
        started = time.perf_counter()
        table.admit(ids)
        seconds.append(time.perf_counter() - started)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return {
        "mean_ms": 1000 * float(np.mean(seconds)),
        "p99_ms": 1000 * float(np.quantile(seconds, 0.99)),
        "max_ms": 1000 * max(seconds),
        "bytes_per_item": (_rss() - before) / options.items,
        "peak_bytes_per_item": (peak - before) / options.items,
    }


def _rss() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


if __name__ == "__main__":
    main()
