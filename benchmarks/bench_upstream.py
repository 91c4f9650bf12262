"""What vectors of users cost: those who compute them, those who train with them, and answers.

    python benchmarks/bench_upstream.py [--users 2000] [--lengths 64 256 1024] [--seconds 8] [--results FILE]

*compute*: users whose vectors a daemon reads, computes and stores in a second of CPU time, by length of history, and
the shares that the network and the store have in it. *train*: milliseconds of CPU that a step of the ranker with 128
rows pays for their vectors as of then. *answer*: microseconds of CPU, median and p99, that a micro-batch of 8 users
takes to have its vectors from memory, and from the store at a first request; beside it, in turns, a look-up that finds
nothing, as without upstream.

The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.environment import environment
from feature_store.config import FeatureStoreConfig, UserVectorsConfig
from feature_store.interactions import Interactions
from feature_store.schema import migrate
from feature_store.store import FeatureStore
from model.action_heads import ActionTask
from model.upstream_config import UpstreamConfig, UpstreamModelConfig
from model.upstream_model import UpstreamModel
from online_trainer.labelled_items import LabelledItems
from online_trainer.vector_batches import compute, histories_of
from online_trainer.vector_writer import VectorWrite, VectorWriter
from online_trainer.vectors_as_of import VectorsAsOf
from serving.batcher import ModelThread
from serving.vector_cache import UserVectorCache
from stream.clock import WallClock

START_MS = 1_700_000_000_000
BATCH_USERS, BATCH_TOKENS = 64, 16_384
STEP_ROWS, ANSWER_USERS = 128, 8
NUM_ITEMS = 20_000


def filled(root: Path, num_users: int, length: int) -> FeatureStore:
    """A store of users with histories of one length."""
    url = f"sqlite:///{root}/store-{length}.db"
    migrate(url)
    store, rng = FeatureStore(FeatureStoreConfig(url=url)), np.random.default_rng(length)
    for first in range(0, num_users, 500):
        users = np.arange(first, min(first + 500, num_users))
        count = len(users) * length
        with store.transaction() as transaction:
            transaction.append(
                Interactions(
                    user_id=np.repeat(users, length),
                    item_id=rng.integers(0, NUM_ITEMS, count),
                    event_time_ms=START_MS + np.tile(np.arange(length) * 60_000, len(users)),
                    action=np.ones(count, np.uint32),
                    value=np.full(count, np.nan, np.float32),
                    event_key=rng.integers(0, 2**63, count).astype(np.uint64),
                    seq=np.zeros(count, np.uint32),
                    arrival_ms=np.full(count, START_MS),
                )
            )
    return store


def model_of(config: UpstreamConfig) -> UpstreamModel:
    """Untrained: it costs what a trained one does."""
    tasks = (ActionTask(name="click", kind="bce", action_bit=0),)
    model = UpstreamModel(UpstreamModelConfig(upstream=config, tasks=tasks, num_actions=32))
    model.items.admit(np.arange(NUM_ITEMS))
    return model.eval()


def serve_version(store: FeatureStore) -> None:
    with store.transaction() as transaction:
        transaction.user_states.begin_version("bench", 1, created_at_ms=0)
        transaction.user_states.serve_version("bench", 1, from_ms=1)


def computing(store: FeatureStore, model: UpstreamModel, num_users: int, seconds: float) -> dict[str, float]:
    """Batches as the daemon makes them, until the time is up or everybody has had a turn."""
    writer = VectorWriter(store, model="bench", log_id="main", topic="history-updates", clock=WallClock())
    writer.load([0])
    spent = {"read": 0.0, "network": 0.0, "write": 0.0}
    num_done, began_s = 0, time.perf_counter()
    max_len = model.config.upstream.max_len
    while num_done < num_users and time.perf_counter() - began_s < seconds:
        users = np.arange(num_done, min(num_done + BATCH_USERS, num_users))
        at = [time.process_time()]
        num_forgotten = store.user_states.num_forgotten()
        current = histories_of(store, users, np.zeros(len(users), np.int64), max_len=max_len)
        at.append(time.process_time())
        vectors = compute(model, 1, current, max_tokens=BATCH_TOKENS).vectors
        at.append(time.process_time())
        writer.commit(VectorWrite(vectors={1: vectors}, positions={0: num_done + 1}, num_forgotten=num_forgotten))
        at.append(time.process_time())
        for name, cpu_s in zip(spent, np.diff(at).tolist(), strict=True):
            spent[name] += cpu_s
        num_done += len(users)
    total_s = sum(spent.values())
    shares = {f"{name}_share": round(cpu_s / total_s, 3) for name, cpu_s in spent.items()}
    return {"users": num_done, "users_per_cpu_s": round(num_done / total_s, 1), **shares}


def training(store: FeatureStore, num_users: int, width: int, seconds: float) -> dict[str, float]:
    """Reads of vectors as of moments, a step's rows at a time."""
    reader, rng = VectorsAsOf(store, model="bench", width=width), np.random.default_rng(1)
    never = np.full(STEP_ROWS, np.iinfo(np.int64).max)
    costs, began_s = [], time.perf_counter()
    while time.perf_counter() - began_s < seconds:
        items = LabelledItems(
            user_id=rng.integers(0, num_users, STEP_ROWS),
            shown_at_ms=never,
            known_before_ms=never,
            written_before_ms=never,
            below_seq=never,
            surface=np.zeros(STEP_ROWS, np.uint8),
            offsets=np.arange(STEP_ROWS + 1),
            item_id=np.zeros(STEP_ROWS, np.int64),
            action=np.zeros(STEP_ROWS, np.uint32),
            value=np.zeros(STEP_ROWS, np.float32),
            is_measured=np.ones(STEP_ROWS, np.bool_),
        )
        before_s = time.process_time()
        reader.read(items)
        costs.append(time.process_time() - before_s)
    return {"rows": STEP_ROWS, "cpu_ms": round(1_000 * float(np.median(costs)), 2)}


