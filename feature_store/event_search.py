"""Finding one event in the histories by its key.

A key has no index: it would be written for every event, and is asked for by a person now and then. The database
searches the bytes of the chunks instead, and gives back only those that hold them.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Final

import numpy as np
from sqlalchemy import ColumnElement, Connection, LargeBinary, TextClause, bindparam, func, select, text

from feature_store.chunk_rows import chunk_ranges
from feature_store.reading import HistoryQuery, read_current
from feature_store.records import StoredEvent
from feature_store.retention import Retention
from feature_store.tables import history_chunk

_CHUNK_NO_END: Final = 2**31


def find_event(
    connection: Connection, key: int, user_ids: Collection[int] | None, retention: Retention
) -> list[StoredEvent]:
    """See `FeatureStore.find_event`."""
    users = _users_with(connection, key) if user_ids is None else sorted(set(user_ids))
    return [event for user_id in users for event in _of_user(connection, user_id, key, retention)]


def _users_with(connection: Connection, key: int) -> list[int]:
    """Users with a chunk that holds the key's bytes somewhere, as the key or by chance."""
    # Little-endian, as `feature_store.chunks` writes the column.
    needle = bindparam("needle", key.to_bytes(8, "little"), LargeBinary)
    holds: ColumnElement[bool] | TextClause
    if connection.dialect.name == "postgresql":
        holds = text("position(:needle in payload) > 0").bindparams(needle)
    else:
        holds = func.instr(history_chunk.c.payload, needle) > 0
    query = select(history_chunk.c.user_id).distinct().where(holds).order_by(history_chunk.c.user_id)
    return list(connection.execute(query).scalars())


def _of_user(connection: Connection, user_id: int, key: int, retention: Retention) -> list[StoredEvent]:
    user_ids, first, end = (np.array([number], np.int64) for number in (user_id, 0, _CHUNK_NO_END))
    stored = chunk_ranges(connection, user_ids, first, end).interactions()
    rows = np.flatnonzero(stored["event_key"] == np.uint64(key))
    if len(rows) == 0:
        return []
    query = HistoryQuery(user_ids=user_ids, max_len=len(stored["event_key"]))
    shown = read_current(connection, query, retention).histories
    shown_ms = set(shown.event_time_ms[shown.event_key == np.uint64(key)].tolist())
    return [
        StoredEvent(
            user_id=user_id,
            item_id=int(stored["item_id"][row]),
            event_time_ms=int(stored["event_time_ms"][row]),
            action=int(stored["action"][row]),
            seq=int(stored["seq"][row]),
            arrival_ms=int(stored["arrival_ms"][row]),
            # Histories are in event order, so what stands behind it and came before it was there already.
            num_later=int((stored["seq"][row + 1 :] < stored["seq"][row]).sum()),
            is_expired=int(stored["event_time_ms"][row]) not in shown_ms,
        )
        for row in rows.tolist()
    ]
