"""Makes a recording of a topic: what producers sent, as it arrived, judged by the rules that ingest applies."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby
from pathlib import Path
from typing import Final

import polars as pl

from backtest.columns import IdKind
from backtest.errors import RecordedStreamError
from backtest.importing import SCRATCH, finish, made_aside
from backtest.intake import ImportConfig, Intake
from backtest.normalising import EVENT_SCHEMA
from backtest.raw_rows import ROW
from backtest.recording import Recording
from stream.events import Event, EventDecoder, EventRules, Refusal
from stream.log import EventLog, LogReader, Record, reading

POLL_RECORDS: Final = 10_000
POLL_MS: Final = 1_000


async def import_topic(
    log: EventLog, topic: str, out: Path, config: ImportConfig, rules: EventRules, *, from_ms: int = 0
) -> Recording:
    """Record what a topic holds now, of records appended at `from_ms` or later (by their timestamps), in that order.

    A record's own partition and offset are its file and row in the report. Ids are integers or text, as the first
    record has them; a record with the other kind is refused. Raises LogUnavailableError, RecordedStreamError.
    """
    with made_aside(out) as folder, Intake(folder, folder / SCRATCH, config, key="arrival_ms") as intake:
        async with reading(log) as reader:
            ends = {number: bounds.end for number, bounds in (await reader.bounds(topic)).items()}
            await reader.assign({(topic, number): "earliest" for number in ends})
            await _read(reader, ends, _Judge(intake, rules, from_ms))
        if not intake.num_rows:
            raise RecordedStreamError(f"topic {topic} holds no record from {from_ms} ms on: the log is empty")
        manifest = finish(
            intake,
            folder,
            name=topic,
            format_name="topic",
            mapping={"topic": topic, "log_id": log.log_id, "from_ms": from_ms, "ends": ends},
            sources=(),
            order="arrival_ms",
        )
    return Recording(out, manifest)


async def _read(reader: LogReader, ends: dict[int, int], judge: _Judge) -> None:
    """Everything below `ends`."""
    unread = {number: end for number, end in ends.items() if end > 0}
    while unread:
        records = await reader.poll(timeout_ms=POLL_MS, max_records=POLL_RECORDS)
        if not records and await reader.read_up_to_ms() is not None:
            return  # the last offsets belong to no record, as after a transaction
        for number, group in groupby(records, key=lambda record: record.partition):
            wanted = [record for record in group if record.offset < ends[number]]
            judge.take(wanted)
            if not wanted or wanted[-1].offset + 1 >= ends[number]:
                unread.pop(number, None)


class _Judge:
    """Records → events and refusals."""

    def __init__(self, intake: Intake, rules: EventRules, from_ms: int) -> None:
        self._intake, self._decoder, self._from_ms = intake, EventDecoder(rules), from_ms
        self._kinds: tuple[IdKind, IdKind] | None = None

    def take(self, records: Sequence[Record]) -> None:
        """Consecutive records of one partition."""
        records = [record for record in records if record.timestamp_ms >= self._from_ms]
        if not records:
            return
        first = records[0]
        self._intake.start_file(f"{first.topic}/{first.partition}", first_row=first.offset)
        good, bad = [], []
        for record, parsed in zip(records, self._decoder.parse_many([one.value for one in records]), strict=True):
            refusal = parsed if isinstance(parsed, Refusal) else self._refusal(parsed, record)
            if refusal is None:
                assert isinstance(parsed, Event)
                good.append((record, parsed))
            else:
                bad.append((record, refusal))
        self._intake.refuse(_refused(bad), ("value",))
        self._intake.take(self._events(good))
        self._intake.end_piece(len(records), num_numbers=records[-1].offset - first.offset + 1)

    def _refusal(self, event: Event, record: Record) -> Refusal | None:
        if (refusal := self._decoder.judge(event, record.timestamp_ms)) is not None:
            return refusal
        kinds = _kind(event.user_id), _kind(event.item_id)
        self._kinds = self._kinds or kinds
        if kinds != self._kinds:
            return Refusal("wrong_type", None, "the ids of this log are integers or text, not both")
        return None

    def _events(self, good: Sequence[tuple[Record, Event]]) -> pl.DataFrame:
        user_kind, item_kind = self._kinds or ("integer", "integer")
        key = self._decoder.rules.surface_key
        return pl.DataFrame(
            {
                "row": [record.offset for record, _ in good],
                "part": [0] * len(good),
                "user_id": [event.user_id for _, event in good],
                "item_id": [event.item_id for _, event in good],
                "event_time_ms": [event.event_time_ms() for _, event in good],
                "arrival_ms": [record.timestamp_ms for record, _ in good],
                "action": [event.action for _, event in good],
                "value": [event.value for _, event in good],
                "event_id": [event.event_id for _, event in good],
                **({"surface": [_surface(event, key) for _, event in good]} if key else {}),
            },
            schema={
                "row": pl.Int64,
                "part": pl.Int64,
                "user_id": pl.Int64 if user_kind == "integer" else pl.String,
                "item_id": pl.Int64 if item_kind == "integer" else pl.String,
                **{name: kind for name, kind in EVENT_SCHEMA.items() if name not in {"row", "part"}},
                **({"surface": pl.String} if key else {}),
            },
        )


def _surface(event: Event, key: str) -> str | None:
    """What is under a key of the context, as text; None: nothing, or what can be no surface."""
    found = (event.context or {}).get(key)
    if isinstance(found, float) and found.is_integer():
        found = int(found)
    return None if found is None or isinstance(found, bool | float) else str(found)


def _kind(identity: int | str) -> IdKind:
    return "integer" if isinstance(identity, int) else "text"


def _refused(bad: Sequence[tuple[Record, Refusal]]) -> pl.DataFrame:
    """In the form of `Normalised.refused`."""
    return pl.DataFrame(
        {
            ROW: [record.offset for record, _ in bad],
            "value": [(record.value or b"").decode("utf-8", "backslashreplace") for record, _ in bad],
            "__reason": [refusal.reason for _, refusal in bad],
            "__column": ["value"] * len(bad),
        },
        schema={ROW: pl.Int64, "value": pl.String, "__reason": pl.String, "__column": pl.String},
    )
