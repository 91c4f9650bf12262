"""Writing rows of `history_chunk`: a whole batch in two statements, refused if another writer was faster.

The statements are on the hot path of ingest, so they are written out for each database: SQLite takes rows one by one,
PostgreSQL takes whole columns as arrays.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray
from sqlalchemy import Connection
from sqlalchemy.exc import DBAPIError

from feature_store.errors import ConcurrentAppendError

_NAMES: Final = ("user_id", "chunk_no", "n", "first_ms", "last_ms", "next_seq", "payload", "expected_seq")

_SQLITE_INSERT: Final = """
    INSERT INTO history_chunk (user_id, chunk_no, n, first_ms, last_ms, next_seq, payload)
    VALUES (?, ?, ?, ?, ?, ?, ?) ON CONFLICT DO NOTHING
"""
_SQLITE_INSERT_VALUES: Final = ("user_id", "chunk_no", "n", "first_ms", "last_ms", "next_seq", "payload")

_SQLITE_OVERWRITE: Final = """
    UPDATE history_chunk SET n = ?, first_ms = ?, last_ms = ?, next_seq = ?, payload = ?
    WHERE user_id = ? AND chunk_no = ? AND next_seq = ? AND n > 0
"""
_SQLITE_OVERWRITE_VALUES: Final = (
    "n",
    "first_ms",
    "last_ms",
    "next_seq",
    "payload",
    "user_id",
    "chunk_no",
    "expected_seq",
)

_POSTGRES_SHELF: Final = """
    CREATE TEMPORARY TABLE IF NOT EXISTS new_chunk (
        user_id bigint, chunk_no integer, n integer, first_ms bigint, last_ms bigint, next_seq bigint, payload bytea,
        expected_seq bigint
    ) ON COMMIT DELETE ROWS
"""
_POSTGRES_COPY: Final = """
    COPY new_chunk (user_id, chunk_no, n, first_ms, last_ms, next_seq, expected_seq, payload)
    FROM STDIN (FORMAT BINARY)
"""
# The planner knows nothing about a table that was filled a moment ago; every way but the primary key would read all.
_POSTGRES_PLAN: Final = "SET LOCAL enable_hashjoin = off; SET LOCAL enable_mergejoin = off"
_POSTGRES_INSERT: Final = """
    INSERT INTO history_chunk (user_id, chunk_no, n, first_ms, last_ms, next_seq, payload)
    SELECT user_id, chunk_no, n, first_ms, last_ms, next_seq, payload FROM new_chunk WHERE expected_seq < 0
    ON CONFLICT DO NOTHING
"""
_POSTGRES_OVERWRITE: Final = """
    UPDATE history_chunk AS chunk
    SET n = new.n, first_ms = new.first_ms, last_ms = new.last_ms, next_seq = new.next_seq, payload = new.payload
    FROM new_chunk AS new
    WHERE chunk.user_id = new.user_id AND chunk.chunk_no = new.chunk_no AND chunk.next_seq = new.expected_seq
    AND chunk.n > 0
"""
_COPY_HEADER: Final = b"PGCOPY\n\xff\r\n\0" + bytes(8)
_COPY_END: Final = b"\xff\xff"
_COPY_ROW: Final = np.dtype(
    [("num_fields", ">i2")]
    + [
        (f"{name}{part}", kind)
        for name, value in (
            ("user_id", ">i8"),
            ("chunk_no", ">i4"),
            ("n", ">i4"),
            ("first_ms", ">i8"),
            ("last_ms", ">i8"),
            ("next_seq", ">i8"),
            ("expected_seq", ">i8"),
        )
        for part, kind in (("_bytes", ">i4"), ("", value))
    ]
    + [("payload_bytes", ">i4")]
)
"""PostgreSQL's binary COPY format: a row up to its payload, every value after its length."""


# These too are made of constants only.
_KEY_NAMES: Final = ("user_id", "chunk_no", "n", "next_seq")
_SQLITE_AS_READ: Final = "WHERE user_id = ? AND chunk_no = ? AND n = ? AND next_seq = ?"
_SQLITE_EMPTY: Final = f"UPDATE history_chunk SET n = 0, first_ms = last_ms, payload = ? {_SQLITE_AS_READ}"  # noqa: S608
_SQLITE_DELETE: Final = f"DELETE FROM history_chunk {_SQLITE_AS_READ}"  # noqa: S608
_POSTGRES_READ: Final = """
    unnest(%(user_id)s::bigint[], %(chunk_no)s::integer[], %(n)s::integer[], %(next_seq)s::bigint[])
        AS old (user_id, chunk_no, n, next_seq)
    WHERE chunk.user_id = old.user_id AND chunk.chunk_no = old.chunk_no AND chunk.n = old.n
    AND chunk.next_seq = old.next_seq
"""
_POSTGRES_EMPTY: Final = f"""
    UPDATE history_chunk AS chunk SET n = 0, first_ms = chunk.last_ms, payload = %(payload)s FROM {_POSTGRES_READ}
"""  # noqa: S608
_POSTGRES_DELETE: Final = f"DELETE FROM history_chunk AS chunk USING {_POSTGRES_READ}"  # noqa: S608


@dataclass(frozen=True, kw_only=True, slots=True)
class ChunkWrite:
    """W chunks to write, in order of users and chunk numbers."""

    user_id: NDArray[np.int64]
    chunk_no: NDArray[np.int64]
    n: NDArray[np.int64]
    """i64[W], interactions in each chunk."""
    first_ms: NDArray[np.int64]
    last_ms: NDArray[np.int64]
    next_seq: NDArray[np.int64]
    """i64[W], the user's next arrival number after this write."""
    expected_seq: NDArray[np.int64]
    """i64[W], the stored `next_seq` of the chunk that is overwritten; -1: the chunk is new."""
    payload: list[bytes]

    def values(self, selected: NDArray[np.bool_]) -> dict[str, list[Any]]:
        """The selected chunks' values by column, as the drivers take them."""
        index = np.flatnonzero(selected)
        columns: dict[str, list[Any]] = {
            name: getattr(self, name)[index].tolist() for name in _NAMES if name != "payload"
        }
        columns["payload"] = [self.payload[row] for row in index.tolist()]
        return columns


