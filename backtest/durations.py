"""Durations as people write them in a run's configuration: `500ms`, `10s`, `1m`, `6h`, `1d`."""

from __future__ import annotations

import re
from typing import Final

_MS_PER_UNIT: Final = {"ms": 1, "s": 1_000, "m": 60_000, "h": 3_600_000, "d": 86_400_000}
_PATTERN: Final = re.compile(r"(\d+)(ms|s|m|h|d)")


def duration_ms(text: str, option: str) -> int:
    """Milliseconds.

    >>> duration_ms("10m", "publish_every")
    600000
    """
    found = _PATTERN.fullmatch(text)
    if found is None:
        raise ValueError(f"{option} = {text!r}: write a whole number and ms, s, m, h or d, such as 10m")
    return int(found[1]) * _MS_PER_UNIT[found[2]]


def publish_interval_ms(text: str, option: str) -> int | None:
    """As `duration_ms`; `batch` is 0, after every batch; `never` is None, once and never again."""
    if text in {"batch", "never"}:
        return 0 if text == "batch" else None
    return duration_ms(text, option)


def as_text(ms: int) -> str:
    """The shortest way to write it.

    >>> as_text(5_400_000)
    '90m'
    """
    unit, size = "ms", 1
    for name, per in _MS_PER_UNIT.items():
        if ms % per == 0 and ms >= per:
            unit, size = name, per
    return f"{ms // size}{unit}"
