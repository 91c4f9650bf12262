"""Which users are forgotten further on in `history-updates`.

A trainer that comes back reads again what was announced before it stopped. Of users who were forgotten since, the
histories are gone from the store, or are new ones with the same arrival numbers: so it must know of them beforehand.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

from stream.log import EventLog, PartitionId, Start, reading
from stream.messages import HistoryUpdate

_QUIET_MS: Final = 500
_RECORDS_PER_POLL: Final = 1_000


@dataclass(frozen=True, slots=True)
class Forgotten:
    """Users who were forgotten, and the place in `history-updates` where and the time when that was announced."""

    partition: int
    offset: int
    user_ids: tuple[int, ...]
    timestamp_ms: int


async def forgotten_ahead(log: EventLog, starts: Mapping[PartitionId, Start]) -> list[Forgotten]:
    """Who is forgotten between these places of `history-updates` and its end as of now.

    Raises LogUnavailableError, or LogResetError if a place is no longer in the log.
    """
    found: list[Forgotten] = []
    async with reading(log) as reader:
        bounds = await reader.bounds(log.topics.history_updates)
        first = {at: start if isinstance(start, int) else bounds[at[1]].start for at, start in starts.items()}
        wanted: dict[PartitionId, Start] = {at: start for at, start in first.items() if start < bounds[at[1]].end}
        if not wanted:
            return []  # aiokafka does not come back from an assignment of nothing
        await reader.assign(wanted)
        behind = {partition for _, partition in wanted}
        # The last offsets of a partition may hold no record (a transaction's marker): then silence ends it.
        while behind and (records := await reader.poll(timeout_ms=_QUIET_MS, max_records=_RECORDS_PER_POLL)):
            for record in records:
                if user_ids := HistoryUpdate.decode(record.value).forgotten:
                    found.append(Forgotten(record.partition, record.offset, user_ids, record.timestamp_ms))
                if record.offset + 1 >= bounds[record.partition].end:
                    behind.discard(record.partition)
    return found
