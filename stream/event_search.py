"""Finding one event in the log: where `history-updates` told of it, where a producer sent it, whether it was refused.

For a person who asks after one event: a partition is read from a time on, in order, to where it ended when that began.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from dataclasses import dataclass, replace
from typing import Final

import msgspec
import numpy as np

from stream.dead_letters import DeadLetter
from stream.events import UNREADABLE
from stream.log import EMPTY_POLLS, EventLog, Record, reading
from stream.messages import HistoryUpdate
from stream.redrive import read_letters
from stream.tracing import Headers

_RECORDS_PER_POLL: Final = 10_000
FOUND_MAX: Final = 100
"""Records or letters of one event that are kept; a producer may send it without end."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Announced:
    """One interaction as a message of `history-updates` told of it."""

    log_id: str
    partition: int
    offset: int
    """Where the event lies in `interactions`."""
    append_ms: int
    """When the broker appended it there."""
    update_offset: int
    """Of the message, in the same partition of `history-updates`."""
    announced_ms: int
    """When the message was appended: the commit followed at once, or it was sent again after a crash."""
    user_id: int
    item_id: int
    event_time_ms: int
    seq: int
    arrival_ms: int
    headers: Headers
    """Trace context of the commit."""
    forgotten_ms: int | None = None
    """When the partition told, later, that the user was forgotten."""


async def find_announced(
    log: EventLog, key: int, *, since_ms: int, is_it: Callable[[Announced], bool], quiet_ms: int = 500
) -> list[Announced]:
    """What `history-updates` has told of an event key since a time; ends at once when `is_it` says that this is it.

    Raises LogUnavailableError, LogResetError or MessageFormatError.
    """
    found: list[Announced] = []
    async with aclosing(_records_since(log, log.topics.history_updates, since_ms, quiet_ms)) as records:
        async for record in records:
            update = HistoryUpdate.decode(record.value)
            for place, one in enumerate(found):
                if one.partition == record.partition and one.user_id in update.forgotten:
                    found[place] = replace(one, forgotten_ms=record.timestamp_ms)
            for row in np.flatnonzero(update.interactions.event_key == np.uint64(key)).tolist():
                one = _announced(update, row, record)
                if is_it(one):
                    return [one]
                if len(found) < FOUND_MAX:
                    found.append(one)
    return found


def _announced(update: HistoryUpdate, row: int, record: Record) -> Announced:
    interactions = update.interactions
    return Announced(
        log_id=update.log_id,
        partition=update.partition,
        offset=int(update.offsets[row]),
        append_ms=int(update.append_ms[row]),
        update_offset=record.offset,
        announced_ms=record.timestamp_ms,
        user_id=int(interactions.user_id[row]),
        item_id=int(interactions.item_id[row]),
        event_time_ms=int(interactions.event_time_ms[row]),
        seq=int(interactions.seq[row]),
        arrival_ms=int(interactions.arrival_ms[row]),
        headers=record.headers,
    )


async def find_sent(log: EventLog, event_id: str, *, since_ms: int, quiet_ms: int = 500) -> list[Record]:
    """Records of `interactions` since a time that carry an event id; raises LogUnavailableError or LogResetError."""
    found = []
    async with aclosing(_records_since(log, log.topics.interactions, since_ms, quiet_ms)) as records:
        async for record in records:
            if event_id_of(record.value) == event_id:
                found.append(record)
                if len(found) == FOUND_MAX:
                    break
    return found


async def find_refused(log: EventLog, event_id: str, *, quiet_ms: int = 500) -> list[DeadLetter]:
    """Dead letters of an event id, also of one that could not be read as JSON; raises LogUnavailableError."""
    found, raw_id = [], event_id.encode()
    letters = read_letters(log, on_foreign=lambda _problem: None, quiet_ms=quiet_ms)
    async with aclosing(letters):
        async for letter in letters:
            if letter.source_topic != log.topics.interactions:
                continue
            stated = event_id_of(letter.value)
            if stated == event_id or (stated is None and raw_id in (letter.value or b"")):
                found.append(letter)
                if len(found) == FOUND_MAX:
                    break
    return found


class _WithId(msgspec.Struct):
    event_id: str


def event_id_of(value: bytes | None) -> str | None:
    """The event id in a record's bytes; None where there is none."""
    try:
        return msgspec.json.decode(value or b"", type=_WithId).event_id
    except UNREADABLE:
        return None


async def _records_since(log: EventLog, topic: str, since_ms: int, quiet_ms: int) -> AsyncGenerator[Record, None]:
    async with reading(log) as reader:
        starts = await reader.since(topic, since_ms)
        ends = {partition: bounds.end for partition, bounds in (await reader.bounds(topic)).items()}
        still_open = {partition for partition, start in starts.items() if start < ends.get(partition, 0)}
        await reader.assign({(topic, partition): starts[partition] for partition in still_open})
        num_empty = 0
        while still_open and num_empty < EMPTY_POLLS:
            records = await reader.poll(timeout_ms=quiet_ms, max_records=_RECORDS_PER_POLL)
            num_empty = 0 if records else num_empty + 1
            for record in records:
                if record.partition not in still_open:
                    continue
                yield record
                if record.offset + 1 >= ends[record.partition]:
                    still_open.discard(record.partition)
