"""SQL of open impressions: what answers showed, kept for as long as an interaction can still change its labels."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray
from sqlalchemy import Connection, bindparam, func, select, text

from feature_store.tables import open_impression
from feature_store.values import values_table

_USERS_PER_STATEMENT: Final = 4_000
_PENDING: Final = np.dtype(
    [("place", "<i4"), ("action", "<u4"), ("first_ms", "<i8"), ("value", "<f4"), ("value_ms", "<i8")]
)
"""How the column `pending` holds items, one after the other."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ItemActions:
    """What a user did with one item within a window, as far as it is known. Event times in epoch ms."""

    action: int
    """Bitmask of the actions."""
    first_ms: int
    """Of the first of them."""
    value: float = np.nan
    """Of the last of them that has one, the largest if several are; NaN: none has."""
    value_ms: int = 0
    """When that was."""

    @property
    def has_value(self) -> bool:
        """Whether one of the actions has a value."""
        return bool(np.isfinite(self.value))

    def joined(self, other: ItemActions) -> ItemActions:
        """With what else is known; in any order, and known things change nothing."""
        last = max((one for one in (self, other) if one.has_value), key=_value_order, default=self)
        return ItemActions(
            action=self.action | other.action,
            first_ms=min(self.first_ms, other.first_ms),
            value=last.value,
            value_ms=last.value_ms,
        )


def _value_order(one: ItemActions) -> tuple[int, float]:
    return one.value_ms, one.value


@dataclass(kw_only=True, slots=True, eq=False)
class OpenImpression:
    """What one answer showed to one user, and what is known about each of its I items.

    `user_id` and `request_id` identify it. Times are epoch ms.
    """

    user_id: int
    request_id: str
    from_ms: int
    until_ms: int
    """The window: an item is taken by an interaction at from_ms ≤ time < until_ms."""
    due_ms: int
    """When it is to be closed, or, once closed, to be removed."""
    is_closed: bool = False
    """Its items without an interaction have been labelled as not taken."""
    item_ids: NDArray[np.int64]
    """i64[I]."""
    is_taken: NDArray[np.bool_]
    """bool[I], labelled as taken."""
    payload: bytes
    """The message it was made from; means nothing to the store."""
    pending: dict[int, ItemActions] = field(default_factory=dict)
    """Place → what was done with the item, where its label waits for more."""


@dataclass(frozen=True, kw_only=True, slots=True)
class UserWindows:
    """U users in order of their ids, and the time from the start of their first to the end of their last window."""

    user_id: NDArray[np.int64]
    from_ms: NDArray[np.int64]
    until_ms: NDArray[np.int64]


