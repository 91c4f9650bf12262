"""A worker with everything around it, real but small: a publisher of snapshots, a store, a log, an HTTP client."""

from __future__ import annotations

import asyncio
import copy
import hashlib
import shutil
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import torch

from feature_store import schema
from feature_store.config import FeatureStoreConfig, HotHistoriesConfig
from feature_store.ids import event_key, stable_id
from feature_store.interactions import Interactions
from feature_store.store import FeatureStore
from model.config import ModelConfig
from model.manifest import Lineage, Manifest, SnapshotKind
from model.recommender import Recommender
from model.snapshot import write_snapshot
from model.swap import take_rows
from serving.api import build_api
from serving.config import ServingConfig
from serving.parts import ServingParts
from serving.worker import ServingWorker
from stream.clock import ManualClock
from stream.events import EventRules
from stream.freshness import AgeHistogram
from stream.memory_log import MemoryLog
from stream.messages import HistoryUpdate, SnapshotPointer, encode_message

NAME = "hstu"
NOW_MS = 1_700_000_000_000
MODEL = ModelConfig(embedding_dim=16, num_layers=1, num_heads=1, attention_dim=8, hidden_dim=8, max_len=8)
SERVING = ServingConfig(
    snapshot_poll_ms=20, snapshot_retry_max_ms=100, store_check_ms=50, broker_check_ms=50, request_timeout_ms=30_000
)
HOT = HotHistoriesConfig(max_len=32, budget_bytes=4 * 1024 * 1024)


class TestClock(ManualClock):
    """Time of day stands still until it is moved, so answers repeat; durations are real."""

    __test__ = False

    def monotonic_s(self) -> float:
        return time.monotonic()


class Publisher:
    """A trainer without training: weights that change at random, published as snapshots."""

    def __init__(self, root: Path, config: ModelConfig = MODEL, *, seed: int = 0) -> None:
        self.root = root
        self.recommender = Recommender(config)
        self.version = 0
        self.positions = {0: 0}
        self.manifests: list[Manifest] = []
        self._generator = torch.Generator().manual_seed(seed)

    @torch.no_grad()
    def learn(self, item_ids: Sequence[int | str], *, at_ms: int = NOW_MS - 60_000) -> None:
        """Change all dense parameters and the rows of some items, new ones among them."""
        ids = np.array([to_id(item) for item in item_ids], np.int64)
        items = self.recommender.items
        rows = items.admit(ids)
        items.observe(rows, np.full(len(rows), at_ms))
        index = torch.from_numpy(np.unique(rows))
        items.weight[index] += 0.1 * torch.randn(len(index), items.weight.shape[1], generator=self._generator)
        items.bias[index] += 0.1 * torch.randn(len(index), generator=self._generator)
        items.dirty[index] = True
        for parameter in self.recommender.parameters():
            parameter.add_(0.02 * torch.randn(parameter.shape, generator=self._generator))

    def publish(self, kind: SnapshotKind = "delta", **fields: Any) -> Manifest:
        """Write the next version and move the pointer."""
        rows = take_rows(self.recommender, kind)
        self.recommender.items.clear_dirty()
        parent, self.version = self.version, self.version + 1
        manifest = Manifest(
            **{
                "model": NAME,
                "version": self.version,
                "kind": kind,
                "parent": parent if kind == "delta" else None,
                "parent_hash": self.manifests[-1].content_hash() if kind == "delta" else None,
                "config_hash": self.recommender.config.config_hash(),
                "model_config": self.recommender.config.as_dict(),
                "num_items": self.recommender.items.num_items,
                "created_at_ms": NOW_MS,
                "watermark_ms": NOW_MS - 60_000,
                "lineage": Lineage(log_id="memory", positions=dict(self.positions)),
                **fields,
            }
        )
        self.manifests.append(write_snapshot(self.root, manifest, self.recommender.dense_state(), rows))
        return self.manifests[-1]

    def fork(self, root: Path) -> Publisher:
        """Another publisher that goes on from here, with all published so far, at a root of its own."""
        shutil.copytree(self.root, root)
        other = copy.deepcopy(self)
        other.root = root
        other._generator.manual_seed(1)
        return other

    def folder(self, version: int) -> Path:
        return self.root / NAME / f"v{version:08d}"


