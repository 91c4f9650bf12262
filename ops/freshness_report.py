"""How fresh everything is at a moment, put together from what daemons, store and log say. Pure.

A daemon or store that does not answer leaves what only it knows empty, and is named; the rest stands.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Final

from feature_store.records import PublishedSnapshot
from ops.snapshot_freshness import SnapshotFreshness
from stream.freshness import F1_STORED, F2_LEARNED, F3_PUBLISHED, F4_ANSWERED, FV_VECTOR, AgeHistogram, AgePair

HOP_WORDS: Final = {
    F1_STORED: "stored",
    F2_LEARNED: "learned",
    F3_PUBLISHED: "published",
    F4_ANSWERED: "answered, slowest replica",
    FV_VECTOR: "in its user's vector",
}

Positions = Mapping[int, int]
"""Partition of `interactions` → next offset."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Facts:
    """What was found out at one moment; None and {}: it could not be."""

    now_ms: int
    ingest_pages: Sequence[Mapping[str, Any]] = ()
    trainer_page: Mapping[str, Any] | None = None
    upstream_page: Mapping[str, Any] | None = None
    """Of the upstream daemon, where there is one."""
    worker_pages: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    """Replica → its status page."""
    running: frozenset[str] = frozenset()
    """Replicas with a valid lease."""
    snapshots: SnapshotFreshness | None = None
    newest: PublishedSnapshot | None = None
    answered_with: Mapping[str, PublishedSnapshot] = field(default_factory=dict)
    """Replica → the newest version that it has answered with."""
    stored: Positions | None = None
    num_unread: int | None = None
    """Records of `interactions` behind the stored positions."""
    problems: Mapping[str, str] = field(default_factory=dict)
    """Who does not answer → why."""


