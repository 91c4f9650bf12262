"""Sweeps over all users that remove what retention lets expire, beside ingest and out of its way."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable

from feature_store.errors import ConcurrentAppendError, StoreUnavailableError
from feature_store.store import FeatureStore

logger = logging.getLogger(__name__)

_PAUSE_S = 0.02
"""Between two slices: SQLite has one writer at a time, and ingest is to be it most of the time."""


class Sweeper:
    """Sweeps again and again, one short transaction after the other, each in a thread of its own."""

    def __init__(self, store: FeatureStore, *, interval_ms: int, is_ours: Callable[[], bool]) -> None:
        """`is_ours`: whether this process is the one that sweeps now; asked before each sweep."""
        self._store, self._interval_s, self._is_ours = store, interval_ms / 1000, is_ours
        self.num_sweeps = 0
        self.num_interactions = 0
        """Interactions removed since the start."""

    @property
    def is_on(self) -> bool:
        """Whether there is anything to sweep for."""
        return self._interval_s > 0 and self._store.retention.is_on

    async def run(self, stopping: asyncio.Event) -> None:
        """Sweep once per interval until told to stop."""
        while self.is_on and not await _is_set_within(stopping, self._interval_s):
            if not self._is_ours():
                continue
            try:
                await self.sweep(stopping)
            except (StoreUnavailableError, ConcurrentAppendError) as error:
                logger.warning("the sweep ended early: %s; the next one is in %.0f s", error, self._interval_s)

    async def sweep(self, stopping: asyncio.Event) -> None:
        """Look at every user once. Raises StoreUnavailableError or ConcurrentAppendError; what was done stays."""
        before, after_user = self.num_interactions, -1
        while True:
            pruned = await asyncio.to_thread(self._store.prune, after_user=after_user)
            self.num_interactions += pruned.num_interactions
            if pruned.next_after is None:
                break
            after_user = pruned.next_after
            if await _is_set_within(stopping, _PAUSE_S):
                return
        self.num_sweeps += 1
        if self.num_interactions > before:
            logger.info("retention removed %d interactions", self.num_interactions - before)


async def _is_set_within(stopping: asyncio.Event, delay_s: float) -> bool:
    try:
        await asyncio.wait_for(stopping.wait(), delay_s)
    except TimeoutError:
        return False
    return True
