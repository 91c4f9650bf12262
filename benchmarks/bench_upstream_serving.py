"""Latency of `POST /v1/rank` with and without users' vectors in place, end to end.

    python benchmarks/bench_upstream_serving.py [--quick] [--rate 50] [--rounds 10] [--results FILE]

Two workers (`serving.daemon.run_worker`) on one store, one broker and the same weights: LLaTTE's ranker behind HSTU
(D = 64, 2 layers), 20,000 items, users with 200 interactions, 50 candidates a request. One reads users' vectors (256
numbers), the other does not. Load comes from a process of its own at a fixed rate, in turns of a few seconds to either
worker, so that a machine's moods meet both alike, latency from when a request was due. Meanwhile, for both, new vectors
of some users are written every second, as the upstream daemon does. The weights are untrained: they cost the same.

Times are milliseconds by the clock; ratios are with to without: of all requests together, and of the median over pairs
of turns. CPU is the workers' own, per request. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from typing import Any, Final

import numpy as np

from benchmarks.bench_serving import Worker, cpu_s, fill_store, running_worker
from benchmarks.environment import environment
from benchmarks.ranking_process import HISTORY_LEN, MODEL, MODEL_NAME, UPSTREAM
from feature_store.config import FeatureStoreConfig
from feature_store.store import FeatureStore
from feature_store.user_states import NewVectors
from model.manifest import Lineage, Manifest
from model.recommender import Recommender
from model.snapshot import write_snapshot
from model.swap import take_rows
from ops.local_broker import LocalBroker, LocalBrokerConfig
from stream.clock import WallClock
from stream.kafka import KafkaConfig, KafkaLog

NUM_ITEMS: Final = 20_000
CANDIDATES: Final = 50
ARMS: Final = ("with", "without")
WARM_UP_RATE: Final = 80.0
_WARM_UP_REQUESTS: Final = 4
"""Of each user, in the mean: one in fifty is left out."""
_MODULE: Final = "benchmarks.ranking_process"


def publish(root: Path) -> None:
    """One snapshot of untrained weights with every item."""
    model = Recommender(MODEL)
    model.items.admit(np.arange(NUM_ITEMS))
    manifest = Manifest(
        model=MODEL_NAME,
        version=1,
        kind="anchor",
        parent=None,
        config_hash=MODEL.config_hash(),
        model_config=MODEL.as_dict(),
        num_items=NUM_ITEMS,
        created_at_ms=0,
        watermark_ms=0,
        lineage=Lineage(log_id="bench", positions={}),
        metrics={},
    )
    write_snapshot(root, manifest, model.dense_state(), take_rows(model, "anchor"))


class Vectors:
    """Everybody's vectors, and new ones of some."""

    def __init__(self, url: str, num_users: int) -> None:
        self._store, self._rng, self._num_users = (
            FeatureStore(FeatureStoreConfig(url=url)),
            np.random.default_rng(3),
            num_users,
        )
        self.num_written = 0
        with self._store.transaction() as transaction:
            transaction.user_states.begin_version(MODEL_NAME, 1, created_at_ms=0)
            transaction.user_states.serve_version(MODEL_NAME, 1, from_ms=1)
        self._write(np.arange(num_users))

    def _write(self, users: np.ndarray[Any, np.dtype[np.int64]]) -> None:
        new = NewVectors(
            user_id=users,
            next_seq=np.full(len(users), HISTORY_LEN + self.num_written),
            as_of_ms=np.full(len(users), 1_700_000_000_000),
            vector=self._rng.standard_normal((len(users), UPSTREAM.width), np.float32),
        )
        with self._store.transaction() as transaction:
            transaction.user_states.write(MODEL_NAME, 1, new, written_at_ms=WallClock().now_ms())
        self.num_written += len(users)

    @contextmanager
    def written(self, per_s: int) -> Iterator[None]:
        """So many new ones every second, for the length of the block."""
        stopping = threading.Event()

        def write() -> None:
            while not stopping.wait(1.0):
                self._write(np.unique(self._rng.integers(0, self._num_users, per_s)))

        thread = threading.Thread(target=write)
        thread.start()
        try:
            yield
        finally:
            stopping.set()
            thread.join()
            self._store.close()


def ask(worker: Worker, args: argparse.Namespace, seed: int, *, seconds: float, rate: float) -> dict[str, Any]:
    """Load on one worker for so long; what came of it, and the CPU a request took."""
    command = [sys.executable, "benchmarks/serving_load.py", "--port", str(worker.port), "--rate", str(rate)]
    command += ["--seconds", str(seconds), "--users", str(args.users), "--seed", str(seed)]
    command += ["--candidates", str(CANDIDATES), "--items", str(NUM_ITEMS)]
    before_s = cpu_s(worker.process.pid)
    found: dict[str, Any] = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    found["cpu_ms"] = 1_000 * (cpu_s(worker.process.pid) - before_s) / max(found["requests"], 1)
    return found


