"""How well the trainer predicts real streams, each interaction before it is learned from, against decayed popularity.

    python benchmarks/quality.py [--streams movietweetings globo-news] [--limit 200000] [--set optimizer.beta2=0.99]

Every interaction of a user with an earlier one, ranked among the whole live catalogue without what the user has seen,
for the model and the baselines alike. movietweetings ships with headrace; globo-news is read from --globo and left out
where it is not there. The first stream runs with the defaults of headrace.toml, the second with those and the settings
in STREAMS, and what --set says. One thread. Writes --results: JSON, and a picture of the curves beside it. The last
line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
from numpy.typing import NDArray

from backtest.datasets import movietweetings
from benchmarks.environment import environment
from benchmarks.in_process import batches, learner_with_store
from feature_store.interactions import Interactions
from kernels.host_memory import keep_freed_memory
from model.config import LossConfig, ModelConfig, OptimizerConfig
from online_trainer.config import ItemsConfig, TrainerConfig
from online_trainer.learner_config import LearnerConfig

ARMS = ("model", "popularity", "cooccurrence")
METRICS = ("hr_at_10", "ndcg_at_20", "mrr")
NUM_POINTS = 100
"""Of a curve."""
_TABLES: dict[str, Any] = {
    "trainer": TrainerConfig,
    "items": ItemsConfig,
    "model": ModelConfig,
    "loss": LossConfig,
    "optimizer": OptimizerConfig,
}


def main() -> None:
    options = _options()
    keep_freed_memory()
    found = {}
    for name in options.streams:
        if name == "globo-news" and not options.globo.is_file():
            print(f"{name}: {options.globo} is not there, left out (--globo)")
            continue
        found[name] = _run(name, options)
        _print(name, found[name])
    result = {"benchmark": "quality", "set": options.set, "streams": found, **environment()}
    if options.results:
        options.results.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
        _draw(found, options.results.with_suffix(".png"))
    brief = {name: {key: value for key, value in of.items() if key != "curve"} for name, of in found.items()}
    print(json.dumps({**result, "streams": brief}))


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Prequential quality on real streams.")
    parser.add_argument("--streams", nargs="+", choices=STREAMS, default=list(STREAMS))
    parser.add_argument("--globo", type=Path, default=Path("../shared/data/globo-news/clicks.parquet"))
    parser.add_argument("--limit", type=int, help="events of each stream at most")
    parser.add_argument("--set", nargs="*", default=[], help="settings as in headrace.toml, such as model.max_len=50")
    parser.add_argument("--results", type=Path, help="JSON file to write, with a picture beside it")
    return parser.parse_args()


@dataclass(frozen=True, kw_only=True, slots=True)
class Stream:
    """A recorded stream and the settings that suit it."""

    read: Callable[[argparse.Namespace], tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]]
    """User ids, item ids and event times (ms) in event-time order."""
    settings: dict[str, dict[str, Any]]


def _movietweetings(_options: argparse.Namespace) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
    rows = pl.read_parquet(movietweetings().interactions).sort("timestamp", maintain_order=True)
    return _columns(rows, rows["timestamp"] * 1000)


def _globo_news(options: argparse.Namespace) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
    rows = pl.read_parquet(options.globo).sort("event_time_ms", maintain_order=True)
    return _columns(rows, rows["event_time_ms"])


def _columns(rows: pl.DataFrame, time_ms: pl.Series) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
    user, item, time = (column.cast(pl.Int64).to_numpy() for column in (rows["user_id"], rows["item_id"], time_ms))
    return user, item, time


STREAMS = {
    "movietweetings": Stream(read=_movietweetings, settings={}),
    # News: an hour is long, and a visit short.
    "globo-news": Stream(
        read=_globo_news,
        settings={"trainer": {"baseline_half_life_h": 1.0}, "model": {"trend_half_life_s": 3600.0, "max_len": 50}},
    ),
}


def _config(settings: dict[str, dict[str, Any]], given: list[str]) -> LearnerConfig:
    tables: dict[str, dict[str, Any]] = {table: dict(settings.get(table, {})) for table in _TABLES}
    tables["trainer"].setdefault("num_threads", 1)
    for one in given:
        key, value = one.split("=", 1)
        table, field = key.split(".")
        tables[table][field] = _value(value)
    return LearnerConfig(**{table: kind(**tables[table]) for table, kind in _TABLES.items()})


def _value(text: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return text


def _run(name: str, options: argparse.Namespace) -> dict[str, Any]:
    config = _config(STREAMS[name].settings, options.set)
    stream = _interactions(*STREAMS[name].read(options), limit=options.limit)
    curve: list[dict[str, float]] = []
    with learner_with_store(config) as (learner, store):
        started_s, began_s = time.process_time(), time.perf_counter()
        for batch in batches(learner, store, config, stream):
            learner.step(batch)
            taken = learner.ledger.num_interactions
            if taken * NUM_POINTS // len(stream) > len(curve):
                summary = learner.metrics_summary()
                kept = {key: value for key, value in summary.items() if key.endswith((".count", *METRICS))}
                curve.append({"events": taken, **kept})
        cpu_s, seconds = time.process_time() - started_s, time.perf_counter() - began_s
        num_items = learner.num_items
    whole, half = curve[-1], min(curve, key=lambda point: abs(point["events"] - len(stream) / 2))
    arms = {arm: _arm(arm, half, whole) for arm in ARMS}
    against = {
        f"{part}.{metric}": arms["model"][part][metric] / arms["popularity"][part][metric]
        for part in ("whole", "second_half")
        for metric in METRICS
    }
    speed = {"events_per_s": len(stream) / seconds, "events_per_cpu_s": len(stream) / cpu_s}
    return {
        "events": len(stream), "items": num_items, "arms": arms, "times_popularity": against, **speed, "curve": curve
    }  # fmt: skip


def _interactions(
    user_id: NDArray[np.int64], item_id: NDArray[np.int64], time_ms: NDArray[np.int64], *, limit: int | None
) -> Interactions:
    N = len(user_id) if limit is None else min(limit, len(user_id))
    return Interactions(
        user_id=user_id[:N],
        item_id=item_id[:N],
        event_time_ms=time_ms[:N],
        action=np.ones(N, np.uint32),
        value=np.full(N, np.nan, np.float32),
        event_key=np.random.default_rng(0).integers(0, 2**63, N).astype(np.uint64),
        seq=np.zeros(N, np.uint32),
        arrival_ms=time_ms[:N],
    )


def _arm(arm: str, half: dict[str, float], whole: dict[str, float]) -> dict[str, dict[str, float]]:
    """Means over the stream and over what came after its middle."""
    first, count = half[f"{arm}.lifetime.count"], whole[f"{arm}.lifetime.count"]
    means = {metric: (half[f"{arm}.lifetime.{metric}"], whole[f"{arm}.lifetime.{metric}"]) for metric in METRICS}
    return {
        "whole": {metric: mean for metric, (_, mean) in means.items()},
        "second_half": {
            metric: (mean * count - before * first) / (count - first) for metric, (before, mean) in means.items()
        },
    }


def _print(name: str, found: dict[str, Any]) -> None:
    speed = f"{found['events_per_s']:,.0f} events/s, {found['events_per_cpu_s']:,.0f} a CPU second"
    print(f"{name}: {found['events']:,} events, {found['items']:,} items, {speed}")
    for part in ("whole", "second_half"):
        for arm in ARMS:
            values = "  ".join(f"{metric} {found['arms'][arm][part][metric]:.4f}" for metric in METRICS)
            print(f"  {part:12s} {arm:12s} {values}")
        ratios = "  ".join(f"{metric} {found['times_popularity'][f'{part}.{metric}']:.3f}x" for metric in METRICS)
        print(f"  {part:12s} {'ratio':12s} {ratios}", flush=True)


def _draw(found: dict[str, Any], path: Path) -> None:
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot

    figure, all_axes = pyplot.subplots(
        1, len(found), figsize=(7 * len(found), 4.5), layout="constrained", squeeze=False
    )
    for axes, (name, of) in zip(all_axes[0], found.items(), strict=True):
        thousands = [point["events"] / 1000 for point in of["curve"]]
        for arm, colour in zip(ARMS, ("#1f6feb", "#8b949e", "#d29922"), strict=True):
            for span, line in (("window", "-"), ("lifetime", ":")):
                values = [point.get(f"{arm}.{span}.ndcg_at_20", float("nan")) for point in of["curve"]]
                axes.plot(thousands, values, color=colour, linestyle=line, label=f"{arm}, {span}")
        axes.set(title=name, xlabel="thousand events", ylabel="NDCG@20")
        axes.set_ylim(bottom=0)
        axes.grid(visible=True, alpha=0.25)
        axes.legend(fontsize=8)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


if __name__ == "__main__":
    main()
