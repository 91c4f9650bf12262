"""The event schema: what producers may send, and exactly why a record is refused.

Validation is pure. A record either becomes an `Event` or a `Refusal` with a reason code; nothing is dropped
silently and nothing raises for bad input. Unknown fields are ignored and counted, so that adding a field
never stops the stream.

A schema version only ever adds fields with defaults. So an event of any version from 1 on is accepted if the fields
known here are valid: producers may be newer than this program, and nothing has to be restarted for them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Annotated, Any, Final

import msgspec
import numpy as np
from numpy.typing import NDArray

INT64_MAX: Final = 2**63 - 1
FLOAT32_MAX: Final = (2 - 2**-23) * 2.0**127
MAX_ACTIONS: Final = 32
"""Actions are bits of a 32-bit mask."""
MAX_SURFACES: Final = 255
"""Surfaces are numbers of 8 bits from 1 on."""
NEWEST_SCHEMA_VERSION: Final = 1
"""The version whose fields `Event` lists; events of later ones are accepted and counted."""

IntId = Annotated[int, msgspec.Meta(ge=0, le=INT64_MAX)]
TextId = Annotated[str, msgspec.Meta(min_length=1, max_length=256)]
EventId = Annotated[str, msgspec.Meta(min_length=1, max_length=128)]
EpochMs = Annotated[int, msgspec.Meta(ge=-(2**63), le=INT64_MAX)]

UNREADABLE: Final = (msgspec.DecodeError, UnicodeDecodeError, RecursionError)
"""What msgspec raises for bytes that it cannot read: no JSON, no UTF-8, or nested deeper than it goes."""


# gc=False: an event holds texts and numbers, so it can be part of no cycle; the collector need not look at millions.
class Event(msgspec.Struct, kw_only=True, omit_defaults=True, gc=False):
    """One user event as producers write it (JSON object): the fields of `NEWEST_SCHEMA_VERSION`.

    Ids are non-negative 64-bit integers or text of at most 256 characters. `event_time` is epoch milliseconds
    or RFC 3339 with an offset. `value` is a rating, a watch time in seconds or the like.
    """

    event_id: EventId
    user_id: IntId | TextId
    item_id: IntId | TextId
    action: str
    event_time: EpochMs | datetime
    value: float | None = None
    request_id: Annotated[str, msgspec.Meta(max_length=128)] | None = None
    context: dict[str, str | int | float | bool | None] | None = None
    schema_version: int = 1

    def event_time_ms(self) -> int:
        """Event time in epoch milliseconds."""
        if isinstance(self.event_time, int):
            return self.event_time
        return (self.event_time - _EPOCH) // timedelta(milliseconds=1)


_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)


class _StrictEvent(Event, kw_only=True, forbid_unknown_fields=True, gc=False):
    """The same schema, used to notice unknown fields."""


REASONS: Final = {
    "empty": "the record has no value",
    "oversize": "the record is larger than events.max_event_bytes",
    "malformed_json": "the value is not a JSON object",
    "missing_field": "a required field is absent",
    "wrong_type": "a field has another type or is out of its range",
    "unsupported_schema_version": "schema_version is below 1",
    "unknown_action": "the action is not declared in events.actions",
    "negative_time": "event_time lies before 1970",
    "future_time": "event_time lies further ahead than events.max_future_skew_ms",
    "naive_time": "event_time is text without a UTC offset",
    "non_finite_value": "value is not a finite 32-bit floating-point number",
    "id_collision": "two different texts hash to the same 63-bit id",
}
"""Reason code → what it means. The codes are part of the dead-letter contract: they never change meaning."""


@dataclass(frozen=True, slots=True)
class Refusal:
    """Why a record did not become an event."""

    reason: str
    field: str | None
    error: str


@dataclass(frozen=True, kw_only=True, slots=True)
class EventRules:
    """What the stream accepts beyond the schema itself."""

    actions: tuple[str, ...] = ("rating", "view", "click", "like", "purchase")
    """Declared actions, at most 32, since an action is stored as a bit: append only, never reorder."""
    surface_key: str = ""
    """Key of an event's `context` that says where it happened, such as "page" or "device"; empty: histories do not keep
    it. What was ingested before keeps none."""
    surfaces: tuple[str, ...] = ()
    """Declared values of that key, texts or whole numbers as text, at most 255, since one is stored as a byte: append
    only, never reorder. Others are kept as "not told", and counted."""
    max_event_bytes: int = 16_384
    """Largest accepted record in bytes; bounds what one poison record can cost."""
    max_future_skew_ms: int = 300_000
    """How far ahead of our clock a producer's event time may lie (ms); beyond it, the producer's clock is wrong."""

    def __post_init__(self) -> None:
        if not 1 <= len(self.actions) <= MAX_ACTIONS or len(set(self.actions)) != len(self.actions):
            raise ValueError(f"events.actions = {self.actions!r}: name 1 to {MAX_ACTIONS} different actions")
        if len(self.surfaces) > MAX_SURFACES or len(set(self.surfaces)) != len(self.surfaces) or "" in self.surfaces:
            raise ValueError(f"events.surfaces = {self.surfaces!r}: name at most {MAX_SURFACES} different texts")
        if bool(self.surface_key) != bool(self.surfaces):
            raise ValueError(
                f"events.surface_key = {self.surface_key!r} and events.surfaces = {self.surfaces!r}: set both, so that"
                " what is under the key has a number, or neither"
            )
        if self.max_event_bytes < 256:
            raise ValueError(f"events.max_event_bytes = {self.max_event_bytes}: must be at least 256")
        if self.max_future_skew_ms < 0:
            raise ValueError(f"events.max_future_skew_ms = {self.max_future_skew_ms}: must not be negative")

    def action_bit(self, action: str) -> int:
        """Bitmask of one action; raises KeyError for an undeclared one."""
        try:
            return 1 << self.actions.index(action)
        except ValueError:
            raise KeyError(action) from None

    def surface_numbers(self) -> dict[str | int | float, int]:
        """Declared surface → its number, from 1 on; a whole number is found as text and as number."""
        numbers: dict[str | int | float, int] = {}
        for number, name in enumerate(self.surfaces, 1):
            numbers[name] = number
            if name.isascii() and name.isdigit() and str(int(name)) == name:
                numbers[int(name)] = number
        return numbers


def encode_event(event: Event) -> bytes:
    """JSON bytes of an event, as producers send it."""
    return msgspec.json.encode(event)


class EventDecoder:
    """Turns record values into events, counting those with unknown fields and those of a newer schema.

    The strict decoder is the fast path; a record it refuses is decoded again leniently (unknown fields are
    fine), and only a record that fails twice is examined field by field to name the reason.
    """

    def __init__(self, rules: EventRules) -> None:
        self.rules = rules
        self.num_with_unknown_fields = 0
        self.num_of_newer_schema = 0
        self.num_of_other_surfaces = 0
        """Events whose surface is not declared."""
        self.surface_numbers = rules.surface_numbers()
        self.action_bits = {action: 1 << bit for bit, action in enumerate(rules.actions)}
        self._strict = msgspec.json.Decoder(_StrictEvent)
        self._lenient = msgspec.json.Decoder(Event)

    def decode(self, value: bytes | None, now_ms: int) -> Event | Refusal:
        """Parse and judge one record value; `now_ms` is processing time, for the future check."""
        parsed = self.parse(value)
        return parsed if isinstance(parsed, Refusal) else self.judge(parsed, now_ms) or parsed

    def parse(self, value: bytes | None) -> Event | Refusal:
        """Parse one record value; what it says is not judged yet."""
        if value is None or len(value) == 0:
            return Refusal("empty", None, "the record has no value")
        if len(value) > self.rules.max_event_bytes:
            limit = self.rules.max_event_bytes
            return Refusal("oversize", None, f"{len(value)} bytes; the limit events.max_event_bytes is {limit}")
        try:
            return self._strict.decode(value)
        except UNREADABLE:
            try:
                event = self._lenient.decode(value)
            except UNREADABLE as error:
                return _diagnose(value, error)
        self.num_with_unknown_fields += 1
        return event

    def parse_many(self, values: Sequence[bytes | None]) -> list[Event | Refusal]:
        """`parse` of every value, without a step in Python for those that are right."""
        limit = self.rules.max_event_bytes
        short = [value if value is not None and len(value) <= limit else b"" for value in values]
        parsed: list[Event | Refusal] = []
        unread = iter(short)
        while len(parsed) < len(values):
            try:
                parsed.extend(map(self._strict.decode, unread))
            except UNREADABLE:
                # What came before the one that failed has been added.
                parsed.append(self.parse(values[len(parsed)]))
        return parsed

    def surfaces_of(self, events: Sequence[Event]) -> NDArray[np.uint8]:
        """u8[N]: number of the surface that each event names; 0: none that is declared, which is counted."""
        key, number_of = self.rules.surface_key, self.surface_numbers
        if not key:
            return np.zeros(len(events), np.uint8)
        named = [None if event.context is None else event.context.get(key) for event in events]
        # True equals 1, but is no number here.
        found = [0 if name is None or isinstance(name, bool) else number_of.get(name, 0) for name in named]
        numbers = np.array(found, np.uint8)
        self.num_of_other_surfaces += len(named) - named.count(None) - int(np.count_nonzero(numbers))
        return numbers

    def judge(self, event: Event, now_ms: int) -> Refusal | None:
        """Why an event that parsed is not accepted, or None; counts those accepted of a newer schema."""
        if refusal := self._refusal(event, now_ms):
            return refusal
        self.num_of_newer_schema += event.schema_version > NEWEST_SCHEMA_VERSION
        return None

    def _refusal(self, event: Event, now_ms: int) -> Refusal | None:
        if event.schema_version < 1:
            error = f"schema_version {event.schema_version}; versions count from 1"
            return Refusal("unsupported_schema_version", "schema_version", error)
        if refusal := id_refusal(event):
            return refusal
        if event.action not in self.action_bits:
            declared = ", ".join(self.rules.actions)
            return Refusal("unknown_action", "action", f"action {event.action!r} is not one of: {declared}")
        if isinstance(event.event_time, datetime) and event.event_time.tzinfo is None:
            return Refusal("naive_time", "event_time", "event_time as text needs a UTC offset (RFC 3339)")
        time_ms = event.event_time_ms()
        if time_ms < 0:
            return Refusal("negative_time", "event_time", f"event_time {time_ms} ms lies before 1970")
        ahead_ms = time_ms - now_ms
        if ahead_ms > self.rules.max_future_skew_ms:
            return Refusal(
                "future_time",
                "event_time",
                f"event_time lies {ahead_ms} ms ahead; events.max_future_skew_ms is {self.rules.max_future_skew_ms}",
            )
        if event.value is not None and not abs(event.value) <= FLOAT32_MAX:
            return Refusal("non_finite_value", "value", f"value is {event.value}: not a finite 32-bit number")
        return None


def id_refusal(event: Event) -> Refusal | None:
    """Why an id that is a text cannot be kept, or None."""
    for name, raw_id in (("user_id", event.user_id), ("item_id", event.item_id)):
        if isinstance(raw_id, str) and "\0" in raw_id:
            return Refusal("wrong_type", name, f"field {name!r}: holds a NUL character, which not every database keeps")
    return None


def _diagnose(value: bytes, found: Exception) -> Refusal:
    """Name the reason for a record that does not decode, as `found` says: which field, and how."""
    try:
        raw: Any = msgspec.json.decode(value)
    except UNREADABLE as error:
        return Refusal("malformed_json", None, str(error))
    if not isinstance(raw, dict):
        return Refusal("malformed_json", None, f"expected a JSON object, got {type(raw).__name__}")
    for field in msgspec.structs.fields(Event):
        if field.name not in raw:
            if field.required:
                return Refusal("missing_field", field.name, f"required field {field.name!r} is absent")
            continue
        try:
            msgspec.convert(raw[field.name], field.type)
        except msgspec.ValidationError as error:
            return Refusal("wrong_type", field.name, f"field {field.name!r}: {error}")
    # JSON allows a key twice: the last one converts, and one before it did not decode.
    return Refusal("wrong_type", None, f"a field that is there more than once: {found}")
