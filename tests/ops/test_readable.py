"""Text for a terminal: nobody's bytes steer it, and no time is too far away."""

from __future__ import annotations

import pytest

from ops.readable import readable, utc_time


@pytest.mark.parametrize(
    ("raw", "text"),
    [
        (b"\xc3\xa9", "é"),
        (b"a\nb\x00", r"a\nb\x00"),
        (b"\xe2\x80\xa8", r"\u2028"),
        (b"\xed\xa0\x80", r"\xed\xa0\x80"),
    ],
)
def test_what_a_producer_sent_stays_on_its_line(raw: bytes, text: str) -> None:
    assert readable(raw) == text


@pytest.mark.parametrize(
    ("epoch_ms", "text"),
    [
        (1_700_000_000_007, "2023-11-14T22:13:20.007Z"),
        (0, "1970-01-01T00:00:00.000Z"),
        (-1, "1969-12-31T23:59:59.999Z"),
        (2**63 - 1, "9223372036854775807 ms"),
    ],
)
def test_times_are_utc_to_the_millisecond(epoch_ms: int, text: str) -> None:
    assert utc_time(epoch_ms) == text
