"""How old an event is when each hop has used it (design: F1 to F4), as histograms that can travel.

* F1 `stored`: visible in the feature store · F2 `learned`: its gradient is applied
* F3 `published`: a snapshot that contains it is published · F4 `answered`: first answer computed with such a snapshot

Ages are measured from two starts: the producer's event time, and the broker's append time (producer clocks
lie, and replayed events are years old).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray
from opentelemetry import metrics, trace

F1_STORED: Final = "F1"
F2_LEARNED: Final = "F2"
F3_PUBLISHED: Final = "F3"
F4_ANSWERED: Final = "F4"
FV_VECTOR: Final = "FV"
"""Beside the way to an answer: visible in its user's vector. Of high-value events, where an upstream daemon runs."""
HOPS: Final = (F1_STORED, F2_LEARNED, F3_PUBLISHED, F4_ANSWERED)

_BUCKETS_PER_OCTAVE: Final = 8
"""Bucket edges grow by 2^(1/8): a quantile is off by at most 4.5 %."""


def _buckets(ages_ms: NDArray[np.float64]) -> NDArray[np.int64]:
    buckets = np.floor(np.log2(np.maximum(ages_ms, 0.5)) * _BUCKETS_PER_OCTAVE) + 1
    found: NDArray[np.int64] = np.maximum(buckets, 0).astype(np.int64)
    return found


class AgeHistogram:
    """Counts of ages in logarithmic buckets: mergeable, bounded (about 350 buckets up to a century), serialisable.

    Bucket 0 holds ages below 1 ms. Negative ages (a producer's clock runs ahead) are clamped to 0 and counted.
    """

    def __init__(self) -> None:
        self._counts: dict[int, int] = {}
        self.num_negative = 0

    @property
    def count(self) -> int:
        """Number of ages added."""
        return sum(self._counts.values())

    def add(self, ages_ms: NDArray[np.int64] | NDArray[np.float64]) -> None:
        """Add ages in milliseconds, any shape."""
        ages = np.asarray(ages_ms, dtype=np.float64).ravel()
        if ages.size == 0:
            return
        self.num_negative += int((ages < 0).sum())
        values, counts = np.unique(_buckets(ages), return_counts=True)
        for bucket, count in zip(values.tolist(), counts.tolist(), strict=True):
            self._counts[bucket] = self._counts.get(bucket, 0) + count

    def merge(self, other: AgeHistogram) -> None:
        """Add another histogram's counts to this one."""
        for bucket, count in list(other._counts.items()):  # another thread may be adding to it
            self._counts[bucket] = self._counts.get(bucket, 0) + count
        self.num_negative += other.num_negative

    def shifted(self, delta_ms: float) -> AgeHistogram:
        """The same events, `delta_ms` later: every bucket's middle moves by that much."""
        later = AgeHistogram()
        middles = self.middles_ms()
        buckets = _buckets(np.array([middle_ms + delta_ms for middle_ms, _ in middles]))
        for bucket, (_, count) in zip(buckets.tolist(), middles, strict=True):
            later._counts[bucket] = later._counts.get(bucket, 0) + count
        later.num_negative = self.num_negative
        return later

    def middles_ms(self) -> list[tuple[float, int]]:
        """Each bucket's geometric middle in ms and its count, ascending."""
        return [(_middle_ms(bucket), count) for bucket, count in sorted(self._counts.copy().items())]

    def counts_up_to(self, octaves: range) -> list[tuple[int, int]]:
        """(limit in ms, ages below it) for the limits 2^octave; exact, because bucket edges fall on them."""
        counts = self._counts.copy()
        return [
            (2**octave, sum(count for bucket, count in counts.items() if bucket <= octave * _BUCKETS_PER_OCTAVE))
            for octave in octaves
        ]

    def quantile_ms(self, q: float) -> float | None:
        """The age below which a share `q` in (0, 1] of the events lies; None when empty."""
        if not 0.0 < q <= 1.0:
            raise ValueError(f"q = {q}: a quantile lies in (0, 1]")
        rank, seen = q * self.count, 0
        for middle_ms, count in self.middles_ms():
            seen += count
            if seen >= rank:
                return middle_ms
        return None

    def summary(self) -> dict[str, float | int | None]:
        """p50, p95, p99 in ms, count and number of clamped negative ages."""
        return {
            "p50_ms": self.quantile_ms(0.50),
            "p95_ms": self.quantile_ms(0.95),
            "p99_ms": self.quantile_ms(0.99),
            "count": self.count,
            "num_negative": self.num_negative,
        }

    def to_dict(self) -> dict[str, object]:
        """JSON-ready form, read back by `from_dict`."""
        return {
            "buckets": {str(bucket): count for bucket, count in sorted(self._counts.copy().items())},
            "num_negative": self.num_negative,
        }

    @classmethod
    def from_dict(cls, stored: Mapping[str, object]) -> AgeHistogram:
        """Read `to_dict`'s form; raises ValueError when it is something else."""
        buckets, num_negative = stored.get("buckets"), stored.get("num_negative", 0)
        if not isinstance(buckets, Mapping) or not isinstance(num_negative, int):
            raise ValueError(  # noqa: TRY004 - wrong content, read from a file
                "not an age histogram: expected 'buckets' and 'num_negative'"
            )
        histogram = cls()
        histogram._counts = {int(bucket): int(count) for bucket, count in buckets.items()}
        histogram.num_negative = num_negative
        return histogram


def _middle_ms(bucket: int) -> float:
    return 0.5 if bucket <= 0 else float(2.0 ** ((bucket - 0.5) / _BUCKETS_PER_OCTAVE))


