"""Runs a configuration: one run for each seed, each begun or gone on with, and what several seeds say together."""

from __future__ import annotations

import asyncio
import dataclasses
import platform
import statistics
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any, Final

import msgspec
import polars as pl

from backtest.arrivals import ArrivalConfig
from backtest.engine import Backtest, EngineParts, remove_run
from backtest.errors import RunFolderError
from backtest.recording import Recording
from backtest.run_config import BacktestConfig
from backtest.run_files import RUN_SCHEMA, ArmInfo, RunFolder, RunManifest, write_json, write_manifest
from backtest.run_setup import with_seed, with_settings
from backtest.run_state import Progress
from backtest.upstream_replay import UpstreamConfigs
from feature_store.config import FeatureStoreConfig, HotHistoriesConfig
from online_trainer.learner_config import LearnerConfig
from online_trainer.prequential import RankMetrics
from stream.clock import WallClock
from stream.events import EventRules

SWEEP: Final = "sweep.json"
_LIBRARIES: Final = ("headrace", "torch", "numpy", "polars", "river")
_BASELINE_TITLES: Final = {
    "popularity": "Decayed popularity",
    "cooccurrence": "What came next after the last item",
    "item_knn": "Items alike, by who had both",
    "river_mf": "river's matrix factorisation",
}


@dataclass(frozen=True, kw_only=True, slots=True)
class RunSettings:
    """Everything that decides what a run computes."""

    backtest: BacktestConfig
    arrivals: ArrivalConfig
    rules: EventRules
    store: FeatureStoreConfig
    hot: HotHistoriesConfig
    learner: LearnerConfig
    upstream: UpstreamConfigs | None = None
    """None: no users' vectors."""

    def __post_init__(self) -> None:
        if self.learner.trainer.lag_policy != "fall_behind":
            raise ValueError(
                f"trainer.lag_policy = {self.learner.trainer.lag_policy}: a backtest waits for its trainer, so that it "
                "is the same on every machine; set fall_behind"
            )
        if self.arrivals.delay_ms and self.backtest.late == "0s":
            raise ValueError(
                f"arrivals.delay_ms = {self.arrivals.delay_ms} makes events late: set backtest.late to how long "
                "answers wait for them, at best arrivals.delay_max_ms"
            )
        if self.upstream is not None and self.learner.ranking.learn_from != "interactions":
            raise ValueError(
                "upstream_daemon.is_on and ranking.learn_from = impressions: a recorded log holds no labels of "
                "impressions, so neither ranker nor upstream model would learn its tasks; set interactions"
            )
        for arm, _ in self.backtest.all_arms():
            if with_settings(self.learner, arm.settings).model.surfaces and not self.rules.surface_key:
                raise ValueError(
                    f"arm {arm.name}: model.surfaces is true and events.surface_key is not set, so that no surface"
                    " would ever be told: set events.surface_key and events.surfaces"
                )

    def as_dict(self) -> dict[str, Any]:
        """By table, plain values."""
        parts: dict[str, Any] = {
            "backtest": self.backtest,
            "arrivals": self.arrivals,
            "events": self.rules,
            "store": replace(self.store, url="sqlite:///store.db"),
            "hot": self.hot,
        }
        parts |= {
            name: getattr(self.learner, name)
            for name in ("trainer", "items", "model", "loss", "optimizer", "drift", "ranking")
        }
        if self.upstream is not None:
            parts |= {"upstream": self.upstream.model, "upstream_daemon": self.upstream.daemon}
        found: dict[str, Any] = msgspec.json.decode(msgspec.json.encode(parts))
        return found


@dataclass(frozen=True, kw_only=True, slots=True)
class Hooks:
    """How a run is watched and stopped."""

    stopping: Callable[[], bool] = lambda: False
    on_progress: Callable[[str, Progress], None] = lambda _name, _progress: None
    """Hears of the run's name and how far it is."""
    say: Callable[[str], None] = lambda _line: None


def run_all(settings: RunSettings, recording: Recording, root: Path, hooks: Hooks, *, restart: bool) -> bool:
    """Every seed's run in `root`, or below it when there are several; False when told to stop before the end.

    Raises RunFolderError for a folder that holds another run, ValueError for settings that contradict each other.
    """
    seeds = settings.backtest.seeds
    folders = [root] if len(seeds) == 1 else [root / f"seed-{seed}" for seed in seeds]
    for seed, folder in zip(seeds, folders, strict=True):
        if not run_one(settings, recording, folder, seed, hooks, restart=restart):
            return False
    if len(seeds) > 1:
        write_json(root / SWEEP, sweep_of(folders))
        hooks.say(f"mean and spread of {len(seeds)} seeds: {root / SWEEP}")
    return True


