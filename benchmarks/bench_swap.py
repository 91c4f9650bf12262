"""How long the model thread spends on a hot swap, and how long it takes by the clock beside a busy thread.

    python benchmarks/bench_swap.py [--items 16000] [--swaps 100]

Arms: *aside* is what serving does (`ServedWeights.ready` in another thread's time, then `swap`); *at once* leaves all
of it to `swap`, as when what was worked out no longer fits. *busy* runs a thread that never leaves the interpreter
alone, which is the worst that parsing updates or snapshots in the same process can do. Swaps are done by a thread of
their own that has just been handed the work, as in serving.

The table's times are milliseconds. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from benchmarks.environment import environment
from model.config import ModelConfig
from model.manifest import Manifest, SnapshotKind
from model.recommender import Recommender
from model.snapshot import Lineage, RowBlock, Snapshot
from serving.item_names import ItemNames, WithheldItems
from serving.weights import PreparedSwap, ServedWeights, prepare_swap

Int64s = NDArray[np.int64]

CASES: dict[str, tuple[int, int]] = {
    "300 rows": (300, 0),
    "1,400 rows": (1_400, 0),
    "1,400 rows, 50 new": (1_350, 50),
    "1,400 rows, growing": (1_200, 200),
    "anchor": (0, 0),
}
"""Rows of known and of new items in a delta. Growing: straight after an anchor, whose table has no spare rows."""


class Publisher:
    """Snapshots with random content."""

    def __init__(self, config: ModelConfig, seed: int = 0) -> None:
        self.config, self.version = config, 0
        self.rng = np.random.default_rng(seed)
        self.dense = Recommender(config).dense_state()

    def publish(self, kind: SnapshotKind, ids: Int64s) -> Snapshot:
        self.version += 1
        n = len(ids)
        manifest = Manifest(
            model="bench",
            version=self.version,
            kind=kind,
            parent=self.version - 1 if kind == "delta" else None,
            config_hash=self.config.config_hash(),
            model_config=self.config.as_dict(),
            num_items=n,
            created_at_ms=0,
            watermark_ms=0,
            lineage=Lineage(log_id="bench", positions={}),
        )
        rows = RowBlock(
            ids=torch.from_numpy(ids),
            weight=torch.from_numpy(self.rng.normal(size=(n, self.config.embedding_dim)).astype(np.float32)),
            bias=torch.from_numpy(self.rng.normal(size=n).astype(np.float32)),
            trend=torch.from_numpy(self.rng.normal(size=n)),
            removed_ids=torch.empty(0, dtype=torch.int64),
            trend_as_of_ms=1_000 + self.version,
        )
        return Snapshot(manifest=manifest, dense={k: v.clone() for k, v in self.dense.items()}, rows=rows)

    def new_ids(self, num: int) -> Int64s:
        return self.rng.integers(0, 1 << 62, num)


@dataclass(frozen=True, slots=True)
class Took:
    """How long a swap took its thread."""

    cpu_s: float
    wall_s: float


def timed_swap(weights: ServedWeights, prepared: PreparedSwap) -> Took:
    wall, cpu = time.perf_counter(), time.thread_time()
    weights.swap(prepared)
    return Took(time.thread_time() - cpu, time.perf_counter() - wall)


def measure(case: str, num_items: int, num_swaps: int, *, aside: bool) -> dict[str, float]:
    """Milliseconds of `ServedWeights.swap`."""
    config = ModelConfig()
    publisher = Publisher(config)
    catalogue = publisher.new_ids(num_items)
    weights = ServedWeights(config, WithheldItems(ItemNames(lambda _ids: {})))
    weights.swap(prepare_swap(config, [publisher.publish("anchor", catalogue)]))
    known, new = CASES[case]
    cpu_s, wall_s = [], []
    model_thread = ThreadPoolExecutor(1)
    for _ in range(num_swaps):
        if case.endswith("growing"):
            weights.swap(prepare_swap(config, [publisher.publish("anchor", catalogue)]))
        if case == "anchor":
            snapshot = publisher.publish("anchor", catalogue)
        else:
            some = publisher.rng.choice(catalogue, known, replace=False)
            snapshot = publisher.publish("delta", np.concatenate([some, publisher.new_ids(new)]))
        prepared = prepare_swap(config, [snapshot])
        if aside:
            prepared = weights.ready(prepared)
        took = model_thread.submit(timed_swap, weights, prepared).result()
        cpu_s.append(took.cpu_s)
        wall_s.append(took.wall_s)
    model_thread.shutdown()
    return {
        f"{name}_p{q}_ms": round(float(np.percentile(values, q)) * 1000, 3)
        for name, values in (("cpu", cpu_s), ("wall", wall_s))
        for q in (50, 99)
    }


@contextmanager
def busy_thread(*, wanted: bool) -> Iterator[None]:
    stop = threading.Event()
    text = json.dumps(list(range(1_000)))

    def parse() -> None:
        while not stop.is_set():
            json.loads(text)

    thread = threading.Thread(target=parse)
    if wanted:
        thread.start()
    try:
        yield
    finally:
        stop.set()
        if wanted:
            thread.join()


def main() -> int:
    parser = argparse.ArgumentParser(description="the pause of a hot swap")
    parser.add_argument("--items", type=int, default=16_000, help="rows of the catalogue")
    parser.add_argument("--swaps", type=int, default=100, help="swaps per case and arm")
    parser.add_argument("--busy-swaps", type=int, default=10, help="swaps per case and arm beside a busy thread")
    args = parser.parse_args()
    torch.set_num_threads(1)  # what serving.num_threads is by default
    measured = []
    columns = ("cpu_p50_ms", "cpu_p99_ms", "wall_p50_ms", "wall_p99_ms")
    print(f"{'case':<20} {'arm':<9}{'process':<9}" + "".join(f"{name[:-3]:>10}" for name in columns))
    for case in CASES:
        for busy in (False, True):
            for arm in ("at once", "aside"):
                with busy_thread(wanted=busy):
                    found = measure(case, args.items, args.busy_swaps if busy else args.swaps, aside=arm == "aside")
                measured.append({"case": case, "arm": arm, "busy": busy, **found})
                row = f"{case:<20} {arm:<9}{'busy' if busy else 'quiet':<9}"
                print(row + "".join(f"{found[name]:>10.2f}" for name in columns), flush=True)
    print(
        json.dumps(
            {
                "benchmark": "swap",
                **environment(),
                "items": args.items,
                "embedding_dim": ModelConfig().embedding_dim,
                "swaps": args.swaps,
                "busy_swaps": args.busy_swaps,
                "measured": measured,
            }
        )
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
