"""What others sent and what machines count, as text that is safe to print on a terminal."""

from __future__ import annotations

from datetime import UTC, datetime


def readable(raw: bytes | str) -> str:
    """Text without line ends or control characters: what a producer sent must not steer the terminal."""
    text = raw.decode("utf-8", "backslashreplace") if isinstance(raw, bytes) else raw
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def utc_time(epoch_ms: int) -> str:
    """RFC 3339 with milliseconds; the number itself where the calendar ends."""
    try:
        when = datetime.fromtimestamp(epoch_ms // 1000, UTC)
    except (ValueError, OverflowError, OSError):
        return f"{epoch_ms} ms"
    return f"{when:%Y-%m-%dT%H:%M:%S}.{epoch_ms % 1000:03d}Z"
