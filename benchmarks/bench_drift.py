"""How soon drift is noticed, how often it is noticed where there is none, and how soon a model is back with a reaction.

    python benchmarks/bench_drift.py [--quick] [--only recurring] [--replay-share 0.1]

The real learner with a real store (SQLite in a temporary folder) in this process, without a broker, over streams of
`backtest.simulator` whose changes are known. Arms: *alert* has the same detectors without reactions, *react* is what
`headrace.toml` has by default. Both see the same events in the same batches.

Quality is NDCG@20 over the NDCG@20 that the stream's truth would score on the same events. Detection delay: events from
the change to the end of the step whose test gave the alarm. Recovery: tested interactions from the end of the change (a
gradual one takes a while) to the first 1,024 that reach a share of the quality of the last 4,000 before the change,
looked for after the lowest point; 0 where quality never fell below it. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from backtest.simulator import Change, Scenario, SimulatedStream, SimulatorConfig, simulate
from benchmarks.environment import environment
from feature_store.config import FeatureStoreConfig, HotHistoriesConfig
from feature_store.hot import HotHistories
from feature_store.interactions import Interactions
from feature_store.schema import migrate
from feature_store.store import FeatureStore
from kernels.host_memory import keep_freed_memory
from model.config import LossConfig, ModelConfig, OptimizerConfig
from online_trainer.batching import MicroBatcher
from online_trainer.config import TrainerConfig
from online_trainer.drift import DriftDecision
from online_trainer.drift_config import DriftConfig, detector_keys
from online_trainer.learner import OnlineLearner
from online_trainer.learner_config import LearnerConfig
from stream.messages import HistoryUpdate

Float64s = NDArray[np.float64]

STREAM = SimulatorConfig(num_events=24_000, num_items=300, num_groups=10, num_clusters=2)
MODEL = ModelConfig(embedding_dim=32, num_layers=2, num_heads=1, attention_dim=32, hidden_dim=32, max_len=24)
REACT = DriftConfig()
ALERT = replace(REACT, **{key: ("alert",) if REACT.reactions(key) else () for key in detector_keys()})  # type: ignore[arg-type]
ARMS = {"alert": ALERT, "react": REACT}
CASES: tuple[tuple[Scenario, tuple[int, ...]], ...] = (
    ("sudden", (10, 11, 12)),
    ("gradual", (10, 11)),
    ("recurring", (10,)),
    ("new_items", (10, 11)),
    ("dirichlet", (10,)),
)
"""Seeds that no default was chosen on."""
SHARES = (0.8, 0.9)
WINDOW, LEVEL = 1_024, 4_000
STATIONARY_EVENTS = 100_000
LONGER_FOR = {"recurring": 3}
"""Changes of a stream that has more than one; its events grow with them."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Run:
    """What one learner did on one stream. Arrays: one entry a step."""

    end: NDArray[np.int64]
    """Events taken after the step."""
    tested: NDArray[np.int64]
    ndcg: Float64s
    """Sum of NDCG@20 over the step's interactions; `ideal` is that of the truth."""
    ideal: Float64s
    decisions: list[DriftDecision]
    cpu_s: float


def learn(stream: SimulatedStream, drift: DriftConfig, trainer: TrainerConfig) -> Run:
    with tempfile.TemporaryDirectory() as folder:
        url = f"sqlite:///{folder}/store.db"
        migrate(url)
        store = FeatureStore(FeatureStoreConfig(url=url))
        updates = stored(store, stream)
        config = LearnerConfig(
            trainer=trainer,
            model=MODEL,
            loss=LossConfig(),
            optimizer=OptimizerConfig(),
            drift=drift,
        )
        hot = HotHistories(store, HotHistoriesConfig(max_len=MODEL.max_len + 1, budget_bytes=1 << 26))
        learner = OnlineLearner(config, hot, log_id="bench")
        run = drive(learner, updates, stream)
        store.close()
    return run


def stored(store: FeatureStore, stream: SimulatedStream, poll: int = 2_000) -> list[HistoryUpdate]:
    """Append the stream in polls; the updates that ingest would have announced."""
    N = len(stream.item_id)
    everything = Interactions(
        user_id=stream.user_id,
        item_id=stream.item_id,
        event_time_ms=stream.event_time_ms,
        action=np.ones(N, np.uint32),
        value=np.full(N, np.nan, np.float32),
        event_key=np.arange(1, N + 1, dtype=np.uint64),
        seq=np.zeros(N, np.uint32),
        arrival_ms=stream.event_time_ms,
    )
    updates = []
    for first in range(0, N, poll):
        part = everything.take(slice(first, first + poll))
        with store.transaction() as transaction:
            result = transaction.append(part)
        assert result.accepted.all()
        offsets = np.arange(first, first + len(part))
        updates.append(
            HistoryUpdate(
                log_id="bench",
                partition=0,
                first_offset=first,
                last_offset=int(offsets[-1]),
                watermark_ms=int(part.event_time_ms.max()),
                offsets=offsets,
                append_ms=part.event_time_ms,
                interactions=result.accepted_from(part),
            )
        )
    return updates


