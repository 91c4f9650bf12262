"""Dead letters: the original bytes of a refused record, and in its headers why and where it came from."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Sequence
from dataclasses import dataclass, replace
from typing import Final

from opentelemetry import metrics

from stream.clock import Clock
from stream.errors import MessageFormatError, RecordTooLargeError
from stream.events import INT64_MAX, REASONS, Refusal
from stream.log import LogWriter, Record, acknowledged
from stream.tracing import Headers

HEADER_PREFIX: Final = "headrace-"
"""Our headers; the original ones are kept beside them."""

MESSAGE_REASON: Final = "malformed_message"
"""Why a record of `items`, `commands` or `impressions` is refused."""

ALL_REASONS: Final = (*REASONS, MESSAGE_REASON)

_ATTEMPTS: Final = HEADER_PREFIX + "attempts"
_LEFT_OUT: Final = HEADER_PREFIX + "left-out"
"""How many bytes of key, value and headers a letter does not hold, because the broker did not take it with them."""
_MAX_ATTEMPTS_DIGITS: Final = 9
_PARTITION_MAX: Final = 2**31 - 1


@dataclass(frozen=True, kw_only=True, slots=True)
class DeadLetter:
    """A refused record as it lies on `dead-letters`."""

    partition: int
    """Where the letter lies; the record it was made from lies at `source_…`."""
    offset: int
    reason: str
    field: str | None
    error: str
    source_topic: str
    source_partition: int
    source_offset: int
    attempts: int
    """How often this record has been refused: 1, and one more each time it was redriven in vain."""
    refused_at_ms: int
    key: bytes | None
    value: bytes | None
    original_headers: Headers
    """As the producer sent them, without ours."""
    num_left_out: int = 0
    """Bytes of the record's key, value and headers that the letter would have been too large with; 0: it has them."""

    @property
    def place(self) -> str:
        """Where the letter lies, as `headrace dlq show` takes it."""
        return f"{self.partition}:{self.offset}"

    def redriven_headers(self) -> Headers:
        """Headers with which the record goes back to its source: the producer's, and how often it was refused."""
        return (*self.original_headers, (_ATTEMPTS, str(self.attempts).encode()))


class DeadLetterWriter:
    """Everything that refuses records writes them through one of these, so that the rate of dead letters is one number.

    A letter is counted when the log has it: one that is sent again after a crash is a second letter, and counts.
    """

    def __init__(self, writer: LogWriter, topic: str, clock: Clock) -> None:
        self._writer, self._topic, self._clock = writer, topic, clock
        self._letters = metrics.get_meter("headrace.stream").create_counter(
            "headrace.dead_letters", unit="{letter}", description="Records refused, by reason and source topic"
        )

    async def write(self, refused: Sequence[tuple[Record, Refusal]]) -> None:
        """Write letters and wait until the log has them; raises LogUnavailableError.

        A letter is a little larger than its record, and holds uncompressed what a producer may have compressed: one
        that the broker does not take is written without the record's bytes, so that it stops nobody.
        """
        sends = [await self._send(*each) for each in refused]
        acknowledgements = await asyncio.gather(*map(_is_taken, sends), return_exceptions=True)
        for each, is_taken in zip(refused, acknowledgements, strict=True):
            if isinstance(is_taken, BaseException):
                raise is_taken
            if not is_taken:
                await acknowledged([await self._send_without_bytes(*each)])
        for record, refusal in refused:
            self._letters.add(1, {"reason": refusal.reason, "source_topic": record.topic})

    async def _send(self, record: Record, refusal: Refusal) -> Awaitable[object]:
        headers = dead_letter_headers(record, refusal, now_ms=self._clock.now_ms())
        # A writer takes no record that has neither key nor value; the reason says that there was none.
        value = b"" if record.value is None and record.key is None else record.value
        try:
            return await self._writer.send(self._topic, value, key=record.key, headers=headers)
        except RecordTooLargeError:
            return await self._send_without_bytes(record, refusal)

    async def _send_without_bytes(self, record: Record, refusal: Refusal) -> Awaitable[object]:
        num_bytes = len(record.key or b"") + len(record.value or b"")
        num_bytes += sum(len(name) + len(value or b"") for name, value in record.headers)
        bare = replace(record, headers=tuple(header for header in record.headers if header[0] == _ATTEMPTS))
        headers = dead_letter_headers(bare, refusal, now_ms=self._clock.now_ms())
        return await self._writer.send(self._topic, b"", headers=(*headers, (_LEFT_OUT, str(num_bytes).encode())))


async def _is_taken(sent: Awaitable[object]) -> bool:
    try:
        await acknowledged([sent])
    except RecordTooLargeError:
        return False
    return True


def dead_letter_headers(record: Record, refusal: Refusal, *, now_ms: int) -> Headers:
    """Headers of a dead letter: reason code, field, error text, source position, attempts and time (epoch ms)."""
    ours = {
        "reason": refusal.reason,
        "field": refusal.field or "",
        "error": refusal.error,
        "source-topic": record.topic,
        "source-partition": str(record.partition),
        "source-offset": str(record.offset),
        "attempts": str(_attempts_before(record.headers) + 1),
        "refused-at-ms": str(now_ms),
    }
    return (*_without_ours(record.headers), *((HEADER_PREFIX + name, text.encode()) for name, text in ours.items()))


def read_dead_letter(record: Record) -> DeadLetter:
    """What `dead_letter_headers` wrote; raises MessageFormatError for a record that is not a dead letter."""
    ours = {name: value for name, value in record.headers if name.startswith(HEADER_PREFIX)}

    def text(name: str) -> str:
        return ours[HEADER_PREFIX + name].decode()

    def number(name: str, largest: int = INT64_MAX) -> int:
        stated = int(ours[HEADER_PREFIX + name])
        if not 0 <= stated <= largest:
            raise ValueError(f"{name} = {stated}: must lie in 0..{largest}")
        return stated

    try:
        return DeadLetter(
            partition=record.partition,
            offset=record.offset,
            reason=text("reason"),
            field=text("field") or None,
            error=text("error"),
            source_topic=text("source-topic"),
            source_partition=number("source-partition", _PARTITION_MAX),
            source_offset=number("source-offset"),
            attempts=number("attempts"),
            refused_at_ms=number("refused-at-ms"),
            key=record.key,
            value=record.value,
            original_headers=_without_ours(record.headers),
            num_left_out=number("left-out") if _LEFT_OUT in ours else 0,
        )
    except (KeyError, ValueError, TypeError, AttributeError) as error:
        # AttributeError, TypeError: Kafka allows a header without a value.
        raise MessageFormatError(
            f"the record at {record.partition}:{record.offset} is not a dead letter of headrace: {error!r}"
        ) from error


def _without_ours(headers: Headers) -> Headers:
    return tuple((name, value) for name, value in headers if not name.startswith(HEADER_PREFIX))


def _attempts_before(headers: Headers) -> int:
    """How often a redriven record was refused before; 0 for a new one.

    Anybody can write headers, and a header must never stop a partition: what is not a small number counts as 0.
    """
    stated = dict(headers).get(_ATTEMPTS) or b""
    return int(stated) if stated.isdigit() and len(stated) <= _MAX_ATTEMPTS_DIGITS else 0
