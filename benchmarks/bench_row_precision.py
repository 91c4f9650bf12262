"""Item embeddings in snapshots as float32, int8 and int4: bytes, quality of what workers answer by, and swap time.

    python benchmarks/bench_row_precision.py [--events 60000] [--items 16000 100000] [--swaps 30]

*bytes*: rows.safetensors of an anchor, and of a delta with 1 % of the rows touched, by size of catalogue.

*quality*: a learner with the defaults takes in the first ratings of movietweetings, and publishes every 1,024
interactions. A replica for each precision swaps to what is published, and answers what comes until the next: HR@10 and
NDCG@20 over the whole live catalogue without what the user has seen, after the first fifth of the stream. The replicas
answer the same questions with the same dense parameters, so differences are those of the rows.

*swap*: milliseconds of CPU time of reading, verifying and decoding a delta of 1,400 rows (`load`, aside), of working
out what it changes (`plan`, aside) and of carrying it out (`pause`).

*sent*: the trainer's way to a device (trainer.device_rows), without one: bytes that go over for the whole catalogue
and for the rows of a step, and milliseconds of CPU time of rounding what a step changed (`refresh`), of taking a step's
rows (`take`) and of making embeddings of their codes (`restore`, which a device does).

The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from backtest.queries import Queries, rank_queries
from backtest.replicas import ChangedRows, Replica, taken_snapshot
from benchmarks.environment import environment
from benchmarks.in_process import batches, learner_with_store
from benchmarks.study_stream import ratings
from kernels.host_memory import keep_freed_memory
from model.config import ROW_PRECISIONS, LossConfig, ModelConfig, OptimizerConfig, RowPrecision
from model.device_rows import DeviceRows
from model.item_table import ItemTable
from model.manifest import Manifest, SnapshotKind
from model.recommender import Recommender
from model.row_precision import bytes_of_row
from model.snapshot import load_snapshot, write_snapshot
from model.swap import apply_snapshot, carry_out, plan_snapshot, take_rows
from online_trainer.config import TrainerConfig
from online_trainer.learner import MeasuredStep
from online_trainer.learner_config import LearnerConfig

TOUCHED = 0.01
SWAPPED_ROWS = 1_400
SENT_ROWS = 4_000
"""Distinct items in the histories of a step."""
PUBLISH_STEPS = 8


def write(root: Path, recommender: Recommender, version: int, kind: SnapshotKind, precision: RowPrecision) -> Manifest:
    manifest = Manifest(
        model="bench",
        version=version,
        kind=kind,
        parent=version - 1 if kind == "delta" else None,
        config_hash=recommender.config.config_hash(),
        model_config=recommender.config.as_dict(),
        num_items=recommender.items.num_items,
        created_at_ms=0,
        watermark_ms=0,
        row_precision=precision,
    )
    return write_snapshot(root, manifest, recommender.dense_state(), take_rows(recommender, kind))


def touched(recommender: Recommender, num_rows: int) -> None:
    """Mark so many rows as changed, and none else."""
    recommender.items.clear_dirty()
    recommender.items.dirty[:num_rows] = True


def bytes_of(num_items: int) -> dict[str, Any]:
    recommender = Recommender(ModelConfig())
    recommender.items.admit(np.random.default_rng(0).integers(0, 1 << 62, num_items))
    found: dict[str, Any] = {"items": num_items}
    for precision in ROW_PRECISIONS:
        with tempfile.TemporaryDirectory() as folder:
            anchor = write(Path(folder), recommender, 1, "anchor", precision)
            touched(recommender, round(num_items * TOUCHED))
            delta = write(Path(folder), recommender, 2, "delta", precision)
        sizes = {
            name: sum(file.size for file in one.files.values()) for name, one in (("anchor", anchor), ("delta", delta))
        }
        rows = {
            f"{name}_rows": one.files["rows.safetensors"].size for name, one in (("anchor", anchor), ("delta", delta))
        }
        found[precision] = {**sizes, **rows, "ratio": round(sizes["anchor"] / sizes["delta"], 1)}
    return found


def swap_times(num_items: int, num_swaps: int, precision: RowPrecision) -> dict[str, float]:
    """Medians, milliseconds of CPU time."""
    recommender, replica = Recommender(ModelConfig()), Recommender(ModelConfig())
    recommender.items.admit(np.random.default_rng(0).integers(0, 1 << 62, num_items))
    times: dict[str, list[float]] = {"load": [], "plan": [], "pause": []}
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        write(root, recommender, 1, "anchor", precision)
        apply_snapshot(replica, load_snapshot(root, "bench", 1))
        for version in range(2, num_swaps + 2):
            touched(recommender, SWAPPED_ROWS)
            write(root, recommender, version, "delta", precision)
            began = time.process_time()
            snapshot = load_snapshot(root, "bench", version)
            loaded = time.process_time()
            planned = plan_snapshot(replica, snapshot)
            worked_out = time.process_time()
            carry_out(planned)
            done = time.process_time()
            for name, seconds in (
                ("load", loaded - began),
                ("plan", worked_out - loaded),
                ("pause", done - worked_out),
            ):
                times[name].append(1_000 * seconds)
    return {name: round(float(np.median(values)), 3) for name, values in times.items()}


def sent(num_items: int, num_rows: int, precision: RowPrecision, *, repeats: int = 20) -> dict[str, Any]:
    """Medians, milliseconds of CPU time; a step reads num_rows rows and changes as many."""
    items = ItemTable(ModelConfig())
    items.admit(np.random.default_rng(0).integers(0, 1 << 62, num_items))
    rounds = precision != "float32"
    rows = DeviceRows(items, precision) if rounds else None
    took: dict[str, list[float]] = {"refresh": [], "take": [], "restore": []}
    drawn = torch.Generator().manual_seed(0)
    for _repeat in range(repeats):
        of_step = torch.randperm(num_items, generator=drawn)[:num_rows].sort().values
        began = time.process_time()
        if rows is not None:
            rows.refresh()
        refreshed = time.process_time()
        codes = None if rows is None else rows.codes(of_step)
        if codes is None:
            items.weight[of_step].clone()
        taken = time.process_time()
        if codes is not None:
            codes.weight()
        done = time.process_time()
        items.mark_changed(of_step)
        for name, seconds in (
            ("refresh", refreshed - began),
            ("take", taken - refreshed),
            ("restore", done - taken),
        ):
            took[name].append(1_000 * seconds)
    each = bytes_of_row(items.config.embedding_dim, precision)
    medians = {name: round(float(np.median(values[1:])), 3) for name, values in took.items()}
    return {
        "items": num_items,
        "rows": num_rows,
        "catalogue_bytes": each * num_items,
        "step_bytes": each * num_rows,
    } | {f"{name}_ms": value for name, value in medians.items()}


@dataclass(slots=True)
class Answers:
    """One precision's replica and its sums."""

    precision: RowPrecision
    replica: Replica
    ranks: list[np.ndarray[Any, Any]] = field(default_factory=list)

    def means(self) -> dict[str, float]:
        rank_P = np.concatenate(self.ranks)
        gain_P = np.where(rank_P <= 20, 1 / np.log2(1.0 + np.minimum(rank_P, 20)), 0.0)
        return {"count": len(rank_P), "hr_at_10": float((rank_P <= 10).mean()), "ndcg_at_20": float(gain_P.mean())}


