"""An inference worker under load while its weights are swapped: latency, pauses, errors, mixed answers, memory.

    python benchmarks/bench_serving.py [--quick] [--rate 200] [--rounds 3] [--results FILE]

Four processes: the worker (`serving.daemon.run_worker`; HSTU D = 64, 2 layers, 20,000 items, users with 200
interactions), a real broker, the load (its own process, a fixed rate, latency from when a request was due), and this
one, which publishes snapshots: deltas of 1,400 rows and all dense parameters.

Phases, taken in turns so that a machine's moods meet all alike: *no swaps*; *every 2 s*; then *storm*, as many swaps as
`--storm`, one every 50 ms. Answers of one user and version are compared with each other (the time of requests stands
still): one that differs is *mixed*. Memory is VmRSS, sampled; steady is the median without swaps.

The table's times are milliseconds by the clock. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import re
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch

from benchmarks.bench_swap import Publisher
from benchmarks.environment import environment
from benchmarks.serving_process import HISTORY_LEN, MODEL, MODEL_NAME
from feature_store.config import FeatureStoreConfig
from feature_store.interactions import Interactions
from feature_store.schema import migrate
from feature_store.store import FeatureStore
from model.snapshot import write_snapshot
from ops.local_broker import LocalBroker, LocalBrokerConfig
from stream.kafka import KafkaConfig, KafkaLog

NUM_ITEMS = 20_000
ROWS_OF_A_DELTA = 1_400
SWAP_EVERY_S = 2.0
STORM_EVERY_S = 0.05
STORM_ROUNDS_MAX = 5
VERSIONS_KEPT = 20
PAUSE_BOUNDS_MS = (0.5, 1.0, 2.0, 5.0, 10.0, 20.0, 50.0, 100.0)
SAMPLE_S = 0.05
SWAP_S_MAX = 60.0


class Snapshots:
    """Versions written one after the other, the old ones deleted."""

    def __init__(self, root: Path) -> None:
        self._root, self._publisher = root, Publisher(MODEL)
        self._catalogue = np.arange(NUM_ITEMS)
        self.publish(whole=True)

    def publish(self, *, whole: bool = False) -> int:
        publisher = self._publisher
        with torch.no_grad():
            for parameter in publisher.dense.values():
                # About what a second of training moves them: the worker's guards, on as by default, take a version that
                # scores otherwise for a spoiled one.
                parameter.add_(0.002 * torch.randn(parameter.shape))
        touched = publisher.rng.choice(NUM_ITEMS, ROWS_OF_A_DELTA, replace=False)
        snapshot = publisher.publish("anchor" if whole else "delta", self._catalogue if whole else touched)
        write_snapshot(self._root, snapshot.manifest, snapshot.dense, snapshot.rows)
        old = self._root / MODEL_NAME / f"v{publisher.version - VERSIONS_KEPT:08d}"
        shutil.rmtree(old, ignore_errors=True)
        return publisher.version


@dataclass
class Worker:
    """The process that is measured, seen from outside."""

    process: subprocess.Popen[str]
    port: int
    pauses_ms: list[float] = field(default_factory=list)
    version: int = 0

    def follow(self) -> None:
        """Read its log to the end."""
        assert self.process.stderr is not None
        for line in self.process.stderr:
            if found := re.match(r"serving version (\d+) .* pause ([\d.]+) ms", line):
                self.version = int(found[1])
                self.pauses_ms.append(float(found[2]))
            elif "Traceback" in line or "rror" in line or "going back" in line:
                print(line, end="", file=sys.stderr)

    def rss_mib(self, name: str = "VmRSS") -> float:
        found = re.search(rf"{name}:\s+(\d+) kB", Path(f"/proc/{self.process.pid}/status").read_text())
        assert found is not None
        return int(found[1]) / 1024

    def until_version(self, version: int) -> None:
        deadline_s = time.monotonic() + SWAP_S_MAX
        while self.version < version:
            assert self.process.poll() is None, "the worker ended"
            assert time.monotonic() < deadline_s, f"version {version} is not served after {SWAP_S_MAX:.0f} s"
            time.sleep(0.001)


@contextmanager
def running_worker(
    folder: Path, bootstrap_servers: str, *arguments: str, module: str = "benchmarks.serving_process"
) -> Iterator[Worker]:
    """The module's process, once it serves version 1."""
    process = subprocess.Popen(
        [sys.executable, "-m", module, str(folder), bootstrap_servers, *arguments],
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stderr is not None
    try:
        port = next(int(found[1]) for line in process.stderr if (found := re.search(r"serving on \S+:(\d+)", line)))
        worker = Worker(process, port)
        threading.Thread(target=worker.follow, daemon=True).start()
        worker.until_version(1)
        yield worker
    finally:
        process.terminate()
        process.wait(30)


def fill_store(path: Path, num_users: int) -> None:
    """Histories of 200 interactions over the last days."""
    url = f"sqlite:///{path}"
    migrate(url)
    store, rng, total = FeatureStore(FeatureStoreConfig(url=url)), np.random.default_rng(1), num_users * HISTORY_LEN
    with store.transaction() as transaction:
        transaction.append(
            Interactions(
                user_id=np.repeat(np.arange(num_users), HISTORY_LEN),
                item_id=rng.zipf(1.3, total) % NUM_ITEMS,
                event_time_ms=1_700_000_000_000 + np.tile(np.arange(HISTORY_LEN) * 600_000, num_users),
                action=np.ones(total, np.uint32),
                value=np.full(total, np.nan, np.float32),
                event_key=np.arange(total, dtype=np.uint64),
                seq=np.zeros(total, np.uint32),
                arrival_ms=np.full(total, 1_700_000_000_000),
            )
        )
    store.close()


@dataclass
class Phase:
    """What was measured of one phase, over all its rounds."""

    latency_ms: list[float] = field(default_factory=list)
    outcomes: dict[str, int] = field(default_factory=dict)
    pauses_ms: list[float] = field(default_factory=list)
    rss_mib: list[float] = field(default_factory=list)
    cpu_s: float = 0.0
    seconds: float = 0.0
    mixed: int = 0
    compared: int = 0

    def add(self, loaded: dict[str, Any]) -> None:
        self.latency_ms += loaded["latency_ms"]
        self.mixed += loaded["mixed"]
        self.compared += loaded["compared"]
        for name, count in loaded["outcomes"].items():
            self.outcomes[name] = self.outcomes.get(name, 0) + count

    def summary(self) -> dict[str, Any]:
        return {
            "requests": sum(self.outcomes.values()),
            "errors": sum(count for name, count in self.outcomes.items() if name != "ok"),
            "outcomes": self.outcomes,
            "p50_ms": _quantile(self.latency_ms, 50),
            "p99_ms": _quantile(self.latency_ms, 99),
            "max_ms": _quantile(self.latency_ms, 100),
            "swaps": len(self.pauses_ms),
            "pause_p50_ms": _quantile(self.pauses_ms, 50),
            "pause_p99_ms": _quantile(self.pauses_ms, 99),
            "pause_max_ms": _quantile(self.pauses_ms, 100),
            "mixed": self.mixed,
            "compared": self.compared,
            "rss_p50_mib": _quantile(self.rss_mib, 50),
            "rss_max_mib": _quantile(self.rss_mib, 100),
            "worker_cores": round(self.cpu_s / self.seconds, 2) if self.seconds else None,
        }


def _quantile(values: list[float], q: float) -> float | None:
    return round(float(np.percentile(values, q)), 2) if values else None


def cpu_s(pid: int) -> float:
    """CPU time of a process so far."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / 100


@dataclass(frozen=True, kw_only=True)
class Load:
    """The same for every phase."""

    rate: float
    users: int


def run_phase(
    worker: Worker, snapshots: Snapshots, load: Load, phase: Phase, *, seconds: float, swap_every_s: float | None
) -> None:
    """One round: load for so long, with or without swaps."""
    first_pause, started_cpu_s = len(worker.pauses_ms), cpu_s(worker.process.pid)
    command = [sys.executable, "benchmarks/serving_load.py", "--port", str(worker.port), "--rate", str(load.rate)]
    command += ["--seconds", str(seconds), "--users", str(load.users), "--seed", str(len(phase.latency_ms))]
    loading = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    started_s = time.monotonic()
    next_swap_s = started_s + 0.5 if swap_every_s is not None else float("inf")
    output = threading.Thread(target=lambda: phase.add(json.loads(loading.communicate()[0])))
    output.start()
    while output.is_alive():
        phase.rss_mib.append(worker.rss_mib())
        if time.monotonic() >= next_swap_s and time.monotonic() < started_s + seconds:
            worker.until_version(snapshots.publish())
            next_swap_s = max(next_swap_s + (swap_every_s or 0.0), time.monotonic())
        time.sleep(min(SAMPLE_S, max(0.001, next_swap_s - time.monotonic())))
    output.join()
    phase.cpu_s += cpu_s(worker.process.pid) - started_cpu_s
    phase.seconds += time.monotonic() - started_s
    phase.pauses_ms += worker.pauses_ms[first_pause:]


def histogram(pauses_ms: list[float]) -> dict[str, int]:
    """Pauses by upper bound in ms."""
    counts, _ = np.histogram(pauses_ms, [0.0, *PAUSE_BOUNDS_MS, np.inf])
    names = [*(f"<= {bound:g}" for bound in PAUSE_BOUNDS_MS), f"> {PAUSE_BOUNDS_MS[-1]:g}"]
    return {name: int(count) for name, count in zip(names, counts, strict=True)}


def measure(args: argparse.Namespace, folder: Path, bootstrap_servers: str) -> dict[str, Any]:
    """All phases over one worker."""
    asyncio.run(KafkaLog(KafkaConfig(bootstrap_servers=bootstrap_servers)).create_topics())
    fill_store(folder / "store.db", args.users)
    snapshots, load = Snapshots(folder / "snapshots"), Load(rate=args.rate, users=args.users)
    phases = {"no swaps": Phase(), "every 2 s": Phase(), "storm": Phase()}
    with running_worker(folder, bootstrap_servers) as worker:
        # Histories come from the store the first time.
        run_phase(worker, snapshots, load, Phase(), seconds=args.warm_up, swap_every_s=None)
        for _ in range(args.rounds):
            run_phase(worker, snapshots, load, phases["no swaps"], seconds=args.seconds, swap_every_s=None)
            run_phase(worker, snapshots, load, phases["every 2 s"], seconds=args.seconds, swap_every_s=SWAP_EVERY_S)
        storm = phases["storm"]
        for _ in range(STORM_ROUNDS_MAX):  # a busy machine swaps more slowly than asked for
            storm_s = (args.storm - len(storm.pauses_ms)) * STORM_EVERY_S + 1
            run_phase(worker, snapshots, load, storm, seconds=storm_s, swap_every_s=STORM_EVERY_S)
            if len(storm.pauses_ms) >= args.storm:
                break
        peak_mib = worker.rss_mib("VmHWM")
    return report(phases, peak_mib)


def report(phases: dict[str, Phase], peak_mib: float) -> dict[str, Any]:
    """The table, and what the last line says."""
    summaries = {name: phase.summary() for name, phase in phases.items()}
    columns = ("requests", "errors", "mixed", "p50_ms", "p99_ms", "max_ms", "swaps", "pause_p50_ms", "pause_p99_ms")
    print(f"{'phase':<10}" + "".join(f"{name:>14}" for name in columns))
    for name, found in summaries.items():
        print(f"{name:<10}" + "".join(f"{found[column]!s:>14}" for column in columns))
    pauses_ms = [pause_ms for phase in phases.values() for pause_ms in phase.pauses_ms]
    steady_mib = median(phases["no swaps"].rss_mib)
    during_mib = max(max(phase.rss_mib) for phase in phases.values())
    without, with_swaps = summaries["no swaps"]["p99_ms"], summaries["every 2 s"]["p99_ms"]
    return {
        "phases": summaries,
        "pause_histogram": histogram(pauses_ms),
        "p99_with_swaps_to_without": round(with_swaps / without, 3),
        "rss_mib": {
            "steady": round(steady_mib, 1),
            "max_under_load": round(during_mib, 1),
            "peak": round(peak_mib, 1),
            "peak_to_steady": round(during_mib / steady_mib, 3),
        },
    }


def main() -> int:
    parser = argparse.ArgumentParser(description="an inference worker under load while its weights are swapped")
    parser.add_argument("--rate", type=float, default=200.0, help="requests a second")
    parser.add_argument("--seconds", type=float, default=20.0, help="of each round and phase")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--storm", type=int, default=1_000, help="swaps of the last phase")
    parser.add_argument("--users", type=int, default=500)
    parser.add_argument("--quick", action="store_true", help="a few seconds, to see that it works")
    parser.add_argument("--results", type=Path, help="JSON file to write")
    args = parser.parse_args()
    args.warm_up = 10.0
    if args.quick:
        args.rate, args.seconds, args.rounds, args.storm, args.users, args.warm_up = 40.0, 3.0, 1, 10, 20, 1.0
    with (
        tempfile.TemporaryDirectory() as folder,
        LocalBroker(LocalBrokerConfig(port=0)) as broker,
    ):
        found = measure(args, Path(folder), broker.bootstrap_servers)
    settings = {"rate": args.rate, "seconds": args.seconds, "rounds": args.rounds, "users": args.users}
    result = {
        "benchmark": "serving",
        **environment(),
        **settings,
        "items": NUM_ITEMS,
        "history_len": HISTORY_LEN,
        "rows_of_a_delta": ROWS_OF_A_DELTA,
        **found,
    }
    if args.results:
        args.results.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(result))
    return 0


if __name__ == "__main__":
    sys.exit(main())
