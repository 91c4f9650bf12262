"""Looks at all processes of the demo a few times a second, and asks the workers for recommendations all the time."""

from __future__ import annotations

import asyncio
import logging
import os
import random
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import httpx

from feature_store.errors import StoreUnavailableError
from feature_store.store import FeatureStore
from ops.demo.plan import HOST, UPSTREAM_TASK, DemoError, Plan
from ops.demo.state import RECENT_MS, Ages, Arm, GrowingCount, Rate, Sample, VectorFigures, WorkerFigures
from ops.local_broker import LocalBroker
from ops.snapshot_freshness import SnapshotFreshness
from ops.supervisor import ChildStatus, Supervisor
from serving.calling import ClientConfig
from serving.client import AsyncClient
from serving.errors import AnswerRefusedError, ClientError
from serving.messages import Recommendation, RecommendRequest
from stream.freshness import F1_STORED, F2_LEARNED, F3_PUBLISHED, F4_ANSWERED, FV_VECTOR

logger = logging.getLogger(__name__)

POLL_S: Final = 0.5
_REQUEST_TIMEOUT_MS: Final = 10_000
_STARTS_MAX: Final = 3
"""A process that has been started more often than this keeps crashing."""
_LOG_LINES: Final = 12


def client_of(http: httpx.AsyncClient, url: str) -> AsyncClient:
    """A client of one worker on connections that others close. It tries nothing twice: every failure is to be seen."""
    return AsyncClient(ClientConfig(url=url, timeout_ms=_REQUEST_TIMEOUT_MS, retries_max=0), http=http)


async def recommend(client: httpx.AsyncClient, url: str, user_id: int, k: int = 10) -> Recommendation:
    """Ask one worker. Raises ClientError."""
    return await client_of(client, url).recommend(RecommendRequest(user_id=user_id, k=k))


class BackgroundLoad:
    """A few requests a second to every worker, for users that have been seen; counts what comes back."""

    def __init__(self, *, requests_per_s: float, user_ids: Sequence[int | str], num_sent: Callable[[], int]) -> None:
        self._interval_s = 1.0 / requests_per_s
        self._user_ids, self._num_sent = user_ids, num_sent
        self.num_answered = 0
        self.num_fallback = 0
        self.failures: Counter[str] = Counter()
        self.contradictions: list[str] = []
        """Answers that no single set of weights can have given."""
        self._times_of: dict[int, str | None] = {}
        self._newest: dict[str, int] = {}

    async def run(self, client: httpx.AsyncClient, url: str, seed: int) -> None:
        """Ask one worker until cancelled."""
        chosen = random.Random(seed)
        while True:
            await asyncio.sleep(self._interval_s * chosen.uniform(0.5, 1.5))
            num_seen = self._num_sent()
            if not num_seen:
                continue
            try:
                answer = await recommend(client, url, int(self._user_ids[chosen.randrange(num_seen)]))
            except AnswerRefusedError as error:
                self.failures[f"status {error.status}"] += 1
                logger.warning("%s answered %s", url, error)
            except ClientError as error:
                self.failures[type(error).__name__] += 1
                logger.warning("%s: %r", url, error)
            else:
                self.note(url, answer)

    def note(self, url: str, answer: Recommendation) -> None:
        """Count an answer, and compare what it says about its weights with what others said."""
        self.num_answered += 1
        self.num_fallback += answer.fallback
        version = answer.snapshot_version
        if version is None:
            return
        if version < self._newest.get(url, 0):
            self.contradictions.append(f"{url} answered with version {version} after {self._newest[url]}")
        self._newest[url] = max(version, self._newest.get(url, 0))
        known = self._times_of.setdefault(version, answer.weights_event_time)
        if known != answer.weights_event_time:
            self.contradictions.append(
                f"version {version} has weights of {known} in one answer and of {answer.weights_event_time} in another"
            )