@dataclass
class Town:
    """Store, log and snapshots that workers are built on."""

    root: Path
    store: FeatureStore
    log: MemoryLog
    clock: TestClock
    publisher: Publisher
    num_events: int = 0
    parts: dict[str, Any] = field(default_factory=dict)

    def happen(self, events: Sequence[tuple[int | str, int | str, int]], *, announced: bool = True) -> HistoryUpdate:
        """Interactions (user, item, event time) pass ingest: into the store, and onto `history-updates`."""
        self.num_events += len(events)
        first = self.num_events - len(events)
        interactions = Interactions(
            user_id=np.array([to_id(user) for user, _, _ in events], np.int64),
            item_id=np.array([to_id(item) for _, item, _ in events], np.int64),
            event_time_ms=np.array([at_ms for _, _, at_ms in events], np.int64),
            action=np.ones(len(events), np.uint32),
            value=np.full(len(events), np.nan, np.float32),
            event_key=np.array([event_key(f"e{first + n}") for n in range(len(events))], np.uint64),
            seq=np.zeros(len(events), np.uint32),
            arrival_ms=np.full(len(events), NOW_MS),
        )
        with self.store.transaction() as transaction:
            for kind, place in (("user", 0), ("item", 1)):
                names = {to_id(event[place]): event[place] for event in events if isinstance(event[place], str)}
                transaction.register_names(kind, names)  # type: ignore[arg-type]
            accepted = transaction.append(interactions).accepted_from(interactions)
        update = HistoryUpdate(
            log_id=self.log.log_id,
            partition=0,
            first_offset=first,
            last_offset=self.num_events - 1,
            watermark_ms=int(interactions.event_time_ms.max()),
            offsets=np.arange(first, self.num_events),
            append_ms=np.full(len(events), NOW_MS),
            interactions=accepted,
        )
        if announced:
            self.announce(update)
        return update

    def announce(self, update: HistoryUpdate) -> None:
        self.log.append(self.log.topics.history_updates, update.partition, b"0", update.encode(), ())

    def announce_snapshot(self, manifest: Manifest) -> None:
        pointer = SnapshotPointer(
            model=manifest.model,
            version=manifest.version,
            kind=manifest.kind,
            parent=manifest.parent,
            created_at_ms=manifest.created_at_ms,
        )
        self.log.append(self.log.topics.snapshots, 0, NAME.encode(), encode_message(pointer), ())

    def build(self, config: ServingConfig = SERVING, **parts: Any) -> ServingWorker:
        defaults: dict[str, Any] = {
            "config": config,
            "model_config": MODEL,
            "model_name": NAME,
            "snapshot_root": self.root,
            "log": self.log,
            "store": self.store,
            "hot_config": HOT,
            "rules": EventRules(),
            "clock": self.clock,
            "replica": "one",
        }
        return ServingWorker(ServingParts(**{**defaults, **parts}))

    @asynccontextmanager
    async def worker(
        self, config: ServingConfig = SERVING, *, version: int | None = None, **parts: Any
    ) -> AsyncIterator[Served]:
        """A running worker, once it serves `version` and reads the log."""
        worker = self.build(config, **parts)
        await worker.start()
        transport = httpx.ASGITransport(app=build_api(worker))
        try:
            async with httpx.AsyncClient(transport=transport, base_url="http://worker") as client:
                served = Served(worker, client)
                if version is not None:
                    await served.until_version(version)
                await eventually(lambda: is_connected(worker))
                yield served
        finally:
            await worker.stop()


@dataclass
class Served:
    """A running worker and a client of it."""

    worker: ServingWorker
    client: httpx.AsyncClient

    async def until_version(self, version: int) -> None:
        await eventually(lambda: self.worker.snapshot_version == version)

    async def recommend(self, user_id: int | str, **fields: Any) -> dict[str, Any]:
        response = await self.client.post("/v1/recommend", json={"user_id": user_id, **fields})
        assert response.status_code == 200, response.text
        answer: dict[str, Any] = response.json()
        return answer

    async def rank(self, user_id: int | str, candidates: Sequence[int | str]) -> dict[str, Any]:
        response = await self.client.post("/v1/rank", json={"user_id": user_id, "candidates": list(candidates)})
        assert response.status_code == 200, response.text
        answer: dict[str, Any] = response.json()
        return answer

    async def until_applied(self, num_interactions: int) -> None:
        """Return once this many interactions have come through the log."""
        await eventually(lambda: self.worker.status()["updates"]["interactions"] >= num_interactions)  # type: ignore[index]


def is_connected(worker: ServingWorker) -> bool:
    broker: Any = worker.status()["broker"]
    return broker["reachable"] and broker["reading"] and broker["writing"] is True


def to_id(raw: int | str) -> int:
    return stable_id(raw) if isinstance(raw, str) else raw


def migrated_database(path: Path) -> Path:
    """An empty database, to be copied: migrating takes longer than most tests."""
    database = path / "empty.db"
    schema.migrate(f"sqlite:///{database}")
    return database


def build_town(path: Path, database: Path) -> Town:
    url = f"sqlite:///{shutil.copy(database, path / 'store.db')}"
    clock = TestClock(NOW_MS)
    return Town(
        root=path / "snapshots",
        store=FeatureStore(FeatureStoreConfig(url=url)),
        log=MemoryLog(clock),
        clock=clock,
        publisher=Publisher(path / "snapshots"),
    )


def ages(*ages_ms: int) -> dict[str, Any]:
    histogram = AgeHistogram()
    histogram.add(np.array(ages_ms, np.int64))
    return histogram.to_dict()


def ids_of(answer: dict[str, Any]) -> list[int | str]:
    return [item["item_id"] for item in answer["items"]]


def scores_of(answer: dict[str, Any]) -> dict[int | str, float | None]:
    return {item["item_id"]: item["score"] for item in answer["items"]}


def flip_last_byte(path: Path) -> None:
    content = path.read_bytes()
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))


def redeclare(folder: Path) -> None:
    """Make READY name the manifest as it is now: what a writer with another idea would have published."""
    (folder / "READY").write_text(hashlib.sha256((folder / "manifest.json").read_bytes()).hexdigest())


async def eventually(holds: Callable[[], object], *, within_s: float = 30.0) -> None:
    """Wait until `holds()` is true; fail after `within_s`."""
    deadline_s = time.monotonic() + within_s
    while not holds():
        assert time.monotonic() < deadline_s, "did not come about in time"
        await asyncio.sleep(0.005)
