"""When a recorded event reaches the log, and what its producer's clock says: simulated on top of what was recorded.

A log that was recorded at its source knows nothing of delays. Real ones have them: a phone sends later, a label is
known only when the film was watched, clocks are wrong. All three are functions of the seed and of the event or its
user, so that every run has the same.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from backtest.event_columns import EventColumns

_MAX_U53 = float(2**53)


@dataclass(frozen=True, kw_only=True, slots=True)
class ArrivalConfig:
    """Delays and wrong clocks."""

    delay_ms: int = 0
    """Mean of an exponential delay (ms) between what happened and its arrival: network, retries, the time until it is
    known whether an impression was taken. 0: events arrive when they happen, or when the log says."""
    delay_max_ms: int = 3_600_000
    """Longest delay (ms); longer ones are cut. Bounds what is held back in memory."""
    clock_skew_ms: int = 0
    """Standard deviation (ms) of how wrong a user's clock is, one number a user. Histories are ordered by these clocks;
    what is shown to the user when, and what has arrived, is not changed by them."""
    seed: int = 0
    """Draws both."""

    def __post_init__(self) -> None:
        for name in ("delay_ms", "delay_max_ms", "clock_skew_ms", "seed"):
            if getattr(self, name) < 0:
                raise ValueError(f"arrivals.{name} = {getattr(self, name)}: must not be negative")
        if self.delay_ms > self.delay_max_ms:
            raise ValueError(
                f"arrivals.delay_ms = {self.delay_ms}: must be at most arrivals.delay_max_ms ({self.delay_max_ms})"
            )


def in_order_of_arrival(batches: Iterable[EventColumns], config: ArrivalConfig) -> Iterator[EventColumns]:
    """The same events, skewed and delayed, in order of arrival; those that arrive together keep their order.

    With delays the batches must come in order of `query_time_ms`.
    """
    waiting: list[EventColumns] = []
    for batch in batches:
        moved = _skewed(batch, config)
        if config.delay_ms == 0:
            yield moved
            continue
        waiting.append(_delayed(moved, config))
        # Whatever comes later arrives after the newest that has happened by now.
        known = EventColumns.concat(waiting)
        is_due = known.arrival_ms <= batch.query_time_ms[-1]
        yield from _sorted(known.take(is_due))
        waiting = [known.take(~is_due)]
    if waiting:
        yield from _sorted(EventColumns.concat(waiting))


def _sorted(events: EventColumns) -> Iterator[EventColumns]:
    if len(events):
        yield events.take(np.argsort(events.arrival_ms, kind="stable"))


def _delayed(events: EventColumns, config: ArrivalConfig) -> EventColumns:
    uniform = _uniform(events.event_key, config.seed)
    delay_ms = np.minimum(-np.log1p(-uniform) * config.delay_ms, config.delay_max_ms).astype(np.int64)
    return _with(events, arrival_ms=events.arrival_ms + delay_ms)


def _skewed(events: EventColumns, config: ArrivalConfig) -> EventColumns:
    if config.clock_skew_ms == 0:
        return events
    keys = events.user_id.astype(np.uint64)
    # Box and Muller: normal numbers from two uniform ones.
    radius = np.sqrt(-2 * np.log1p(-_uniform(keys, config.seed + 1)))
    normal = radius * np.cos(2 * np.pi * _uniform(keys, config.seed + 2))
    skew_ms = (config.clock_skew_ms * normal).astype(np.int64)
    return _with(events, event_time_ms=np.maximum(events.event_time_ms + skew_ms, 0))


def _uniform(keys: NDArray[np.uint64], seed: int) -> NDArray[np.float64]:
    """[0, 1) from a key each: the finaliser of SplitMix64."""
    mixed = keys + np.uint64((seed * 2 + 1) * 0x9E3779B97F4A7C15 % 2**64)
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        mixed = (mixed ^ (mixed >> np.uint64(shift))) * np.uint64(factor)
    mixed ^= mixed >> np.uint64(31)
    return (mixed >> np.uint64(11)).astype(np.float64) / _MAX_U53


def _with(events: EventColumns, **columns: NDArray[np.int64]) -> EventColumns:
    names = EventColumns.__dataclass_fields__
    return EventColumns(**{name: columns.get(name, getattr(events, name)) for name in names})
