"""`POST /v1/events`: events from HTTP callers, validated as ingest will validate them, into the log."""

from __future__ import annotations

import asyncio

import msgspec

from serving.config import ServingConfig
from serving.errors import EventsRefusedError, EventsUnavailableError, InvalidRequestError
from serving.log_writer import SharedWriter
from serving.messages import RefusedEvent
from stream.clock import Clock
from stream.errors import LogUnavailableError
from stream.events import UNREADABLE, Event, EventDecoder, EventRules, Refusal
from stream.log import acknowledged
from stream.tracing import current_headers


class EventIntake:
    """Sends events of one request to the log, all or none."""

    def __init__(
        self, config: ServingConfig, rules: EventRules, writer: SharedWriter, topic: str, clock: Clock
    ) -> None:
        self._config = config
        self._decoder = EventDecoder(rules)
        self._writer = writer
        self._topic = topic
        self._clock = clock
        self.num_accepted = 0

    async def accept(self, body: bytes) -> list[str]:
        """Validate and send one event or a list of them; event ids once the log has acknowledged all.

        Raises InvalidRequestError (not JSON, empty, too many), EventsRefusedError (nothing was sent) or
        EventsUnavailableError (some may have been sent: sending all again is harmless).
        """
        raw_events = self._split(body)
        events = self._decode(raw_events)
        try:
            async with asyncio.timeout(self._config.events_timeout_ms / 1000):
                headers = current_headers()
                sends = [
                    # The bytes go to the log as they came, fields unknown to this version included.
                    await self._writer.send(self._topic, raw, key=str(event.user_id).encode(), headers=headers)
                    for raw, event in zip(raw_events, events, strict=True)
                ]
                await acknowledged(sends)
        except (LogUnavailableError, TimeoutError) as error:
            cause = str(error) or f"no answer within {self._config.events_timeout_ms} ms"
            raise EventsUnavailableError(
                f"the log did not acknowledge the events ({cause}): send them again, those that did arrive count once"
            ) from error
        self.num_accepted += len(events)
        return [event.event_id for event in events]

    def _split(self, body: bytes) -> list[bytes]:
        try:
            if not body.lstrip().startswith(b"["):
                return [body]
            raw_events = [bytes(raw) for raw in msgspec.json.decode(body, type=list[msgspec.Raw])]
        except UNREADABLE as error:
            raise InvalidRequestError(f"the body is not JSON: {error}", code="malformed_json") from error
        if not raw_events:
            raise InvalidRequestError("the list of events is empty")
        if len(raw_events) > self._config.events_max:
            raise InvalidRequestError(
                f"{len(raw_events)} events; serving.events_max is {self._config.events_max}: send them in parts",
                status=413,
                code="too_many_events",
            )
        return raw_events

    def _decode(self, raw_events: list[bytes]) -> list[Event]:
        now_ms = self._clock.now_ms()
        events: list[Event] = []
        refused: list[RefusedEvent] = []
        for index, raw in enumerate(raw_events):
            decoded = self._decoder.decode(raw, now_ms)
            if isinstance(decoded, Refusal):
                refused.append(
                    RefusedEvent(index=index, reason=decoded.reason, field=decoded.field, error=decoded.error)
                )
            else:
                events.append(decoded)
        if refused:
            raise EventsRefusedError(
                f"{len(refused)} of {len(raw_events)} events are not acceptable; none was sent", refused
            )
        return events
