"""Events of a recorded log as columns, on their way through the stream: who, what, when it happened, when it arrived.

Three times. *query_time_ms*: when it really happened, and so when the user was shown something before it.
*event_time_ms*: what its record says, which is the same unless the producer's clock is wrong. *arrival_ms*: when the
log had it, which is when anybody could learn of it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from backtest.errors import RecordedStreamError
from feature_store.ids import event_keys, stable_id
from stream.events import Event

Int64s = NDArray[np.int64]


class RecordedBatch(Protocol):
    """N consecutive events of a log, in the order in which they are replayed."""

    @property
    def first(self) -> int:
        """Number of the first of them in the log."""
        ...

    @property
    def user_id(self) -> Int64s | list[str]:
        """i64[N] or texts."""
        ...

    @property
    def item_id(self) -> Int64s | list[str]:
        """i64[N] or texts."""
        ...

    @property
    def event_time_ms(self) -> Int64s:
        """i64[N], epoch ms."""
        ...

    @property
    def arrival_ms(self) -> Int64s:
        """i64[N], epoch ms; the event time where the log does not say."""
        ...

    @property
    def action(self) -> list[str]:
        """[N]."""
        ...

    @property
    def value(self) -> NDArray[np.float64]:
        """f64[N], NaN where there is none."""
        ...

    @property
    def event_id(self) -> list[str]:
        """[N]."""
        ...

    @property
    def surface(self) -> list[str | None] | None:
        """[N], where each happened; None: the log does not say."""
        ...

    def __len__(self) -> int: ...


class EventSource(Protocol):
    """A recorded log, read in pieces that fit memory."""

    def __len__(self) -> int: ...

    def batches(self, size: int, *, start: int = 0, end: int | None = None) -> Iterator[RecordedBatch]:
        """Events from `start` up to `end`, `size` at a time."""
        ...


@dataclass(frozen=True, kw_only=True, slots=True)
class EventColumns:
    """N events. event: number in the log. event_id: texts. action: as declared in the settings. surface:
    texts, or None. user_texts, item_texts: what hashed ids are called.
    """

    event: Int64s
    user_id: Int64s
    item_id: Int64s
    query_time_ms: Int64s
    event_time_ms: Int64s
    arrival_ms: Int64s
    action: NDArray[np.object_]
    value: NDArray[np.float32]
    event_id: NDArray[np.object_]
    event_key: NDArray[np.uint64]
    surface: NDArray[np.object_]
    user_texts: Mapping[int, str] = field(default_factory=dict)
    item_texts: Mapping[int, str] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.event)

    @staticmethod
    def of(batch: RecordedBatch) -> EventColumns:
        """Raises RecordedStreamError where two texts have the same 63-bit hash."""
        users, user_texts = _numbers("user", batch.user_id)
        items, item_texts = _numbers("item", batch.item_id)
        return EventColumns(
            event=np.arange(batch.first, batch.first + len(batch)),
            user_id=users,
            item_id=items,
            query_time_ms=batch.event_time_ms,
            event_time_ms=batch.event_time_ms,
            arrival_ms=np.maximum(batch.arrival_ms, batch.event_time_ms),
            action=np.array(batch.action, object),
            value=batch.value.astype(np.float32),
            event_id=np.array(batch.event_id, object),
            event_key=event_keys(batch.event_id),
            surface=np.array([None] * len(batch) if batch.surface is None else batch.surface, object),
            user_texts=user_texts,
            item_texts=item_texts,
        )

    def take(self, rows: NDArray[np.integer[Any]] | NDArray[np.bool_] | slice) -> EventColumns:
        """Some of the rows, in that order."""
        columns = {name: getattr(self, name) for name in _NAMES}
        return EventColumns(**{name: column if name in _TEXTS else column[rows] for name, column in columns.items()})

    @staticmethod
    def concat(parts: Sequence[EventColumns]) -> EventColumns:
        """All rows of all parts (at least one), in order."""
        if len(parts) == 1:
            return parts[0]
        columns: dict[str, Any] = {
            name: {number: text for part in parts for number, text in getattr(part, name).items()}
            if name in _TEXTS
            else np.concatenate([getattr(part, name) for part in parts])
            for name in _NAMES
        }
        return EventColumns(**columns)

    def as_event(self, row: int, surface_key: str = "") -> Event:
        """One of them as its producer sends it; surface_key: of its context, empty: without."""
        user, item, value = int(self.user_id[row]), int(self.item_id[row]), float(self.value[row])
        return Event(
            event_id=self.event_id[row],
            user_id=self.user_texts.get(user, user),
            item_id=self.item_texts.get(item, item),
            action=self.action[row],
            event_time=int(self.event_time_ms[row]),
            value=None if np.isnan(value) else value,
            context={surface_key: self.surface[row]} if surface_key and self.surface[row] is not None else None,
        )


_NAMES = tuple(one.name for one in fields(EventColumns))
_TEXTS = ("user_texts", "item_texts")


def _numbers(kind: str, ids: Int64s | list[str]) -> tuple[Int64s, dict[int, str]]:
    if isinstance(ids, np.ndarray):
        return ids, {}
    number_of = {text: stable_id(text) for text in dict.fromkeys(ids)}
    texts = {number: text for text, number in number_of.items()}
    if len(texts) < len(number_of):
        raise RecordedStreamError(f"two {kind} ids have the same 63-bit hash: rename one of them")
    return np.array([number_of[text] for text in ids], np.int64), texts
