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


def duration(milliseconds: float) -> str:
    """A length of time with the unit that suits it: `35 ms`, `1.25 s`, `12.0 min`, `3.5 h`, `40.1 d`."""
    size = abs(milliseconds)
    if size < 1_000:
        return f"{milliseconds:.0f} ms"
    for unit, length_ms, below_ms in (("s", 1e3, 12e4), ("min", 6e4, 72e5), ("h", 36e5, 1728e5)):
        if size < below_ms:
            return f"{milliseconds / length_ms:.{2 if unit == 's' else 1}f} {unit}"
    return f"{milliseconds / 864e5:.1f} d"
