"""What the prequential metrics cost of a training step.

    python benchmarks/bench_metrics.py [--steps 100] [--losses full sampled]

The stream is movietweetings (12,611 items, histories up to 64), in steps of 128 interactions; the learner learns all
of it but its end, then two copies of it learn the end, taking turns. Arms: *on* is the trainer's learner, with three
arms of metrics and both baselines; *off* is the same learner with a test that does nothing (with the full softmax the
logits are needed anyway, with the sampled one nobody asks for them). Both end with the same weights, bit by bit, or
the run fails. Times are CPU time of the process, which a busy machine disturbs less than the clock, on one thread.

    share = (on - off) / on, target <= 25 %

*read* is what one look at all metrics costs: every `trainer.metrics_every_steps` for the metrics file, and whenever
somebody scrapes. The table's times are milliseconds, means over the steps. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from backtest.datasets import movietweetings
from backtest.replay import read_recorded
from benchmarks.environment import environment
from feature_store.config import FeatureStoreConfig, HotHistoriesConfig
from feature_store.hot import HotHistories
from feature_store.interactions import Interactions
from feature_store.schema import migrate
from feature_store.store import FeatureStore
from model.config import LossConfig, ModelConfig, OptimizerConfig
from online_trainer.batching import MicroBatch, MicroBatcher
from online_trainer.config import TrainerConfig
from online_trainer.evaluation import Evaluation
from online_trainer.learner import OnlineLearner
from online_trainer.learner_config import LearnerConfig
from stream.messages import HistoryUpdate

TARGET = 0.25
LOG_ID = "bench"
MAX_LEN = 64
POLL = 5_000
COLUMNS = ("on_ms", "off_ms", "metrics_ms", "share", "read_ms", "read_share")


class Untested(Evaluation):
    """Tests nothing and counts nothing."""

    def start(self, *_args: Any, **_kwargs: Any) -> Any:
        return SimpleNamespace(on_logits=None)

    def finish(self, *_args: Any) -> dict[str, NDArray[np.int64]]:
        return {}

    def observe(self, *_args: Any) -> None:
        pass


def interactions(limit: int | None) -> Interactions:
    dataset = movietweetings()
    recorded = read_recorded(dataset.interactions, dataset.columns, limit=limit)
    num = len(recorded)
    return Interactions(
        user_id=np.array(recorded.user_id, np.int64),
        item_id=np.array(recorded.item_id, np.int64),
        event_time_ms=recorded.event_time_ms.astype(np.int64),
        action=np.ones(num, np.uint32),
        value=np.full(num, np.nan, np.float32),
        event_key=np.arange(num, dtype=np.uint64),
        seq=np.zeros(num, np.uint32),
        arrival_ms=np.zeros(num, np.int64),
    )


def batches(store: FeatureStore, events: Interactions, config: LearnerConfig) -> list[MicroBatch]:
    """The whole stream as micro-batches, all of it durable in the store."""
    batcher = MicroBatcher(
        max_interactions=config.trainer.batch_interactions,
        max_tokens=config.trainer.batch_tokens,
        max_len=config.model.max_len,
        positions={},
    )
    for number, first in enumerate(range(0, len(events), POLL)):
        poll = events.take(slice(first, first + POLL))
        with store.transaction() as transaction:
            result = transaction.append(poll)
        offsets = np.flatnonzero(result.accepted) + first
        update = HistoryUpdate(
            log_id=LOG_ID,
            partition=0,
            first_offset=first,
            last_offset=first + len(poll) - 1,
            watermark_ms=int(poll.event_time_ms.max()),
            offsets=offsets,
            append_ms=offsets,
            interactions=result.accepted_from(poll),
        )
        batcher.add(update, number)
    taken = []
    while (batch := batcher.take()) is not None:
        taken.append(batch)
    return taken


def learner(store: FeatureStore, config: LearnerConfig) -> OnlineLearner:
    return OnlineLearner(config, HotHistories(store, HotHistoriesConfig(max_len=MAX_LEN + 1)), log_id=LOG_ID)


def measure(
    store: FeatureStore, config: LearnerConfig, first: OnlineLearner, steps: list[MicroBatch]
) -> dict[str, Any]:
    """CPU milliseconds of a step in either arm, and of a look at all metrics."""
    arms = {name: learner(store, config) for name in ("on", "off")}
    arms["off"].evaluation = Untested(config.trainer)
    for arm in arms.values():
        arm.load_checkpoint(first.capture_checkpoint())
    taken_s: dict[str, list[float]] = {name: [] for name in arms}
    for number, batch in enumerate(steps):
        for name in sorted(arms, reverse=bool(number % 2)):
            started = time.process_time()
            arms[name].step(batch)
            taken_s[name].append(time.process_time() - started)
    weights = {name: arm.model.dense_state() | arm.model.items.state_dict() for name, arm in arms.items()}
    assert all(torch.equal(tensor, weights["off"][name]) for name, tensor in weights["on"].items()), "arms differ"
    started = time.process_time()
    for _ in range(20):
        arms["on"].evaluation.detailed()
    read_ms = (time.process_time() - started) / 20 * 1000
    warm = {name: np.array(values[len(values) // 10 :]) * 1000 for name, values in taken_s.items()}
    on_ms, off_ms = float(warm["on"].mean()), float(warm["off"].mean())
    return {
        "on_ms": round(on_ms, 3),
        "off_ms": round(off_ms, 3),
        "metrics_ms": round(on_ms - off_ms, 3),
        "share": round((on_ms - off_ms) / on_ms, 4),
        "share_p10_p90": [round(float(np.percentile(1 - warm["off"] / warm["on"], q)), 4) for q in (10, 90)],
        "read_ms": round(read_ms, 3),
        "read_share": round(read_ms / config.trainer.metrics_every_steps / on_ms, 4),
    }


def run(num_steps: int, losses: Sequence[str], limit: int | None) -> dict[str, Any]:
    """Learn the stream but its end, once, then measure the end with each loss."""

    def config(loss: str) -> LearnerConfig:
        return LearnerConfig(
            trainer=TrainerConfig(num_threads=1),
            model=ModelConfig(max_len=MAX_LEN),
            loss=LossConfig(kind=loss),  # type: ignore[arg-type]
            optimizer=OptimizerConfig(),
        )

    with tempfile.TemporaryDirectory() as folder:
        url = f"sqlite:///{Path(folder) / 'bench.db'}"
        migrate(url)
        store = FeatureStore(FeatureStoreConfig(url=url))
        try:
            steps = batches(store, interactions(limit), config("full"))
            first = learner(store, config("full"))
            for batch in steps[:-num_steps]:
                first.step(batch)
            print(f"{len(steps) - num_steps} steps learned, {first.num_items} items; {num_steps} steps are measured")
            print(f"{'loss':<10}" + "".join(f"{name:>13}" for name in COLUMNS), flush=True)
            found = {}
            for loss in losses:
                found[loss] = measure(store, config(loss), first, steps[-num_steps:])
                print(f"{loss:<10}" + "".join(f"{found[loss][name]:>13}" for name in COLUMNS), flush=True)
        finally:
            store.close()
    return {"items": first.num_items, "steps": num_steps, "target_share": TARGET, "measured": found}


def main() -> int:
    parser = argparse.ArgumentParser(description="the cost of prequential metrics")
    parser.add_argument("--steps", type=int, default=100, help="steps measured, at the end of the stream")
    parser.add_argument("--losses", nargs="+", default=["full", "sampled"], choices=("full", "sampled"))
    parser.add_argument("--limit", type=int, help="only the first so many interactions of the stream")
    args = parser.parse_args()
    torch.set_num_threads(1)
    print(json.dumps({"benchmark": "metrics", **environment(), **run(args.steps, args.losses, args.limit)}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
