"""Reading `dead-letters`, and sending letters back to where they came from.

Sending back is idempotent twice over. A letter's source place is stored once its record has been acknowledged, and a
stored one is not sent again; between the two a crash may send a record again, and then the histories drop what they
hold already. A record that is refused again is a new letter of a new place, so it can be redriven in its turn.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass, field
from typing import Final

from feature_store.records import SourcePlace
from feature_store.store import FeatureStore
from stream.clock import Clock
from stream.dead_letters import ALL_REASONS, DeadLetter, read_dead_letter
from stream.errors import MessageFormatError
from stream.log import EMPTY_POLLS, EventLog, LogWriter, acknowledged, reading

_LETTERS_PER_POLL: Final = 500
_BATCH_BYTES: Final = 8_388_608
"""Letters held in memory until they are sent: one that is too large for ingest can be as large as the broker allows."""


@dataclass(frozen=True, kw_only=True, slots=True)
class LetterQuery:
    """Which dead letters."""

    reason: str | None = None
    """Only letters of this reason code."""
    limit: int | None = None
    """At most so many, the oldest of each partition first."""

    def __post_init__(self) -> None:
        if self.reason is not None and self.reason not in ALL_REASONS:
            raise ValueError(f"--reason {self.reason}: use one of {', '.join(ALL_REASONS)}")
        if self.limit is not None and self.limit < 1:
            raise ValueError(f"--limit {self.limit}: must be at least 1")


@dataclass(slots=True)
class RedriveReport:
    """What became of the letters that a redrive looked at."""

    num_sent: Counter[str] = field(default_factory=Counter)
    """Sent back (in a dry run: that would be), per reason code."""
    num_known: int = 0
    """Were sent back by an earlier redrive, or stand on `dead-letters` twice."""
    num_foreign: int = 0
    """Records that are no dead letters, are without the record's bytes, or name a topic that ingest does not read."""


async def read_letters(
    log: EventLog, *, on_foreign: Callable[[str], None], quiet_ms: int = 500
) -> AsyncGenerator[DeadLetter, None]:
    """The dead letters that exist now, in offset order per partition, holding one poll of them at a time.

    Each partition is read to where it ended when this began, so that reading ends, and a redrive never meets the
    letters that it causes. By offsets, not by time: letters are stamped by the clocks of those who refuse. Ends also
    when polls stay empty for `quiet_ms` each: the last offsets may hold no record.

    Raises LogUnavailableError when the broker is away; `on_foreign` hears of records that are no dead letters.
    """
    topic = log.topics.dead_letters
    async with reading(log) as reader:
        ends = {number: held.end for number, held in (await reader.bounds(topic)).items() if held.start < held.end}
        open_partitions = set(ends)
        await reader.assign({(topic, partition): "earliest" for partition in open_partitions})
        num_empty = 0
        while open_partitions and num_empty < EMPTY_POLLS:
            records = await reader.poll(timeout_ms=quiet_ms, max_records=_LETTERS_PER_POLL)
            num_empty = 0 if records else num_empty + 1
            for record in records:
                if record.offset >= ends[record.partition] - 1:
                    open_partitions.discard(record.partition)
                if record.offset >= ends[record.partition]:
                    continue
                try:
                    letter = read_dead_letter(record)
                except MessageFormatError as error:
                    on_foreign(str(error))
                else:
                    yield letter


async def redrive(
    log: EventLog,
    store: FeatureStore,
    clock: Clock,
    query: LetterQuery,
    *,
    is_dry_run: bool = False,
    on_foreign: Callable[[str], None],
    quiet_ms: int = 500,
) -> RedriveReport:
    """Send the queried letters back to their source topics, each at most once; a dry run only counts.

    Key, bytes and headers are the producer's; `headrace-attempts` says how often the record was refused. It goes to
    the partition it came from, where its user's other events are.

    Raises LogUnavailableError or StoreUnavailableError; a letter that was sent by then and is not stored as sent will
    be sent again, and dropped as a duplicate.
    """
    async with _writing(log) as writer:
        work = _Redrive(log, store, clock, writer, await _source_partitions(log))
        letters = read_letters(log, on_foreign=lambda problem: work.skip(problem, on_foreign), quiet_ms=quiet_ms)
        batch: list[DeadLetter] = []
        async with aclosing(letters):
            async for letter in letters:
                if query.reason not in {None, letter.reason}:
                    continue
                if letter.num_left_out:
                    source = f"{letter.source_topic}/{letter.source_partition}:{letter.source_offset}"
                    work.skip(f"the letter at {letter.place} is without the bytes of {source}, too many", on_foreign)
                    continue
                if letter.source_topic not in work.partitions:
                    work.skip(f"the letter at {letter.place} came from {letter.source_topic}", on_foreign)
                    continue
                batch.append(letter)
                num_left = _LETTERS_PER_POLL if query.limit is None else query.limit - work.report.num_sent.total()
                is_large = sum(len(one.value or b"") for one in batch) >= _BATCH_BYTES
                if len(batch) < min(num_left, _LETTERS_PER_POLL) and not is_large:
                    continue
                await work.apply(batch, is_dry_run=is_dry_run)
                batch = []
                if work.report.num_sent.total() == query.limit:
                    break
        await work.apply(batch, is_dry_run=is_dry_run)
        return work.report


@dataclass(frozen=True, slots=True)
class _Redrive:
    """A redrive under way."""

    log: EventLog
    store: FeatureStore
    clock: Clock
    writer: LogWriter
    partitions: dict[str, list[int]]
    """Partition numbers of each topic that letters can go back to."""
    report: RedriveReport = field(default_factory=RedriveReport)

    def skip(self, problem: str, on_foreign: Callable[[str], None]) -> None:
        """Count a record that cannot be sent back, and say why."""
        self.report.num_foreign += 1
        on_foreign(problem)

    async def apply(self, letters: list[DeadLetter], *, is_dry_run: bool) -> None:
        """Send what was not sent yet, wait until the log has it, then remember it: in this order nothing is lost."""
        # A crash of ingest before its SQL commit may have left two letters of one place: one of them is enough.
        by_place = {SourcePlace(one.source_topic, one.source_partition, one.source_offset): one for one in letters}
        known = await asyncio.to_thread(self.store.redriven_among, self.log.log_id, by_place.keys())
        wanted = {place: letter for place, letter in by_place.items() if place not in known}
        if not is_dry_run:
            await acknowledged([await self._send(letter) for letter in wanted.values()])
            await asyncio.to_thread(self.store.record_redriven, self.log.log_id, wanted.keys(), self.clock.now_ms())
        self.report.num_sent.update(letter.reason for letter in wanted.values())
        self.report.num_known += len(letters) - len(wanted)

    async def _send(self, letter: DeadLetter) -> Awaitable[object]:
        exists = letter.source_partition in self.partitions[letter.source_topic]
        return await self.writer.send(
            letter.source_topic,
            letter.value,
            key=letter.key,
            partition=letter.source_partition if exists else None,
            headers=letter.redriven_headers(),
        )


async def _source_partitions(log: EventLog) -> dict[str, list[int]]:
    async with reading(log) as reader:
        topics = (log.topics.interactions, log.topics.items, log.topics.commands, log.topics.impressions)
        return {topic: await reader.partitions(topic) for topic in topics}


@asynccontextmanager
async def _writing(log: EventLog) -> AsyncIterator[LogWriter]:
    writer = log.writer()
    await writer.start()
    try:
        yield writer
    finally:
        await writer.stop()
