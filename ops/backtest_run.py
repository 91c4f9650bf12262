"""`headrace backtest run`: replays a log through the live code, watched by a person."""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
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
from backtest.recording import Recording
from backtest.run import Hooks, RunSettings, run_all, summary_of
from backtest.run_config import BacktestConfig
from backtest.run_files import RunFolder
from backtest.run_setup import with_seed
from backtest.run_state import Progress as RunProgress
from backtest.sources import SourceConfig, open_source
from backtest.through_broker import fingerprints_through_broker, refuse_what_differs
from backtest.upstream_replay import UpstreamConfigs
from backtest.vector_gains import NEVER
from feature_store.config import FeatureStoreConfig, HotHistoriesConfig
from kernels.host_memory import keep_freed_memory
from model.config import LossConfig, ModelConfig, OptimizerConfig
from model.llatte_config import LlatteSettings
from model.ranking_model import upstream_model_config, with_ranking_head
from model.ranking_settings import RankingSettings
from model.upstream_config import UpstreamConfig
from online_trainer.config import ItemsConfig, TrainerConfig
from online_trainer.drift_config import DriftConfig
from online_trainer.learner_config import LearnerConfig
from online_trainer.upstream_settings import UpstreamDaemonConfig
from ops.config import HeadraceConfig
from ops.errors import OpsError
from ops.local_broker import LocalBroker, LocalBrokerConfig
from ops.settings import SECTIONS, Section, Settings, load
from stream.events import EventRules
from stream.kafka import KafkaConfig

BACKTEST_SECTIONS: Final = (
    Section("source", "backtest.sources", "SourceConfig"),
    Section("arrivals", "backtest.arrivals", "ArrivalConfig"),
    Section("backtest", "backtest.run_config", "BacktestConfig", {"publish_every": ("batch", "1h", "1d", "never")}),
)
"""Tables of a run's configuration beside those of `headrace.toml`."""
_BROKER_TIMEOUT_S: Final = 86_400.0
_LINE_EVERY_S: Final = 30.0
_SHOWN: Final = ("hr_at_10", "ndcg_at_20", "mrr")


def backtest_settings(path: Path) -> Settings:
    """The settings of a run; raises SettingsError."""
    return load(path, environment=os.environ, sections=(*SECTIONS, *BACKTEST_SECTIONS))


def run_settings(settings: Settings) -> RunSettings:
    """What decides what a run computes; raises OpsError for what contradicts itself."""
    rules, ranking = settings.get(EventRules), settings.get(RankingSettings)
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
                model=with_ranking_head(
                    settings.get(ModelConfig),
                    ranking,
                    rules.actions,
                    settings.get(LlatteSettings),
                    upstream_width=settings.get(UpstreamConfig).width,
                ),
                loss=settings.get(LossConfig),
                optimizer=settings.get(OptimizerConfig),
                drift=settings.get(DriftConfig),
                actions=rules.actions,
                ranking=ranking,
            ),
            upstream=_upstream(settings),
        )
    except ValueError as error:
        raise OpsError(str(error)) from error


def _upstream(settings: Settings) -> UpstreamConfigs | None:
    """None where no users' vectors are asked for. ValueError as `upstream_model_config`."""
    daemon = settings.get(UpstreamDaemonConfig)
    if not daemon.is_on:
        return None
    actions = settings.get(EventRules).actions
    model = upstream_model_config(settings.get(UpstreamConfig), settings.get(RankingSettings), actions)
    return UpstreamConfigs(model=model, daemon=daemon)


@dataclass(frozen=True, kw_only=True, slots=True)
class Asked:
    """The command's arguments."""

    config: Path
    out: Path | None
    restart: bool
    through_broker: bool


