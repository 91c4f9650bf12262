"""Dead letters: what is written can be read, a record refused again says so, and no header stops anything."""

from __future__ import annotations

import pytest

from stream.dead_letters import ALL_REASONS, dead_letter_headers, read_dead_letter
from stream.errors import MessageFormatError
from stream.events import Refusal
from stream.log import Record
from stream.tracing import Headers

REFUSAL = Refusal("unknown_action", "action", "action 'stare' is not one of: view")
ORIGINAL: Headers = (("traceparent", b"00-ab"), ("colour", b"blue"))


def refused(headers: Headers = ORIGINAL, *, offset: int = 7) -> Record:
    """The letter of a record with these headers, at place 0:3 of `dead-letters`."""
    source = Record("interactions", 2, offset, 1_000, b"key", b"\xff\x00", headers)
    return Record("dead-letters", 0, 3, 2_000, b"key", b"\xff\x00", dead_letter_headers(source, REFUSAL, now_ms=1_500))


def test_a_letter_says_what_where_why_and_when() -> None:
    letter = read_dead_letter(refused())
    assert (letter.place, letter.reason, letter.field, letter.error) == (
        "0:3",
        "unknown_action",
        "action",
        REFUSAL.error,
    )
    assert (letter.source_topic, letter.source_partition, letter.source_offset) == ("interactions", 2, 7)
    assert (letter.attempts, letter.refused_at_ms) == (1, 1_500)
    assert (letter.key, letter.value, letter.original_headers) == (b"key", b"\xff\x00", ORIGINAL)


def test_a_record_refused_again_counts_its_attempts_and_carries_no_header_twice() -> None:
    first = read_dead_letter(refused())
    assert first.redriven_headers() == (*ORIGINAL, ("headrace-attempts", b"1"))
    again = refused(first.redriven_headers(), offset=8)
    second = read_dead_letter(again)
    assert (second.attempts, second.source_offset, second.original_headers) == (2, 8, ORIGINAL)
    names = [name for name, _ in again.headers]
    assert len(names) == len(set(names))


@pytest.mark.parametrize("stated", [b"", b"many", b"-1", b"\xff", b"\xb2", b"9" * 4_300, None])
def test_an_attempts_header_that_is_no_small_number_counts_as_none(stated: bytes | None) -> None:
    headers = (("headrace-attempts", stated),)
    assert read_dead_letter(refused(headers)).attempts == 1  # type: ignore[arg-type]  # Kafka allows None


@pytest.mark.parametrize(
    "headers",
    [
        (),
        ORIGINAL,
        tuple((name, value) for name, value in refused().headers if name != "headrace-reason"),
        tuple((name, b"soon" if name == "headrace-source-offset" else value) for name, value in refused().headers),
        tuple((name, b"9" * 20 if name == "headrace-source-offset" else value) for name, value in refused().headers),
        tuple((name, b"-1" if name == "headrace-source-offset" else value) for name, value in refused().headers),
        tuple((name, b"9" * 10 if name == "headrace-source-partition" else value) for name, value in refused().headers),
        tuple((name, b"\xff" if name == "headrace-error" else value) for name, value in refused().headers),
        tuple((name, None if name == "headrace-reason" else value) for name, value in refused().headers),
    ],
)
def test_a_record_that_is_no_dead_letter_is_named(headers: Headers) -> None:
    with pytest.raises(MessageFormatError, match="0:3 is not a dead letter"):
        read_dead_letter(Record("dead-letters", 0, 3, 2_000, None, b"{}", headers))


def test_every_reason_is_known() -> None:
    assert "malformed_message" in ALL_REASONS
    assert "unknown_action" in ALL_REASONS
