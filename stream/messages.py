"""What travels on headrace's own topics, and how it is encoded.

`history-updates` carries columnar micro-batches: one message holds the accepted interactions of one poll of one
source partition, each column as little-endian bytes inside a msgpack map. Readers apply a row only if its source
offset lies above the last one they applied for that partition, which makes re-sent messages harmless.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Annotated, Any, Final, Literal, TypeVar

import msgspec
import numpy as np
from numpy.typing import NDArray

from feature_store.ids import numeric_id, stable_id
from feature_store.interactions import Interactions
from feature_store.records import Item
from stream.errors import MessageFormatError
from stream.events import INT64_MAX, MAX_SURFACES, UNREADABLE, IntId, TextId


@dataclass(frozen=True, kw_only=True, slots=True)
class Topics:
    """Topic names; a prefix lets several installations share a cluster."""

    interactions: str = "interactions"
    history_updates: str = "history-updates"
    items: str = "items"
    impressions: str = "impressions"
    labels: str = "labels"
    snapshots: str = "snapshots"
    commands: str = "commands"
    dead_letters: str = "dead-letters"

    @classmethod
    def with_prefix(cls, prefix: str) -> Topics:
        """The same topics, each name preceded by `prefix`."""
        plain = cls()
        return cls(**{name: prefix + getattr(plain, name) for name in cls.__dataclass_fields__})


COMPACTED_TOPICS: Final = ("items", "snapshots")
"""Fields of `Topics` whose last value per key is kept for ever."""

_FORMAT: Final = 1
_COLUMNS: Final = {
    "user_id": "<i8",
    "item_id": "<i8",
    "event_time_ms": "<i8",
    "action": "<u4",
    "value": "<f4",
    "event_key": "<u8",
    "seq": "<u4",
    "arrival_ms": "<i8",
}


_SURFACE: Final = "surface"
"""A column, u8, that a message has only where some interaction of it tells."""


@dataclass(frozen=True, kw_only=True, slots=True)
class HistoryUpdate:
    """Interactions that ingest accepted from one source partition, in source order.

    `first_offset` and `last_offset` span everything the batch consumed, refused and duplicate records included.
    """

    log_id: str
    partition: int
    first_offset: int
    last_offset: int
    watermark_ms: int
    """Highest event time seen on this partition, which never runs back."""
    offsets: NDArray[np.int64]
    """[N] source offset of each interaction, ascending."""
    append_ms: NDArray[np.int64]
    """[N] when the broker appended the source record, epoch ms."""
    interactions: Interactions
    forgotten: tuple[int, ...] = ()
    """Users removed from the feature store: drop what you hold of them, and what this partition has told before."""

    @classmethod
    def forgetting(cls, log_id: str, partition: int, user_ids: tuple[int, ...]) -> HistoryUpdate:
        """Tells the readers of a partition that everything about these users, up to here, is gone."""
        return cls(
            log_id=log_id,
            partition=partition,
            first_offset=-1,
            last_offset=-1,
            watermark_ms=0,
            offsets=np.empty(0, np.int64),
            append_ms=np.empty(0, np.int64),
            interactions=Interactions.empty(),
            forgotten=user_ids,
        )

    def encode(self) -> bytes:
        """Msgpack bytes."""
        columns = {name: _bytes(getattr(self.interactions, name), kind) for name, kind in _COLUMNS.items()}
        if self.interactions.surface.any():
            columns[_SURFACE] = self.interactions.surface.tobytes()
        return msgspec.msgpack.encode(
            {
                "format": _FORMAT,
                "log_id": self.log_id,
                "partition": self.partition,
                "first_offset": self.first_offset,
                "last_offset": self.last_offset,
                "watermark_ms": self.watermark_ms,
                "offsets": _bytes(self.offsets, "<i8"),
                "append_ms": _bytes(self.append_ms, "<i8"),
                "columns": columns,
                "forgotten": self.forgotten,
            }
        )

    @classmethod
    def decode(cls, value: bytes | None) -> HistoryUpdate:
        """Read `encode`'s bytes; raises MessageFormatError for anything else."""
        try:
            raw: dict[str, Any] = msgspec.msgpack.decode(value or b"")
            if raw["format"] != _FORMAT:
                raise MessageFormatError(f"history update of format {raw['format']}; this headrace reads {_FORMAT}")
            columns = {name: np.frombuffer(raw["columns"][name], kind) for name, kind in _COLUMNS.items()}
            if _SURFACE in raw["columns"]:
                columns[_SURFACE] = np.frombuffer(raw["columns"][_SURFACE], "<u1")
            update = cls(
                log_id=raw["log_id"],
                partition=raw["partition"],
                first_offset=raw["first_offset"],
                last_offset=raw["last_offset"],
                watermark_ms=raw["watermark_ms"],
                offsets=np.frombuffer(raw["offsets"], "<i8"),
                append_ms=np.frombuffer(raw["append_ms"], "<i8"),
                interactions=Interactions(**columns),
                forgotten=tuple(raw["forgotten"]),
            )
            update._refuse_other_types()
        except (*UNREADABLE, KeyError, TypeError, ValueError) as error:
            raise MessageFormatError(f"not a history update: {error}") from error
        return update

    def _refuse_other_types(self) -> None:
        """Raise ValueError for what msgpack can say and no writer of ours does: nobody looks at it again."""
        numbers = (self.partition, self.first_offset, self.last_offset, self.watermark_ms, *self.forgotten)
        if type(self.log_id) is not str or not all(type(one) is int and -1 <= one <= INT64_MAX for one in numbers):
            raise ValueError("a field has another type, or a number is out of its range")
        if not len(self.offsets) == len(self.append_ms) == len(self.interactions):
            raise ValueError("columns are not of one length")

    def split(self, max_rows: int) -> list[HistoryUpdate]:
        """The same interactions as messages of at most `max_rows`; none if there is nothing to tell."""
        if len(self.offsets) <= max_rows:
            return [self] if len(self.offsets) or self.forgotten else []
        parts = []
        for start in range(0, len(self.offsets), max_rows):
            rows, is_last = slice(start, start + max_rows), start + max_rows >= len(self.offsets)
            parts.append(
                replace(
                    self,
                    first_offset=self.first_offset if start == 0 else int(self.offsets[start - 1]) + 1,
                    last_offset=self.last_offset if is_last else int(self.offsets[start + max_rows - 1]),
                    offsets=self.offsets[rows],
                    append_ms=self.append_ms[rows],
                    interactions=self.interactions.take(rows),
                    forgotten=self.forgotten if start == 0 else (),
                )
            )
        return parts

    def above(self, offset: int) -> HistoryUpdate:
        """The rows whose source offset is greater than `offset`."""
        start = int(np.searchsorted(self.offsets, offset, side="right"))
        if start == 0:
            return self
        return HistoryUpdate(
            log_id=self.log_id,
            partition=self.partition,
            first_offset=max(self.first_offset, offset + 1),
            last_offset=self.last_offset,
            watermark_ms=self.watermark_ms,
            offsets=self.offsets[start:],
            append_ms=self.append_ms[start:],
            interactions=self.interactions.take(slice(start, None)),
            forgotten=self.forgotten,
        )


