"""`headrace freshness`: what is put together from daemons, store and log, and what is said when some are away."""

from __future__ import annotations

import json
import socket
from collections.abc import AsyncIterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from opentelemetry import trace
from rich.console import Console

from feature_store.config import FeatureStoreConfig
from feature_store.records import PublishedSnapshot
from feature_store.schema import migrate
from feature_store.store import FeatureStore
from model.retention import ReplicaLease, write_lease
from model.storage import open_storage
from ops.freshness_report import FreshnessReport, report_of
from ops.freshness_sources import FreshnessSources, SourceParts
from ops.freshness_table import rendered
from ops.probes import Probes, ProbeServer, Readiness
from stream.clock import ManualClock
from stream.freshness import AgePair, FreshnessRecorder
from stream.memory_log import MemoryLog
from tests.ops.command_line import Headrace

NOW_MS = 1_700_000_000_000
FIELDS = ("num_events", "num_waiting", "coverage")


class World:
    """A store and a log; daemons are their status pages, answered over HTTP."""

    def __init__(self, root: Path, client: httpx.AsyncClient) -> None:
        self.url = f"sqlite:///{root}/store.db"
        migrate(self.url)
        self.store = FeatureStore(FeatureStoreConfig(url=self.url))
        self.clock = ManualClock(NOW_MS)
        self.log = MemoryLog(self.clock)
        self.snapshots = open_storage(root / "snapshots")
        self.running = ExitStack()
        self.urls: list[str] = []
        self._client = client

    def listen(self, page: Mapping[str, Any]) -> int:
        """A daemon with this status page; its port."""
        probes = Probes(
            is_alive=lambda: True, readiness=lambda: Readiness(is_ready=True), metrics=lambda: b"", status=lambda: page
        )
        server = self.running.enter_context(ProbeServer(probes, port=0))
        return server.port

    def start_ingest(self, ages_ms: list[int], *, lag: int = 0) -> None:
        page = {"lag": lag, "freshness": {"F1": self.recorded("F1", ages_ms)}}
        self.urls.append(f"http://127.0.0.1:{self.listen(page)}")

    def start_trainer(self, ages_ms: list[int], *, position: int) -> None:
        page = {"positions": {"0": position}, "freshness": {"F2": self.recorded("F2", ages_ms)}}
        self.urls.append(f"http://127.0.0.1:{self.listen(page)}")

    def start_upstream(self, ages_ms: list[int], *, waiting: int) -> None:
        page = {"waiting": waiting, "freshness": {"FV": self.recorded("FV", ages_ms)}}
        self.urls.append(f"http://127.0.0.1:{self.listen(page)}")

    def start_worker(self, version: int, **page: Any) -> str:
        """A replica that answers; its name."""
        told: dict[str, Any] = {"freshness": {"F4": {}}, "snapshot": {"version": version}, **page}
        replica = f"{socket.gethostname()}:{self.listen(told)}"
        told["replica"] = replica
        self.lease(replica, version)
        return replica

    def lease(self, replica: str, version: int) -> None:
        lease = ReplicaLease(replica=replica, version=version, loading=None, at_ms=self.clock.now_ms())
        write_lease(self.snapshots, "default", lease)

    def recorded(self, hop: str, ages_ms: list[int]) -> dict[str, object]:
        """What a daemon tells of events that were sent 200 ms before they were appended."""
        recorder, now_ms = FreshnessRecorder(hop, mode="live"), self.clock.now_ms()
        appended = now_ms - np.array(ages_ms, np.int64)
        recorder.record(appended - 200, appended, now_ms, trace.INVALID_SPAN)
        return recorder.summary(now_ms)

    def store_up_to(self, position: int) -> None:
        with self.store.transaction() as transaction:
            transaction.lock_position("memory", "interactions", 0)
            transaction.set_position("memory", "interactions", 0, position, watermark_ms=NOW_MS)

    def publish(self, version: int, *, up_to: int, ages_ms: list[int], ago_ms: int = 0) -> None:
        ages, now_ms = AgePair(), self.clock.now_ms() - ago_ms
        ages.append.add(np.array(ages_ms, np.int64))
        ages.event.add(np.array(ages_ms, np.int64) + 200)
        self.store.record_published(
            PublishedSnapshot(
                model="default",
                version=version,
                kind="delta",
                parent=version - 1,
                created_at_ms=now_ms,
                published_at_ms=now_ms + 10,
                watermark_ms=NOW_MS,
                lineage={"log_id": "memory", "positions": {"0": up_to}},
                event_age=ages.event.to_dict(),
                append_age=ages.append.to_dict(),
            )
        )

    def answered(self, version: int, replica: str, *, after_ms: int) -> None:
        self.store.record_first_served("default", version, replica, self.clock.now_ms() + after_ms)

    def sources(self, **changes: Any) -> FreshnessSources:
        parts: dict[str, Any] = {
            "store": self.store,
            "log": self.log,
            "snapshots": self.snapshots,
            "model": "default",
            "clock": self.clock,
            "client": self._client,
            "urls": self.urls,
            "replica_timeout_ms": 60_000,
        }
        return FreshnessSources(SourceParts(**(parts | changes)))

    async def report(self, **changes: Any) -> FreshnessReport:
        return report_of(await self.sources(**changes).look())


