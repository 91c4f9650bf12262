"""How far a run is, what it knows at the end, and what it must remember in between."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from backtest.event_columns import EventColumns
from backtest.run_files import ArmCosts

Int64s = NDArray[np.int64]


@dataclass(frozen=True, kw_only=True, slots=True)
class Progress:
    """How far a run is."""

    num_done: int
    """Events learned from."""
    num_events: int
    time_ms: int
    """The run's clock."""
    is_catching_up: bool
    """The store is being built again up to the checkpoint."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RunOutcome:
    """What the engine knows at the end, for the manifest."""

    is_complete: bool
    num_events: int
    num_evaluated: int
    first_event_time_ms: int | None
    last_event_time_ms: int | None
    evaluated_from_ms: int | None
    counts: dict[str, int]
    metrics: dict[str, float]
    vectors: dict[str, Any]
    fingerprints: dict[str, str]
    wall_s: float
    cpu_s: float
    costs: dict[str, ArmCosts]
    num_parts: int


@dataclass(slots=True)
class SoFar:
    """What goes from one session to the next, JSON-ready."""

    num_evaluated: int = 0
    first_ms: int | None = None
    last_ms: int | None = None
    evaluated_from_ms: int | None = None
    is_evaluating: bool = False
    wall_s: float = 0.0
    cpu_s: float = 0.0
    num_parts: int = 0


@dataclass(slots=True)
class PolledEvents:
    """Events behind the offsets that wait for a batch: numbers, times and users, poll by poll."""

    first_offsets: list[int] = field(default_factory=list)
    events: list[EventColumns] = field(default_factory=list)

    def of(self, offsets: Int64s) -> EventColumns:
        """The events at ascending offsets; what lies below is dropped."""
        while len(self.events) > 1 and offsets[0] >= self.first_offsets[1]:
            self.first_offsets.pop(0)
            self.events.pop(0)
        last = int(np.searchsorted(self.first_offsets, offsets[-1], side="right"))
        joined = EventColumns.concat(self.events[:last])
        return joined.take(offsets - self.first_offsets[0])
