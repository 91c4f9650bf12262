"""The worker's one connection for writing to the log, which may be away."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable

from stream.errors import LogUnavailableError
from stream.log import LogWriter, start_when_available
from stream.tracing import Headers


class SharedWriter:
    """A LogWriter that is opened in the background; until then, sending raises LogUnavailableError at once."""

    def __init__(self, writer: LogWriter) -> None:
        self._writer = writer
        self.is_open = False

    async def open(self, stopping: asyncio.Event) -> None:
        """Connect, however long it takes."""
        self.is_open = await start_when_available(self._writer.start, what="serving", stopping=stopping)

    async def close(self) -> None:
        """Send what is buffered and disconnect."""
        if self.is_open:
            self.is_open = False
            await self._writer.stop()

    async def send(
        self, topic: str, value: bytes, *, key: bytes | None = None, headers: Headers = ()
    ) -> Awaitable[object]:
        """See LogWriter.send."""
        if not self.is_open:
            raise LogUnavailableError("this worker is not connected to the broker")
        return await self._writer.send(topic, value, key=key, headers=headers)
