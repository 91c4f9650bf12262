"""Whether the broker answers: clients retry in silence, so it is asked."""

from __future__ import annotations

import asyncio
import logging

from stream.errors import LogUnavailableError
from stream.log import EventLog, start_when_available

logger = logging.getLogger(__name__)


class BrokerWatch:
    """Asks the broker regularly; serving goes on whatever it says."""

    def __init__(self, log: EventLog) -> None:
        self._log = log
        self._seen = asyncio.Event()
        self.problem: str | None = "not looked at yet"

    async def seen(self) -> None:
        """Wait until the broker has answered once, and the topics exist."""
        await self._seen.wait()

    async def run(self, interval_ms: int, stopping: asyncio.Event) -> None:
        """Look until it is there, then every `interval_ms`, until cancelled."""
        if await start_when_available(self._look, what="serving", stopping=stopping):
            self._seen.set()
        while True:
            await asyncio.sleep(interval_ms / 1000)
            was_there = self.problem is None
            try:
                await self._look()
            except LogUnavailableError as error:
                if was_there:
                    logger.warning("serving goes on without the log: %s", error)

    async def _look(self) -> None:
        """Topics that a fresh broker does not have yet are created. Raises LogUnavailableError."""
        try:
            await self._log.create_topics()
        except LogUnavailableError as error:
            self.problem = str(error)
            raise
        self.problem = None
