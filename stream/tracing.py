"""W3C trace context in Kafka headers, and links between batch spans and the events inside them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Final

from opentelemetry import propagate, trace
from opentelemetry.trace import Link

Headers = tuple[tuple[str, bytes], ...]

MAX_LINKS: Final = 128
"""Links kept on one batch span; the OpenTelemetry default limit, beyond which SDKs drop them anyway."""
_CONTEXT_HEADERS: Final = ("traceparent", "tracestate")


def processing_attributes(topic: str) -> dict[str, str | int]:
    """Of spans and measurements of the processing of a topic's records, by OpenTelemetry's messaging conventions."""
    return {
        "messaging.system": "kafka",
        "messaging.operation.name": "process",
        "messaging.operation.type": "process",
        "messaging.destination.name": topic,
    }


def current_headers() -> Headers:
    """The active span's context as Kafka headers; empty without an active, sampled span."""
    carrier: dict[str, str] = {}
    propagate.inject(carrier)
    return tuple((name, text.encode()) for name, text in carrier.items())


def current_traceparent() -> str | None:
    """The active span's `traceparent`, or None: stored in snapshot manifests."""
    carrier: dict[str, str] = {}
    propagate.inject(carrier)
    return carrier.get("traceparent")


def link_to(traceparent: str | None) -> list[Link]:
    """A link to a span known by its `traceparent`; empty when there is none or it is malformed."""
    return [] if traceparent is None else links_to([(("traceparent", traceparent.encode()),)])


def links_to(headers_of_records: Iterable[Sequence[tuple[str, bytes]]]) -> list[Link]:
    """Links to the spans that records carry in their headers, at most `MAX_LINKS`."""
    links: list[Link] = []
    for headers in headers_of_records:
        if not headers:
            continue
        # Kafka allows a header without a value.
        carrier = {name: text.decode("ascii", "replace") for name, text in headers if text and name in _CONTEXT_HEADERS}
        if not carrier:
            continue
        context = trace.get_current_span(propagate.extract(carrier)).get_span_context()
        if context.is_valid:
            links.append(Link(context))
            if len(links) == MAX_LINKS:
                break
    return links


def trace_id_of(headers: Sequence[tuple[str, bytes]]) -> str | None:
    """The trace id (32 hex digits) of the span that a record carries in its headers; None without one."""
    links = links_to([headers])
    return trace.format_trace_id(links[0].context.trace_id) if links else None
