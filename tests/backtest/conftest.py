"""Small recorded logs and runs over them."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
from numpy.typing import NDArray

from backtest.arrivals import ArrivalConfig
from backtest.engine import Backtest, EngineParts
from backtest.recording import EventBatch
from backtest.run_config import BacktestConfig
from backtest.run_state import RunOutcome
from feature_store.config import FeatureStoreConfig, HotHistoriesConfig
from model.config import LossConfig, ModelConfig, OptimizerConfig
from online_trainer.config import TrainerConfig
from online_trainer.learner_config import LearnerConfig
from stream.events import EventRules

START_MS = 1_700_000_000_000
MODEL = ModelConfig(embedding_dim=8, num_layers=1, num_heads=1, attention_dim=4, hidden_dim=4, max_len=6)
LEARNER = LearnerConfig(
    trainer=TrainerConfig(batch_interactions=16, metrics_window=200),
    model=MODEL,
    loss=LossConfig(),
    optimizer=OptimizerConfig(),
)


@dataclass(frozen=True, kw_only=True)
class Log:
    """A log in memory."""

    user_id: NDArray[np.int64]
    item_id: NDArray[np.int64]
    time_ms: NDArray[np.int64]
    arrival_ms: NDArray[np.int64] | None = None
    value: NDArray[np.float64] | None = None

    def __len__(self) -> int:
        return len(self.user_id)

    def batches(self, size: int, *, start: int = 0, end: int | None = None) -> Iterator[EventBatch]:
        last = len(self) if end is None else end
        for first in range(start, last, size):
            part = slice(first, min(first + size, last))
            count = part.stop - first
            yield EventBatch(
                first=first,
                user_id=self.user_id[part],
                item_id=self.item_id[part],
                event_time_ms=self.time_ms[part],
                arrival_ms=(self.time_ms if self.arrival_ms is None else self.arrival_ms)[part],
                action=["click"] * count,
                value=np.full(count, np.nan) if self.value is None else self.value[part],
                event_id=[f"log-{number}" for number in range(first, part.stop)],
            )


def walks(num_events: int, *, num_users: int = 25, num_items: int = 40, seed: int = 3) -> Log:
    """Users who walk through the items in nearly the same order; one event every 700 to 1,300 ms."""
    rng = np.random.default_rng(seed)
    users = rng.integers(0, num_users, num_events)
    steps = rng.integers(1, 4, num_events)
    at = rng.integers(0, num_items, num_users)
    items = np.empty(num_events, np.int64)
    for event, (user, step) in enumerate(zip(users, steps, strict=True)):
        at[user] = (at[user] + step) % num_items
        items[event] = at[user]
    return Log(user_id=users, item_id=items, time_ms=START_MS + np.cumsum(rng.integers(700, 1_300, num_events)))


def parts(root: Path, log: Log, *, learner: LearnerConfig = LEARNER, **options: Any) -> EngineParts:
    """A run of small pieces over a log."""
    own: dict[str, Any] = {name: options.pop(name) for name in ("arrivals", "stopping", "upstream") if name in options}
    defaults = {"poll_events": 90, "checkpoint_events": 300, "sample_every": 4, "timeline_every": "30s"}
    return EngineParts(
        source=log,
        config=BacktestConfig(**{"publish_every": ("batch",), "keep_weights_every": "never", **defaults, **options}),
        rules=EventRules(),
        store=FeatureStoreConfig(url="sqlite:///unused.db"),
        hot=HotHistoriesConfig(budget_bytes=1 << 20),
        learner=learner,
        root=root,
        **{"arrivals": ArrivalConfig(), **own},
    )


def run(given: EngineParts) -> RunOutcome:
    return asyncio.run(Backtest(given).run())


def stopped_after(num_looks: int) -> Callable[[], bool]:
    """True from the given look on."""
    looks = iter(range(num_looks))
    return lambda: next(looks, None) is None


def table(root: Path, name: str) -> pl.DataFrame:
    return pl.concat([pl.read_parquet(path) for path in sorted((root / name).glob("*.parquet"))])


def table_bytes(root: Path) -> dict[str, bytes]:
    """Every file of a run's tables and kept weights."""
    return {
        str(path.relative_to(root)): path.read_bytes()
        for path in sorted(root.rglob("*"))
        if path.is_file()
        and path.relative_to(root).parts[0] not in {"checkpoints", "store.db", "speed.jsonl", "run.json"}
        and not path.name.startswith("store.db")
    }


def without_cpu(outcome: RunOutcome) -> RunOutcome:
    return replace(outcome, wall_s=0.0, cpu_s=0.0, costs={})