@dataclass(frozen=True, kw_only=True, slots=True)
class AgeFigures:
    """Quantiles of recent ages; None without any."""

    p50_ms: float | None
    p95_ms: float | None
    p99_ms: float | None
    num_negative: int
    """Clamped to 0: the clock of a producer or of the broker runs ahead."""

    @staticmethod
    def of(ages: AgeHistogram) -> AgeFigures:
        """Of a histogram."""
        return AgeFigures(
            p50_ms=ages.quantile_ms(0.50),
            p95_ms=ages.quantile_ms(0.95),
            p99_ms=ages.quantile_ms(0.99),
            num_negative=ages.num_negative,
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class HopFigures:
    """One hop."""

    hop: str
    what: str
    num_events: int | None
    """That came to it recently; None: nobody could say."""
    num_waiting: int | None
    """Records that have not come to it yet, at most: refused and repeated ones, which never will, count until then."""
    append: AgeFigures
    event: AgeFigures

    @property
    def coverage(self) -> float | None:
        """Of the events that came to this hop recently or still wait for it, the share that came."""
        if self.num_events is None or self.num_waiting is None or not self.num_events + self.num_waiting:
            return None
        return self.num_events / (self.num_events + self.num_waiting)


@dataclass(frozen=True, kw_only=True, slots=True)
class ReplicaFigures:
    """One inference worker."""

    replica: str
    is_running: bool
    version: int | None
    num_events: int
    append: AgeFigures
    """F4 at this replica."""
    weights_behind_ms: float | None
    """How long interactions have waited to be learned by the weights it serves; 0 on a quiet stream. None: unknown."""
    weights_age_ms: float | None
    """Time of a request now minus the event time that its weights have come to: grows on a quiet stream."""


@dataclass(frozen=True, kw_only=True, slots=True)
class FreshnessReport:
    """Everything, as of a moment."""

    at_ms: int
    hops: tuple[HopFigures, ...]
    replicas: tuple[ReplicaFigures, ...]
    problems: Mapping[str, str]

    @property
    def is_idle(self) -> bool:
        """Whether nothing came recently and nothing waits, as far as is known; of what ingest knows, it must be."""
        stored = self.hops[0]
        return (stored.num_events, stored.num_waiting) == (0, 0) and all(
            hop.num_events in {0, None} and hop.num_waiting in {0, None} for hop in self.hops
        )

    @property
    def is_empty(self) -> bool:
        """Whether nobody could say anything."""
        return all(hop.num_events is None for hop in self.hops)

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        hops = [asdict(hop) | {"coverage": hop.coverage} for hop in self.hops]
        return asdict(self) | {"hops": hops, "is_idle": self.is_idle}


def report_of(facts: Facts) -> FreshnessReport:
    """Put the facts together."""
    known, now_ms = facts.snapshots, facts.now_ms
    stored, trainer = facts.stored, facts.trainer_page
    learned = None if trainer is None else _positions(trainer.get("positions", {}))
    answering = [one for replica, one in facts.answered_with.items() if replica in facts.running or not facts.running]
    hops: tuple[HopFigures, ...] = (
        _hop(F1_STORED, _recent(facts.ingest_pages, F1_STORED), facts.num_unread),
        _hop(F2_LEARNED, _recent([] if trainer is None else [trainer], F2_LEARNED), _behind(stored, learned)),
        _hop(
            F3_PUBLISHED,
            None if known is None else known.recent_published(now_ms),
            _behind(stored, None if known is None else _lineage(facts.newest)),
        ),
        _hop(
            F4_ANSWERED,
            None if known is None else known.recent_answered(now_ms),
            max((_behind(stored, _lineage(one)) or 0 for one in answering), default=None),
        ),
    )
    if facts.upstream_page is not None:
        # Of high-value events alone: who waits are users, and what else is unread there is not known.
        page = facts.upstream_page
        hops = (*hops, _hop(FV_VECTOR, _recent([page], FV_VECTOR), int(page["waiting"])))
    replicas = sorted({*facts.running, *facts.worker_pages, *(known.replicas if known is not None else ())})
    return FreshnessReport(
        at_ms=now_ms,
        hops=hops,
        replicas=tuple(_replica(facts, replica) for replica in replicas),
        problems=dict(facts.problems),
    )


def _hop(hop: str, ages: AgePair | None, num_waiting: int | None) -> HopFigures:
    found = AgePair() if ages is None else ages
    return HopFigures(
        hop=hop,
        what=HOP_WORDS[hop],
        num_events=None if ages is None else found.append.count,
        num_waiting=num_waiting,
        append=AgeFigures.of(found.append),
        event=AgeFigures.of(found.event),
    )


def _recent(pages: Sequence[Mapping[str, Any]], hop: str) -> AgePair | None:
    """Recent ages of all daemons of a kind together; None when none has answered."""
    told = [page["freshness"][hop]["recent"] for page in pages if hop in page.get("freshness", {})]
    if not told:
        return None
    ages = AgePair()
    for one in told:
        ages.merge(AgePair.of_dict(one))
    return ages


def _replica(facts: Facts, replica: str) -> ReplicaFigures:
    known, page = facts.snapshots, facts.worker_pages.get(replica, {})
    answered = facts.answered_with.get(replica)
    is_known = known is not None and replica in known.replicas
    ages = known.recent_of(replica, facts.now_ms).append if known is not None and is_known else AgeHistogram()
    return ReplicaFigures(
        replica=replica,
        is_running=replica in facts.running or bool(page),
        version=page["snapshot"]["version"] if page else None if answered is None else answered.version,
        num_events=ages.count,
        append=AgeFigures.of(ages),
        weights_behind_ms=page.get("weights_behind_ms"),
        weights_age_ms=page.get("weights_age_ms"),
    )


def _lineage(snapshot: PublishedSnapshot | None) -> Positions:
    return {} if snapshot is None else _positions(snapshot.lineage.get("positions", {}))


def _positions(told: Mapping[Any, Any]) -> dict[int, int]:
    return {int(partition): int(offset) for partition, offset in told.items()}


def _behind(stored: Positions | None, reached: Positions | None) -> int | None:
    """Records that are stored and have not come as far; None when one of the two is not known."""
    if stored is None or reached is None:
        return None
    return sum(max(0, offset - reached.get(partition, 0)) for partition, offset in stored.items())
