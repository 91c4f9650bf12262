"""What headrace writes on its own topics reads back, and nothing else is taken for it."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import msgspec
import numpy as np
import pytest
from msgspec.structs import replace as replace_message

from feature_store.ids import stable_id
from feature_store.interactions import Interactions
from stream.errors import MessageFormatError
from stream.messages import (
    Command,
    ForgetUser,
    HistoryUpdate,
    Impression,
    ItemMessage,
    Labels,
    Topics,
    decode_message,
    encode_message,
    id_as_written,
    read_item,
)


def update_of(num_rows: int, *, first_offset: int = 10) -> HistoryUpdate:
    rows = np.arange(num_rows)
    return HistoryUpdate(
        log_id="main",
        partition=2,
        first_offset=first_offset,
        last_offset=first_offset + 2 * num_rows,
        watermark_ms=99,
        offsets=first_offset + 2 * rows,
        append_ms=rows + 500,
        interactions=Interactions(
            user_id=rows * 3,
            item_id=rows * 5,
            event_time_ms=rows + 7,
            action=np.ones(num_rows, np.uint32),
            value=np.full(num_rows, np.nan, np.float32),
            event_key=np.array([2**64 - 1 - row for row in range(num_rows)], np.uint64),
            seq=rows.astype(np.uint32),
            arrival_ms=rows + 600,
        ),
    )


def test_a_history_update_reads_back() -> None:
    update = update_of(5)
    again = HistoryUpdate.decode(update.encode())
    assert again.encode() == update.encode()
    np.testing.assert_array_equal(again.interactions.event_key, update.interactions.event_key)


def test_surfaces_travel_where_some_are_told_and_take_no_room_elsewhere() -> None:
    plain = update_of(5)
    told = replace(plain, interactions=replace(plain.interactions, surface=np.arange(5, dtype=np.uint8)))
    assert HistoryUpdate.decode(told.encode()).interactions.surface.tolist() == [0, 1, 2, 3, 4]
    assert HistoryUpdate.decode(plain.encode()).interactions.surface.tolist() == [0] * 5
    assert b"surface" not in plain.encode()
    assert told.split(2)[1].interactions.surface.tolist() == [2, 3]
    assert told.above(13).interactions.surface.tolist() == [2, 3, 4]


def test_above_drops_what_was_applied() -> None:
    kept = update_of(5).above(13)
    assert kept.offsets.tolist() == [14, 16, 18]
    assert kept.interactions.seq.tolist() == [2, 3, 4]
    assert update_of(5).above(9).offsets.tolist() == [10, 12, 14, 16, 18]
    assert len(update_of(5).above(18).offsets) == 0


@pytest.mark.parametrize(
    "value", [None, b"", b"\x01", b"\x91" * 5_000, b"not msgpack at all", update_of(3).encode()[:-9]]
)
def test_what_is_no_history_update_is_refused(value: bytes | None) -> None:
    with pytest.raises(MessageFormatError):
        HistoryUpdate.decode(value)


def test_low_rate_messages_read_back() -> None:
    item = ItemMessage(item_id="tt1", title="Metropolis", categories=["Drama"])
    assert decode_message(ItemMessage, encode_message(item)) == item
    command = ForgetUser(user_id="anna")
    assert decode_message(Command, encode_message(command)) == command


def test_what_the_head_predicted_reads_back_and_may_be_absent_as_in_earlier_versions() -> None:
    old_impression = (
        b'{"request_id":"r","user_id":5,"items":[1,2],"scores":[0.5,null],"snapshot_version":3,"shown_at_ms":7}'
    )
    impression = decode_message(Impression, old_impression)
    assert impression.predictions is None
    told = replace_message(impression, predictions={"click": [0.25, None], "value": [31.5, None]})
    assert decode_message(Impression, encode_message(told)) == told
    assert told.mismatch() is None
    old_labels = (
        b'{"request_id":"r","user_id":5,"shown_at_ms":7,"snapshot_version":3,"outcome":"not_taken","late":false,'
        b'"items":[1],"places":[0],"scores":[0.5],"actions":[],"event_times_ms":[]}'
    )
    labels = decode_message(Labels, old_labels)
    assert labels.predictions is None
    labelled = replace_message(labels, predictions={"click": [0.25]})
    assert decode_message(Labels, encode_message(labelled)) == labelled


@pytest.mark.parametrize(
    "changes",
    [
        {"log_id": 1},
        {"partition": "0"},
        {"partition": True},
        {"last_offset": 2**63},
        {"first_offset": -2},
        {"watermark_ms": None},
        {"forgotten": ["anna"]},
        {"forgotten": [2**63]},
        {"forgotten": "7"},
        {"offsets": b""},
        {"append_ms": bytes(8)},
        {"columns": {}},
    ],
)
def test_a_history_update_of_other_types_is_refused(changes: dict[str, Any]) -> None:
    raw = msgspec.msgpack.decode(update_of(3).encode())
    assert len(HistoryUpdate.decode(msgspec.msgpack.encode(raw)).offsets) == 3
    with pytest.raises(MessageFormatError, match="not a history update"):
        HistoryUpdate.decode(msgspec.msgpack.encode(raw | changes))


def test_an_unknown_command_is_refused() -> None:
    with pytest.raises(MessageFormatError, match="ForgetUser"):
        decode_message(Command, b'{"command": "self_destruct", "user_id": 1}')


@pytest.mark.parametrize("value", [None, b"", b"\xff", b'{"item_id": "\xff"}', b"[" * 5_000, b'{"x":' * 5_000])
def test_what_is_no_message_is_refused(value: bytes | None) -> None:
    with pytest.raises(MessageFormatError, match="not a ItemMessage"):
        decode_message(ItemMessage, value)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        (None, {"item_id": -1}),
        (None, {"item_id": 2**63}),
        (None, {"item_id": ""}),
        (None, {"item_id": "a\0"}),
        (None, {"item_id": 1, "title": "\0"}),
        (None, {"item_id": 1, "text": "a\0b"}),
        (None, {"item_id": 1, "categories": ["a", "\0"]}),
        (None, None),
        (b"99999999999999999999", None),
        (b"9" * 5_000, None),
        (b"0" * 20 + b"9" * 5_000, None),
    ],
)
def test_an_item_that_not_every_database_keeps_is_refused(key: bytes | None, value: dict[str, Any] | None) -> None:
    with pytest.raises(MessageFormatError):
        read_item(key, None if value is None else json.dumps(value).encode())


def test_digits_of_another_script_are_a_text() -> None:
    assert read_item("²".encode(), None) == (stable_id("²"), None, None)


def test_a_prefix_precedes_every_topic() -> None:
    topics = Topics.with_prefix("acme.")
    assert topics.history_updates == "acme.history-updates"
    assert topics.interactions == "acme.interactions"


def test_a_large_update_is_split_into_messages_that_follow_one_another() -> None:
    update = replace(update_of(7), forgotten=(4,))
    parts = update.split(3)
    assert [(part.first_offset, part.last_offset) for part in parts] == [(10, 14), (15, 20), (21, 24)]
    assert [part.offsets.tolist() for part in parts] == [[10, 12, 14], [16, 18, 20], [22]]
    assert (
        np.concatenate([part.interactions.item_id for part in parts]).tolist() == update.interactions.item_id.tolist()
    )
    assert [part.forgotten for part in parts] == [(4,), (), ()]
    assert update.split(7) == [update]


def test_an_update_without_content_needs_no_message() -> None:
    assert update_of(0).split(10) == []


@pytest.mark.parametrize(
    ("text", "as_text", "meant"),
    [
        ("17", False, 17),
        ("17", True, "17"),
        ("0", False, 0),
        (str(2**63 - 1), False, 2**63 - 1),
        ("anna", False, "anna"),
        ("-3", False, "-3"),
        ("²", False, "²"),
    ],
)
def test_an_id_as_a_person_writes_it(text: str, as_text: bool, meant: int | str) -> None:
    assert id_as_written(text, as_text=as_text) == meant


@pytest.mark.parametrize("text", ["", "x" * 257, str(2**63), "9" * 5_000])
def test_an_id_that_no_producer_can_have_sent_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="user id"):
        id_as_written(text)