def run_backtest(asked: Asked, *, say: Callable[[str], None], show: Callable[[str], None]) -> int:
    """Run, or go on with, what a configuration asks for; returns the exit code. `show` hears the result's lines."""
    settings = backtest_settings(asked.config)
    wanted = run_settings(settings)
    root = asked.out or Path("runs") / wanted.backtest.name
    cache = settings.get(HeadraceConfig).data_dir / "recordings"
    keep_freed_memory()
    try:
        if asked.through_broker:
            refuse_what_differs(wanted)
        recording = open_source(settings.get(SourceConfig), cache, say=say)
        with _stop_on_signal() as is_stopping, _progress(say) as on_progress:
            hooks = Hooks(stopping=is_stopping, on_progress=on_progress, say=say)
            is_complete = run_all(wanted, recording, root, hooks, restart=asked.restart)
    except ValueError as error:
        raise OpsError(str(error)) from error
    if not is_complete:
        say(f"headrace: interrupted; the same command goes on with {root}")
        return 130
    if len(wanted.backtest.seeds) == 1:
        for line in _lines(summary_of(root)):
            show(line)
        for line in vector_lines(RunFolder.open(root).manifest.vectors):
            show(line)
    say(f"headrace: wrote {root}")
    return _compare_with_broker(wanted, recording, root, say=say) if asked.through_broker else 0


def _compare_with_broker(wanted: RunSettings, recording: Recording, root: Path, *, say: Callable[[str], None]) -> int:
    """Send the same events through a broker and the daemons; 1 if anything differs, else 0."""
    seed = wanted.backtest.seeds[0]
    replayed = RunFolder.open(root if len(wanted.backtest.seeds) == 1 else root / f"seed-{seed}").manifest.fingerprints
    own = root / "through-broker"
    shutil.rmtree(own, ignore_errors=True)
    own.mkdir(parents=True)
    with LocalBroker(LocalBrokerConfig(port=0)) as broker:
        kafka = KafkaConfig(bootstrap_servers=broker.bootstrap_servers, num_partitions=1)
        through = asyncio.run(
            fingerprints_through_broker(
                replace(wanted, learner=with_seed(wanted.learner, seed)),
                recording,
                kafka,
                own,
                timeout_s=_BROKER_TIMEOUT_S,
            )
        )
    for name, fingerprint in replayed.items():
        verdict = "equal" if through[name] == fingerprint else "NOT EQUAL"
        say(f"headrace: {name} through the broker: {verdict} ({through[name][:12]}, replayed {fingerprint[:12]})")
    return 0 if through == replayed else 1


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
def _progress(say: Callable[[str], None]) -> Iterator[Callable[[str, RunProgress], None]]:
    """A bar on a terminal, else a line every `_LINE_EVERY_S` seconds."""
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
    said_s = time.monotonic()

    def show(name: str, progress: RunProgress) -> None:
        if name not in tasks:
            tasks[name] = bar.add_task(name, total=progress.num_events)
        reached = datetime.fromtimestamp(progress.time_ms / 1000, UTC)
        what = "building the store again" if progress.is_catching_up else f"event time {reached:%Y-%m-%d %H:%M}"
        bar.update(tasks[name], completed=progress.num_done, description=f"{name}: {what}")
        nonlocal said_s
        if bar.disable and time.monotonic() - said_s >= _LINE_EVERY_S:
            said_s = time.monotonic()
            say(f"headrace: {name}: {progress.num_done:,} of {progress.num_events:,} events, {what}")

    with bar:
        yield show


def _lines(summary: list[dict[str, Any]]) -> Iterator[str]:
    width = max(len(one["arm"]) for one in summary)
    yield f"{'arm':{width}}  " + "".join(f"{name:>12}" for name in _SHOWN)
    for one in summary:
        values = "".join(f"{'' if one[name] is None else format(one[name], '.4f'):>12}" for name in _SHOWN)
        yield f"{one['arm']:{width}}  {values}  {one['title']}"


def vector_lines(vectors: Mapping[str, Any]) -> Iterator[str]:
    """What users' vectors bring each task of the ranker; nothing of a run without them."""
    for task, rankers in vectors.get("gains", {}).items():
        count = next(iter(rankers.values()))["count"]
        yield f"ranking {task}: {count:,.0f} interactions, loss over that of predicting the mean, gain over no vectors"
        for lag, found in rankers.items():
            name = "no vectors" if lag == NEVER else f"vectors {lag} after they were computed"
            gain = ""
            if "gain_percent" in found:
                gain = f"  {found['gain_percent']:+.2f} ± {found['standard_error']:.2f} %"
            yield f"  {name:38}  {found['normalised_loss']:.4f}{gain}"