_LIMITS: Final = range(30)
"""Limits of the exported histogram: 1 ms, 2 ms, … 2^29 ms (six days), and everything."""


RECENT_MS: Final = 300_000
"""What status pages call recent: a quiet stream then shows no ages rather than those of yesterday."""
_SLOTS: Final = 30


@dataclass(slots=True)
class AgePair:
    """Ages of the same events from both starts."""

    event: AgeHistogram = field(default_factory=AgeHistogram)
    append: AgeHistogram = field(default_factory=AgeHistogram)

    def merge(self, other: AgePair) -> None:
        """Add another pair's counts to these."""
        self.event.merge(other.event)
        self.append.merge(other.append)

    def shifted(self, delta_ms: float) -> AgePair:
        """The same events, `delta_ms` later."""
        return AgePair(self.event.shifted(delta_ms), self.append.shifted(delta_ms))

    def to_dict(self) -> dict[str, object]:
        """JSON-ready form, read back by `of_dict`."""
        return {"event": self.event.to_dict(), "append": self.append.to_dict()}

    @classmethod
    def of_dict(cls, stored: Mapping[str, Any]) -> AgePair:
        """Read `to_dict`'s form; raises ValueError when it is something else."""
        return cls(AgeHistogram.from_dict(stored.get("event", {})), AgeHistogram.from_dict(stored.get("append", {})))


class RecentAges:
    """Ages of the newest milliseconds, in 30 slots: bounded, and forgotten as time goes on."""

    def __init__(self, recent_ms: int = RECENT_MS) -> None:
        self._recent_ms, self._slot_ms = recent_ms, max(1, recent_ms // _SLOTS)
        self._slots: deque[tuple[int, AgePair]] = deque(maxlen=_SLOTS + 2)

    def add(self, ages: AgePair, now_ms: int) -> None:
        """Note ages that were taken at `now_ms`; a clock that was set back goes on in the newest slot."""
        slot = now_ms // self._slot_ms
        if not self._slots or slot > self._slots[-1][0]:
            self._slots.append((slot, AgePair()))
        self._slots[-1][1].merge(ages)

    def as_of(self, now_ms: int) -> AgePair:
        """Everything recent, give or take a slot."""
        recent = AgePair()
        for slot, ages in list(self._slots):
            if (slot + 1) * self._slot_ms > now_ms - self._recent_ms:
                recent.merge(ages)
        return recent


class FreshnessRecorder:
    """One hop's ages: kept here for status pages, and exported as `headrace.freshness.age.bucket`.

    Exported as cumulative counts with an attribute `le`, as Prometheus keeps histograms, and read when metrics are
    collected: a synchronous histogram takes one measurement at a time, which costs more than ingesting the event.
    Those have no exemplars, so the oldest event of each batch is measured by a histogram that has. Recorded by one
    thread, read by others.
    """

    def __init__(self, hop: str, *, mode: str) -> None:
        self.hop = hop
        self.total = AgePair()
        self._recent = RecentAges()
        self._mode = mode
        meter = metrics.get_meter("headrace.freshness")
        meter.create_observable_counter(
            "headrace.freshness.age.bucket",
            [self._observe],
            unit="{event}",
            description="Events whose age, when a hop has used them, was below `le` ms",
        )
        self._oldest = meter.create_histogram(
            "headrace.freshness.oldest",
            unit="s",
            description="Age from append of the oldest event of a batch; its exemplars lead to the traces",
        )
        meter.create_observable_counter(
            "headrace.freshness.negative",
            [self._observe_negative],
            unit="{event}",
            description="Events whose age was negative, since clocks differ; it counts as 0",
        )

    def record(
        self, event_time_ms: NDArray[np.int64], append_ms: NDArray[np.int64], now_ms: int, span: trace.Span
    ) -> None:
        """Record that these events (arrays of equal length) reached the hop at `now_ms`, wall clock, within `span`."""
        ages = AgePair()
        ages.event.add(now_ms - event_time_ms)
        ages.append.add(now_ms - append_ms)
        self.record_ages(ages, now_ms, span)

    def record_ages(self, ages: AgePair, now_ms: int, span: trace.Span) -> None:
        """Record ages that come as histograms (hops F3 and F4: from manifests)."""
        self.total.merge(ages)
        self._recent.add(ages, now_ms)
        if (oldest_ms := ages.append.quantile_ms(1.0)) is not None:
            attributes = {"headrace.hop": self.hop, "headrace.mode": self._mode}
            self._oldest.record(oldest_ms / 1000, attributes, trace.set_span_in_context(span))

    def summary(self, now_ms: int) -> dict[str, object]:
        """For status pages: quantiles from both starts since this process began, and the histograms, all and recent."""
        return {
            "event": self.total.event.summary(),
            "append": self.total.append.summary(),
            "total": self.total.to_dict(),
            "recent": {"window_ms": RECENT_MS, **self._recent.as_of(now_ms).to_dict()},
        }

    def _starts(self) -> Iterable[tuple[dict[str, str], AgeHistogram]]:
        for start, ages in (("event", self.total.event), ("append", self.total.append)):
            yield {"headrace.hop": self.hop, "headrace.start": start, "headrace.mode": self._mode}, ages

    def _observe(self, _options: object) -> Iterable[metrics.Observation]:
        for attributes, ages in self._starts():
            for limit_ms, count in ages.counts_up_to(_LIMITS):
                yield metrics.Observation(count, attributes | {"le": str(limit_ms)})
            yield metrics.Observation(ages.count, attributes | {"le": "+Inf"})

    def _observe_negative(self, _options: object) -> Iterable[metrics.Observation]:
        return [metrics.Observation(ages.num_negative, attributes) for attributes, ages in self._starts()]
