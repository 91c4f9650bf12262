"""Decoding one poll into columns: pure, so that a batch can be decoded again after a failed commit."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from feature_store.ids import event_key, stable_id
from feature_store.interactions import Interactions
from stream.events import Event, EventDecoder, Refusal
from stream.log import Record


@dataclass(frozen=True, kw_only=True, slots=True)
class DecodedBatch:
    """One partition's poll: accepted events as columns, refused records with their reasons."""

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

    def from_offset(self, position: int) -> tuple[DecodedBatch, int]:
        """The part at or above `position`, and how many records were dropped below it."""
        if self.first_offset >= position:
            return self, 0
        start = int(np.searchsorted(self.offsets, position, side="left"))
        refused = [(record, refusal) for record, refusal in self.refused if record.offset >= position]
        kept = DecodedBatch(
            first_offset=position,
            last_offset=self.last_offset,
            interactions=self.interactions.take(slice(start, None)),
            offsets=self.offsets[start:],
            append_ms=self.append_ms[start:],
            refused=refused,
            user_names=self.user_names,
            item_names=self.item_names,
        )
        return kept, start + len(self.refused) - len(refused)


class _Names:
    """Integer ids of one kind; texts are hashed and remembered, and two texts never share an id."""

    def __init__(self, kind: str, colliding: Collection[tuple[str, str]]) -> None:
        self.kind = kind
        self.texts: dict[int, str] = {}
        self._colliding = colliding

    def id_of(self, raw: int | str) -> int | None:
        """The integer id, or None when the text's hash belongs to another text."""
        if isinstance(raw, int):
            return raw
        hashed = stable_id(raw)
        if (self.kind, raw) in self._colliding or self.texts.setdefault(hashed, raw) != raw:
            return None
        return hashed


def decode_batch(
    records: list[Record], decoder: EventDecoder, now_ms: int, *, colliding: Collection[tuple[str, str]] = ()
) -> DecodedBatch:
    """Decode records (at least one, ascending offsets) of one partition.

    `colliding` holds (kind, text) pairs whose hash is taken by another text in the store: they are refused.
    """
    users, items = _Names("user", colliding), _Names("item", colliding)
    refused: list[tuple[Record, Refusal]] = []
    rows: list[tuple[Event, Record, int, int]] = []
    for record in records:
        decoded = decoder.decode(record.value, now_ms)
        if isinstance(decoded, Refusal):
            refused.append((record, decoded))
            continue
        user_id, item_id = users.id_of(decoded.user_id), items.id_of(decoded.item_id)
        if user_id is None or item_id is None:
            refused.append((record, _collision("user_id" if user_id is None else "item_id")))
            continue
        rows.append((decoded, record, user_id, item_id))
    bits = decoder.action_bits
    return DecodedBatch(
        first_offset=records[0].offset,
        last_offset=records[-1].offset,
        interactions=Interactions(
            user_id=np.array([row[2] for row in rows], np.int64),
            item_id=np.array([row[3] for row in rows], np.int64),
            event_time_ms=np.array([row[0].event_time_ms() for row in rows], np.int64),
            action=np.array([bits[row[0].action] for row in rows], np.uint32),
            value=np.array([np.nan if row[0].value is None else row[0].value for row in rows], np.float32),
            event_key=np.array([event_key(row[0].event_id) for row in rows], np.uint64),
            seq=np.zeros(len(rows), np.uint32),
            arrival_ms=np.full(len(rows), now_ms, np.int64),
        ),
        offsets=np.array([row[1].offset for row in rows], np.int64),
        append_ms=np.array([row[1].timestamp_ms for row in rows], np.int64),
        refused=refused,
        user_names=users.texts,
        item_names=items.texts,
    )


def _collision(field: str) -> Refusal:
    return Refusal("id_collision", field, f"{field}: another text has the same 63-bit hash; nothing is merged")
