"""What a delta weighs against an anchor, and what publishing costs the trainer's steps.

    python benchmarks/bench_publish.py [--items 16000 100000] [--steps 600] [--interval-ms 1000]

*bytes*: files of an anchor and of a delta with 1 % of the rows touched, on disk, with their manifests. A delta carries
all dense parameters, so they bound the ratio for small catalogues: the last column is the size of catalogue above which
it reaches 50.

*steps*: a learner steps in one thread and, in the arm that publishes, snapshots are captured between steps and written
by another thread, as in the daemon: to a file system with fsync, every `--interval-ms`, every tenth an anchor (the
daemon's default is every sixtieth). The arms take turns in blocks, so that a busy machine hits both. `wall` and `cpu`
are milliseconds of a step, `path` those by the clock with the taking of copies (`capture`) after it.

The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from benchmarks.environment import environment
from feature_store.config import FeatureStoreConfig, HotHistoriesConfig
from feature_store.hot import HotHistories
from feature_store.interactions import Interactions
from feature_store.schema import migrate
from feature_store.store import FeatureStore
from model.config import LossConfig, ModelConfig, OptimizerConfig
from model.manifest import Manifest, SnapshotKind
from model.recommender import Recommender
from model.snapshot import snapshot_folder, write_snapshot
from model.swap import take_rows
from online_trainer.batching import MicroBatch, MicroBatcher
from online_trainer.config import TrainerConfig
from online_trainer.learner import OnlineLearner
from online_trainer.learner_config import LearnerConfig
from online_trainer.publisher import Published, Publisher
from online_trainer.steps import LearnedSteps
from stream.clock import WallClock
from stream.messages import HistoryUpdate

TOUCHED = 0.01
BATCH = 128
NUM_USERS = 2_000
POLL = 4_096
START_MS = 1_700_000_000_000


def bytes_of(num_items: int, root: Path) -> dict[str, float]:
    """Sizes on disk of an anchor and of a delta after 1 % of the rows were touched."""
    recommender = Recommender(ModelConfig())
    recommender.items.admit(np.random.default_rng(0).integers(0, 1 << 62, num_items))
    sizes: dict[str, float] = {"items": num_items}
    for version, kind in enumerate(("anchor", "delta"), start=1):
        write(root, recommender, version, kind)  # type: ignore[arg-type]
        folder = root / snapshot_folder("bench", version)
        sizes[f"{kind}_bytes"] = sum(file.stat().st_size for file in folder.iterdir())
        sizes["dense_bytes"] = (folder / "dense.safetensors").stat().st_size
        recommender.items.clear_dirty()
        recommender.items.dirty[: round(num_items * TOUCHED)] = True
    sizes["ratio"] = round(sizes["anchor_bytes"] / sizes["delta_bytes"], 1)
    row_bytes = (sizes["anchor_bytes"] - sizes["dense_bytes"]) / num_items
    sizes["items_for_50"] = round(49 * sizes["dense_bytes"] / (row_bytes * (1 - 50 * TOUCHED)))
    return sizes


def write(root: Path, recommender: Recommender, version: int, kind: SnapshotKind) -> None:
    manifest = Manifest(
        model="bench",
        version=version,
        kind=kind,
        parent=version - 1 if kind == "delta" else None,
        config_hash=recommender.config.config_hash(),
        model_config=recommender.config.as_dict(),
        num_items=recommender.items.num_items,
        created_at_ms=START_MS,
        watermark_ms=START_MS,
    )
    write_snapshot(root, manifest, recommender.dense_state(), take_rows(recommender, kind))


def micro_batches(
    store: FeatureStore, learner: OnlineLearner, num_batches: int, num_items: int
) -> Iterator[MicroBatch]:
    """A made-up stream, stored and announced as ingest does: some items are far more popular than others."""
    rng = np.random.default_rng(1)
    catalogue = rng.integers(0, 1 << 62, num_items)
    learner.model.items.admit(catalogue)
    learner.model.items.clear_dirty()
    batcher = MicroBatcher(max_interactions=BATCH, max_tokens=1 << 20, max_len=64, positions=learner.ledger.positions)
    for number, first in enumerate(range(0, num_batches * BATCH, POLL)):
        times = START_MS + np.arange(first, first + POLL) * 300
        interactions = Interactions(
            user_id=rng.integers(0, NUM_USERS, POLL),
            item_id=catalogue[np.minimum(rng.zipf(1.2, POLL), num_items) - 1],
            event_time_ms=times,
            action=np.ones(POLL, np.uint32),
            value=np.full(POLL, np.nan, np.float32),
            event_key=rng.integers(0, 2**63, POLL).astype(np.uint64),
            seq=np.zeros(POLL, np.uint32),
            arrival_ms=times,
        )
        with store.transaction() as transaction:
            result = transaction.append(interactions)
        update = HistoryUpdate(
            log_id="main",
            partition=0,
            first_offset=first,
            last_offset=first + POLL - 1,
            watermark_ms=int(times[-1]),
            offsets=first + np.flatnonzero(result.accepted),
            append_ms=times[result.accepted],
            interactions=result.accepted_from(interactions),
        )
        batcher.add(update, number)
        while batcher.num_pending >= BATCH:
            batch = batcher.take()
            assert batch is not None
            yield batch


@dataclass
class Stepping:
    """The training path, with and without publishing beside it."""

    learner: OnlineLearner
    publisher: Publisher
    batches: Iterator[MicroBatch]
    interval_ms: int

    def __post_init__(self) -> None:
        self.times: dict[str, list[float]] = defaultdict(list)
        self.published: list[Published] = []
        self._files = ThreadPoolExecutor(1)
        self._writing: Future[Published] | None = None
        self._captured_s = 0.0

    def block(self, num_steps: int, *, publishing: bool) -> None:
        """So many steps of one arm; what is being written at its end belongs to it."""
        arm = "publishing" if publishing else "alone"
        self._captured_s = time.perf_counter()
        for _ in range(num_steps):
            batch = next(self.batches)
            wall, cpu = time.perf_counter(), time.thread_time()
            self.learner.step(batch)
            self.times[f"{arm} wall"].append(time.perf_counter() - wall)
            self.times[f"{arm} cpu"].append(time.thread_time() - cpu)
            ledger = self.learner.ledger
            step = LearnedSteps.of_batch(batch, ledger, at_ms=WallClock().now_ms(), is_set_aside=False)
            self.publisher.learned(batch.interactions.event_time_ms, batch.append_ms, ledger.num_interactions, 0, step)
            if publishing and (time.perf_counter() - self._captured_s) * 1000 >= self.interval_ms:
                self._publish()
            self.times[f"{arm} path"].append(time.perf_counter() - wall)
        self._written()

    def _publish(self) -> None:
        if self._writing is not None and not self._writing.done():
            return
        self._written()
        self._captured_s = time.perf_counter()
        captured = self.publisher.capture(self.learner, traceparent=None)
        assert captured is not None, "held back"
        self.times[f"capture {captured.manifest.kind}"].append(time.perf_counter() - self._captured_s)
        self._writing = self._files.submit(self.publisher.write, captured)

    def _written(self) -> None:
        if self._writing is not None:
            self.published.append(self._writing.result())
            self._writing = None


def step_times(num_items: int, num_steps: int, interval_ms: int, root: Path) -> dict[str, float]:
    """Milliseconds of steps without and with publishing."""
    url = f"sqlite:///{root}/store.db"
    migrate(url)
    store = FeatureStore(FeatureStoreConfig(url=url))
    trainer = TrainerConfig(anchor_every=10, gate_baseline_min=0, num_threads=1)
    config = LearnerConfig(trainer=trainer, model=ModelConfig(), loss=LossConfig(), optimizer=OptimizerConfig())
    learner = OnlineLearner(config, HotHistories(store, HotHistoriesConfig()), log_id="main")
    publisher = Publisher(root / "snapshots", "bench", trainer, store=store, clock=WallClock(), mode="live")
    block = max(1, num_steps // 10)
    batches = micro_batches(store, learner, 2 * num_steps + 3 * block, num_items)
    stepping = Stepping(learner, publisher, batches, interval_ms)
    stepping.block(block, publishing=True)  # warm up
    stepping.times.clear()
    stepping.published.clear()
    for _ in range(num_steps // block):
        for publishing in (False, True):
            stepping.block(block, publishing=publishing)
    store.close()
    found: dict[str, float] = {"items": num_items, "steps": num_steps, "published": len(stepping.published)}
    for name, seconds in stepping.times.items():
        for q in (50, 99):
            found[f"{name} p{q}_ms"] = round(float(np.percentile(seconds, q)) * 1000, 2)
    for kind in ("delta", "anchor"):
        written = [one.seconds for one in stepping.published if one.manifest.kind == kind]
        found[f"write {kind} p50_ms"] = round(float(np.median(written)) * 1000, 1) if written else -1.0
    for clock in ("wall", "cpu", "path"):
        ratio = found[f"publishing {clock} p99_ms"] / found[f"alone {clock} p99_ms"]
        found[f"{clock} p99 ratio"] = round(ratio, 3)
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description="bytes and cost of publishing")
    parser.add_argument("--items", type=int, nargs="+", default=[16_000, 100_000], help="rows of the catalogue")
    parser.add_argument("--steps", type=int, default=600, help="steps per arm; 0: only bytes")
    parser.add_argument("--interval-ms", type=int, default=1_000, help="time between two snapshots")
    args = parser.parse_args()
    torch.set_num_threads(1)
    sizes, steps = [], []
    print(f"{'items':>9}{'anchor B':>13}{'delta B':>11}{'dense B':>10}{'ratio':>8}{'50 at items':>13}")
    for num_items in args.items:
        with tempfile.TemporaryDirectory() as folder:
            found = bytes_of(num_items, Path(folder))
        sizes.append(found)
        print(
            f"{num_items:>9,}{found['anchor_bytes']:>13,}{found['delta_bytes']:>11,}{found['dense_bytes']:>10,}"
            f"{found['ratio']:>8}{found['items_for_50']:>13,}",
            flush=True,
        )
    for num_items in args.items if args.steps else []:
        with tempfile.TemporaryDirectory() as folder:
            measured = step_times(num_items, args.steps, args.interval_ms, Path(folder))
        steps.append(measured)
        print(f"\n{num_items:,} items, {args.steps} steps an arm, {measured['published']} snapshots")
        for name, value in measured.items():
            if "_ms" in name or "ratio" in name:
                print(f"  {name:<26}{value:>10}", flush=True)
    print(json.dumps({"benchmark": "publish", **environment(), "touched": TOUCHED, "bytes": sizes, "steps": steps}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