def _bytes(column: NDArray[Any], kind: str) -> bytes:
    return np.ascontiguousarray(column, dtype=kind).tobytes()


class SnapshotPointer(msgspec.Struct, frozen=True, kw_only=True):
    """Announces a published snapshot on the `snapshots` topic; key: model name."""

    model: str
    version: int
    kind: str
    parent: int | None
    created_at_ms: int


class Impression(msgspec.Struct, frozen=True, kw_only=True):
    """What one answer showed, on the `impressions` topic; key: user id."""

    request_id: Annotated[str, msgspec.Meta(min_length=1, max_length=128)]
    user_id: IntId | TextId
    items: list[IntId | TextId]
    """Best first, as producers write them."""
    scores: list[float | None]
    snapshot_version: int | None
    shown_at_ms: Annotated[int, msgspec.Meta(ge=0, le=INT64_MAX)]
    """Time of the query: the clock, or the event time that a replayed stream had come to."""
    predictions: dict[str, list[float | None]] | None = None
    """Where the ranking head gave the scores: task → what it said of each item, as probability, of the task `value` in
    its own unit; null for an item it does not know. None: another order, or an impression of an earlier version."""
    surface: Annotated[int, msgspec.Meta(ge=0, le=MAX_SURFACES)] = 0
    """Number of the declared surface that the request named; 0: none."""

    def mismatch(self) -> str | None:
        """What is wrong where the lists are not all of one length, as a sentence's end; None: nothing."""
        if len(self.scores) != len(self.items):
            return f"of {len(self.items)} items with {len(self.scores)} scores"
        return predictions_mismatch(self.predictions, len(self.items))


def predictions_mismatch(predictions: dict[str, list[float | None]] | None, num_items: int) -> str | None:
    """What is wrong where a task has not one prediction for each item, as a sentence's end; None: nothing."""
    for task, of_items in (predictions or {}).items():
        if len(of_items) != num_items:
            return f"of {num_items} items with {len(of_items)} predictions of {task[:64]!r}"
    return None


