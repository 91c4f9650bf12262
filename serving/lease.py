"""Saying beside the snapshots which version this worker runs, so that the trainer keeps what it needs."""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import Callable

from model.errors import ModelError
from model.retention import ReplicaLease, end_lease, write_lease
from model.storage import SnapshotRoot, open_storage
from stream.clock import Clock

logger = logging.getLogger(__name__)


class SnapshotLease:
    """The lease of one worker, renewed from a thread of its own. Without it serving goes on, and `problem` says why."""

    def __init__(
        self,
        root: SnapshotRoot,
        model: str,
        replica: str,
        clock: Clock,
        *,
        held: Callable[[], int | None],
        back_to: Callable[[], int | None],
    ) -> None:
        self._storage, self._model, self._replica = open_storage(root), model, replica
        self._clock, self._held, self._back_to = clock, held, back_to
        self._loading: int | None = None
        self._writing = threading.Lock()
        self.problem: str | None = None

    async def run(self, interval_ms: int) -> None:
        """Renew it every `interval_ms` until cancelled."""
        while True:
            await asyncio.to_thread(self._write)
            await asyncio.sleep(interval_ms / 1000)

    def note_loading(self, version: int) -> None:
        """Say at once that what leads to this version is being read, in place of an earlier one. Blocking."""
        self._loading = version
        self._write()

    def end(self) -> None:
        """The worker stops; nothing is kept for it any more. Blocking."""
        try:
            with self._writing:
                end_lease(self._storage, self._model, self._replica)
        except (ModelError, OSError) as error:
            logger.warning("the lease of this worker runs out by itself: %s", error)

    def _write(self) -> None:
        with self._writing:
            held = self._held()
            if held is not None and held == self._loading:
                self._loading = None
            lease = ReplicaLease(
                replica=self._replica,
                version=held,
                loading=self._loading,
                back_to=self._back_to(),
                at_ms=self._clock.now_ms(),
            )
            try:
                write_lease(self._storage, self._model, lease)
                problem = None
            except (ModelError, OSError) as error:
                problem = str(error)
                if self.problem is None:
                    logger.warning("the trainer is not told which version this worker runs: %s", error)
            self.problem = problem
