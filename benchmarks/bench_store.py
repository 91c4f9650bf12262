"""How fast histories are appended and read: in memory, from a cold database, and as the number of users grows.

    python benchmarks/bench_store.py [--quick] [--only append,gather,cold,growth] [--directory PATH]

* *append*: `HotHistories.apply` of update batches of resident users, drawn by Zipf's law (exponent 1) from 50,000; the
  headline is a batch of 10,000 rows, as much as one history-updates message holds while catching up. In the arm "1 %
  late", that share of the rows is up to ten minutes older than the stream.
* *gather*: `HotHistories.gather` of 256 users × 512, whose blocks lie scattered in an arena larger than the processor's
  caches, against memcpy of as many bytes: in one piece, and in pieces as long as the arena's (512 values of a column),
  scattered as they are. Read and written bytes count, for all three.
* *cold*: `FeatureStore.read` of the same shape by a store object that has never been used: nothing in our process. The
  operating system's cache of the file is warm, or has been dropped (`posix_fadvise`).
* *growth*: three SQLite stores with as many interactions, of ten times as many users each. The same cohort of users has
  512 interactions in every store, the others share the rest evenly; all are written a few at a time in random order, so
  that a user's chunks lie scattered as a live stream leaves them. "Same users": batches append to and reads ask for
  members of the cohort, so the work is the same and only what surrounds it grows. "Any users" draws from everybody:
  histories get shorter as users get more, so that it is not the same work (a read counts by user, not by event), but it
  is what a growing service sees. Means include the batches that moved SQLite's write-ahead log into the file, which are
  too few to count in medians.
  The three take turns, files are in the operating system's cache, and flatness is the largest figure by the smallest.

CPU time is this thread's, with the kernel's part. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import os
import sqlite3
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any, Final, TypeVar

import numpy as np
from numpy.typing import NDArray

from benchmarks.environment import environment
from feature_store import schema
from feature_store.config import FeatureStoreConfig, HotHistoriesConfig
from feature_store.hot import HotHistories
from feature_store.interactions import BYTES_PER_INTERACTION, COLUMN_DTYPES, Interactions
from feature_store.jagged import rank_in_group
from feature_store.store import FeatureStore

Int64s = NDArray[np.int64]
Result = dict[str, Any]
T = TypeVar("T")

B, L = 256, 512
"""Users and interactions of each, in a gather and a cold read."""
START_MS: Final = 1_700_000_000_000


class Events:
    """Interactions with random content, one a millisecond; numbers each user's arrivals as the store would."""

    def __init__(self, num_users: int, seed: int) -> None:
        self.rng = np.random.default_rng(seed)
        self.user_ids = self.rng.integers(0, 1 << 62, num_users)
        shares = np.cumsum(1 / np.arange(1, num_users + 1))
        self._shares = shares / shares[-1]
        self._next_seq = np.zeros(num_users, np.int64)
        self._now_ms = START_MS

    def zipf(self, num: int) -> Int64s:
        return np.searchsorted(self._shares, self.rng.random(num))

    def batch(self, users: Int64s, *, late_share: float = 0.0) -> Interactions:
        """One row for each of these user numbers."""
        n, rng = len(users), self.rng
        order = np.argsort(users, kind="stable")
        _, group = np.unique(users[order], return_inverse=True)
        seq = np.empty(n, np.int64)
        seq[order] = self._next_seq[users[order]] + rank_in_group(group, int(group.max(initial=-1)) + 1)
        np.add.at(self._next_seq, users, 1)
        time_ms = self._now_ms + np.arange(n)
        self._now_ms += n
        is_late = rng.random(n) < late_share
        return Interactions(
            user_id=self.user_ids[users],
            item_id=rng.integers(0, 1 << 62, n),
            event_time_ms=np.where(is_late, time_ms - rng.integers(0, 600_000, n), time_ms),
            action=np.ones(n, np.uint32),
            value=rng.random(n, np.float32),
            event_key=rng.integers(0, 1 << 62, n).astype(np.uint64),
            seq=seq.astype(np.uint32),
            arrival_ms=time_ms,
        )


class Timed:
    """Wall and CPU seconds of calls, one after the other."""

    def __init__(self) -> None:
        self.wall_s: list[float] = []
        self.cpu_s: list[float] = []

    def call(self, function: Callable[..., T], *args: Any, **kwargs: Any) -> T:
        wall, cpu = time.perf_counter(), time.thread_time()
        result = function(*args, **kwargs)
        self.cpu_s.append(time.thread_time() - cpu)
        self.wall_s.append(time.perf_counter() - wall)
        return result


