"""Every bad record gets a reason code; every good one becomes an event."""

from __future__ import annotations

import json
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from stream.events import NEWEST_SCHEMA_VERSION, REASONS, Event, EventDecoder, EventRules, Refusal, encode_event

NOW_MS = 1_700_000_000_000


def good(**changes: Any) -> dict[str, Any]:
    fields: dict[str, Any] = {
        "event_id": "e1",
        "user_id": 7,
        "item_id": 9,
        "action": "rating",
        "event_time": NOW_MS - 5,
    }
    return fields | changes


def decode(value: Any, **rules: Any) -> Event | Refusal:
    if isinstance(value, dict):
        value = {name: given for name, given in value.items() if given is not ...}
    raw = value if isinstance(value, bytes) or value is None else json.dumps(value).encode()
    return EventDecoder(EventRules(**rules)).decode(raw, NOW_MS)


def test_a_minimal_event_is_accepted() -> None:
    event = decode(good())
    assert isinstance(event, Event)
    assert (event.user_id, event.item_id, event.event_time_ms()) == (7, 9, NOW_MS - 5)


def test_an_encoded_event_decodes_to_itself() -> None:
    event = Event(event_id="e", user_id="anna", item_id=3, action="view", event_time=5, value=1.5, context={"a": 1})
    decoded = decode(encode_event(event))
    assert isinstance(decoded, Event)
    assert msgspec.structs.asdict(decoded) == msgspec.structs.asdict(event)


@pytest.mark.parametrize(
    ("text", "expected_ms"),
    [
        ("2023-11-14T22:13:19.123Z", 1_699_999_999_123),
        ("2023-11-14T23:13:19.123+01:00", 1_699_999_999_123),
        ("2023-11-14T22:13:19Z", 1_699_999_999_000),
    ],
)
def test_rfc_3339_times_keep_their_milliseconds(text: str, expected_ms: int) -> None:
    event = decode(good(event_time=text))
    assert isinstance(event, Event)
    assert event.event_time_ms() == expected_ms


@pytest.mark.parametrize(
    ("value", "reason", "field"),
    [
        (None, "empty", None),
        (b"", "empty", None),
        (b"{not json", "malformed_json", None),
        (b"\xff\xfe", "malformed_json", None),
        ([1, 2], "malformed_json", None),
        (good(user_id=...), "missing_field", "user_id"),
        (good(event_time=...), "missing_field", "event_time"),
        (good(event_id=5), "wrong_type", "event_id"),
        (good(event_id=""), "wrong_type", "event_id"),
        (good(event_id="x" * 129), "wrong_type", "event_id"),
        (good(user_id=-1), "wrong_type", "user_id"),
        (good(user_id=2**63), "wrong_type", "user_id"),
        (good(user_id=1.5), "wrong_type", "user_id"),
        (good(user_id=True), "wrong_type", "user_id"),
        (good(item_id="x" * 257), "wrong_type", "item_id"),
        (good(value="high"), "wrong_type", "value"),
        (good(context={"deep": {"er": 1}}), "wrong_type", "context"),
        (good(event_time="yesterday"), "wrong_type", "event_time"),
        (good(event_time="2023-11-14T22:13:19"), "naive_time", "event_time"),
        (good(event_time=-1), "negative_time", "event_time"),
        (good(event_time="1969-12-31T23:59:59Z"), "negative_time", "event_time"),
        (good(event_time=NOW_MS + 300_001), "future_time", "event_time"),
        (good(action="teleport"), "unknown_action", "action"),
        (good(schema_version=0), "unsupported_schema_version", "schema_version"),
        (good(schema_version=-3), "unsupported_schema_version", "schema_version"),
        (good(context={"filler": "x" * 20_000}), "oversize", None),
    ],
)
def test_a_bad_record_is_refused_with_its_reason(value: Any, reason: str, field: str | None) -> None:
    refusal = decode(value)
    assert isinstance(refusal, Refusal)
    assert (refusal.reason, refusal.field) == (reason, field)
    assert refusal.reason in REASONS
    assert refusal.error


NO_JSON_VALUE_OF: dict[str, tuple[Any, ...]] = {
    "event_id": (5, 1.5, True, None, [], {}),
    "user_id": (1.5, True, None, [], {}),
    "item_id": (1.5, True, None, [], {}),
    "action": (5, 1.5, True, None, [], {}),
    "event_time": (1.5, True, None, [], {}),
    "value": ("8", True, [], {}),
    "request_id": (5, 1.5, True, [], {}),
    "context": ("a=1", 5, 1.5, True, [], {"a": []}),
    "schema_version": ("2", 1.5, True, None, [], {}),
}
"""Field → values of the types it must not have."""


def test_a_wrong_type_is_tried_for_every_field() -> None:
    assert set(NO_JSON_VALUE_OF) == {field.name for field in msgspec.structs.fields(Event)}


