"""What a backtest costs: stream and store alone, one online arm with full-catalogue metrics, the freshness curve.

    python benchmarks/bench_backtest.py [--events 100000] [--globo ../shared/data/globo-news/clicks.parquet]

HSTU, width 64, 2 layers, histories of 50, one thread. On globo-news where it is, else on movietweetings, which ships
with headrace. Rates are events a second of CPU time: other work on the machine does not change them. Prints a table;
the last line is one JSON object. --results writes it to a file, too.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from backtest.arrivals import ArrivalConfig
from backtest.engine import Backtest, EngineParts
from backtest.event_columns import EventColumns
from backtest.ingest_stage import IngestStage
from backtest.recording import Recording
from backtest.run_config import BacktestConfig
from backtest.run_state import RunOutcome
from backtest.sources import SourceConfig, open_source
from benchmarks.environment import environment
from feature_store.config import FeatureStoreConfig, HotHistoriesConfig
from feature_store.schema import migrate
from feature_store.store import FeatureStore
from kernels.host_memory import keep_freed_memory
from model.config import LossConfig, ModelConfig, OptimizerConfig
from online_trainer.config import TrainerConfig
from online_trainer.learner_config import LearnerConfig
from stream.events import EventRules

EIGHT = ("batch", "1s", "10s", "1m", "10m", "1h", "1d", "never")


def main() -> None:
    options = _options()
    keep_freed_memory()
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        source, name = _source(options, root)
        stream = _stream_alone(source, root, min(options.stream_events, len(source)))
        one = _run(source, root / "one", options.events, publish_every=("batch",))
        eight = _run(source, root / "eight", options.events, publish_every=EIGHT)
    result = {
        "benchmark": "backtest",
        "log": name,
        "stream_and_store_events_per_cpu_s": round(stream),
        "one_arm_events_per_cpu_s": round(one.num_events / one.cpu_s),
        "eight_arms_events_per_cpu_s": round(eight.num_events / eight.cpu_s),
        "eight_arms_times_one": round(eight.cpu_s / one.cpu_s, 3),
        "events": one.num_events,
        "one_arm_shared_cpu_s": one.costs["shared"].cpu_s,
        **environment(),
    }
    _print(result)
    if options.results:
        options.results.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(result))


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="What a backtest costs.")
    parser.add_argument("--globo", type=Path, default=Path("../shared/data/globo-news/clicks.parquet"))
    parser.add_argument("--events", type=int, default=100_000, help="of the runs with arms")
    parser.add_argument("--stream-events", type=int, default=1_000_000, help="of stream and store alone")
    parser.add_argument("--results", type=Path, help="JSON file to write")
    return parser.parse_args()


def _source(options: argparse.Namespace, root: Path) -> tuple[Recording, str]:
    config, name = SourceConfig(format="movietweetings"), "movietweetings"
    if options.globo.is_file():
        config = SourceConfig(paths=(str(options.globo),), time="event_time_ms", time_unit="ms", default_action="click")
        name = "globo-news"
    return open_source(config, root / "recordings"), name


def _stream_alone(source: Recording, root: Path, num_events: int) -> float:
    """Events a CPU second from the recording to durable histories and decoded updates."""

    poll_events = BacktestConfig(publish_every=("batch",)).poll_events

    async def replayed() -> float:
        await stage.start()
        started_s = time.process_time()
        for batch in source.batches(poll_events, end=num_events):
            await stage.commit(EventColumns.of(batch))
        return num_events / (time.process_time() - started_s)

    url = f"sqlite:///{root}/stream.db"
    migrate(url)
    store = FeatureStore(FeatureStoreConfig(url=url))
    stage = IngestStage(store, EventRules())
    try:
        return asyncio.run(replayed())
    finally:
        stage.close()
        store.close()


def _run(source: Recording, root: Path, num_events: int, **options: Any) -> RunOutcome:
    trainer = replace(TrainerConfig(), baseline_half_life_h=1.0)
    parts = EngineParts(
        source=source,
        config=BacktestConfig(limit=num_events, keep_weights_every="never", **options),
        arrivals=ArrivalConfig(),
        rules=EventRules(),
        store=FeatureStoreConfig(url="sqlite:///unused.db"),
        hot=HotHistoriesConfig(),
        learner=LearnerConfig(
            trainer=trainer,
            model=ModelConfig(max_len=50, trend_half_life_s=3_600.0),
            loss=LossConfig(),
            optimizer=OptimizerConfig(),
        ),
        root=root,
    )
    return asyncio.run(Backtest(parts).run())


def _print(result: dict[str, Any]) -> None:
    print(f"{result['log']}, {result['events']:,} events")
    print(f"  stream and store alone   {result['stream_and_store_events_per_cpu_s']:>9,} events a CPU second")
    print(f"  one online arm           {result['one_arm_events_per_cpu_s']:>9,}")
    print(f"  eight publishing times   {result['eight_arms_events_per_cpu_s']:>9,}", end="")
    print(f"   {result['eight_arms_times_one']:.2f} times the cost of one")


if __name__ == "__main__":
    main()
