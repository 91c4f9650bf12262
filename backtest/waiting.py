"""Queries of an arm that cannot be answered yet, because weights or histories of before may still come."""

from __future__ import annotations

from typing import Final

from backtest.queries import Queries

WAITING_MAX: Final = 1_024
"""Queries that wait for one copy of the weights; more cost memory and save no time."""


class WaitingQueries:
    """In the order in which they came."""

    def __init__(self) -> None:
        self._parts: list[Queries] = []

    def add(self, queries: Queries) -> None:
        """Take in a step's queries."""
        self._parts.append(queries)

    @property
    def are_many(self) -> bool:
        """Whether those that can be answered should be."""
        return sum(len(part) for part in self._parts) >= WAITING_MAX

    @property
    def newest_ms(self) -> int:
        """When the newest was asked; -1 of none."""
        return max((int(part.asked_ms_P.max(initial=-1)) for part in self._parts), default=-1)

    def take_before(self, time_ms: float) -> Queries | None:
        """Those asked before a time, which wait no longer; None if there are none."""
        if not self._parts:
            return None
        waiting = Queries.concat(self._parts)
        is_before_P = waiting.asked_ms_P < time_ms
        self._parts = [] if is_before_P.all() else [waiting.part(~is_before_P)]
        return waiting.part(is_before_P) if is_before_P.any() else None
