"""Hops F3 and F4 of all events, put together from what the store knows about each published version."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Final

from feature_store.records import FirstServed, PublishedSnapshot
from stream.freshness import RECENT_MS, AgeHistogram, AgePair, RecentAges

_WAITING_MAX: Final = 10_000
"""Versions that may wait for an answer of each replica; the oldest are given up."""


@dataclass(slots=True)
class _Replica:
    recent: RecentAges
    served: list[FirstServed] = field(default_factory=list)
    """First answers with versions that are not counted yet, ascending by version."""
    read_up_to: int = 0
    counted_up_to: int = 0


class SnapshotFreshness:
    """Ages of events at F3 and F4, in total and recently.

    F4 of an event is the first answer at the slowest replica: for each version and replica, the earliest answer with
    this version or a later one, which contains it. A version is counted once every replica has answered.
    """

    def __init__(self, replicas: Iterable[str], *, recent_ms: int = RECENT_MS) -> None:
        self._replicas = {replica: _Replica(RecentAges(recent_ms)) for replica in replicas}
        self._waiting: dict[int, PublishedSnapshot] = {}
        self._recent_published, self._recent_answered = RecentAges(recent_ms), RecentAges(recent_ms)
        self._slowest_ms: dict[int, int] = {}
        """Version → the latest of the first answers seen so far."""
        self.published, self.answered = AgePair(), AgePair()
        self.newest: PublishedSnapshot | None = None
        self.newest_answered_ms = 0
        self.num_published = 0
        self.num_anchors = 0

    @property
    def replicas(self) -> frozenset[str]:
        """Whose answers count."""
        return frozenset(self._replicas)

    @property
    def published_up_to(self) -> int:
        """Versions above this one are still to be read from the store's published snapshots."""
        return 0 if self.newest is None else self.newest.version

    @property
    def answered_up_to(self) -> int:
        """Versions above this one are still to be read from the store's first answers, by the slowest replica."""
        return min((replica.read_up_to for replica in self._replicas.values()), default=0)

    def add(self, published: Iterable[PublishedSnapshot], first_served: Iterable[FirstServed]) -> None:
        """Take in rows of the store, each kind ascending by version; rows seen before are harmless."""
        for snapshot in published:
            if snapshot.version > self.published_up_to:
                self._waiting[snapshot.version] = self.newest = snapshot
                self.num_published += 1
                self.num_anchors += snapshot.kind == "anchor"
                ages = _as_of(snapshot, snapshot.published_at_ms)
                self.published.merge(ages)
                self._recent_published.add(ages, snapshot.published_at_ms)
        for one in first_served:
            known = self._replicas.get(one.replica)
            if known is not None and one.version > known.read_up_to:
                known.served.append(one)
                known.read_up_to = one.version
        self._settle()
        for version in sorted(self._waiting)[:-_WAITING_MAX]:
            del self._waiting[version]

    def recent_published(self, now_ms: int) -> AgePair:
        """F3 of what was published recently."""
        return self._recent_published.as_of(now_ms)

    def recent_answered(self, now_ms: int) -> AgePair:
        """F4 at the slowest replica of what was first answered with recently."""
        return self._recent_answered.as_of(now_ms)

    def recent_of(self, replica: str, now_ms: int) -> AgePair:
        """F4 at one replica."""
        return self._replicas[replica].recent.as_of(now_ms)

    def _settle(self) -> None:
        for version in sorted(self._waiting):
            counts = [self._count(replica, version) for replica in self._replicas.values()]
            if not all(counts):
                continue
            slowest_ms = self._slowest_ms.pop(version, 0)
            ages = _as_of(self._waiting.pop(version), slowest_ms)
            self.answered.merge(ages)
            self._recent_answered.add(ages, slowest_ms)
            self.newest_answered_ms = max(self.newest_answered_ms, slowest_ms)

    def _count(self, replica: _Replica, version: int) -> bool:
        """Count a version's first answer of one replica, if there is one by now; whether it is counted."""
        if version <= replica.counted_up_to:
            return True
        replica.served = [one for one in replica.served if one.version >= version]
        if not replica.served:
            return False
        first_ms = min(one.at_ms for one in replica.served)
        replica.counted_up_to = version
        replica.recent.add(_as_of(self._waiting[version], first_ms), first_ms)
        self._slowest_ms[version] = max(first_ms, self._slowest_ms.get(version, 0))
        return True


def _as_of(snapshot: PublishedSnapshot, at_ms: int) -> AgePair:
    """Ages at `at_ms` of the events that the snapshot newly contains."""
    pair = AgePair(*(AgeHistogram.from_dict(ages) if ages else AgeHistogram() for ages in _stored(snapshot)))
    return pair.shifted(at_ms - snapshot.created_at_ms)


def _stored(snapshot: PublishedSnapshot) -> tuple[dict[str, object], dict[str, object]]:
    return dict(snapshot.event_age), dict(snapshot.append_age)
