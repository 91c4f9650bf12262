"""The label join as a Faust service beside ingest: which worker does it, how it waits, how it stops."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from typing import Any, Final

from mode import Service

from feature_store.errors import ConcurrentAppendError, StoreUnavailableError
from stream.errors import LogResetError, LogUnavailableError
from stream.labels import LabelJoiner
from stream.log import RETRY_FIRST_S, RETRY_MAX_S

logger = logging.getLogger(__name__)

_RETRYABLE: Final = (StoreUnavailableError, ConcurrentAppendError, LogUnavailableError)
_NOT_MINE: Final = "another ingest worker joins the labels"
_TURN_S: Final = 0.5
"""How often a worker looks whether the join has become its own."""


class LabelService(Service):
    """Runs a joiner while `is_mine` says so, until it is stopped.

    `is_mine` decides who works, not who may: around a change of owners two may work, and their positions fence them.
    """

    def __init__(
        self,
        joiner: LabelJoiner,
        *,
        is_mine: Callable[[], bool],
        batch_wait_ms: int,
        drain_timeout_ms: int,
        **options: Any,
    ) -> None:
        super().__init__(**options)
        self.joiner = joiner
        self._is_mine, self._batch_wait_ms, self._drain_timeout_ms = is_mine, batch_wait_ms, drain_timeout_ms
        self._stopping = asyncio.Event()
        self._finished = asyncio.Event()
        self._finished.set()
        self.blocked_by: str | None = "starting"

    @Service.task
    async def _join(self) -> None:
        self._finished.clear()
        try:
            await self._run()
        except LogResetError as error:
            # Nothing of it endangers the histories: ingest goes on.
            self.blocked_by = str(error)
            logger.error("labels are not joined any more: %s", error)  # noqa: TRY400 - the sentence says it all
        finally:
            self._finished.set()

    async def _run(self) -> None:
        delay_s = RETRY_FIRST_S
        while not self._stopping.is_set():
            if not self._is_mine():
                self.blocked_by = _NOT_MINE
                await self.joiner.disconnect()
                await self._pause(_TURN_S)
                continue
            try:
                is_more_waiting = await self.joiner.step()
            except _RETRYABLE as error:
                self.blocked_by = str(error)
                logger.warning("labels: %s; trying again in %.1f s", error, delay_s)
                await self._pause(delay_s)
                delay_s = min(2 * delay_s, RETRY_MAX_S)
            else:
                self.blocked_by, delay_s = None, RETRY_FIRST_S
                # Catching up, a step may find everything at hand and wait for nothing: let ingest have its turn.
                await self._pause(0.0 if is_more_waiting else self._batch_wait_ms / 1000)

    async def _pause(self, delay_s: float) -> None:
        try:
            await asyncio.wait_for(self._stopping.wait(), delay_s)
        except TimeoutError:
            return

    async def on_stop(self) -> None:
        """Finish the batch in hand, then close."""
        self._stopping.set()
        try:
            await asyncio.wait_for(self._finished.wait(), self._drain_timeout_ms / 1000)
        except TimeoutError:
            logger.warning("labels in hand did not get out in time; they will be joined after the restart")
        await self.joiner.close()

    def status(self) -> dict[str, object]:
        """What the joiner counts, and what keeps it from working, JSON-ready."""
        return {"blocked_by": self.blocked_by, **self.joiner.status()}