def quality(num_events: int) -> dict[str, Any]:
    stream = ratings(num_events).interactions
    config = LearnerConfig(
        trainer=TrainerConfig(num_threads=1), model=ModelConfig(), loss=LossConfig(), optimizer=OptimizerConfig()
    )
    arms = [Answers(precision=one, replica=Replica(config.model)) for one in ROW_PRECISIONS]
    changed, first = ChangedRows(), num_events // 5
    with learner_with_store(config) as (learner, store):

        def on_tested(step: MeasuredStep) -> None:
            if learner.ledger.num_interactions < first or arms[0].replica.step is None:
                return
            examples = step.examples
            repeats_P = np.zeros(len(examples.positions), np.bool_)
            asked = Queries.of_examples(
                examples, np.ones(len(repeats_P), np.int64) * 64, is_repeat_P=repeats_P, sample_every=1 << 30
            )
            for arm in arms:
                arm.ranks.append(rank_queries(arm.replica.model, arm.replica.catalogue, asked).rank_P)

        learner.on_tested = on_tested
        for batch in batches(learner, store, config, stream):
            learner.step(batch)
            ledger = learner.ledger
            changed.after_step(learner.model, ledger.num_steps, ledger.num_items_retired)
            if ledger.num_steps % PUBLISH_STEPS == 0:
                for arm in arms:
                    since = arm.replica.step
                    arm.replica.apply(
                        taken_snapshot(
                            learner.model, changed, step=ledger.num_steps, since=since, row_precision=arm.precision
                        )
                    )
    return {"events": num_events, **{arm.precision: arm.means() for arm in arms}}


def main() -> None:
    parser = argparse.ArgumentParser(description="Snapshots with rows of fewer bits.")
    parser.add_argument("--items", type=int, nargs="+", default=[16_000, 100_000], help="rows of the catalogue")
    parser.add_argument("--events", type=int, default=60_000, help="ratings of movietweetings; 0: no quality")
    parser.add_argument("--swaps", type=int, default=30)
    parser.add_argument("--results", type=Path, help="JSON file to write")
    options = parser.parse_args()
    torch.set_num_threads(1)
    keep_freed_memory()
    result: dict[str, Any] = {"benchmark": "row-precision", **environment(), "touched": TOUCHED}
    result["bytes"] = [bytes_of(num_items) for num_items in options.items]
    print(f"{'items':>9} {'rows':<9}{'anchor B':>12}{'delta B':>10}{'of it rows':>12}{'anchor/delta':>14}")
    for sizes in result["bytes"]:
        for precision in ROW_PRECISIONS:
            row = sizes[precision]
            print(
                f"{sizes['items']:>9,} {precision:<9}{row['anchor']:>12,}{row['delta']:>10,}"
                f"{row['delta_rows']:>12,}{row['ratio']:>14}",
                flush=True,
            )
    result["swap"] = {one: swap_times(options.items[0], options.swaps, one) for one in ROW_PRECISIONS}
    for precision, times in result["swap"].items():
        print(f"{precision:<9}" + "".join(f"  {name} {ms:.2f} ms" for name, ms in times.items()), flush=True)
    result["sent"] = {one: [sent(num, SENT_ROWS, one) for num in options.items] for one in ROW_PRECISIONS}
    for precision, cases in result["sent"].items():
        for row in cases:
            print(
                f"{precision:<9}  catalogue of {row['items']:,}: {row['catalogue_bytes']:,} B; {row['rows']:,} rows:"
                f" {row['step_bytes']:,} B, refresh {row['refresh_ms']} ms, take {row['take_ms']} ms, restore"
                f" {row['restore_ms']} ms",
                flush=True,
            )
    if options.events:
        result["quality"] = quality(options.events)
        for precision in ROW_PRECISIONS:
            row = result["quality"][precision]
            print(f"{precision:<9}  HR@10 {row['hr_at_10']:.4f}  NDCG@20 {row['ndcg_at_20']:.4f}", flush=True)
    if options.results:
        options.results.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
