"""What content buys: newcomers that start from it, and items that have a row before anybody interacts with them.

    python benchmarks/bench_content.py [--limit 30000] [--streams ml-1m movietweetings]

Genres and the decade in the title are the categories of a film. Arms: *none* (newcomers start at the mean of those
before them), *content* (they start where content says, from their first interaction on), *cold* (each item is told of
a day before its first interaction, and has a row from then on). Same events, same batches, everything else by default.
Prequential over the whole live catalogue without what the user has seen. ml-1m, and titles and genres of
movietweetings, are read from --data; a stream that is not there is left out. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import gzip
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from backtest.datasets import movietweetings
from benchmarks.environment import environment
from benchmarks.in_process import batches, learner_with_store
from feature_store.interactions import Interactions
from model.config import LossConfig, ModelConfig, OptimizerConfig
from online_trainer.config import ItemsConfig, TrainerConfig
from online_trainer.item_content import ItemNews, content_vector
from online_trainer.learner_config import LearnerConfig

ARMS = {"none": None, "content": ItemsConfig(cold_items=0), "cold": ItemsConfig()}
_DAY_MS = 86_400_000


def read_films(lines: Iterator[str]) -> dict[int, tuple[str, ...]]:
    """Item id → categories, of lines `id::title (year)::genre|genre`."""
    films = {}
    for line in lines:
        item_id, title, genres = line.rstrip("\n").split("::")
        films[int(item_id)] = (*(genre for genre in genres.split("|") if genre), f"decade {title.rstrip()[-5:-2]}")
    return films


def read_stream(name: str, data: Path, limit: int) -> tuple[Interactions, dict[int, tuple[str, ...]]] | None:
    """The first events of a stream, and what its items are."""
    if name == "ml-1m":
        path, titles, unit = data / name / "interactions.parquet", data / name / "movies.dat", 1000
    else:
        path, titles, unit = movietweetings().interactions, data / name / "movies.dat.gz", 1000
    if not (path.is_file() and titles.is_file()):
        return None
    rows = pl.read_parquet(path).sort("timestamp", maintain_order=True).head(limit)
    user, item, time_ms = (rows[column].cast(pl.Int64).to_numpy() for column in ("user_id", "item_id", "timestamp"))
    N = len(user)
    stream = Interactions(
        user_id=user,
        item_id=item,
        event_time_ms=time_ms * unit,
        action=np.ones(N, np.uint32),
        value=np.full(N, np.nan, np.float32),
        event_key=np.random.default_rng(0).integers(0, 2**63, N).astype(np.uint64),
        seq=np.zeros(N, np.uint32),
        arrival_ms=time_ms * unit,
    )
    if titles.suffix == ".gz":
        with gzip.open(titles, "rt", encoding="utf-8") as file:
            return stream, read_films(iter(file))
    with titles.open(encoding="latin-1") as file:
        return stream, read_films(iter(file))


def news_of(stream: Interactions, films: dict[int, tuple[str, ...]]) -> list[ItemNews]:
    """Each item of the stream is told of a day before its first interaction."""
    item_ids, first = np.unique(stream.item_id, return_index=True)
    news = []
    for item_id, row in zip(item_ids.tolist(), first.tolist(), strict=True):
        content = content_vector(None, films.get(item_id, ()))
        at_ms = int(stream.event_time_ms[row]) - _DAY_MS
        news.append(
            ItemNews(item_id=item_id, content=content, is_available=True, partition=0, offset=0, append_ms=at_ms)
        )
    return sorted(news, key=lambda one: (one.append_ms, one.item_id))


def measure(stream: Interactions, news: list[ItemNews], items: ItemsConfig | None) -> dict[str, Any]:
    config = LearnerConfig(
        trainer=TrainerConfig(),
        model=ModelConfig(),
        loss=LossConfig(),
        optimizer=OptimizerConfig(),
        items=items or ItemsConfig(),
    )
    waiting = [] if items is None else news
    with learner_with_store(config) as (learner, store):
        told, started_s = 0, time.process_time()
        for batch in batches(learner, store, config, stream):
            now_ms, first = int(batch.interactions.event_time_ms.max()), told
            while told < len(waiting) and waiting[told].append_ms <= now_ms:
                told += 1
            learner.tell(waiting[first:told])
            learner.step(batch)
        cpu_s = time.process_time() - started_s
        found = learner.evaluation.detailed()
        return {
            name: {m: found.get(f"model.lifetime.{group}{m}", 0.0) for m in ("count", "hr_at_10", "ndcg_at_20")}
            for name, group in (("all", ""), ("new_item", "new_item."), ("unknown_item", "unknown_item."))
        } | {"events_per_cpu_s": len(stream) / cpu_s, "cold": learner.ledger.num_cold}


def main() -> None:
    parser = argparse.ArgumentParser(description="content for newcomers and cold items")
    parser.add_argument("--streams", nargs="+", default=["ml-1m", "movietweetings"])
    parser.add_argument("--data", type=Path, default=Path(__file__).parents[1].parent / "shared" / "data")
    parser.add_argument("--limit", type=int, default=30_000)
    parser.add_argument("--results", type=Path)
    options = parser.parse_args()
    result: dict[str, Any] = {"benchmark": "content", "limit": options.limit, **environment(), "streams": {}}
    for name in options.streams:
        read = read_stream(name, options.data, options.limit)
        if read is None:
            print(f"{name}: not found under {options.data}")
            continue
        stream, films = read
        news = news_of(stream, films)
        of_arm = result["streams"][name] = {}
        for arm, items in ARMS.items():
            found = of_arm[arm] = measure(stream, news, items)
            row = "  ".join(f"{k} {found['all'][k]:.4f}" for k in ("hr_at_10", "ndcg_at_20"))
            new = f"new items HR@10 {found['new_item']['hr_at_10']:.4f}, unknown {found['unknown_item']['count']:.0f}"
            print(f"{name:15s} {arm:8s} {row}  {new}  {found['events_per_cpu_s']:,.0f} events/CPU s", flush=True)
    if options.results:
        options.results.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
