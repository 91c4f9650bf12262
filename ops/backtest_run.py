"""`headrace backtest run`: replays a log through the live code, watched by a person."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskProgressColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from backtest.arrivals import ArrivalConfig
from backtest.engine import Progress as RunProgress
from backtest.run import Hooks, RunSettings, run_all, summary_of
from backtest.run_config import BacktestConfig
from backtest.sources import SourceConfig, open_source
from feature_store.config import FeatureStoreConfig, HotHistoriesConfig
from kernels.host_memory import keep_freed_memory
from model.config import LossConfig, ModelConfig, OptimizerConfig
from online_trainer.config import ItemsConfig, TrainerConfig
from online_trainer.drift_config import DriftConfig
from online_trainer.learner import LearnerConfig
from ops.config import HeadraceConfig
from ops.errors import OpsError
from ops.settings import SECTIONS, Section, Settings, load
from stream.events import EventRules

BACKTEST_SECTIONS: Final = (
    Section("source", "backtest.sources", "SourceConfig"),
    Section("arrivals", "backtest.arrivals", "ArrivalConfig"),
    Section("backtest", "backtest.run_config", "BacktestConfig", {"publish_every": ("batch", "1h", "1d", "never")}),
)
"""Tables of a run's configuration beside those of `headrace.toml`."""
_SHOWN: Final = ("hr_at_10", "ndcg_at_20", "mrr")


def backtest_settings(path: Path) -> Settings:
    """The settings of a run; raises SettingsError."""
    return load(path, environment=os.environ, sections=(*SECTIONS, *BACKTEST_SECTIONS))


def run_settings(settings: Settings) -> RunSettings:
    """What decides what a run computes; raises OpsError for what contradicts itself."""
    rules = settings.get(EventRules)
    try:
        return RunSettings(
            backtest=settings.get(BacktestConfig),
            arrivals=settings.get(ArrivalConfig),
            rules=rules,
            store=settings.get(FeatureStoreConfig),
            hot=settings.get(HotHistoriesConfig),
            learner=LearnerConfig(
                trainer=settings.get(TrainerConfig),
                items=settings.get(ItemsConfig),
                model=settings.get(ModelConfig),
                loss=settings.get(LossConfig),
                optimizer=settings.get(OptimizerConfig),
                drift=settings.get(DriftConfig),
                actions=rules.actions,
            ),
        )
    except ValueError as error:
        raise OpsError(str(error)) from error


def run_backtest(
    path: Path, out: Path | None, *, restart: bool, say: Callable[[str], None], show: Callable[[str], None]
) -> int:
    """Run, or go on with, what a configuration asks for; returns the exit code. `show` hears the result's lines."""
    settings = backtest_settings(path)
    wanted = run_settings(settings)
    root = out or Path("runs") / wanted.backtest.name
    cache = settings.get(HeadraceConfig).data_dir / "recordings"
    keep_freed_memory()
    try:
        recording = open_source(settings.get(SourceConfig), cache, say=say)
        with _stop_on_signal() as is_stopping, _progress() as on_progress:
            hooks = Hooks(stopping=is_stopping, on_progress=on_progress, say=say)
            is_complete = run_all(wanted, recording, root, hooks, restart=restart)
    except ValueError as error:
        raise OpsError(str(error)) from error
    if not is_complete:
        say(f"headrace: interrupted; the same command goes on with {root}")
        return 130
    if len(wanted.backtest.seeds) == 1:
        for line in _lines(summary_of(root)):
            show(line)
    say(f"headrace: wrote {root}")
    return 0


@contextmanager
def _stop_on_signal() -> Iterator[Callable[[], bool]]:
    """Whether SIGINT or SIGTERM came. What is in hand is finished first; a second SIGINT ends at once."""
    came: list[int] = []
    before: dict[int, Any] = {}

    def note(number: int, _frame: object) -> None:
        came.append(number)
        signal.signal(signal.SIGINT, before[signal.SIGINT])

    for one in (signal.SIGINT, signal.SIGTERM):
        before[one] = signal.signal(one, note)
    try:
        yield lambda: bool(came)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def _progress() -> Iterator[Callable[[str, RunProgress], None]]:
    console = Console(stderr=True)
    bar = Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        TaskProgressColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        console=console,
        disable=not console.is_terminal,
    )
    tasks: dict[str, Any] = {}

    def show(name: str, progress: RunProgress) -> None:
        if name not in tasks:
            tasks[name] = bar.add_task(name, total=progress.num_events)
        reached = datetime.fromtimestamp(progress.time_ms / 1000, UTC)
        what = "building the store again" if progress.is_catching_up else f"event time {reached:%Y-%m-%d %H:%M}"
        bar.update(tasks[name], completed=progress.num_done, description=f"{name}: {what}")

    with bar:
        yield show


def _lines(summary: list[dict[str, Any]]) -> Iterator[str]:
    width = max(len(one["arm"]) for one in summary)
    yield f"{'arm':{width}}  " + "".join(f"{name:>12}" for name in _SHOWN)
    for one in summary:
        values = "".join(f"{'' if one[name] is None else format(one[name], '.4f'):>12}" for name in _SHOWN)
        yield f"{one['arm']:{width}}  {values}  {one['title']}"
