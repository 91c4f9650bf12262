"""Decoding one poll into columns: pure, so that a batch can be decoded again after a failed commit.

All values of a batch are parsed in one call and checked column by column; only what is suspicious is looked at one by
one, to name the reason.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from feature_store.ids import event_keys, stable_id
from feature_store.interactions import Interactions
from stream.events import NEWEST_SCHEMA_VERSION, Event, EventDecoder, Refusal, id_refusal
from stream.log import Record, RecordBatch

_NO_ID = -1


@dataclass(frozen=True, kw_only=True, slots=True)
class DecodedBatch:
    """One partition's poll: accepted events as columns, refused records with their reasons."""

    partition: int
    first_offset: int
    last_offset: int
    interactions: Interactions
    """[N] `seq` is 0 until the store assigns it."""
    offsets: NDArray[np.int64]
    """[N] source offsets, ascending."""
    append_ms: NDArray[np.int64]
    """[N] broker append times, epoch ms."""
    refused: list[tuple[Record, Refusal]]
    user_names: dict[int, str]
    """Texts of hashed user ids."""
    item_names: dict[int, str]
    source: RecordBatch
    """What was decoded, for decoding it again."""

    def from_offset(self, position: int) -> tuple[DecodedBatch, int]:
        """The part at or above `position`, and how many records were dropped below it."""
        if self.first_offset >= position:
            return self, 0
        start = int(np.searchsorted(self.offsets, position, side="left"))
        refused = [(record, refusal) for record, refusal in self.refused if record.offset >= position]
        kept = DecodedBatch(
            partition=self.partition,
            first_offset=position,
            last_offset=self.last_offset,
            interactions=self.interactions.take(slice(start, None)),
            offsets=self.offsets[start:],
            append_ms=self.append_ms[start:],
            refused=refused,
            user_names=self.user_names,
            item_names=self.item_names,
            source=self.source,
        )
        return kept, start + len(self.refused) - len(refused)


@dataclass(slots=True)
class _Ids:
    """Integer ids of N events, of one kind."""

    ids: NDArray[np.int64]
    """i64[N]; -1 where the text's hash belongs to another text, and for texts that cannot be kept."""
    texts: dict[int, str] = field(default_factory=dict)
    """The texts behind hashed ids."""

    @staticmethod
    def of(kind: str, raw: Sequence[int | str], colliding: Collection[tuple[str, str]]) -> _Ids:
        if {int}.issuperset(map(type, raw)):
            return _Ids(np.array(raw, np.int64))
        found = _Ids(np.empty(0, np.int64))
        known: dict[int | str, int] = {}
        for each in dict.fromkeys(raw):
            known[each] = each if isinstance(each, int) else found._hashed(kind, each, colliding)
        found.ids = np.array([known[each] for each in raw], np.int64)
        return found

    def _hashed(self, kind: str, text: str, colliding: Collection[tuple[str, str]]) -> int:
        hashed = stable_id(text)
        if "\0" in text or (kind, text) in colliding or self.texts.setdefault(hashed, text) != text:
            return _NO_ID
        return hashed


def decode_batch(
    source: RecordBatch, decoder: EventDecoder, now_ms: int, *, colliding: Collection[tuple[str, str]] = ()
) -> DecodedBatch:
    """Decode the records of one partition.

    `colliding` holds (kind, text) pairs whose hash is taken by another text in the store: they are refused.
    """
    refusals: dict[int, Refusal] = {}
    rows, events = _parse(source, decoder, refusals)
    columns, is_suspect = _checked_columns(events, decoder, now_ms)
    for place in np.flatnonzero(is_suspect).tolist():
        refusal = decoder.judge(events[place], now_ms)
        if refusal is not None:
            refusals[int(rows[place])] = refusal
    users = _Ids.of("user", [event.user_id for event in events], colliding)
    items = _Ids.of("item", [event.item_id for event in events], colliding)
    for ids, name in ((users.ids, "user_id"), (items.ids, "item_id")):
        for place in np.flatnonzero(ids == _NO_ID).tolist():
            refusals.setdefault(int(rows[place]), id_refusal(events[place]) or _collision(name))
    interactions = Interactions(
        user_id=users.ids,
        item_id=items.ids,
        event_key=event_keys([event.event_id for event in events]),
        seq=np.zeros(len(events), np.uint32),
        arrival_ms=np.full(len(events), now_ms, np.int64),
        **columns,
    )
    if refusals:
        is_good = ~np.isin(rows, list(refusals))
        interactions, rows = interactions.take(is_good), rows[is_good]
        _keep_names(users, interactions.user_id)
        _keep_names(items, interactions.item_id)
    return DecodedBatch(
        partition=source.partition,
        first_offset=int(source.offsets[0]),
        last_offset=int(source.offsets[-1]),
        interactions=interactions,
        offsets=source.offsets[rows],
        append_ms=source.timestamps_ms[rows],
        refused=[(source.record(row), refusals[row]) for row in sorted(refusals)],
        user_names=users.texts,
        item_names=items.texts,
        source=source,
    )


def _parse(
    source: RecordBatch, decoder: EventDecoder, refusals: dict[int, Refusal]
) -> tuple[NDArray[np.int64], Sequence[Event]]:
    """The rows that are events, and the events; why the others are not goes into `refusals`."""
    parsed = decoder.parse_many(source.values)
    refusals |= {row: found for row, found in enumerate(parsed) if isinstance(found, Refusal)}
    rows = np.arange(len(parsed))
    if not refusals:
        return rows, cast("Sequence[Event]", parsed)
    return np.delete(rows, list(refusals)), [found for found in parsed if isinstance(found, Event)]


def _checked_columns(
    events: Sequence[Event], decoder: EventDecoder, now_ms: int
) -> tuple[dict[str, NDArray[Any]], NDArray[np.bool_]]:
    """Columns `event_time_ms`, `value`, `action` and `surface`; which of the N events `EventDecoder.judge` would refuse
    or count.
    """
    raw_times = [event.event_time for event in events]
    if {int}.issuperset(map(type, raw_times)):
        times = np.array(raw_times, np.int64)
    else:
        is_naive = [isinstance(time, datetime) and time.tzinfo is None for time in raw_times]
        times = np.array(
            [_NO_ID if naive else event.event_time_ms() for naive, event in zip(is_naive, events, strict=True)],
            np.int64,
        )
    with np.errstate(over="ignore"):  # what overflows is refused below
        values = np.array([event.value for event in events], np.float64).astype(np.float32)
    bit_of = decoder.action_bits.get
    actions = np.array([bit_of(event.action, 0) for event in events], np.uint32)
    is_suspect = (times < 0) | (times - now_ms > decoder.rules.max_future_skew_ms) | np.isinf(values) | (actions == 0)
    is_suspect |= np.array([event.schema_version != NEWEST_SCHEMA_VERSION for event in events], np.bool_)
    surfaces = decoder.surfaces_of(events)
    return {"event_time_ms": times, "value": values, "action": actions, "surface": surfaces}, is_suspect


def _keep_names(ids: _Ids, kept: NDArray[np.int64]) -> None:
    """Forget the texts of refused records: nothing of them is stored."""
    if ids.texts:
        present = set(kept.tolist())
        ids.texts = {number: text for number, text in ids.texts.items() if number in present}


def _collision(name: str) -> Refusal:
    return Refusal("id_collision", name, f"{name}: another text has the same 63-bit hash; nothing is merged")
