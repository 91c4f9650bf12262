"""What surviving costs: a stream with poisoned batches against a clean one, and a checkpoint against a step.

    python benchmarks/bench_survival.py [--limit 40000] [--only poison checkpoint]

*Poison*: movietweetings; in 1 % of the batches, from the tenth part of the stream on, every item is replaced by one
that nobody has ever seen, as by bots that make them up. NDCG@20 over the clean batches after the first poisoned one: of
the clean stream (three seeds of the model: their spread is the noise), of the poisoned one with the guard's defaults,
and without it (the yardstick).
*Checkpoint*: CPU time of copying everything a checkpoint holds, which is what training stands still for (the files are
written by another thread), against that of a step on the same catalogue. One thread; the last line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
from numpy.typing import NDArray

from backtest.datasets import movietweetings
from benchmarks.environment import environment
from benchmarks.in_process import batches, learner_with_store
from feature_store.interactions import Interactions
from model.config import LossConfig, ModelConfig, OptimizerConfig
from online_trainer.config import TrainerConfig
from online_trainer.learner_config import LearnerConfig

BATCH = TrainerConfig().batch_interactions
POISONED_EVERY = 100
SEEDS = (0, 1, 2)
CATALOGUES = (12_000, 100_000, 400_000)


def config(*, seed: int = 0, loss: LossConfig | None = None, **trainer: Any) -> LearnerConfig:
    return LearnerConfig(
        trainer=TrainerConfig(num_threads=1, **trainer),
        model=ModelConfig(seed=seed),
        loss=loss or LossConfig(),
        optimizer=OptimizerConfig(),
    )


def clean_stream(limit: int) -> Interactions:
    rows = pl.read_parquet(movietweetings().interactions).sort("timestamp", maintain_order=True).head(limit)
    user, item, time_s = (rows[column].cast(pl.Int64).to_numpy() for column in ("user_id", "item_id", "timestamp"))
    N = len(user)
    return Interactions(
        user_id=user,
        item_id=item,
        event_time_ms=time_s * 1000,
        action=np.ones(N, np.uint32),
        value=np.full(N, np.nan, np.float32),
        event_key=np.random.default_rng(0).integers(0, 2**63, N).astype(np.uint64),
        seq=np.zeros(N, np.uint32),
        arrival_ms=time_s * 1000,
    )


def poisoned(stream: Interactions) -> tuple[Interactions, NDArray[np.bool_]]:
    """The stream with made-up items in every hundredth batch after its first tenth; bool[N], where."""
    number = np.arange(len(stream)) // BATCH
    is_bot = (number >= len(stream) // BATCH // 10) & (number % POISONED_EVERY == POISONED_EVERY - 1)
    made_up = np.random.default_rng(1).integers(1 << 40, 1 << 41, len(stream))
    return replace(stream, item_id=np.where(is_bot, made_up, stream.item_id)), is_bot


def quality(stream: Interactions, is_bot: NDArray[np.bool_], learning: LearnerConfig) -> dict[str, float]:
    """NDCG@20 over the batches that hold no bot, from the first that does; and how many were set aside."""
    first, total, count = int(np.argmax(is_bot)), 0.0, 0.0
    before = (0.0, 0.0)
    with learner_with_store(learning) as (learner, store):
        for batch in batches(learner, store, learning, stream):
            start = learner.ledger.num_interactions
            learner.step(batch)
            summary = learner.metrics_summary()
            tested = summary["model.lifetime.count"]
            after = (tested, summary.get("model.lifetime.ndcg_at_20", 0.0) * tested)
            if start >= first and not is_bot[start : learner.ledger.num_interactions].any():
                count, total = count + after[0] - before[0], total + after[1] - before[1]
            before = after
        return {"ndcg_at_20": total / count, "set_aside": len(learner.set_aside)}


def poison(limit: int) -> dict[str, Any]:
    clean = clean_stream(limit)
    spoiled, is_bot = poisoned(clean)
    of_seed = [quality(clean, is_bot, config(seed=seed))["ndcg_at_20"] for seed in SEEDS]
    guarded = quality(spoiled, is_bot, config())
    unguarded = quality(spoiled, is_bot, config(spike_deviations=0.0))
    found = {
        "poisoned_batches": int(is_bot.sum()) // BATCH,
        "clean": of_seed,
        "noise": float(np.std(of_seed, ddof=1)),
        "poisoned": guarded,
        "poisoned_without_guard": unguarded,
        "poisoned_to_clean": guarded["ndcg_at_20"] / of_seed[0],
    }
    print(f"poison: {found['poisoned_batches']} batches; clean {of_seed[0]:.4f} (seeds {min(of_seed):.4f} to "
          f"{max(of_seed):.4f}), poisoned {guarded['ndcg_at_20']:.4f} with {guarded['set_aside']} set aside, "
          f"without guard {unguarded['ndcg_at_20']:.4f}", flush=True)  # fmt: skip
    return found


def checkpoint(num_items: int) -> dict[str, float]:
    """Milliseconds of CPU time: the median of copying, and of a step on a catalogue of so many items."""
    rng = np.random.default_rng(0)
    N = 20 * BATCH
    stream = Interactions(
        user_id=rng.integers(0, 400, N),
        item_id=rng.integers(0, num_items, N),
        event_time_ms=1_700_000_000_000 + 1_000 * np.arange(N),
        action=np.ones(N, np.uint32),
        value=np.full(N, np.nan, np.float32),
        event_key=rng.integers(0, 2**63, N).astype(np.uint64),
        seq=np.zeros(N, np.uint32),
        arrival_ms=np.full(N, 1_700_000_000_000),
    )
    learning = config(loss=LossConfig(kind="full" if num_items <= 100_000 else "sampled"))
    steps, copies = [], []
    with learner_with_store(learning) as (learner, store):
        for first in range(0, num_items, 50_000):
            learner.model.items.admit(np.arange(first, min(first + 50_000, num_items)))
        for number, batch in enumerate(batches(learner, store, learning, stream)):
            started_s = time.process_time()
            learner.step(batch)
            steps.append(time.process_time() - started_s)
            if number % 4 == 3:
                started_s = time.process_time()
                learner.capture_checkpoint()
                copies.append(time.process_time() - started_s)
    found = {"step_ms": 1000 * float(np.median(steps)), "copy_ms": 1000 * float(np.median(copies))}
    found["copy_to_step"] = found["copy_ms"] / found["step_ms"]
    print(f"checkpoint: {num_items:,} items: step {found['step_ms']:.0f} ms, copy {found['copy_ms']:.0f} ms, "
          f"ratio {found['copy_to_step']:.2f}", flush=True)  # fmt: skip
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description="poisoned batches and checkpoints")
    parser.add_argument("--limit", type=int, default=40_000)
    parser.add_argument("--only", nargs="+", default=["poison", "checkpoint"])
    parser.add_argument("--results", type=Path)
    options = parser.parse_args()
    result: dict[str, Any] = {"benchmark": "survival", "limit": options.limit, **environment()}
    if "checkpoint" in options.only:
        result["checkpoint"] = {str(num_items): checkpoint(num_items) for num_items in CATALOGUES}
    if "poison" in options.only:
        result["poison"] = poison(options.limit)
    if options.results:
        options.results.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