class OpenImpressions:
    """The open impressions of one writer transaction: handed out by `StoreTransaction.impressions`."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection

    def lock(self) -> None:
        """Hold off `forget` until the transaction ends, so that nothing read here can be forgotten meanwhile."""
        if self._connection.dialect.name == "postgresql":
            self._connection.execute(text("LOCK TABLE open_impression IN ROW EXCLUSIVE MODE"))

    def request_ids(self, user_ids: NDArray[np.int64]) -> dict[int, set[str]]:
        """The request ids of each user's impressions; users without any are absent."""
        found: dict[int, set[str]] = {}
        for part in _parts(np.unique(user_ids)):
            wanted = values_table(self._connection.dialect.name, {"user_id": part})
            query = select(open_impression.c.user_id, open_impression.c.request_id)
            query = query.join_from(wanted, open_impression, open_impression.c.user_id == wanted.c.user_id)
            for row in self._connection.execute(query):
                found.setdefault(row.user_id, set()).add(row.request_id)
        return found

    def add(self, impressions: Iterable[OpenImpression]) -> None:
        """Store impressions whose identity is not stored yet."""
        rows = [
            {
                "user_id": impression.user_id,
                "request_id": impression.request_id,
                "from_ms": impression.from_ms,
                "until_ms": impression.until_ms,
                "due_ms": impression.due_ms,
                "is_closed": impression.is_closed,
                "item_ids": impression.item_ids.astype("<i8").tobytes(),
                "is_taken": impression.is_taken.tobytes(),
                "payload": impression.payload,
                "pending": _encoded(impression.pending),
            }
            for impression in impressions
        ]
        if rows:
            self._connection.execute(open_impression.insert(), rows)

    def overlapping(
        self, user_ids: NDArray[np.int64], first_ms: NDArray[np.int64], last_ms: NDArray[np.int64]
    ) -> list[OpenImpression]:
        """Impressions of users (i64[B], each once) whose window meets first_ms ≤ time ≤ last_ms (i64[B] each)."""
        found: list[OpenImpression] = []
        for start in range(0, len(user_ids), _USERS_PER_STATEMENT):
            part = slice(start, start + _USERS_PER_STATEMENT)
            columns = {"user_id": user_ids[part], "first_ms": first_ms[part], "last_ms": last_ms[part]}
            wanted = values_table(self._connection.dialect.name, columns)
            query = select(open_impression).join_from(
                wanted, open_impression, open_impression.c.user_id == wanted.c.user_id
            )
            query = query.where(
                open_impression.c.from_ms <= wanted.c.last_ms, open_impression.c.until_ms > wanted.c.first_ms
            )
            found += map(_impression, self._connection.execute(query))
        return found

    def due(self, now_ms: int, limit: int) -> list[OpenImpression]:
        """At most `limit` impressions that are due at `now_ms`, the longest overdue first."""
        query = select(open_impression).where(open_impression.c.due_ms <= now_ms)
        query = query.order_by(open_impression.c.due_ms).limit(limit)
        return [_impression(row) for row in self._connection.execute(query)]

    def save(self, impressions: Iterable[OpenImpression]) -> None:
        """Store what changed: what is taken, known of what waits, whether it is closed, and when it is due next."""
        rows = [
            {
                **_key(impression),
                "due_ms": impression.due_ms,
                "is_closed": impression.is_closed,
                "is_taken": impression.is_taken.tobytes(),
                "pending": _encoded(impression.pending),
            }
            for impression in impressions
        ]
        if rows:
            names = ("due_ms", "is_closed", "is_taken", "pending")
            statement = open_impression.update().values({name: bindparam(name) for name in names})
            self._connection.execute(statement.where(*_IS_KEY), rows)

    def remove(self, impressions: Iterable[OpenImpression]) -> None:
        """Remove impressions."""
        rows = [_key(impression) for impression in impressions]
        if rows:
            self._connection.execute(open_impression.delete().where(*_IS_KEY), rows)

    def forget(self, user_ids: NDArray[np.int64]) -> None:
        """Remove everything that was shown to users."""
        if self._connection.dialect.name == "postgresql":
            # Waits for the join under way and holds off the next one; see `lock`.
            self._connection.execute(text("LOCK TABLE open_impression IN SHARE ROW EXCLUSIVE MODE"))
        for part in _parts(user_ids):
            wanted = values_table(self._connection.dialect.name, {"user_id": part})
            is_wanted = open_impression.c.user_id.in_(select(wanted.c.user_id))
            self._connection.execute(open_impression.delete().where(is_wanted))

    def user_windows(self, limit: int) -> UserWindows:
        """The users with impressions and when their windows lie; at most `limit` users."""
        column = open_impression.c
        query = select(column.user_id, func.min(column.from_ms), func.max(column.until_ms))
        query = query.group_by(column.user_id).order_by(column.user_id).limit(limit)
        rows = np.array([tuple(row) for row in self._connection.execute(query)], np.int64).reshape(-1, 3)
        user_id, from_ms, until_ms = np.ascontiguousarray(rows.T)
        return UserWindows(user_id=user_id, from_ms=from_ms, until_ms=until_ms)

    def num_open(self) -> int:
        """How many are not closed yet; reads every row's flag."""
        query = select(func.count()).select_from(open_impression).where(open_impression.c.is_closed.is_(False))
        return self._connection.execute(query).scalar_one()

    def next_due_ms(self) -> int | None:
        """When the first one is due; None when there is none."""
        due_ms: int | None = self._connection.execute(select(func.min(open_impression.c.due_ms))).scalar_one()
        return due_ms


_IS_KEY: Final = (
    open_impression.c.user_id == bindparam("key_user_id"),
    open_impression.c.request_id == bindparam("key_request_id"),
)


def _key(impression: OpenImpression) -> dict[str, Any]:
    # An UPDATE may not bind a parameter that has the name of one of its columns.
    return {"key_user_id": impression.user_id, "key_request_id": impression.request_id}


def _impression(row: Any) -> OpenImpression:
    return OpenImpression(
        user_id=row.user_id,
        request_id=row.request_id,
        from_ms=row.from_ms,
        until_ms=row.until_ms,
        due_ms=row.due_ms,
        is_closed=row.is_closed,
        item_ids=np.frombuffer(row.item_ids, "<i8"),
        is_taken=np.frombuffer(row.is_taken, np.bool_).copy(),
        payload=row.payload,
        pending=_decoded(row.pending),
    )


def _encoded(pending: dict[int, ItemActions]) -> bytes | None:
    rows = [(place, one.action, one.first_ms, one.value, one.value_ms) for place, one in sorted(pending.items())]
    return np.array(rows, _PENDING).tobytes() if rows else None


def _decoded(content: bytes | None) -> dict[int, ItemActions]:
    return {
        place: ItemActions(action=action, first_ms=first_ms, value=value, value_ms=value_ms)
        for place, action, first_ms, value, value_ms in np.frombuffer(content or b"", _PENDING).tolist()
    }


def _parts(user_ids: Sequence[int] | NDArray[np.int64]) -> Iterator[NDArray[np.int64]]:
    ids = np.asarray(user_ids, np.int64)
    for start in range(0, len(ids), _USERS_PER_STATEMENT):
        yield ids[start : start + _USERS_PER_STATEMENT]