def answering(store: FeatureStore, num_users: int, width: int, seconds: float) -> dict[str, Any]:
    """Three kinds of look-up in turns, so that a busy machine hits all of them."""
    thread, rng = ModelThread(), np.random.default_rng(2)

    def cache_of(model: str) -> UserVectorCache:
        return UserVectorCache(store, UserVectorsConfig(), thread, WallClock(), model=model, width=width)

    warm, cold, without = cache_of("bench"), cache_of("bench"), cache_of("nobody's")
    everybody = list(range(num_users))
    warm.read(everybody)
    without.read(everybody)
    kinds: dict[str, Callable[[Sequence[int]], Any]] = {
        "memory": warm.read,
        "store": cold.read,
        "without": without.read,
    }
    times: dict[str, list[float]] = {name: [] for name in kinds}
    began_s = time.perf_counter()
    while time.perf_counter() - began_s < seconds:
        users: NDArray[np.int64] = rng.integers(0, num_users, ANSWER_USERS)
        cold.clear()
        for name, read in kinds.items():
            before_s = time.thread_time()
            read(users.tolist())
            times[name].append(1e6 * (time.thread_time() - before_s))
    for one in (warm, cold, without):
        one.close()
    thread.close()
    return {
        name: {"p50_us": round(float(np.median(spent)), 1), "p99_us": round(float(np.quantile(spent, 0.99)), 1)}
        for name, spent in times.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--users", type=int, default=2_000)
    parser.add_argument("--lengths", type=int, nargs="+", default=[64, 256, 1024])
    parser.add_argument("--seconds", type=float, default=8.0, help="of each part, about")
    parser.add_argument("--results", type=Path, help="JSON file to write")
    options = parser.parse_args()
    config = UpstreamConfig()
    found: dict[str, Any] = {"environment": environment(), "compute": {}, "width": config.width}
    with tempfile.TemporaryDirectory() as folder:
        for length in options.lengths:
            store = filled(Path(folder), options.users, length)
            serve_version(store)
            found["compute"][str(length)] = one = computing(store, model_of(config), options.users, options.seconds)
            print(
                f"compute: history of {length:5,}: {one['users_per_cpu_s']:7,.1f} users per second of CPU "
                f"(network {one['network_share']:.0%}, read {one['read_share']:.0%}, write {one['write_share']:.0%})"
            )
            num_users = int(one["users"])
            if length == options.lengths[0]:
                found["train"] = training(store, num_users, config.width, options.seconds)
                found["answer"] = answering(store, num_users, config.width, options.seconds)
                print(f"train:   {found['train']['cpu_ms']} ms of CPU for a step of {STEP_ROWS} rows")
                for name, figures in found["answer"].items():
                    print(f"answer:  {name:8} p50 {figures['p50_us']:8,.1f} us, p99 {figures['p99_us']:8,.1f} us")
            store.close()
    if options.results:
        options.results.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(found))


if __name__ == "__main__":
    main()