def drive(learner: OnlineLearner, updates: list[HistoryUpdate], stream: SimulatedStream) -> Run:
    trainer = TrainerConfig()
    batcher = MicroBatcher(
        max_interactions=trainer.batch_interactions,
        max_tokens=trainer.batch_tokens,
        max_len=MODEL.max_len,
        positions={},
    )
    for number, update in enumerate(updates):
        batcher.add(update, number)
    end, count, total, first = [], [0.0], [0.0], 0
    ideal: list[float] = []
    decisions: list[DriftDecision] = []
    started_s = time.process_time()
    while batch := batcher.take():
        learner.step(batch)
        end.append(learner.ledger.num_interactions)
        found = learner.metrics_summary()
        count.append(found.get("model.lifetime.count", 0.0))
        total.append(found.get("model.lifetime.ndcg_at_20", 0.0) * count[-1])
        ideal.append(float(np.nansum(stream.ideal_ndcg_at_20[first : end[-1]])))
        decisions += learner.take_drift_decisions()
        first = end[-1]
    return Run(
        end=np.array(end),
        tested=np.diff(np.array(count)).astype(np.int64),
        ndcg=np.diff(total),
        ideal=np.array(ideal),
        decisions=decisions,
        cpu_s=time.process_time() - started_s,
    )


def quality(run: Run, steps: slice) -> float:
    return float(run.ndcg[steps].sum() / run.ideal[steps].sum())


def recovery(run: Run, change: Change, until: int, share: float) -> int | None:
    """See the top; None when it is not back before event `until`."""
    first, over, last = np.searchsorted(run.end, (change.first, change.last, until), side="right").tolist()
    tested_before = run.tested.cumsum() - run.tested
    start = int(np.searchsorted(tested_before, tested_before[first] - LEVEL))
    wanted = share * quality(run, slice(start, first))
    windows = []
    for step in range(over, last):
        end = int(np.searchsorted(tested_before, tested_before[step] + WINDOW))
        if end >= last:
            break
        windows.append(quality(run, slice(step, end)))
    if not windows or min(windows) >= wanted:
        return 0 if windows else None
    lowest = int(np.argmin(windows))
    back = next((at for at in range(lowest, len(windows)) if windows[at] >= wanted), None)
    return None if back is None else int(tested_before[over + back] - tested_before[over])


def alarms(run: Run, first: int, until: int) -> dict[str, int]:
    """Detector → events from `first` to its first alarm in a stretch of the stream."""
    found: dict[str, int] = {}
    for decision in run.decisions:
        at = int(run.end[decision.step - 1])
        if first < at <= until:
            found.setdefault(f"{decision.detector}_{decision.signal}", at - first)
    return found


def measure(scenario: Scenario, seed: int, num_events: int, trainer: TrainerConfig) -> list[dict[str, Any]]:
    """One row per change: alarms, and recovery and quality of each arm."""
    changes = LONGER_FOR.get(scenario, 1)
    config = replace(
        STREAM, scenario=scenario, seed=seed, num_changes=changes, num_events=num_events * (1 + changes) // 2
    )
    stream = simulate(config)
    runs = {arm: learn(stream, drift, trainer) for arm, drift in ARMS.items()}
    bounds = [change.first for change in stream.changes] + [config.num_events]
    rows = []
    for change, until in zip(stream.changes, bounds[1:], strict=True):
        row: dict[str, Any] = {
            "scenario": scenario,
            "seed": seed,
            "change": change.first,
            "over": change.last,
            "until": until,
        }
        row["alarms"] = alarms(runs["alert"], change.first, until)
        for arm, run in runs.items():
            stretch = slice(*np.searchsorted(run.end, (change.first, until), side="right").tolist())
            row[arm] = {"quality": quality(run, stretch), "cpu_s": round(run.cpu_s, 1)}
            if scenario != "dirichlet":  # always changing: there is no time before
                row[arm]["recovery"] = {f"{share:g}": recovery(run, change, until, share) for share in SHARES}
        rows.append(row)
    return rows


