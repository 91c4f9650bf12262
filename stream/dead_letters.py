"""Dead letters: the original bytes of a refused record, and in its headers why and where it came from."""

from __future__ import annotations

from typing import Final

from stream.events import Refusal
from stream.log import Record
from stream.tracing import Headers

HEADER_PREFIX: Final = "headrace-"
"""Our headers; the original ones are kept beside them."""


def dead_letter_headers(record: Record, refusal: Refusal, *, now_ms: int, attempts: int = 1) -> Headers:
    """Headers of a dead letter: reason code, field, error text, source position, attempts and time (epoch ms)."""
    ours = {
        "reason": refusal.reason,
        "field": refusal.field or "",
        "error": refusal.error,
        "source-topic": record.topic,
        "source-partition": str(record.partition),
        "source-offset": str(record.offset),
        "attempts": str(attempts),
        "refused-at-ms": str(now_ms),
    }
    return (*record.headers, *((HEADER_PREFIX + name, text.encode()) for name, text in ours.items()))