def measure(args: argparse.Namespace, folder: Path, bootstrap_servers: str) -> dict[str, Any]:
    """All turns, each arm first in every other pair."""
    asyncio.run(KafkaLog(KafkaConfig(bootstrap_servers=bootstrap_servers)).create_topics())
    fill_store(folder / "store.db", args.users)
    publish(folder / "snapshots")
    vectors = Vectors(f"sqlite:///{folder / 'store.db'}", args.users)
    turns: dict[str, list[dict[str, Any]]] = {name: [] for name in ARMS}
    with (
        running_worker(folder, bootstrap_servers, "with", module=_MODULE) as reads,
        running_worker(folder, bootstrap_servers, "without", module=_MODULE) as reads_none,
        vectors.written(args.vectors_per_s),
    ):
        workers = dict(zip(ARMS, (reads, reads_none), strict=True))
        for name in ARMS:  # of every user: histories and vectors come from the store the first time
            ask(workers[name], args, 0, seconds=_WARM_UP_REQUESTS * args.users / WARM_UP_RATE, rate=WARM_UP_RATE)
        for number in range(args.rounds):
            for name in ARMS if number % 2 else ARMS[::-1]:
                turns[name].append(ask(workers[name], args, 1 + number, seconds=args.seconds, rate=args.rate))
    return report(turns) | {"vectors_written": vectors.num_written}


def report(turns: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    """The table, and what the last line says."""
    arms: dict[str, dict[str, Any]] = {}
    for name, own in turns.items():
        latency_ms = [ms for turn in own for ms in turn["latency_ms"]]
        requests, ok = sum(turn["requests"] for turn in own), sum(turn["outcomes"].get("ok", 0) for turn in own)
        arms[name] = {
            "requests": requests,
            "errors": requests - ok,
            "with_vector": sum(turn["with_vector"] for turn in own),
            **{f"p{q}_ms": round(float(np.percentile(latency_ms, q)), 2) for q in (50, 90, 99)},
            "cpu_ms": round(sum(turn["cpu_ms"] * turn["requests"] for turn in own) / requests, 3),
        }
    pairs = list(zip(turns["with"], turns["without"], strict=True))
    ratios = {}
    for q in (50, 99):
        of_pairs = [np.percentile(a["latency_ms"], q) / np.percentile(b["latency_ms"], q) for a, b in pairs]
        ratios[f"p{q}"] = round(arms["with"][f"p{q}_ms"] / arms["without"][f"p{q}_ms"], 3)
        ratios[f"p{q}_median_of_pairs"] = round(float(median(of_pairs)), 3)
    ratios["cpu"] = round(arms["with"]["cpu_ms"] / arms["without"]["cpu_ms"], 3)
    columns = ("requests", "errors", "with_vector", "p50_ms", "p90_ms", "p99_ms", "cpu_ms")
    print(f"{'upstream':<10}" + "".join(f"{name:>13}" for name in columns))
    for name, found in arms.items():
        print(f"{name:<10}" + "".join(f"{found[column]!s:>13}" for column in columns))
    print("with to without: " + ", ".join(f"{name} {ratio}" for name, ratio in ratios.items()))
    return {"arms": arms, "with_to_without": ratios}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rate", type=float, default=50.0, help="requests a second")
    parser.add_argument("--seconds", type=float, default=5.0, help="of each turn")
    parser.add_argument("--rounds", type=int, default=10, help="pairs of turns")
    parser.add_argument("--users", type=int, default=300)
    parser.add_argument("--vectors-per-s", type=int, default=20, help="new vectors written meanwhile")
    parser.add_argument("--quick", action="store_true", help="a few seconds, to see that it works")
    parser.add_argument("--results", type=Path, help="JSON file to write")
    args = parser.parse_args()
    if args.quick:
        args.rate, args.seconds, args.rounds, args.users = 20.0, 1.0, 2, 20
    with tempfile.TemporaryDirectory() as folder, LocalBroker(LocalBrokerConfig(port=0)) as broker:
        found = measure(args, Path(folder), broker.bootstrap_servers)
    settings = {name: getattr(args, name) for name in ("rate", "seconds", "rounds", "users", "vectors_per_s")}
    shapes = {"items": NUM_ITEMS, "candidates": CANDIDATES, "history_len": HISTORY_LEN, "width": UPSTREAM.width}
    result = {"benchmark": "upstream-serving", **environment(), **settings, **shapes, **found}
    if args.results:
        args.results.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(result))
    return 0


if __name__ == "__main__":
    sys.exit(main())
