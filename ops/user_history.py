"""`headrace user show`: one user's history as a person reads it."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass
from typing import Final

import numpy as np

from feature_store.ids import numeric_id, stable_id
from feature_store.store import FeatureStore
from ops.readable import readable, utc_time
from stream.events import EventRules

_COLUMNS: Final = ("event_time_ms", "item_id", "action", "surface", "value", "seq", "arrival_ms")
_HEADER: Final = ("event time", "item", "action", "value", "seq", "arrived")


@dataclass(frozen=True, kw_only=True, slots=True)
class ShownInteraction:
    """One interaction with names where the store knows them."""

    event_time_ms: int
    item_id: int
    item_name: str | None
    """The text behind a hashed item id."""
    title: str | None
    actions: tuple[str, ...]
    surface: str | None
    """Where it happened; None: it was not told."""
    value: float | None
    seq: int
    arrival_ms: int

    def cells(self) -> tuple[str, ...]:
        """One row of the table."""
        item = str(self.item_id) if self.item_name is None else readable(self.item_name)
        return (
            utc_time(self.event_time_ms),
            f"{item} {readable(self.title)}" if self.title else item,
            "+".join(self.actions) + ("" if self.surface is None else f"@{readable(self.surface)}"),
            "-" if self.value is None else f"{self.value:g}",
            str(self.seq),
            utc_time(self.arrival_ms),
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class ShownUser:
    """A user and the newest part of the history, oldest first."""

    user_id: int
    name: str | None
    """The text behind a hashed user id."""
    num_interactions: int
    """How many have arrived; retention may have let the oldest expire."""
    interactions: tuple[ShownInteraction, ...]

    def to_json(self) -> str:
        """Everything, as one JSON object."""
        return json.dumps(asdict(self), indent=2)

    def to_text(self) -> str:
        """A table."""
        name = "" if self.name is None else f" ({readable(self.name)})"
        noun = "interaction" if self.num_interactions == 1 else "interactions"
        heading = f"user {self.user_id}{name}: {self.num_interactions:,} {noun}"
        if not self.interactions:
            return f"{heading}, all of them expired"
        if len(self.interactions) < self.num_interactions:
            heading += f", the newest {len(self.interactions):,} of them"
        rows = [_HEADER, *(one.cells() for one in self.interactions)]
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in rows]
        return "\n".join([heading, *(line.rstrip() for line in lines)])


def show_user(store: FeatureStore, raw_id: str, rules: EventRules, *, limit: int) -> ShownUser | None:
    """The newest `limit` interactions of a user, or None for one without history.

    Digits mean the number; if nothing is stored under it, the text.

    Raises ChunkCorruptError, SchemaRevisionError or StoreUnavailableError.
    """
    for user_id in user_ids_meant(raw_id):
        shown = _show(store, user_id, rules, limit)
        if shown is not None:
            return shown
    return None


def user_ids_meant(raw_id: str) -> list[int]:
    """The numbers under which a user can be stored whom a person names so: the number itself first, then the text."""
    number = numeric_id(raw_id)
    return ([] if number is None else [number]) + [stable_id(raw_id)]


def action_names(mask: int, actions: tuple[str, ...]) -> tuple[str, ...]:
    """The declared actions in a bitmask; a bit that is not declared any more is named by its number."""
    return tuple(
        actions[bit] if bit < len(actions) else f"bit {bit}" for bit in range(mask.bit_length()) if mask >> bit & 1
    )


def surface_name(number: int, surfaces: tuple[str, ...]) -> str | None:
    """A declared surface; one that is not declared any more is named by its number."""
    if number == 0:
        return None
    return surfaces[number - 1] if number <= len(surfaces) else f"surface {number}"


def _show(store: FeatureStore, user_id: int, rules: EventRules, limit: int) -> ShownUser | None:
    current = store.read_current(np.array([user_id], np.int64), max_len=limit)
    num_interactions, found = int(current.next_seq[0]), current.histories
    if num_interactions == 0:
        return None
    item_ids = np.unique(found.item_id)
    items, names = store.items(item_ids), store.names("item", item_ids)
    rows = zip(*(found.columns[name].tolist() for name in _COLUMNS), strict=True)
    return ShownUser(
        user_id=user_id,
        name=store.names("user", [user_id]).get(user_id),
        num_interactions=num_interactions,
        interactions=tuple(
            ShownInteraction(
                event_time_ms=event_time_ms,
                item_id=item_id,
                item_name=names.get(item_id),
                title=(items[item_id].title or None) if item_id in items else None,
                actions=action_names(action, rules.actions),
                surface=surface_name(surface, rules.surfaces),
                value=None if math.isnan(value) else value,
                seq=seq,
                arrival_ms=arrival_ms,
            )
            for event_time_ms, item_id, action, surface, value, seq, arrival_ms in rows
        ),
    )