def run_one(
    settings: RunSettings, recording: Recording, folder: Path, seed: int, hooks: Hooks, *, restart: bool
) -> bool:
    """One run, from the start or from where it was interrupted; False when told to stop before the end."""
    begun = _begun(settings, recording, folder, seed, restart=restart)
    if begun.is_complete:
        hooks.say(f"{folder} is complete; --restart makes it anew")
        return True
    with _written(folder):
        return _go_on(begun, settings, recording, folder, seed, hooks)


@contextmanager
def _written(folder: Path) -> Iterator[None]:
    """RunFolderError where the folder cannot be written. What its last checkpoint holds stays."""
    try:
        yield
    except (OSError, pl.exceptions.PolarsError) as error:  # polars tells of a full disk by an error of its own
        raise RunFolderError(f"{folder} cannot be written: {error}; once it can, the same command goes on") from error


def _go_on(
    begun: RunManifest, settings: RunSettings, recording: Recording, folder: Path, seed: int, hooks: Hooks
) -> bool:
    folder.mkdir(parents=True, exist_ok=True)
    write_manifest(folder, begun)
    parts = EngineParts(
        source=recording,
        config=settings.backtest,
        arrivals=settings.arrivals,
        rules=settings.rules,
        store=settings.store,
        hot=settings.hot,
        learner=with_seed(settings.learner, seed),
        upstream=None if settings.upstream is None else settings.upstream.with_seed(seed),
        root=folder,
        stopping=hooks.stopping,
        on_progress=lambda progress: hooks.on_progress(folder.name, progress),
    )
    outcome = asyncio.run(Backtest(parts).run())
    told = {one.name: getattr(outcome, one.name) for one in dataclasses.fields(outcome)}
    write_manifest(folder, replace(begun, **told))
    return outcome.is_complete


def _begun(settings: RunSettings, recording: Recording, folder: Path, seed: int, *, restart: bool) -> RunManifest:
    """The manifest to go on from."""
    config, lineage = settings.as_dict(), lineage_of(recording)
    if (folder / "run.json").is_file() and not restart:
        stored = RunFolder.open(folder).manifest
        made_with = {"config": stored.config, "source": stored.lineage["source"], "seed": stored.seed}
        if made_with != {"config": config, "source": lineage["source"], "seed": seed}:
            raise RunFolderError(
                f"{folder} holds a run of other settings, seed or source ({_difference(stored.config, config)}): "
                "--restart makes it anew, --out names another folder"
            )
        return stored
    remove_run(folder)
    return RunManifest(
        name=settings.backtest.name,
        is_complete=False,
        created_at=datetime.fromtimestamp(WallClock().now_ms() / 1000, UTC).isoformat(timespec="seconds"),
        config=config,
        lineage=lineage,
        seed=seed,
        arms=arms_of(settings.backtest),
        schema=RUN_SCHEMA,
    )


def arms_of(config: BacktestConfig) -> list[ArmInfo]:
    """Every arm, those that learn first."""
    learning = [arm.info(ablation) for arm, ablation in config.all_arms()]
    return [
        *learning,
        *(ArmInfo(name=name, kind="baseline", title=_BASELINE_TITLES[name]) for name in config.baselines),
    ]


def lineage_of(recording: Recording) -> dict[str, Any]:
    """What a run is made from."""
    manifest = recording.manifest
    return {
        "source": {
            "name": manifest.name,
            "format": manifest.format,
            "order": manifest.order,
            "num_events": len(recording),
            "files": [dataclasses.asdict(one) for one in manifest.sources],
        },
        "versions": {name: version(name) for name in _LIBRARIES} | {"python": platform.python_version()},
        "machine": platform.machine(),
    }


def _difference(stored: dict[str, Any], wanted: dict[str, Any]) -> str:
    differing = [
        f"{table}.{name}"
        for table, values in wanted.items()
        for name, value in values.items()
        if stored.get(table, {}).get(name) != value
    ]
    return ", ".join(differing[:5]) or "another seed or source"


def sweep_of(folders: Sequence[Path]) -> dict[str, Any]:
    """By arm and metric: the value of every seed, mean and standard deviation (of a sample)."""
    runs = [RunFolder.open(folder) for folder in folders]
    found: dict[str, Any] = {}
    for arm in runs[0].manifest.arms:
        of_seed = [
            dataclasses.asdict(RankMetrics.of_ranks(run.ranks(arm.name).select("rank").collect()["rank"].to_numpy()))
            for run in runs
        ]
        found[arm.name] = {
            name: {"mean": statistics.fmean(values), "sd": statistics.stdev(values), "values": values}
            for name in of_seed[0]
            if None not in (values := [one[name] for one in of_seed])
        }
    return {"seeds": [run.manifest.seed for run in runs], "arms": found}


def summary_of(folder: Path) -> list[dict[str, Any]]:
    """One line for each arm of a run: name, title and metrics."""
    run = RunFolder.open(folder)
    return [
        {"arm": arm.name, "title": arm.title}
        | dataclasses.asdict(RankMetrics.of_ranks(run.ranks(arm.name).select("rank").collect()["rank"].to_numpy()))
        for arm in run.manifest.arms
    ]
