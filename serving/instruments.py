"""What a worker counts and times: OpenTelemetry instruments, and the same figures kept here for `/status`."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from typing import Final

import numpy as np
from opentelemetry import metrics, trace
from opentelemetry.metrics import CallbackOptions, Observation

_WINDOW: Final = 4_096
"""Newest durations that the quantiles of the status page are computed from."""

OK: Final = "ok"
FALLBACK: Final = "fallback"
REFUSED: Final = "refused"
REJECTED: Final = "rejected"
ERROR: Final = "error"
"""Outcomes of a request: answered by the model · answered by popularity · the caller's mistake (4xx) · no capacity,
too late or draining (429, 503, 504) · our bug (500)."""


class DurationWindow:
    """The newest durations, for quantiles: bounded, and cheap to add to."""

    def __init__(self, size: int = _WINDOW) -> None:
        self._durations_s = np.zeros(size)
        self.count = 0
        self.last_s: float | None = None
        self.max_s: float | None = None

    def add(self, duration_s: float) -> None:
        """Add one duration in seconds."""
        self._durations_s[self.count % len(self._durations_s)] = duration_s
        self.count += 1
        self.last_s = duration_s
        self.max_s = duration_s if self.max_s is None else max(self.max_s, duration_s)

    def quantile_ms(self, q: float) -> float | None:
        """Quantile of the newest durations in milliseconds; None without any."""
        if not self.count:
            return None
        return float(np.quantile(self._durations_s[: min(self.count, len(self._durations_s))], q) * 1000)


def _ms(duration_s: float | None) -> float | None:
    return None if duration_s is None else duration_s * 1000


class ServingInstruments:
    """Counts and durations of one worker."""

    def __init__(self) -> None:
        self.outcomes: Counter[tuple[str, str]] = Counter()
        self.latency = DurationWindow()
        self.pauses = DurationWindow()
        self._meter = metrics.get_meter("headrace.serving")
        self._requests = self._meter.create_counter(
            "headrace.serving.requests", unit="{request}", description="Requests by route and outcome"
        )
        self._durations = self._meter.create_histogram(
            "http.server.request.duration", unit="s", description="Time from reading a request to its answer"
        )
        self._pauses = self._meter.create_histogram(
            "headrace.serving.swap.pause", unit="s", description="Time the model answers nothing while weights change"
        )
        self._batch_sizes = self._meter.create_histogram(
            "headrace.serving.batch.size", unit="{request}", description="Requests answered by one forward pass"
        )
        self._refused_snapshots = self._meter.create_counter(
            "headrace.serving.snapshots.refused", unit="{snapshot}", description="Snapshots that could not be used"
        )
        self._reanchored = self._meter.create_counter(
            "headrace.serving.snapshots.reanchored",
            unit="{swap}",
            description="Times a worker started over from an anchor because deltas build on other weights than its own",
        )
        self._guard_trips = self._meter.create_counter(
            "headrace.serving.guard.trips", unit="{trip}", description="Times a guard made a worker go back, by guard"
        )
        self._impressions = self._meter.create_counter(
            "headrace.serving.impressions", unit="{impression}", description="Impressions by outcome"
        )

    def observe(self, name: str, unit: str, description: str, read: Callable[[], float | None]) -> None:
        """Publish a gauge that is read when metrics are collected; None publishes nothing."""

        def callback(_options: CallbackOptions) -> Iterable[Observation]:
            value = read()
            return [] if value is None else [Observation(value)]

        self._meter.create_observable_gauge(name, [callback], unit=unit, description=description)

    def request_done(self, route: str, outcome: str, duration_s: float, attributes: Mapping[str, str | int]) -> None:
        """One request was answered, whatever the answer; `attributes` are those of OpenTelemetry's HTTP conventions."""
        self.outcomes[route, outcome] += 1
        self._requests.add(1, {"http.route": route, "headrace.outcome": outcome})
        self._durations.record(duration_s, attributes)
        if outcome in {OK, FALLBACK}:
            self.latency.add(duration_s)

    def swapped(self, pause_s: float, kind: str, span: trace.Span) -> None:
        """Weights were swapped within `span`, and answers paused for `pause_s`."""
        self.pauses.add(pause_s)
        self._pauses.record(pause_s, {"headrace.snapshot.kind": kind}, trace.set_span_in_context(span))

    def batch_answered(self, size: int) -> None:
        """One forward pass answered `size` requests."""
        self._batch_sizes.record(size)

    def snapshot_refused(self, error: str) -> None:
        """One more snapshot version could not be used; `error` is the error's class name."""
        self._refused_snapshots.add(1, {"error.type": error})

    def reanchored(self) -> None:
        """What is published builds on another version of the same number than the one loaded."""
        self._reanchored.add(1)

    def guard_tripped(self, guard: str) -> None:
        """A guard made this worker go back to the version before."""
        self._guard_trips.add(1, {"headrace.guard": guard})

    def impression_done(self, outcome: str) -> None:
        """An impression was `sent`, `dropped` (queue full) or `failed` (log away)."""
        self._impressions.add(1, {"headrace.outcome": outcome})

    def status(self) -> dict[str, object]:
        """JSON-ready figures of requests and pauses."""
        totals: Counter[str] = Counter()
        for (_, outcome), count in self.outcomes.items():
            totals[outcome] += count
        return {
            "requests": sum(totals.values()),
            "errors": totals[ERROR],
            "outcomes": dict(totals),
            "latency_ms": {"p50": self.latency.quantile_ms(0.50), "p99": self.latency.quantile_ms(0.99)},
            "swap_pause_ms": {
                "last": _ms(self.pauses.last_s),
                "p50": self.pauses.quantile_ms(0.50),
                "p99": self.pauses.quantile_ms(0.99),
                "max": _ms(self.pauses.max_s),
            },
        }