def new_store(path: Path) -> FeatureStore:
    url = f"sqlite:///{path}"
    schema.migrate(url)
    return FeatureStore(FeatureStoreConfig(url=url))


def measure_append(directory: Path, *, quick: bool) -> list[Result]:
    """Every case in turn, several times over, so that a busy moment of the machine hits all of them."""
    cases = [(1_000, 0.0), (5_000, 0.0), (10_000, 0.0), (50_000, 0.0), (10_000, 0.01)]
    num_rounds, rows_per_round = (3, 50_000) if quick else (7, 100_000)
    with closing(new_store(directory / "append.db")) as store:
        hot = HotHistories(store, HotHistoriesConfig(budget_bytes=1 << 30))
        events = Events(50_000, seed=1)
        hot.apply(events.batch(np.arange(50_000)))
        for _ in range(4 if quick else 20):  # blocks of all sizes, the busiest users' full
            hot.apply(events.batch(events.zipf(50_000)))
        timed = {case: [Timed() for _ in range(num_rounds)] for case in cases}
        for number in range(num_rounds):
            for size, late_share in cases:
                for _ in range(max(1, rows_per_round // size)):
                    batch = events.batch(events.zipf(size), late_share=late_share)
                    timed[size, late_share][number].call(hot.apply, batch)
        assert hot.stats.misses == hot.stats.repairs == hot.stats.evictions == 0
    results = []
    print(f"\nhot append{'':<14}{'rows/s best':>13}{'rows/s p50':>13}{'rows/CPU s':>13}{'batch p50':>13}")
    for (size, late_share), rounds in timed.items():
        num_rows = size * len(rounds[0].wall_s)
        walls = [num_rows / sum(one.wall_s) for one in rounds]
        result = {
            "batch_rows": size,
            "late_share": late_share,
            "rows_per_s_best": round(max(walls)),
            "rows_per_s_p50": round(float(np.median(walls))),
            "rows_per_cpu_s": round(num_rows * num_rounds / sum(sum(one.cpu_s) for one in rounds)),
            "batch_p50_ms": round(float(np.median([s for one in rounds for s in one.wall_s])) * 1e3, 3),
        }
        results.append(result)
        name = f"  {size:,} rows" + (f", {late_share:.0%} late" if late_share else "")
        figures = (f"{result[key]:>13,}" for key in ("rows_per_s_best", "rows_per_s_p50", "rows_per_cpu_s"))
        print(f"{name:<24}{''.join(figures)}{result['batch_p50_ms']:>10.2f} ms", flush=True)
    return results


def measure_gather(directory: Path, *, quick: bool) -> list[Result]:
    """Gather and both kinds of memcpy take turns."""
    num_users, num_calls = (2_000, 100) if quick else (8_000, 300)
    rng = np.random.default_rng(2)
    timed = {name: Timed() for name in ("gather", "memcpy, one piece", "memcpy, scattered pieces")}
    with closing(new_store(directory / "gather.db")) as store:
        hot = HotHistories(store, HotHistoriesConfig(budget_bytes=1 << 30))
        events = Events(num_users, seed=2)
        for _ in range(60):
            hot.apply(events.batch(np.tile(np.arange(num_users), 10)))
        source = {name: np.ones((num_users, L), dtype) for name, dtype in COLUMN_DTYPES.items()}
        whole = np.ones(num_users * L * BYTES_PER_INTERACTION, np.uint8)
        num_bytes = B * L * BYTES_PER_INTERACTION
        for _ in range(num_calls):
            users = rng.choice(num_users, B, replace=False)
            histories = timed["gather"].call(hot.gather, events.user_ids[users], max_len=L)
            assert histories.num_interactions == B * L
            start = int(rng.integers(len(whole) - num_bytes))
            timed["memcpy, one piece"].call(whole[start : start + num_bytes].copy)
            timed["memcpy, scattered pieces"].call(take_rows, list(source.values()), users)
    results = []
    header = f"{'wall p50':>12}{'wall best':>12}{'CPU p50':>12}{'GB/s p50':>10}"
    print(f"\ngather {B} × {L}{'':<12}{header}   gather is (CPU p50, best)")
    for name, one in timed.items():
        p50_s, best_s, cpu_s = float(np.median(one.wall_s)), min(one.wall_s), float(np.median(one.cpu_s))
        result = {
            "case": name,
            "wall_p50_ms": round(p50_s * 1e3, 3),
            "wall_best_ms": round(best_s * 1e3, 3),
            "cpu_p50_ms": round(cpu_s * 1e3, 3),
            "gb_per_s_p50": round(2 * num_bytes / p50_s / 1e9, 2),
            "gather_share_cpu_p50": round(cpu_s / float(np.median(timed["gather"].cpu_s)), 3),
            "gather_share_wall_p50": round(p50_s / float(np.median(timed["gather"].wall_s)), 3),
            "gather_share_wall_best": round(best_s / min(timed["gather"].wall_s), 3),
        }
        results.append(result)
        figures = (f"{result[key]:>9.2f} ms" for key in ("wall_p50_ms", "wall_best_ms", "cpu_p50_ms"))
        shares = f"{result['gather_share_cpu_p50']:>13.0%}, {result['gather_share_wall_best']:.0%}"
        print(f"  {name:<24}{''.join(figures)}{result['gb_per_s_p50']:>10.1f}{shares if name != 'gather' else ''}")
    return results


def take_rows(columns: list[NDArray[Any]], rows: Int64s) -> list[NDArray[Any]]:
    """Whole rows of two-dimensional columns: np.take copies each by one memmove, in C."""
    return [column.take(rows, axis=0, mode="clip") for column in columns]


def measure_cold(path: Path, cohort: Int64s, *, quick: bool) -> list[Result]:
    """Reads by a store object that has just been made; its connection and first statement are part of the time."""
    rng = np.random.default_rng(3)
    results = []
    print(f"\ncold read {B} × {L}{'':<7}{'wall p50':>13}{'wall best':>13}{'CPU p50':>13}")
    for case in ("file cached", "file not cached"):
        timed = Timed()
        for _ in range(5 if quick else 20):
            users = rng.choice(cohort, B, replace=False)
            (warm_up if case == "file cached" else drop_from_cache)(path)
            with closing(FeatureStore(FeatureStoreConfig(url=f"sqlite:///{path}"))) as store:
                histories = timed.call(store.read, users, max_len=L)
            assert histories.num_interactions == B * L
        result = {
            "case": case,
            "wall_p50_ms": round(float(np.median(timed.wall_s)) * 1e3, 1),
            "wall_best_ms": round(min(timed.wall_s) * 1e3, 1),
            "cpu_p50_ms": round(float(np.median(timed.cpu_s)) * 1e3, 1),
        }
        results.append(result)
        figures = (f"{result[key]:>10.1f} ms" for key in ("wall_p50_ms", "wall_best_ms", "cpu_p50_ms"))
        print(f"  {case:<22}{''.join(figures)}", flush=True)
    return results


def warm_up(path: Path) -> None:
    with path.open("rb") as file:
        while file.read(1 << 24):
            pass


def drop_from_cache(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


class GrowthStore:
    """One store of the growth curve."""

    def __init__(self, path: Path, num_users: int, num_interactions: int, num_cohort: int) -> None:
        self.path, self.num_users = path, num_users
        self.events = Events(num_users, seed=num_users)
        self.cohort = np.arange(num_cohort)
        self.store = new_store(path)
        started = time.perf_counter()
        self._fill(num_interactions)
        self.fill_s = time.perf_counter() - started
        self.timed = {(arm, kind): Timed() for arm in ("same users", "any users") for kind in ("append", "read")}

    def _fill(self, num_interactions: int) -> None:
        rest = num_interactions - L * len(self.cohort)
        left = np.full(self.num_users, rest // (self.num_users - len(self.cohort)))
        left[self.cohort] = L
        while left.any():
            users = self.events.rng.permutation(np.flatnonzero(left))
            for low in range(0, len(users), 4_000):
                some = users[low : low + 4_000]
                counts = np.minimum(left[some], 32)
                left[some] -= counts
                self._append(self.events.batch(self.events.rng.permutation(np.repeat(some, counts))))
        # The log moves into the file, which then is all there is to read.
        with closing(sqlite3.connect(self.path)) as connection:
            connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")

    def _append(self, batch: Interactions) -> None:
        with self.store.transaction() as transaction:
            result = transaction.append(batch)
        assert result.accepted.all()

    def measure(self, arm: str, num_users: int) -> None:
        """One batch of two rows a user, and one read."""
        users = self.cohort if arm == "same users" else np.arange(self.num_users)
        some = self.events.rng.choice(users, num_users, replace=False)
        batch = self.events.batch(self.events.rng.permutation(np.repeat(some, 2)))
        self.timed[arm, "append"].call(self._append, batch)
        some = self.events.rng.choice(users, B, replace=False)
        histories = self.timed[arm, "read"].call(self.store.read, self.events.user_ids[some], max_len=L)
        assert arm == "any users" or histories.num_interactions == B * L


def measure_growth(directory: Path, *, quick: bool) -> tuple[Result, GrowthStore]:
    num_interactions, num_cohort, first, num_rounds = (
        (1_000_000, 500, 1_000, 4) if quick else (10_000_000, 5_000, 10_000, 25)
    )
    stores = []
    for num_users in (first, 10 * first, 100 * first):
        store = GrowthStore(directory / f"growth-{num_users}.db", num_users, num_interactions, num_cohort)
        size_mb = store.path.stat().st_size / 1e6
        print(f"  filled {num_users:>9,} users in {store.fill_s:.0f} s, {size_mb:.0f} MB", flush=True)
        warm_up(store.path)
        stores.append(store)
    for number in range(num_rounds + 1):
        for store in stores:
            for arm in ("same users", "any users"):
                store.measure(arm, num_cohort // 2)
                if number == 0:  # the pages that every append and read goes through
                    for timed in store.timed.values():
                        timed.wall_s.clear()
                        timed.cpu_s.clear()
    print(
        f"\ngrowth, per{'':<27}"
        + "".join(f"{f'{store.num_users:,} users':>16}" for store in stores)
        + f"{'flat within':>13}"
    )
    measured, flatness = [], {}
    for arm, kind, unit in (
        ("same users", "append", "event"),
        ("same users", "read", "event"),
        ("any users", "append", "event"),
        ("any users", "read", "user"),
    ):
        num = {("append", "event"): 2 * (num_cohort // 2), ("read", "event"): B * L, ("read", "user"): B}[kind, unit]
        for figure, clock in (("p50", "cpu"), ("mean", "cpu"), ("p50", "wall")):
            calls = [getattr(store.timed[arm, kind], f"{clock}_s") for store in stores]
            each = [float(np.median(one) if figure == "p50" else np.mean(one)) / num * 1e6 for one in calls]
            name = f"{kind}, {arm}, {unit}, {clock} {figure}"
            flatness[name] = round(max(each) / min(each) - 1, 3)
            print(f"  {name:<36}" + "".join(f"{us:>13.2f} µs" for us in each) + f"{flatness[name]:>13.0%}")
            measured += [
                {"users": store.num_users, "arm": arm, "kind": kind, "per": unit, f"{clock}_{figure}_us": round(us, 3)}
                for store, us in zip(stores, each, strict=True)
            ]
    filled = [{"users": s.num_users, "fill_s": round(s.fill_s, 1), "bytes": s.path.stat().st_size} for s in stores]
    for store in stores:
        store.store.close()
    shape = {"interactions": num_interactions, "cohort": num_cohort, "rounds": num_rounds, "stores": filled}
    return shape | {"measured": measured, "flat_within": flatness}, stores[1]


def main() -> int:
    parser = argparse.ArgumentParser(description="appends and reads of histories")
    parser.add_argument("--quick", action="store_true", help="a tenth of the data, fewer repetitions")
    parser.add_argument("--only", default="append,gather,cold,growth", help="parts, separated by commas")
    parser.add_argument("--directory", help="where the databases go for the time being: about 2 GB")
    args = parser.parse_args()
    parts = args.only.split(",")
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory(prefix="headrace-bench-", dir=args.directory) as name:
        directory = Path(name)
        if "append" in parts:
            found["append"] = measure_append(directory, quick=args.quick)
        if "gather" in parts:
            found["gather"] = measure_gather(directory, quick=args.quick)
        if "growth" in parts or "cold" in parts:
            growth, middle = measure_growth(directory, quick=args.quick)
            found["growth"] = growth
            found["cold"] = measure_cold(middle.path, middle.events.user_ids[middle.cohort], quick=args.quick)
    print(
        json.dumps(
            {
                "benchmark": "store",
                **environment(),
                "shape": {"users": B, "interactions": L, "bytes_per_interaction": BYTES_PER_INTERACTION},
                "quick": args.quick,
                **found,
            }
        )
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
