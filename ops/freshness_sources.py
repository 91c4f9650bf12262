"""Where `headrace freshness` finds its facts: status pages of the daemons, the store, leases, and the log's ends."""

from __future__ import annotations

import asyncio
import ipaddress
import socket
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Final

import httpx

from feature_store.errors import StoreUnavailableError
from feature_store.records import FirstServed, PublishedSnapshot
from feature_store.store import FeatureStore
from model.errors import SnapshotError
from model.retention import valid_leases
from model.storage import SnapshotStorage
from ops.freshness_report import Facts
from ops.log_positions import read_status
from ops.snapshot_freshness import SnapshotFreshness
from stream.clock import Clock
from stream.errors import LogUnavailableError
from stream.freshness import F1_STORED, F2_LEARNED, F4_ANSWERED, FV_VECTOR, RECENT_MS
from stream.log import EventLog

_LOOK_BACK_MS: Final = 2 * RECENT_MS
"""What was first answered with recently may have been published so much earlier than that."""
_TIMEOUT_S: Final = 3.0


@dataclass(frozen=True, kw_only=True, slots=True)
class SourceParts:
    """Where to ask."""

    store: FeatureStore
    log: EventLog
    snapshots: SnapshotStorage
    model: str
    clock: Clock
    client: httpx.AsyncClient
    urls: Sequence[str]
    """Daemons whose addresses are known; workers of this machine are found by their leases."""
    replica_timeout_ms: int
    is_tls: bool = False
    """Workers speak HTTPS."""


@dataclass(frozen=True, slots=True)
class _FromStore:
    newest: PublishedSnapshot | None
    answered_with: dict[str, PublishedSnapshot]
    stored: dict[int, int]


@dataclass(slots=True)
class FreshnessSources:
    """Asks everybody, again and again; what the store said before is not read again."""

    parts: SourceParts
    _known: SnapshotFreshness | None = None
    _by_version: dict[int, PublishedSnapshot] = field(default_factory=dict)
    """What was published lately, and what is answered with now."""
    _answered: dict[str, int] = field(default_factory=dict)
    _problems: dict[str, str] = field(default_factory=dict)

    async def look(self) -> Facts:
        """The facts of now."""
        self._problems = {}
        running = await asyncio.to_thread(self._running)
        if not running and "snapshots" not in self._problems:
            self._problems["serving"] = "no inference worker is running"
        urls = dict.fromkeys([*self.parts.urls, *(self._url_of(replica) for replica in sorted(running))])
        pages = [page for page in await asyncio.gather(*map(self._page, urls)) if page is not None]
        ingest = [page for page in pages if F1_STORED in page.get("freshness", {})]
        found: _FromStore | None = None
        try:
            found = await asyncio.to_thread(self._from_store, running)
        except StoreUnavailableError as error:
            self._problems["store"] = str(error)
        return Facts(
            now_ms=self.parts.clock.now_ms(),
            ingest_pages=ingest,
            trainer_page=next((page for page in pages if F2_LEARNED in page.get("freshness", {})), None),
            upstream_page=next((page for page in pages if FV_VECTOR in page.get("freshness", {})), None),
            worker_pages={page["replica"]: page for page in pages if F4_ANSWERED in page.get("freshness", {})},
            running=running,
            snapshots=None if found is None else self._known,
            newest=None if found is None else found.newest,
            answered_with={} if found is None else found.answered_with,
            stored=None if found is None else found.stored,
            num_unread=sum(page["lag"] for page in ingest) if ingest else await self._unread(found),
            problems=self._problems,
        )

    def _running(self) -> frozenset[str]:
        """Replicas with a valid lease. Blocking."""
        since_ms = self.parts.clock.now_ms() - self.parts.replica_timeout_ms
        try:
            leases = valid_leases(self.parts.snapshots, self.parts.model, since_ms=since_ms)
        except (SnapshotError, OSError) as error:
            self._problems["snapshots"] = str(error)
            return frozenset()
        return frozenset(lease.replica for lease in leases)

    def _url_of(self, replica: str) -> str:
        host, _, port = replica.rpartition(":")
        if self.parts.is_tls:
            return f"https://{host}:{port}"  # certificates name hosts
        # By default a worker listens on the loopback address alone.
        return f"http://{'127.0.0.1' if host == socket.gethostname() else host}:{port}"

    async def _page(self, url: str) -> dict[str, Any] | None:
        try:
            response = await self.parts.client.get(f"{url}/status", timeout=_TIMEOUT_S)
            response.raise_for_status()
            page: dict[str, Any] = response.json()
        except httpx.HTTPStatusError as error:
            status = error.response.status_code
            self._problems[url] = f"status {status}" + (": give --token-file" if status in {401, 403} else "")
        except (httpx.HTTPError, httpx.InvalidURL, ValueError) as error:
            self._problems[url] = str(error) or type(error).__name__
        else:
            return page
        return None

    def _from_store(self, running: frozenset[str]) -> _FromStore:
        """Read what is new. Blocking."""
        parts = self.parts
        since_ms = parts.clock.now_ms() - _LOOK_BACK_MS
        known = self._known
        up_to = 0 if known is None else known.published_up_to
        published = parts.store.published_snapshots(parts.model, up_to, created_from_ms=since_ms)
        newest = published[-1] if published else None if known is None else known.newest
        newest = newest or parts.store.newest_snapshot(parts.model)
        self._by_version |= {one.version: one for one in published}
        first = min(self._by_version, default=0 if newest is None else newest.version)
        served = parts.store.first_served(parts.model, first - 1)
        answering = {one.replica for one in served} | (known.replicas if known is not None else set())
        if running:
            answering &= running
        if known is None or known.replicas != answering:
            # Replicas have come or gone: put together anew what is recent.
            known = self._known = SnapshotFreshness(answering)
            published = [one for one in self._by_version.values() if one.created_at_ms >= since_ms]
        known.add(published, served)
        self._note_answered(served)
        kept = {v: one for v, one in self._by_version.items() if one.created_at_ms >= since_ms}
        answered = {version: self._snapshot(version) for version in self._answered.values()}
        self._by_version = kept | {version: one for version, one in answered.items() if one is not None}
        log_id = newest.lineage["log_id"] if newest is not None else parts.store.current_log_id(parts.log.log_id)
        return _FromStore(
            newest=newest,
            answered_with={r: self._by_version[v] for r, v in self._answered.items() if v in self._by_version},
            stored=parts.store.positions(log_id, parts.log.topics.interactions),
        )

    def _note_answered(self, served: Sequence[FirstServed]) -> None:
        for one in served:
            self._answered[one.replica] = max(one.version, self._answered.get(one.replica, 0))

    def _snapshot(self, version: int) -> PublishedSnapshot | None:
        if version not in self._by_version:
            found = self.parts.store.published_snapshots(self.parts.model, version - 1, limit=1)
            return found[0] if found and found[0].version == version else None
        return self._by_version[version]

    async def _unread(self, found: _FromStore | None) -> int | None:
        """Records behind the stored positions, as the log says while no ingest worker answers."""
        if found is None:
            return None
        try:
            standing = await read_status(self.parts.log, self.parts.store)
        except (LogUnavailableError, StoreUnavailableError) as error:
            self._problems["log"] = str(error)
            return None
        return sum(one.lag for one in standing.standings)


def reachable_host(host: str) -> str:
    """Where to ask a daemon that listens on `host`: on any address of this machine is on the loopback one."""
    try:
        return "127.0.0.1" if ipaddress.ip_address(host).is_unspecified else host
    except ValueError:
        return host