@pytest.mark.parametrize("version", [..., 1, 2])
@pytest.mark.parametrize("field", NO_JSON_VALUE_OF)
def test_a_retyped_field_is_refused_under_its_name_whatever_the_version(field: str, version: Any) -> None:
    for value in NO_JSON_VALUE_OF[field]:
        refusal = decode(good(schema_version=version) | {field: value})
        assert isinstance(refusal, Refusal), value
        assert (refusal.reason, refusal.field) == ("wrong_type", field), value


@pytest.mark.parametrize("version", [..., 1, 2])
@pytest.mark.parametrize("field", [field.name for field in msgspec.structs.fields(Event) if field.required])
def test_a_missing_field_is_refused_under_its_name_whatever_the_version(field: str, version: Any) -> None:
    refusal = decode(good(schema_version=version) | {"added_later": 1} | {field: ...})
    assert isinstance(refusal, Refusal)
    assert (refusal.reason, refusal.field) == ("missing_field", field)


def test_events_of_a_newer_schema_are_accepted_and_counted() -> None:
    decoder = EventDecoder(EventRules())
    for version in (1, NEWEST_SCHEMA_VERSION, NEWEST_SCHEMA_VERSION + 1, 10**30):
        raw = json.dumps(good(schema_version=version, added_later={"deep": [1]})).encode()
        assert isinstance(decoder.decode(raw, NOW_MS), Event)
    refused = json.dumps(good(schema_version=2, action="teleport")).encode()
    assert isinstance(decoder.decode(refused, NOW_MS), Refusal)
    assert decoder.num_of_newer_schema == 2


@pytest.mark.parametrize(
    ("rules", "says"),
    [
        ({"surface_key": "page"}, "set both"),
        ({"surfaces": ("home",)}, "set both"),
        ({"surface_key": "page", "surfaces": ("home", "home")}, "different texts"),
        ({"surface_key": "page", "surfaces": ("",)}, "different texts"),
        ({"surface_key": "page", "surfaces": tuple(map(str, range(256)))}, "at most 255"),
    ],
)
def test_surfaces_that_cannot_be_meant_are_refused(rules: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=rf"events\.surface.*{says}"):
        EventRules(**rules)


def test_an_event_at_the_edge_of_the_future_is_accepted() -> None:
    assert isinstance(decode(good(event_time=NOW_MS + 300_000)), Event)


def test_unknown_fields_are_ignored_and_counted() -> None:
    decoder = EventDecoder(EventRules())
    assert isinstance(decoder.decode(json.dumps(good(experiment="b")).encode(), NOW_MS), Event)
    assert isinstance(decoder.decode(json.dumps(good()).encode(), NOW_MS), Event)
    assert decoder.num_with_unknown_fields == 1


@given(st.binary(max_size=300))
def test_no_bytes_make_the_decoder_raise(raw: bytes) -> None:
    assert isinstance(decode(raw), Event | Refusal)


@given(
    st.dictionaries(
        st.sampled_from([*good(), "value", "context", "request_id", "schema_version", "other"]),
        st.recursive(
            st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
            lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=4), inner, max_size=2),
            max_leaves=4,
        ),
    )
)
def test_no_json_object_makes_the_decoder_raise(changes: dict[str, Any]) -> None:
    assert isinstance(decode(json.dumps(good() | changes).encode()), Event | Refusal)


def test_what_is_nested_deeper_than_the_interpreter_goes_is_refused_and_raises_nothing() -> None:
    nested = b"[" * 7_000 + b"]" * 7_000
    for raw in (nested, b'{"extra":' + nested + b"," + json.dumps(good()).encode()[1:]):
        refused = decode(raw)
        assert isinstance(refused, Refusal)
        assert refused.reason == "malformed_json"


@pytest.mark.parametrize(
    "twice",
    [
        b'"event_id": 5',
        b'"event_time": "soon"',
        b'"context": {"a": [1]}, "context": {}',
        b'"context": {"a": [1], "a": 1}',
    ],
)
def test_a_wrong_field_that_is_there_again_and_right_is_refused_and_raises_nothing(twice: bytes) -> None:
    refused = decode(b"{" + twice + b"," + json.dumps(good()).encode()[1:])
    assert isinstance(refused, Refusal)
    assert (refused.reason, refused.field) == ("wrong_type", None)
    assert "more than once" in refused.error


@pytest.mark.parametrize("field", ["user_id", "item_id"])
def test_a_text_that_not_every_database_keeps_is_no_id(field: str) -> None:
    refused = decode(good(**{field: "a\0b"}))
    assert isinstance(refused, Refusal)
    assert (refused.reason, refused.field) == ("wrong_type", field)
    assert "NUL" in refused.error


def test_rules_refuse_more_actions_than_bits() -> None:
    with pytest.raises(ValueError, match=r"events.actions"):
        EventRules(actions=tuple(f"a{n}" for n in range(33)))
