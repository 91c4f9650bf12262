"""SQL of names and items: the strings behind hashed ids, and what is known about items."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray
from sqlalchemy import Connection, select

from feature_store.errors import IdCollisionError
from feature_store.records import IdKind, Item
from feature_store.tables import id_name, item
from feature_store.values import insert_missing, upsert, values_table

_IDS_PER_STATEMENT: Final = 4_000


def register_names(connection: Connection, kind: IdKind, names: Mapping[int, str]) -> None:
    """Store the strings of hashed ids; see `StoreTransaction.register_names`."""
    stored = load_names(connection, kind, np.array(list(names), np.int64))
    rows = [
        {"kind": kind, "id": hashed_id, "name": name} for hashed_id, name in names.items() if hashed_id not in stored
    ]
    if rows:
        connection.execute(insert_missing(connection.dialect.name, id_name), rows)
        # Another writer may have inserted the same id between our look and our insert: look again.
        stored |= load_names(connection, kind, np.array([row["id"] for row in rows], np.int64))
    for hashed_id, name in names.items():
        if stored[hashed_id] != name:
            raise IdCollisionError(kind, hashed_id, stored[hashed_id], name)


def load_names(connection: Connection, kind: IdKind, ids: NDArray[np.int64]) -> dict[int, str]:
    """The strings behind hashed ids; ids without one are absent."""
    names: dict[int, str] = {}
    for part in _parts(ids):
        wanted = values_table(connection.dialect.name, {"id": part})
        query = select(id_name.c.id, id_name.c.name).join_from(wanted, id_name, id_name.c.id == wanted.c.id)
        names.update({row.id: row.name for row in connection.execute(query.where(id_name.c.kind == kind))})
    return names


def forget_names(connection: Connection, kind: IdKind, ids: NDArray[np.int64]) -> None:
    """Remove the strings behind hashed ids."""
    for part in _parts(ids):
        wanted = values_table(connection.dialect.name, {"id": part})
        connection.execute(id_name.delete().where(id_name.c.kind == kind, id_name.c.id.in_(select(wanted.c.id))))


def upsert_items(connection: Connection, items: Sequence[Item]) -> None:
    """Store items, replacing what was known about them."""
    if not items:
        return
    statement = upsert(connection.dialect.name, item)
    columns = ("title", "text", "categories", "embedding", "available")
    statement = statement.on_conflict_do_update(
        index_elements=[item.c.item_id], set_={name: statement.excluded[name] for name in columns}
    )
    # Rows in order of their ids: two writers then wait for each other instead of deadlocking.
    connection.execute(statement, [_item_row(it) for it in sorted(items, key=lambda it: it.item_id)])


def retire_items(connection: Connection, ids: NDArray[np.int64]) -> None:
    """Mark items unavailable, also ones never heard of, so that a tombstone is remembered."""
    if len(ids) == 0:
        return
    statement = upsert(connection.dialect.name, item)
    statement = statement.on_conflict_do_update(index_elements=[item.c.item_id], set_={"available": False})
    rows = [_item_row(Item(item_id=item_id, available=False)) for item_id in sorted(set(ids.tolist()))]
    connection.execute(statement, rows)


def load_items(connection: Connection, ids: NDArray[np.int64]) -> dict[int, Item]:
    """What is known about items; unknown ones are absent."""
    items: dict[int, Item] = {}
    for part in _parts(ids):
        wanted = values_table(connection.dialect.name, {"item_id": part})
        query = select(item).join_from(wanted, item, item.c.item_id == wanted.c.item_id)
        for row in connection.execute(query).mappings():
            items[row["item_id"]] = Item(**(dict(row) | {"categories": tuple(row["categories"])}))
    return items


def load_categories(connection: Connection, *, after: int, limit: int) -> dict[int, tuple[str, ...]]:
    """Categories of the first `limit` items with a larger id, by ascending id; items without any are among them."""
    query = select(item.c.item_id, item.c.categories).where(item.c.item_id > after).order_by(item.c.item_id)
    return {row.item_id: tuple(row.categories) for row in connection.execute(query.limit(limit))}


def unavailable_items(connection: Connection) -> NDArray[np.int64]:
    """i64[K], ids of retired items in ascending order."""
    query = select(item.c.item_id).where(item.c.available.is_(False)).order_by(item.c.item_id)
    return np.array(connection.execute(query).scalars().all(), np.int64)


def _item_row(value: Item) -> dict[str, Any]:
    return {
        "item_id": value.item_id,
        "title": value.title,
        "text": value.text,
        "categories": list(value.categories),
        "embedding": value.embedding,
        "available": value.available,
    }


def _parts(ids: NDArray[np.int64]) -> Iterator[NDArray[np.int64]]:
    for start in range(0, len(ids), _IDS_PER_STATEMENT):
        yield ids[start : start + _IDS_PER_STATEMENT]