class Watcher:
    """Takes a `Sample` of everything, again and again."""

    def __init__(self, plan: Plan, store: FeatureStore, supervisor: Supervisor, broker: LocalBroker) -> None:
        self._plan, self._store, self._supervisor, self._broker = plan, store, supervisor, broker
        self._started_s = time.monotonic()
        self._rates = {name: Rate() for name in ("sent", "stored", "learned")}
        self._statuses: dict[str, Mapping[str, Any]] = {}
        self._stored = GrowingCount()
        self.snapshots: SnapshotFreshness | None = None
        self.samples: list[Sample] = [Sample(at_s=0.0)]
        self.num_sent = 0
        self.event_time_ms: int | None = None
        self.load: BackgroundLoad | None = None
        self.window = 0

    @property
    def newest(self) -> Sample:
        """The last sample."""
        return self.samples[-1]

    def status(self, name: str) -> Mapping[str, Any]:
        """The newest status page of a process; empty before the first."""
        return self._statuses.get(name, {})

    async def run(self, client: httpx.AsyncClient, on_sample: Callable[[Sample], None]) -> None:
        """Watch until cancelled. Raises DemoError when a process is down for good."""
        while True:
            began_s = time.monotonic()
            self._require_alive()
            self.samples.append(await self._look(client))
            on_sample(self.newest)
            await asyncio.sleep(max(0.05, POLL_S - (time.monotonic() - began_s)))

    def _require_alive(self) -> None:
        if not self._broker.is_running:
            raise DemoError(f"the local broker ended by itself{log_tail(self._plan.options.log_dir / 'broker.log')}")
        for child in self._supervisor.status():
            if child.state == "refused" or child.num_starts > _STARTS_MAX:
                what = "refused to start" if child.state == "refused" else "crashes again and again"
                log = self._plan.options.log_dir / f"{child.name}.log"
                raise DemoError(f"{child.name} {what} (exit status {child.last_exit}){log_tail(log)}")

    async def _look(self, client: httpx.AsyncClient) -> Sample:
        ports = self._plan.ports
        pages = {"ingest": f"http://{HOST}:{ports.ingest}", "trainer": f"http://{HOST}:{ports.trainer}"}
        if self._plan.options.has_upstream:
            pages["upstream"] = f"http://{HOST}:{ports.upstream}"
        pages |= {f"serving{index}": url for index, url in enumerate(ports.serving_urls())}
        await asyncio.gather(*(self._read(client, name, url) for name, url in pages.items()))
        await asyncio.to_thread(self._read_store)
        return self._sample()

    async def _read(self, client: httpx.AsyncClient, name: str, url: str) -> None:
        try:
            response = await client.get(f"{url}/status")
            response.raise_for_status()
            self._statuses[name] = response.json()
        except (httpx.HTTPError, ValueError) as error:
            logger.debug("%s/status: %r", url, error)  # starting, or being started again: the last page stays

    def _read_store(self) -> None:
        replicas = [page["replica"] for name, page in self._statuses.items() if name.startswith("serving")]
        if self.snapshots is None:
            if len(replicas) < len(self._plan.ports.serving):
                return
            self.snapshots = SnapshotFreshness(replicas, recent_ms=RECENT_MS)
        known, model = self.snapshots, "default"
        try:
            published = self._store.published_snapshots(model, known.published_up_to)
            known.add(published, self._store.first_served(model, known.answered_up_to))
        except StoreUnavailableError as error:
            logger.warning("%s", error)

    def _sample(self) -> Sample:
        at_s = time.monotonic() - self._started_s
        ingest, trainer = self.status("ingest"), self.status("trainer")
        stored, learned = self._stored.of(int(ingest.get("accepted", 0))), int(trainer.get("interactions", 0))
        metrics, snapshot = trainer.get("metrics", {}), trainer.get("snapshot") or {}
        known, load = self.snapshots, self.load
        workers = [self.status(f"serving{index}") for index in range(len(self._plan.ports.serving))]
        return Sample(
            at_s=at_s,
            num_sent=self.num_sent,
            num_stored=stored,
            num_learned=learned,
            sent_per_s=self._rates["sent"].add(at_s, self.num_sent),
            stored_per_s=self._rates["stored"].add(at_s, stored),
            learned_per_s=self._rates["learned"].add(at_s, learned),
            refused=sum(ingest.get("refused", {}).values()),
            event_time_ms=self.event_time_ms,
            num_evaluated=int(metrics.get("model.lifetime.count", 0)),
            window=self.window,
            model=Arm.of(metrics, "model"),
            popularity=Arm.of(metrics, "popularity"),
            num_items=int(trainer.get("items", 0)),
            snapshot_version=snapshot.get("version"),
            snapshot_kind=snapshot.get("kind"),
            snapshot_bytes=snapshot.get("bytes"),
            publish_s=snapshot.get("publish_s"),
            workers=tuple(WorkerFigures.of_status(page) if page else WorkerFigures() for page in workers),
            vectors=self._vectors(),
            freshness={
                F1_STORED: _ages(ingest, F1_STORED),
                F2_LEARNED: _ages(trainer, F2_LEARNED),
                F3_PUBLISHED: Ages() if known is None else Ages.of(known.published.append),
                F4_ANSWERED: Ages() if known is None else Ages.of(known.answered.append),
                **({FV_VECTOR: _ages(self.status("upstream"), FV_VECTOR)} if self._plan.options.has_upstream else {}),
            },
            # As of the newest answer: at the end of a stream, the last seconds of it stay.
            recent_f4=Ages() if known is None else Ages.of(known.recent_answered(known.newest_answered_ms).append),
            num_answered=0 if load is None else load.num_answered,
            num_failed=0 if load is None else load.failures.total(),
            cpu_s=cpu_seconds(self._supervisor.status(), self._broker.pid),
        )

    def _vectors(self) -> VectorFigures | None:
        if not self._plan.options.has_upstream:
            return None
        return VectorFigures.of_status(self.status("upstream"), self.status("trainer"), UPSTREAM_TASK)


def _ages(page: Mapping[str, Any], hop: str) -> Ages:
    return Ages.of_summary(page["freshness"][hop]["append"]) if page else Ages()


def cpu_seconds(children: Sequence[ChildStatus], broker_pid: int | None) -> dict[str, float]:
    """Processor seconds of each running process and of this one; empty where /proc does not tell."""
    pids = {child.name: child.pid for child in children} | {"broker": broker_pid, "demo": os.getpid()}
    used: dict[str, float] = {}
    for name, pid in pids.items():
        try:
            # After the command's closing bracket, user and system time are the 12th and 13th fields.
            numbers = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()
            used[name] = (int(numbers[11]) + int(numbers[12])) / os.sysconf("SC_CLK_TCK")
        except (OSError, IndexError, ValueError):
            continue
    return used


def log_tail(path: Path, num_lines: int = _LOG_LINES) -> str:
    """`; the end of <path>:` and its last lines; without a file, where it would be."""
    try:
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines()[-num_lines:]
    except OSError:
        lines = []
    return f"; its log {path} ends with:\n" + "\n".join(f"  {line}" for line in lines) if lines else f"; see {path}"
