"""The `items` topic as the trainer reads it: what is said about items, in the order in which it was said.

News wait until the stream of interactions has come to their time, so that what a newcomer starts from is a function of
the log: a trainer that repeats what it did after a crash finds the same content at the same step.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Mapping
from typing import Final

import numpy as np
from numpy.typing import NDArray

from feature_store.records import Item
from online_trainer.item_content import ItemNews, content_vector
from online_trainer.text_content import TextEncoder, hashed_ngrams, item_text
from stream.clock import Clock
from stream.errors import LogResetError, MessageFormatError
from stream.log import EventLog, LogReader, PartitionId, Record, Start
from stream.messages import read_item

logger = logging.getLogger(__name__)

_RECORDS_PER_POLL: Final = 500
_WAITING_MAX: Final = 50_000
"""News read and not yet told; 0.4 kB each."""
_QUIET_MS: Final = 500


class ItemFeed:
    """Reads `items` beside the updates, from given positions on. Unreadable messages are ingest's to report."""

    def __init__(self, log: EventLog, clock: Clock, encode: TextEncoder = hashed_ngrams) -> None:
        """encode: the titles and texts of items that come without an embedding."""
        self._log, self._clock, self._encode = log, clock, encode
        self._reader: LogReader = log.reader()
        self._waiting: deque[ItemNews] = deque()

    async def start(self) -> None:
        """Connect; raises LogUnavailableError."""
        await self._reader.start()

    async def stop(self) -> None:
        """Disconnect."""
        await self._reader.stop()

    async def begin(self, positions: Mapping[int, int]) -> None:
        """Read from these offsets on, partitions that are not named from their start, up to the end as of now.

        So that a trainer that starts knows all that was said before it learns on. Raises LogUnavailableError.
        """
        topic = self._log.topics.items
        bounds = await self._reader.bounds(topic)
        starts: dict[PartitionId, Start] = {}
        for partition, held in bounds.items():
            at = positions.get(partition, 0)
            # Elsewhere: the topic was made anew.
            starts[topic, partition] = at if held.start <= at <= held.end else held.start
        await self._reader.assign(starts)
        self._waiting.clear()
        behind = {partition for (_, partition), at in starts.items() if at != bounds[partition].end}
        while behind and len(self._waiting) < _WAITING_MAX:
            records = await self._poll(_QUIET_MS)
            behind -= {record.partition for record in records if record.offset + 1 >= bounds[record.partition].end}
            if not records:
                break  # the last offsets of a compacted partition may hold no record

    async def read(self) -> None:
        """Take what has come, without waiting. Raises LogUnavailableError."""
        if len(self._waiting) >= _WAITING_MAX:
            return
        try:
            await self._poll(0)
        except LogResetError as error:
            logger.warning("%s; reading what is said about items from its start", error)
            await self.begin({})

    async def _poll(self, timeout_ms: int) -> list[Record]:
        records = await self._reader.poll(timeout_ms=timeout_ms, max_records=_RECORDS_PER_POLL)
        now_ms = self._clock.now_ms()
        self._waiting.extend(news for record in records if (news := _news(record, now_ms, self._encode)) is not None)
        return records

    def due(self, append_ms: int) -> list[ItemNews]:
        """What had been said when something was appended to the log, and was not asked for before."""
        found = []
        while self._waiting and self._waiting[0].append_ms <= append_ms:
            found.append(self._waiting.popleft())
        return found


def _news(record: Record, now_ms: int, encode: TextEncoder) -> ItemNews | None:
    try:
        item_id, _, item = read_item(record.key, record.value)
    except MessageFormatError:
        return None
    return ItemNews(
        item_id=item_id,
        content=None if item is None else _content(item, encode),
        is_available=item is not None and item.available,
        partition=record.partition,
        offset=record.offset,
        # A producer whose clock is ahead must not hold up what comes behind it.
        append_ms=min(record.timestamp_ms, now_ms),
    )


def _content(item: Item, encode: TextEncoder) -> NDArray[np.float32] | None:
    if item.embedding is not None:
        return content_vector(np.frombuffer(item.embedding, "<f4"), item.categories)
    text = item_text(item.title, item.text)
    return content_vector(None, item.categories, encode(text) if text else None)
