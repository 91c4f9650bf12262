"""What the demo knows at a moment: figures taken from the processes, and freshness put together from the store."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Final

from stream.freshness import F1_STORED, F2_LEARNED, F3_PUBLISHED, F4_ANSWERED, FV_VECTOR, HOPS, AgeHistogram

RECENT_MS: Final = 15_000
"""`Recent` freshness: snapshots that were first answered with in the newest so many milliseconds."""

HOP_WORDS: Final = {
    F1_STORED: "stored",
    F2_LEARNED: "learned",
    F3_PUBLISHED: "published",
    F4_ANSWERED: "answered with",
    FV_VECTOR: "in the vector",
}


@dataclass(frozen=True, slots=True)
class Ages:
    """Quantiles of one hop, in ms since the broker appended the event; None before the first."""

    p50_ms: float | None = None
    p99_ms: float | None = None
    count: int = 0

    @staticmethod
    def of_summary(summary: Mapping[str, Any]) -> Ages:
        """From `AgeHistogram.summary()`, as status pages carry it."""
        return Ages(summary.get("p50_ms"), summary.get("p99_ms"), int(summary.get("count") or 0))

    @staticmethod
    def of(ages: AgeHistogram) -> Ages:
        """From a histogram."""
        return Ages.of_summary(ages.summary())


@dataclass(frozen=True, kw_only=True, slots=True)
class WorkerFigures:
    """One inference worker at a moment."""

    version: int | None = None
    swaps: int = 0
    learned_interactions: int | None = None
    pause_last_ms: float | None = None
    pause_p99_ms: float | None = None
    pause_max_ms: float | None = None
    latency_p50_ms: float | None = None
    latency_p99_ms: float | None = None
    num_requests: int = 0
    num_errors: int = 0
    num_rejected: int = 0

    @staticmethod
    def of_status(status: Mapping[str, Any]) -> WorkerFigures:
        """From the worker's status page."""
        snapshot, pause, latency = status["snapshot"], status["swap_pause_ms"], status["latency_ms"]
        return WorkerFigures(
            version=snapshot["version"],
            swaps=snapshot["swaps"],
            learned_interactions=snapshot["learned_interactions"],
            pause_last_ms=pause["last"],
            pause_p99_ms=pause["p99"],
            pause_max_ms=pause["max"],
            latency_p50_ms=latency["p50"],
            latency_p99_ms=latency["p99"],
            num_requests=status["requests"],
            num_errors=status["errors"],
            num_rejected=status["outcomes"].get("rejected", 0),
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class VectorFigures:
    """The upstream daemon at a moment, and what the ranker makes of its vectors."""

    version: int | None = None
    """In effect; None: nobody has a vector yet."""
    num_written: int = 0
    num_waiting: int = 0
    """Users whose vectors are to be computed."""
    num_found: int = 0
    num_missing: int = 0
    """Interactions that the ranker learned from, whose user had a vector, or had none."""
    normalised_entropy: float | None = None
    """Of the ranker's predictions, over its newest ones."""

    @staticmethod
    def of_status(upstream: Mapping[str, Any], trainer: Mapping[str, Any], task: str) -> VectorFigures:
        """From the status pages of upstream daemon and trainer, either of which may be empty."""
        found = (trainer.get("ranking") or {}).get("vectors", {})
        return VectorFigures(
            version=upstream.get("version"),
            num_written=int(upstream.get("vectors", 0)),
            num_waiting=int(upstream.get("waiting", 0)),
            num_found=int(found.get("found", 0)),
            num_missing=int(found.get("missing", 0)),
            normalised_entropy=trainer.get("metrics", {}).get(f"ranking.{task}.window.ne"),
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class Arm:
    """HR@10 of one arm, over the newest evaluated interactions and over all."""

    window: float | None = None
    lifetime: float | None = None

    @staticmethod
    def of(metrics: Mapping[str, Any], arm: str) -> Arm:
        """From the trainer's metrics."""
        return Arm(window=metrics.get(f"{arm}.window.hr_at_10"), lifetime=metrics.get(f"{arm}.lifetime.hr_at_10"))


@dataclass(frozen=True, kw_only=True, slots=True)
class Sample:
    """Everything that is shown, at one moment."""

    at_s: float
    """Seconds since the demo began."""

    num_sent: int = 0
    num_stored: int = 0
    num_learned: int = 0
    sent_per_s: float = 0.0
    stored_per_s: float = 0.0
    learned_per_s: float = 0.0
    refused: int = 0
    event_time_ms: int | None = None
    num_evaluated: int = 0
    window: int = 0
    """Interactions in the windowed metrics."""

    model: Arm = field(default_factory=Arm)
    popularity: Arm = field(default_factory=Arm)
    num_items: int = 0
    snapshot_version: int | None = None
    snapshot_kind: str | None = None
    snapshot_bytes: int | None = None
    publish_s: float | None = None
    workers: tuple[WorkerFigures, ...] = ()
    freshness: Mapping[str, Ages] = field(default_factory=lambda: {hop: Ages() for hop in HOPS})
    recent_f4: Ages = field(default_factory=Ages)
    vectors: VectorFigures | None = None
    """None: no upstream daemon runs."""
    num_answered: int = 0
    """Background requests answered, as their caller counted them."""

    num_failed: int = 0
    cpu_s: Mapping[str, float] = field(default_factory=dict)
    """Processor seconds each process has used."""

    @property
    def lag_ingest(self) -> int:
        """Events sent but not stored."""
        return max(0, self.num_sent - self.num_stored)

    @property
    def lag_trainer(self) -> int:
        """Events stored but not learned from."""
        return max(0, self.num_stored - self.num_learned)

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return asdict(self) | {"lag_ingest": self.lag_ingest, "lag_trainer": self.lag_trainer}


class Rate:
    """Events per second over the newest few seconds of a growing count."""

    def __init__(self, window_s: float = 5.0) -> None:
        self._window_s = window_s
        self._seen: deque[tuple[float, int]] = deque()

    def add(self, at_s: float, count: int) -> float:
        """Note a count; returns the rate. A count that falls (a process started again) begins a new series."""
        if self._seen and count < self._seen[-1][1]:
            self._seen.clear()
        self._seen.append((at_s, count))
        while len(self._seen) > 2 and self._seen[1][0] <= at_s - self._window_s:
            self._seen.popleft()
        (first_s, first), (last_s, last) = self._seen[0], self._seen[-1]
        return (last - first) / (last_s - first_s) if last_s > first_s else 0.0


class GrowingCount:
    """The total behind a count that begins again at 0 when its process is started again."""

    def __init__(self) -> None:
        self._before, self._last = 0, 0

    def of(self, count: int) -> int:
        """Note the count; returns the total."""
        if count < self._last:
            self._before += self._last
        self._last = count
        return self._before + count
