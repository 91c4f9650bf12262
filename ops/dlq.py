"""`headrace dlq`: dead letters as a person reads them, and sending them back."""

from __future__ import annotations

import json
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from dataclasses import replace

from feature_store.config import FeatureStoreConfig
from feature_store.store import FeatureStore
from ops.errors import OpsError
from ops.readable import readable, utc_time
from ops.settings import Settings
from stream.clock import WallClock
from stream.dead_letters import DeadLetter, read_dead_letter
from stream.kafka import KafkaConfig, KafkaLog
from stream.log import Record, record_at
from stream.redrive import LetterQuery, RedriveReport, read_letters, redrive

_NUM_FIRST_BYTES = 60


async def list_letters(
    settings: Settings, query: LetterQuery, *, as_json: bool, say: Callable[[str], None]
) -> AsyncGenerator[str, None]:
    """One line per letter of the query; `say` hears of records that are no dead letters."""
    log, num_listed = KafkaLog(settings.get(KafkaConfig)), 0
    async with aclosing(read_letters(log, on_foreign=say)) as letters:
        async for letter in letters:
            if query.reason in {None, letter.reason}:
                yield letter_json(letter) if as_json else letter_line(letter)
                num_listed += 1
                if num_listed == query.limit:
                    return


async def find_record(settings: Settings, place: str) -> Record:
    """The record at `PARTITION:OFFSET` of `dead-letters`; raises OpsError when there is none."""
    log = KafkaLog(settings.get(KafkaConfig))
    partition, offset = parse_place(place)
    record = await record_at(log, log.topics.dead_letters, partition, offset)
    if record is None:
        raise OpsError(f"{log.topics.dead_letters} has no record at {place}: `headrace dlq ls` lists what is there")
    return record


async def send_back(
    settings: Settings, query: LetterQuery, *, is_dry_run: bool, say: Callable[[str], None]
) -> RedriveReport:
    """Redrive the letters of the query."""
    store = FeatureStore(settings.get(FeatureStoreConfig))
    try:
        store.require_current_schema()
        kafka = settings.get(KafkaConfig)
        # Offsets of a log that was made anew are other places than the same offsets before.
        log = KafkaLog(replace(kafka, log_id=store.current_log_id(kafka.log_id)))
        return await redrive(log, store, WallClock(), query, is_dry_run=is_dry_run, on_foreign=say)
    finally:
        store.close()


def parse_place(place: str) -> tuple[int, int]:
    """Partition and offset of `PARTITION:OFFSET`; raises OpsError."""
    partition, _, offset = place.partition(":")
    if not (partition.isascii() and partition.isdigit() and offset.isascii() and offset.isdigit()):
        raise OpsError(f"{place!r} is no place of a dead letter: give PARTITION:OFFSET, such as 0:17")
    if max(len(partition), len(offset)) > 18:
        raise OpsError(f"{place!r} is no place of a dead letter: the numbers are too large")
    return int(partition), int(offset)


def letter_line(letter: DeadLetter) -> str:
    """One line for a person: where, why, since when, where from, and how it begins."""
    reason = letter.reason if letter.field is None else f"{letter.reason} ({letter.field})"
    source = f"{letter.source_topic}/{letter.source_partition}:{letter.source_offset}"
    first = readable((letter.value or b"")[:_NUM_FIRST_BYTES])
    return f"{letter.place:<8} {utc_time(letter.refused_at_ms)}  {readable(reason):<28} {source:<20} {first}"


def letter_json(letter: DeadLetter) -> str:
    """One line of JSON."""
    return json.dumps(
        {
            "place": letter.place,
            "reason": letter.reason,
            "field": letter.field,
            "error": letter.error,
            "source_topic": letter.source_topic,
            "source_partition": letter.source_partition,
            "source_offset": letter.source_offset,
            "attempts": letter.attempts,
            "refused_at_ms": letter.refused_at_ms,
            "num_bytes": len(letter.value or b""),
            "first_bytes": readable((letter.value or b"")[:_NUM_FIRST_BYTES]),
        }
    )


def record_text(record: Record) -> str:
    """A dead letter in full: every header, then the original key and bytes in readable form."""
    letter = read_dead_letter(record)
    facts = {
        "reason": letter.reason,
        "field": letter.field or "-",
        "error": letter.error,
        "source": f"{letter.source_topic}/{letter.source_partition}:{letter.source_offset}",
        "attempts": str(letter.attempts),
        "refused at": utc_time(letter.refused_at_ms),
        "key": "-" if letter.key is None else readable(letter.key),
    }
    lines = [f"{name:<10} {readable(text)}" for name, text in facts.items()]
    lines += [f"header     {readable(name)}: {readable(value or b'')}" for name, value in letter.original_headers]
    num_bytes = "none" if letter.value is None else f"{len(letter.value)}"
    if letter.num_left_out:
        num_bytes = f"{letter.num_left_out} of key, value and headers, too many for a letter: only at the source"
    return "\n".join([*lines, f"bytes      {num_bytes}", "", readable(letter.value or b"")])


def report_sentence(report: RedriveReport, *, is_dry_run: bool) -> str:
    """What a redrive did, for a person."""
    by_reason = ", ".join(f"{reason} {count:,}" for reason, count in report.num_sent.most_common())
    done = "would be sent back" if is_dry_run else "sent back"
    sentence = f"{report.num_sent.total():,} letters {done}" + (f" ({by_reason})" if by_reason else "")
    sentence += f"; {report.num_known:,} were sent back before"
    return sentence + (f"; {report.num_foreign:,} records are left alone" if report.num_foreign else "")
