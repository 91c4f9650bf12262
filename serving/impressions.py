"""What answers showed, on its way to the log: never in the way of an answer."""

from __future__ import annotations

import asyncio
import logging

from serving.instruments import ServingInstruments
from serving.log_writer import SharedWriter
from stream.errors import LogUnavailableError
from stream.log import acknowledged
from stream.messages import Impression, encode_message

logger = logging.getLogger(__name__)

_SEND_MAX = 500
_PAUSE_S = 1.0
_GATHER_S = 0.1
"""Impressions of so long go together: a request to the broker costs more than the records in it, and the event loop
that waits for it has answers to write."""


class ImpressionLog:
    """A bounded queue of impressions and the task that empties it; what does not fit or cannot be sent is counted."""

    def __init__(self, writer: SharedWriter, topic: str, queue_max: int, instruments: ServingInstruments) -> None:
        self._writer = writer
        self._topic = topic
        self._queue: asyncio.Queue[Impression] = asyncio.Queue(queue_max)
        self._instruments = instruments
        self.num_sent = 0
        self.num_dropped = 0

    def add(self, impression: Impression) -> None:
        """Queue an impression, or drop it when the queue is full. Returns at once."""
        try:
            self._queue.put_nowait(impression)
        except asyncio.QueueFull:
            self._dropped(1, "dropped")

    async def run(self) -> None:
        """Send what is queued until cancelled."""
        while True:
            await asyncio.sleep(_GATHER_S)
            while not self._queue.empty():
                await self._send(self._taken())

    async def flush(self) -> None:
        """Send what is still queued, when the worker stops."""
        while not self._queue.empty() and self._writer.is_open:
            await self._send(self._taken())

    def _taken(self) -> list[Impression]:
        return [self._queue.get_nowait() for _ in range(min(_SEND_MAX, self._queue.qsize()))]

    async def _send(self, batch: list[Impression]) -> None:
        try:
            sends = [
                await self._writer.send(self._topic, encode_message(impression), key=str(impression.user_id).encode())
                for impression in batch
            ]
            await acknowledged(sends)
        except LogUnavailableError as error:
            self._dropped(len(batch), "failed")
            logger.debug("%d impressions were not written: %s", len(batch), error)
            await asyncio.sleep(_PAUSE_S)
            return
        self.num_sent += len(batch)
        for _ in batch:
            self._instruments.impression_done("sent")

    def _dropped(self, count: int, outcome: str) -> None:
        self.num_dropped += count
        for _ in range(count):
            self._instruments.impression_done(outcome)