class Labels(msgspec.Struct, frozen=True, kw_only=True):
    """What became of some items of one impression, on the `labels` topic; key: user id.

    `(request_id, item, outcome)` says which label it is: a crash may send one twice, and readers drop the second. An
    item that was labelled as not taken can later be labelled as taken, with `late` set; never the other way round.
    """

    request_id: str
    user_id: IntId | TextId
    shown_at_ms: int
    snapshot_version: int | None
    outcome: Literal["taken", "not_taken"]
    late: bool
    """It corrects labels that said `not_taken`."""
    items: list[IntId | TextId]
    """I items, as in the impression."""
    places: list[int]
    """I places in the list that was shown, from 0."""
    scores: list[float | None]
    """I scores, as in the impression."""
    actions: list[int]
    """Taken: I bitmasks of the user's actions on the item that were known when the label was made. Else empty."""
    event_times_ms: list[int]
    """Taken: I event times, of the first of these actions. Else empty."""
    values: list[float | None] = []
    """Taken: I values, of the last of these actions that has one. Else empty, as in labels of earlier versions."""
    from_ms: int | None = None
    """When the window began: interactions that arrived before it are what the answer could know. `shown_at_ms`, or in
    a replay, whose event times say nothing about arrival, the impression's append time. None: of an earlier version."""
    predictions: dict[str, list[float | None]] | None = None
    """Task → I predictions, as in the impression."""
    surface: Annotated[int, msgspec.Meta(ge=0, le=MAX_SURFACES)] = 0
    """As in the impression."""


class ItemMessage(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """Metadata of one item on the `items` topic; key: item id; no value retires the item."""

    item_id: IntId | TextId
    title: str = ""
    text: str = ""
    categories: list[str] = []
    embedding: list[float] | None = None
    available: bool = True


def read_item(key: bytes | None, value: bytes | None) -> tuple[int, str | None, Item | None]:
    """Item id, its text if the id is one, and the item (None: retired). Raises MessageFormatError."""
    if not value:
        if not key:
            raise MessageFormatError("an item record without value needs the item id as key")
        text = key.decode("utf-8", "replace")
        if (number := numeric_id(text)) is not None:
            return number, None, None
        if text.isascii() and text.isdigit():
            raise MessageFormatError(f"item id {text[:20]} as key: the largest number is {INT64_MAX}")
        return stable_id(text), None, None
    message = decode_message(ItemMessage, value)
    if any("\0" in text for text in (str(message.item_id), message.title, message.text, *message.categories)):
        raise MessageFormatError("a text of the item holds a NUL character, which not every database keeps")
    raw_id = message.item_id
    item_id = stable_id(raw_id) if isinstance(raw_id, str) else raw_id
    item = Item(
        item_id=item_id,
        title=message.title,
        text=message.text,
        categories=tuple(message.categories),
        embedding=None if message.embedding is None else np.array(message.embedding, "<f4").tobytes(),
        available=message.available,
    )
    return item_id, (raw_id if isinstance(raw_id, str) else None), item


class ForgetUser(msgspec.Struct, frozen=True, kw_only=True, tag="forget_user", tag_field="command"):
    """Remove everything headrace holds about one user."""

    user_id: IntId | TextId


Command = ForgetUser
"""Every command on the `commands` topic (a tagged union: later commands join it)."""


def id_as_written(text: str, *, as_text: bool = False) -> int | str:
    """The id that a person or a URL means: digits are the number, everything else (or `as_text`) the text.

    Raises ValueError for what no producer can have sent.
    """
    if not as_text and text.isascii() and text.isdigit():
        if (number := numeric_id(text)) is None:
            raise ValueError(f"user id {text[:20]}: the largest number is {INT64_MAX}")
        return number
    if not 1 <= len(text) <= 256:
        raise ValueError(f"a user id that is a text has 1 to 256 characters, not {len(text)}")
    return text


def encode_message(message: SnapshotPointer | Impression | Labels | ItemMessage | Command) -> bytes:
    """JSON bytes of a low-rate message."""
    return msgspec.json.encode(message)


_Message = TypeVar("_Message", bound=msgspec.Struct)


def decode_message(kind: type[_Message], value: bytes | None) -> _Message:
    """Read a low-rate message; raises MessageFormatError naming what is wrong."""
    try:
        return msgspec.json.decode(value or b"", type=kind)
    except UNREADABLE as error:
        raise MessageFormatError(f"not a {kind.__name__}: {error}") from error