def stationary(num_events: int, trainer: TrainerConfig) -> dict[str, Any]:
    """False alarms per 100,000 events; without any, reacting to them changes nothing."""
    stream = simulate(replace(STREAM, scenario="stationary", num_events=num_events, seed=10))
    alert = learn(stream, ALERT, trainer)
    runs = {"alert": alert, "react": learn(stream, REACT, trainer) if alert.decisions else alert}
    per = 100_000 / num_events
    names = [f"{one.detector}_{one.signal}" for one in alert.decisions]
    return {
        "events": num_events,
        "false_alarms_per_100k": {key: names.count(key) * per for key in detector_keys() if REACT.reactions(key)},
        "quality": {arm: quality(run, slice(None)) for arm, run in runs.items()},
        "cpu_s": round(alert.cpu_s, 1),
    }


def summary(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Medians over the changes of one scenario; a recovery that did not happen counts as the whole stretch."""
    found: dict[str, Any] = {"changes": len(rows)}
    keys = [key for key in detector_keys() if REACT.reactions(key)]
    found["delay"] = {key: _median([row["alarms"].get(key) for row in rows]) for key in keys}
    found["quality"] = {arm: float(np.mean([row[arm]["quality"] for row in rows])) for arm in ARMS}
    if "recovery" in rows[0]["alert"]:
        found["recovery"] = {}
        for share in map("{:g}".format, SHARES):
            of_arm = {
                arm: float(np.median([_or_all(row[arm]["recovery"][share], row) for row in rows])) for arm in ARMS
            }
            ratio = of_arm["react"] / of_arm["alert"] if of_arm["alert"] else None
            found["recovery"][share] = {**of_arm, "ratio": ratio}
    return found


def _or_all(recovered: int | None, row: dict[str, Any]) -> int:
    return row["until"] - row["over"] if recovered is None else recovered


def _median(delays: list[int | None]) -> float | None:
    """None where at most half of the changes were noticed."""
    known = sorted(delay for delay in delays if delay is not None)
    return None if 2 * len(known) <= len(delays) else float(np.median(known))


def show(scenario: str, found: dict[str, Any]) -> None:
    delays = " ".join(f"{key}={'-' if at is None else int(at)}" for key, at in found["delay"].items())
    print(f"{scenario:<10} {found['changes']} changes   quality {_pair(found['quality'], '.3f')}   delay {delays}")
    for share, of_arm in found.get("recovery", {}).items():
        ratio = "-" if of_arm["ratio"] is None else f"{of_arm['ratio']:.2f}"
        print(f"{'':<10} back at {share}: {_pair(of_arm, '.0f')} interactions, ratio {ratio}", flush=True)


def _pair(of_arm: dict[str, float], form: str) -> str:
    return f"{of_arm['alert']:{form}} -> {of_arm['react']:{form}}"


def main() -> None:
    parser = argparse.ArgumentParser(description="detection delay, false alarms, recovery")
    parser.add_argument("--quick", action="store_true", help="one seed a scenario, a shorter stationary stream")
    parser.add_argument("--only", nargs="+", help="these scenarios")
    parser.add_argument("--results", type=Path, help="JSON file to write")
    parser.add_argument("--replay-share", type=float, help="trainer.replay_share of both arms instead of the default")
    options = parser.parse_args()
    trainer = TrainerConfig(num_threads=1)
    if options.replay_share is not None:
        trainer = replace(trainer, replay_share=options.replay_share)
    keep_freed_memory()
    result: dict[str, Any] = {"benchmark": "drift", **environment(), "drift": asdict(REACT), "stream": asdict(STREAM)}
    result["replay_share"] = trainer.replay_share
    result |= {"scenarios": {}, "rows": []}
    print("alert -> react")
    for scenario, seeds in CASES:
        if options.only and scenario not in options.only:
            continue
        rows = [
            row
            for seed in seeds[: 1 if options.quick else None]
            for row in measure(scenario, seed, STREAM.num_events, trainer)
        ]
        result["rows"] += rows
        result["scenarios"][scenario] = summary(rows)
        show(scenario, result["scenarios"][scenario])
    if not options.only or "stationary" in options.only:
        calm = stationary(STATIONARY_EVENTS // (4 if options.quick else 1), trainer)
        result["stationary"] = calm
        rates = " ".join(f"{key}={rate:g}" for key, rate in calm["false_alarms_per_100k"].items())
        print(f"stationary quality {_pair(calm['quality'], '.3f')}   false alarms per 100k: {rates}")
    if options.results:
        options.results.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
