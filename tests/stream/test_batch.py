"""Decoding in columns gives what decoding one by one gives, whatever lies side by side in a batch."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import numpy as np
from hypothesis import example, given
from hypothesis import strategies as st

from feature_store.ids import event_key, stable_id
from stream.batch import DecodedBatch, decode_batch
from stream.events import Event, EventDecoder, EventRules, Refusal
from stream.log import Record, RecordBatch

NOW_MS = 1_700_000_000_000

GOOD: dict[str, Any] = {"event_id": "e", "user_id": 1, "item_id": 2, "action": "view", "event_time": NOW_MS}

changes = st.one_of(
    st.fixed_dictionaries({"user_id": st.one_of(st.integers(0, 2**63 - 1), st.sampled_from(["anna", "bert"]))}),
    st.fixed_dictionaries({"item_id": st.one_of(st.integers(-2, 5), st.sampled_from(["a", "b", ""]), st.none())}),
    st.fixed_dictionaries({"event_time": st.one_of(st.integers(-(2**64), 2**64), st.just(NOW_MS + 10**9))}),
    st.fixed_dictionaries({"event_time": st.sampled_from(["2023-11-14T22:13:20Z", "2023-11-14T22:13:20", "noon"])}),
    st.fixed_dictionaries({"value": st.one_of(st.none(), st.floats(-1e40, 1e40), st.just(1e39), st.just("3"))}),
    st.fixed_dictionaries({"action": st.sampled_from(["view", "rating", "teleport", ""])}),
    st.fixed_dictionaries({"schema_version": st.sampled_from([1, 0, 2, 2**70, "1"])}),
    st.fixed_dictionaries({"surface": st.sampled_from(["home", {"x": [1]}])}),
    st.fixed_dictionaries({"context": st.sampled_from([None, {}, {"page": 2}, {"other": "home"}, [1], {"page": []}])}),
)
events = st.builds(lambda change, number: GOOD | {"event_id": f"e{number}"} | change, changes, st.integers(0, 9))
values = st.one_of(
    st.just(GOOD).map(lambda event: json.dumps(event).encode()),
    events.map(lambda event: json.dumps(event).encode()),
    events.map(lambda event: json.dumps(event, indent=1).encode()),
    events.map(lambda event: b" " + json.dumps(event).encode() + b"\r\n"),
    st.sampled_from(
        [
            None,
            b"",
            b"{}",
            b"[]",
            b"{",
            b"}",
            b"\xff",
            b"[" * 7_000,
            b'{"event_id":"x\n{"}',
            b"x" * 20_000,
            # Two that make one object, and one that makes two.
            json.dumps(GOOD).encode()[:-1],
            b',"value":1}',
            json.dumps(GOOD).encode() * 2,
            json.dumps(GOOD).encode() + b"\n" + json.dumps(GOOD).encode(),
        ]
    ),
)


def batch_of(raw: Sequence[bytes | None]) -> RecordBatch:
    return RecordBatch.of(
        [Record("interactions", 3, 7 + 2 * n, NOW_MS + n, b"k%d" % n, value, ()) for n, value in enumerate(raw)]
    )


@given(st.lists(values, min_size=1, max_size=90))
@example([json.dumps(GOOD).encode()[:-1], b',"value":1}', json.dumps(GOOD).encode() * 2])
@example([json.dumps(GOOD).encode(), b"", json.dumps(GOOD).encode() + b"\n" + json.dumps(GOOD).encode()])
@example([json.dumps(GOOD).encode()] * 80 + [b"?"])
def test_columns_are_what_each_record_gives_alone(raw: list[bytes | None]) -> None:
    source, alone, together = batch_of(raw), EventDecoder(EventRules()), EventDecoder(EventRules())
    decoded = [alone.decode(value, NOW_MS) for value in raw]
    batch = decode_batch(source, together, NOW_MS)
    good = [row for row, each in enumerate(decoded) if isinstance(each, Event)]
    assert batch.offsets.tolist() == source.offsets[good].tolist()
    assert batch.append_ms.tolist() == source.timestamps_ms[good].tolist()
    assert [(record.offset, refusal) for record, refusal in batch.refused] == [
        (int(source.offsets[row]), each) for row, each in enumerate(decoded) if isinstance(each, Refusal)
    ]
    assert rows_of(batch) == [row_of(each, together) for each in decoded if isinstance(each, Event)]
    texts = {each.user_id for each in decoded if isinstance(each, Event)}
    assert set(batch.user_names.values()) == {text for text in texts if isinstance(text, str)}
    assert together.num_with_unknown_fields == alone.num_with_unknown_fields
    assert together.num_of_newer_schema == alone.num_of_newer_schema


def rows_of(batch: DecodedBatch) -> list[tuple[Any, ...]]:
    columns = batch.interactions
    return [
        (user, item, time, action, repr(value), key)
        for user, item, time, action, value, key in zip(
            columns.user_id.tolist(),
            columns.item_id.tolist(),
            columns.event_time_ms.tolist(),
            columns.action.tolist(),
            columns.value.tolist(),
            columns.event_key.tolist(),
            strict=True,
        )
    ]


def row_of(event: Event, decoder: EventDecoder) -> tuple[Any, ...]:
    user, item = (stable_id(each) if isinstance(each, str) else each for each in (event.user_id, event.item_id))
    value = float(np.float32("nan" if event.value is None else event.value))
    return user, item, event.event_time_ms(), decoder.action_bits[event.action], repr(value), event_key(event.event_id)


def test_what_the_declared_key_of_the_context_says_becomes_a_number() -> None:
    rules = EventRules(surface_key="page", surfaces=("home", "3", "search", "007"))
    told = ["search", "home", 3, "3", 3.0, 7, "007", "elsewhere", True, None, 2.5, "", {}, "no context"]
    contexts = [{} if each == {} else {"page": each, "device": "home"} for each in told[:-1]]
    raw = [json.dumps(GOOD | {"event_id": str(n), "context": each}).encode() for n, each in enumerate(contexts)]
    raw.append(json.dumps(GOOD).encode())
    decoder = EventDecoder(rules)
    batch = decode_batch(batch_of(raw), decoder, NOW_MS)
    assert batch.refused == []
    assert batch.interactions.surface.tolist() == [3, 1, 2, 2, 2, 0, 4, 0, 0, 0, 0, 0, 0, 0]
    assert decoder.num_of_other_surfaces == 5
    off = EventDecoder(EventRules())
    assert not decode_batch(batch_of(raw), off, NOW_MS).interactions.surface.any()
    assert off.num_of_other_surfaces == 0


def test_a_hash_that_another_text_has_is_refused_and_its_name_not_kept() -> None:
    raw = [json.dumps(GOOD | {"user_id": user}).encode() for user in ("anna", "bert", 5)]
    batch = decode_batch(batch_of(raw), EventDecoder(EventRules()), NOW_MS, colliding={("user", "anna")})
    assert [refusal.reason for _, refusal in batch.refused] == ["id_collision"]
    assert batch.interactions.user_id.tolist() == [stable_id("bert"), 5]
    assert batch.user_names == {stable_id("bert"): "bert"}


def test_an_id_that_not_every_database_keeps_is_refused_as_one_record_is_alone() -> None:
    raw = [json.dumps(GOOD | ids).encode() for ids in ({"user_id": "a\0"}, {"item_id": "\0"}, {"user_id": "anna"})]
    batch = decode_batch(batch_of(raw), EventDecoder(EventRules()), NOW_MS)
    alone = [EventDecoder(EventRules()).decode(value, NOW_MS) for value in raw[:2]]
    assert [refusal for _, refusal in batch.refused] == alone
    assert (list(batch.user_names.values()), batch.item_names) == (["anna"], {})


def test_what_lies_below_a_position_is_dropped() -> None:
    raw = [json.dumps(GOOD | {"event_id": str(n)}).encode() if n != 1 else b"?" for n in range(5)]
    batch = decode_batch(batch_of(raw), EventDecoder(EventRules()), NOW_MS)
    assert batch.from_offset(7) == (batch, 0)
    kept, num_dropped = batch.from_offset(11)
    assert (num_dropped, kept.first_offset, kept.offsets.tolist(), kept.refused) == (2, 11, [11, 13, 15], [])