@pytest.fixture
async def world(tmp_path: Path) -> AsyncIterator[World]:
    async with httpx.AsyncClient() as client:
        made = World(tmp_path, client)
        await made.log.create_topics()
        with made.running:
            yield made
        made.store.close()


def about(expected_ms: float) -> Any:
    return pytest.approx(expected_ms, rel=0.1)  # two roundings into buckets of 9 %


def figures(report: FreshnessReport) -> list[tuple[Any, ...]]:
    return [tuple(getattr(hop, name) for name in FIELDS) for hop in report.hops]


async def test_every_hop_has_its_events_what_waits_and_the_share_that_came(world: World) -> None:
    world.start_ingest([30] * 90, lag=10)
    world.start_ingest([50] * 10, lag=0)
    world.start_trainer([300] * 80, position=80)
    world.store_up_to(100)
    world.publish(1, up_to=60, ages_ms=[500] * 60)
    world.publish(2, up_to=70, ages_ms=[400] * 10)
    fast = world.start_worker(2, weights_behind_ms=120, weights_age_ms=9e9)
    slow = world.start_worker(1, weights_behind_ms=900, weights_age_ms=9e9)
    world.answered(1, fast, after_ms=100)
    world.answered(2, fast, after_ms=100)
    world.answered(1, slow, after_ms=700)
    report = await world.report()
    assert figures(report) == [(100, 10, 100 / 110), (80, 20, 0.8), (70, 30, 0.7), (60, 40, 0.6)]
    assert [hop.append.p50_ms for hop in report.hops] == [about(30), about(300), about(510), about(1_200)]
    assert [hop.event.p50_ms for hop in report.hops] == [about(230), about(500), about(710), about(1_400)]
    found = {one.replica: (one.version, one.num_events, one.weights_behind_ms) for one in report.replicas}
    assert found == {fast: (2, 70, 120), slow: (1, 60, 900)}
    assert report.problems == {}
    assert not report.is_idle


async def test_figures_follow_what_happens_while_it_looks_and_replicas_come_and_go(world: World) -> None:
    world.store_up_to(20)
    world.publish(1, up_to=10, ages_ms=[100] * 10)
    world.lease("a", 1)
    world.answered(1, "a", after_ms=50)
    sources = world.sources()
    assert figures(report_of(await sources.look()))[2:] == [(10, 10, 0.5), (10, 10, 0.5)]
    world.clock.advance(1_000)
    world.publish(2, up_to=20, ages_ms=[100] * 10)
    world.answered(2, "a", after_ms=50)
    assert figures(report_of(await sources.look()))[2:] == [(20, 0, 1.0), (20, 0, 1.0)]
    world.lease("b", 1)
    world.answered(1, "b", after_ms=5_000)
    report = report_of(await sources.look())
    assert figures(report)[3] == (10, 10, 0.5), "the slowest replica counts"
    assert report.hops[3].append.p50_ms == about(6_100)


async def test_vectors_of_users_are_a_hop_of_their_own_where_they_are_kept(world: World) -> None:
    world.start_ingest([100] * 4)
    assert [hop.hop for hop in (await world.report()).hops] == ["F1", "F2", "F3", "F4"]
    world.start_upstream([5_000] * 3, waiting=1)
    hop = (await world.report()).hops[-1]
    assert (hop.hop, hop.num_events, hop.num_waiting) == ("FV", 3, 1)
    assert hop.append.p50_ms == pytest.approx(5_000, rel=0.05)
    assert hop.event.p50_ms == pytest.approx(5_200, rel=0.05)


async def test_a_quiet_stream_is_idle_and_not_stale(world: World) -> None:
    world.start_ingest([])
    world.start_trainer([], position=5)
    world.store_up_to(5)
    world.publish(1, up_to=5, ages_ms=[500] * 5, ago_ms=3_600_000)
    replica = world.start_worker(1, weights_behind_ms=0, weights_age_ms=3_600_000)
    world.answered(1, replica, after_ms=-3_599_000)
    report = await world.report()
    assert figures(report) == [(0, 0, None)] * 4
    assert report.hops[3].append.p99_ms is None
    assert report.is_idle
    # Something was sent that nobody has read, or nobody says whether something was: that is not idle.
    world.start_ingest([], lag=1)
    assert not (await world.report()).is_idle
    assert not (await world.report(urls=[])).is_idle