def write_chunks(connection: Connection, write: ChunkWrite) -> None:
    """Write all chunks, or refuse if another writer changed one of them since it was read.

    Every append changes its user's tail chunk or adds one after it, so two writers of one user always meet in a chunk,
    and the `next_seq` in it tells the second one that it has read something old. A chunk that retention has emptied
    since it was read is not written again: what was in it has been removed.

    Raises:
        ConcurrentAppendError: a chunk is not as it was read; the transaction must be rolled back.
    """
    if connection.dialect.name == "postgresql":
        num_written = _write_postgres(connection, write)
    else:
        num_written = _write_sqlite(connection, write)
    if num_written != len(write.payload):
        raise ConcurrentAppendError(
            f"{len(write.payload) - num_written} of {len(write.payload)} history chunks were changed by another "
            "writer between our read and our write: retry the transaction"
        )


def remove_chunks(
    connection: Connection, columns: dict[str, NDArray[np.int64]], is_emptied: NDArray[np.bool_], emptied: bytes
) -> None:
    """Empty the marked chunks and delete the others, or refuse if one is not as it was read.

    A late event changes `next_seq` of every chunk from its own on; another remover changes `n`, or deletes.

    Args:
        connection: in a transaction.
        columns: i64[C] each of `user_id`, `chunk_no`, `n` and `next_seq`, as they were read.
        is_emptied: bool[C].
        emptied: the bytes of a chunk without interactions.

    Raises:
        ConcurrentAppendError: a chunk is not as it was read; the transaction must be rolled back.
    """
    old = {name: columns[name][~is_emptied].tolist() for name in _KEY_NAMES}
    last = {name: columns[name][is_emptied].tolist() for name in _KEY_NAMES}
    if connection.dialect.name == "postgresql":
        num_removed = _execute_columns(connection, _POSTGRES_EMPTY, last | {"payload": emptied})
        num_removed += _execute_columns(connection, _POSTGRES_DELETE, old)
    else:
        payloads = [emptied] * len(last["user_id"])
        num_removed = _execute_rows(connection, _SQLITE_EMPTY, [payloads, *(last[name] for name in _KEY_NAMES)])
        num_removed += _execute_rows(connection, _SQLITE_DELETE, [old[name] for name in _KEY_NAMES])
    if num_removed != len(is_emptied):
        raise ConcurrentAppendError(
            f"{len(is_emptied) - num_removed} of {len(is_emptied)} expired history chunks were changed by another "
            "writer between our read and our write: retry the transaction"
        )


def _execute_columns(connection: Connection, statement: str, columns: dict[str, Any]) -> int:
    return connection.exec_driver_sql(statement, columns).rowcount if columns["user_id"] else 0


def _write_sqlite(connection: Connection, write: ChunkWrite) -> int:
    is_new = write.expected_seq < 0
    new, old = write.values(is_new), write.values(~is_new)
    num_written = _execute_rows(connection, _SQLITE_INSERT, [new[name] for name in _SQLITE_INSERT_VALUES])
    return num_written + _execute_rows(connection, _SQLITE_OVERWRITE, [old[name] for name in _SQLITE_OVERWRITE_VALUES])


def _execute_rows(connection: Connection, statement: str, columns: list[list[Any]]) -> int:
    rows = list(zip(*columns, strict=True))
    return connection.exec_driver_sql(statement, rows).rowcount if rows else 0


def _write_postgres(connection: Connection, write: ChunkWrite) -> int:
    """COPY takes rows at half the cost of parameters, which psycopg would escape byte by byte."""
    connection.exec_driver_sql(_POSTGRES_SHELF)
    connection.exec_driver_sql(_POSTGRES_PLAN)
    driver_connection = connection.connection.driver_connection
    assert driver_connection is not None
    driver = connection.dialect.loaded_dbapi
    try:
        with driver_connection.cursor().copy(_POSTGRES_COPY) as copy:
            copy.write(_copy_bytes(write))
    except driver.Error as error:
        # As SQLAlchemy does with what it executes itself: the driver's own errors are nobody's to handle.
        raise DBAPIError.instance(_POSTGRES_COPY, None, error, driver.Error, dialect=connection.dialect) from error
    num_written = connection.exec_driver_sql(_POSTGRES_INSERT).rowcount
    num_written += connection.exec_driver_sql(_POSTGRES_OVERWRITE).rowcount
    connection.exec_driver_sql("DELETE FROM new_chunk")
    return num_written


def _copy_bytes(write: ChunkWrite) -> bytes:
    rows = np.zeros(len(write.payload), _COPY_ROW)
    rows["num_fields"] = 8
    for name in ("user_id", "chunk_no", "n", "first_ms", "last_ms", "next_seq", "expected_seq"):
        rows[name] = getattr(write, name)
        rows[f"{name}_bytes"] = rows[name].dtype.itemsize
    rows["payload_bytes"] = [len(payload) for payload in write.payload]
    heads = rows.tobytes()
    size = _COPY_ROW.itemsize
    parts = [_COPY_HEADER]
    for number, payload in enumerate(write.payload):
        parts.append(heads[number * size : (number + 1) * size])
        parts.append(payload)
    return b"".join([*parts, _COPY_END])