async def test_events_from_the_future_are_clamped_and_counted(world: World) -> None:
    world.start_ingest([-400, -250, 30])
    (stored, *_) = (await world.report()).hops
    assert (stored.append.num_negative, stored.event.num_negative) == (2, 2)
    assert stored.append.p50_ms == 0.5


async def test_what_is_away_is_named_and_the_rest_stands(world: World) -> None:
    world.store_up_to(7)
    for _ in range(9):
        world.log.append("interactions", 0, None, b"{}", ())
    world.publish(1, up_to=5, ages_ms=[100] * 5)
    world.lease("elsewhere.invalid:8080", 1)
    world.answered(1, "elsewhere.invalid:8080", after_ms=50)
    report = await world.report(urls=["http://127.0.0.1:9"])
    # Without ingest, the log says what is unread; without the trainer, nobody knows what it has learned.
    assert figures(report) == [(None, 2, None), (None, None, None), (5, 2, 5 / 7), (5, 2, 5 / 7)]
    assert set(report.problems) == {"http://127.0.0.1:9", "http://elsewhere.invalid:8080"}
    assert [(one.replica, one.num_events, one.weights_behind_ms) for one in report.replicas] == [
        ("elsewhere.invalid:8080", 5, None)
    ]


async def test_without_the_store_the_daemons_still_tell(world: World, tmp_path: Path) -> None:
    world.start_ingest([30] * 5)
    away = FeatureStore(FeatureStoreConfig(url=f"sqlite:///{tmp_path}/no/such/folder.db"))
    report = await world.report(store=away)
    assert figures(report) == [(5, 0, 1.0), (None, None, None), (None, None, None), (None, None, None)]
    assert "store" in report.problems


async def test_the_table_shows_it_in_words(world: World) -> None:
    world.start_ingest([30] * 90, lag=10)
    world.store_up_to(90)
    world.publish(1, up_to=90, ages_ms=[400] * 90)
    world.lease("w:1", 1)
    world.answered(1, "w:1", after_ms=1_000)
    console = Console(width=200, no_color=True)
    with console.capture() as captured:
        console.print(rendered(await world.report(), width=console.width))
    lines = captured.get().splitlines()
    stored = next(line for line in lines if line.startswith("F1 stored"))
    assert stored.split()[2:5] == ["90", "10", "90.0%"]
    answered = next(line for line in lines if line.startswith("F4 answered"))
    assert answered.split()[4:9] == ["90", "0", "100.0%", "1.39", "s"]
    assert any(line.startswith("w:1") for line in lines)
    assert "http://w:1" in captured.get(), "it does not answer, and is named"


async def test_eighty_columns_hold_the_table(world: World) -> None:
    world.start_ingest([400 * 86_400_000] * 90, lag=10)
    world.store_up_to(90)
    world.publish(1, up_to=90, ages_ms=[1_000] * 90)
    world.lease("production-host:8080", 1)
    world.answered(1, "production-host:8080", after_ms=1_000)
    console = Console(width=80, no_color=True)
    with console.capture() as captured:
        console.print(rendered(await world.report(), width=console.width))
    told = captured.get()
    assert "…" not in told
    for words in ("F1 stored", "F2 learned", "F3", "F4", "waiting", "coverage", "p99", "negative", "behind"):
        assert words in told
    assert "p95" not in told


def test_the_command_looks_once_where_there_is_no_terminal(headrace: Headrace, tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path}/store.db"
    migrate(url)
    settings = {
        "HEADRACE_STORE__URL": url,
        "HEADRACE_LOG__BOOTSTRAP_SERVERS": "127.0.0.1:9",
        "HEADRACE_LOG__REQUEST_TIMEOUT_MS": "300",
        "HEADRACE_HEADRACE__INGEST_PORT": "9",
        "HEADRACE_HEADRACE__TRAINER_PORT": "9",
    }
    ran = headrace("freshness", "--json", **settings)
    assert ran.returncode == 0, ran.stderr
    told = json.loads(ran.stdout)
    assert [(hop["hop"], hop["num_events"]) for hop in told["hops"]] == [
        ("F1", None),
        ("F2", None),
        ("F3", 0),
        ("F4", 0),
    ]
    assert {"http://127.0.0.1:9", "serving", "log"} <= set(told["problems"])
    ran = headrace("freshness", **(settings | {"HEADRACE_STORE__URL": f"sqlite:///{tmp_path}/no/such/folder.db"}))
    assert ran.returncode == 1, "nobody could be asked"
