"""Reading rows of `history_chunk`: the chunks of many users by one statement."""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray
from sqlalchemy import Connection, FromClause, Select, func, literal, select

from feature_store.chunks import decode_chunks
from feature_store.errors import ChunkCorruptError
from feature_store.tables import history_chunk
from feature_store.values import values_table

IDS_PER_STATEMENT: Final = 4_000
"""Users asked for in one statement; more are asked for in turn, so that no statement grows without bound."""

_ROW: Final = (
    history_chunk.c.user_id,
    history_chunk.c.chunk_no,
    history_chunk.c.n,
    history_chunk.c.first_ms,
    history_chunk.c.next_seq,
    history_chunk.c.payload,
)


@dataclass(frozen=True, kw_only=True, slots=True)
class ChunkRows:
    """C stored chunks, ordered by what they were asked for (`pos`) and then by chunk number."""

    pos: NDArray[np.int64]
    """i64[C], which of the asked rows each chunk answers."""
    user_id: NDArray[np.int64]
    chunk_no: NDArray[np.int64]
    length: NDArray[np.int64]
    """i64[C], interactions in each chunk."""
    first_ms: NDArray[np.int64]
    next_seq: NDArray[np.int64]
    """i64[C], the user's next arrival number when the chunk was last written; the tail's is the user's."""
    payloads: list[bytes]

    def __len__(self) -> int:
        return len(self.payloads)

    def refuse_gaps(self, chunk_len: int) -> None:
        """Check that each user's chunks follow one another, all full but the last; the first may have been emptied.

        Raises:
            ChunkCorruptError: a chunk is missing or too short.
        """
        follows = self.pos[1:] == self.pos[:-1]
        is_full = self.length[:-1] == chunk_len
        if not is_full.all():
            is_full |= (self.length[:-1] == 0) & np.append(True, ~follows)[:-1]
        is_gap = follows & ((np.diff(self.chunk_no) != 1) | ~is_full)
        if is_gap.any():
            row = int(np.argmax(is_gap))
            problem = f"it holds {self.length[row]} interactions and the next chunk found is {self.chunk_no[row + 1]}"
            raise ChunkCorruptError(int(self.user_id[row]), int(self.chunk_no[row]), problem)

    def interactions(self) -> dict[str, NDArray[Any]]:
        """The columns of all interactions of these chunks, back to back.

        Raises:
            ChunkCorruptError: a payload is not what was written.
        """
        return decode_chunks(self.payloads, self.length, self.user_id, self.chunk_no)

    @staticmethod
    def ordered(numbers: Sequence[NDArray[np.int64]], payloads: list[bytes]) -> ChunkRows:
        """From six number columns (pos, user_id, chunk_no, length, first_ms, next_seq) in any row order."""
        order = np.lexsort((numbers[2], numbers[0]))
        pos, user_id, chunk_no, length, first_ms, next_seq = (column[order] for column in numbers)
        return ChunkRows(
            pos=pos,
            user_id=user_id,
            chunk_no=chunk_no,
            length=length,
            first_ms=first_ms,
            next_seq=next_seq,
            payloads=[payloads[row] for row in order.tolist()],
        )

    def replaced(self, is_replaced: NDArray[np.bool_], other: ChunkRows) -> ChunkRows:
        """These chunks without the marked ones, and the other's."""
        rows = np.flatnonzero(~is_replaced)
        kept = [column[rows] for column in self._numbers()]
        numbers = [np.concatenate(pair) for pair in zip(kept, other._numbers(), strict=True)]
        return ChunkRows.ordered(numbers, [self.payloads[row] for row in rows.tolist()] + other.payloads)

    def moved_to(self, pos: NDArray[np.int64]) -> ChunkRows:
        """The same chunks as answers to other asked rows."""
        return replace(self, pos=pos)

    def _numbers(self) -> tuple[NDArray[np.int64], ...]:
        return (self.pos, self.user_id, self.chunk_no, self.length, self.first_ms, self.next_seq)


def newest_chunks(
    connection: Connection, user_ids: NDArray[np.int64], num_chunks: int, before_ms: NDArray[np.int64] | None = None
) -> ChunkRows:
    """Of each asked user, the last `num_chunks` chunks, counting only those that start before `before_ms`."""
    wanted_columns = {"user_id": user_ids} | ({} if before_ms is None else {"before_ms": before_ms})

    def query(wanted: FromClause) -> Select[Any]:
        other = history_chunk.alias("other")
        last = select(func.max(other.c.chunk_no)).where(other.c.user_id == wanted.c.user_id)
        chunks = _chunks_of(wanted)
        if before_ms is not None:
            last = last.where(other.c.first_ms < wanted.c.before_ms)
            chunks = chunks.where(history_chunk.c.first_ms < wanted.c.before_ms)
        return chunks.where(history_chunk.c.chunk_no > last.scalar_subquery() - num_chunks)

    return _fetch(connection, wanted_columns, query)


def chunk_ranges(
    connection: Connection, user_ids: NDArray[np.int64], low: NDArray[np.int64], high: NDArray[np.int64]
) -> ChunkRows:
    """Of each asked user, the chunks numbered low ≤ chunk_no < high."""

    def query(wanted: FromClause) -> Select[Any]:
        chunk_no = history_chunk.c.chunk_no
        return _chunks_of(wanted).where(chunk_no >= wanted.c.low, chunk_no < wanted.c.high)

    return _fetch(connection, {"user_id": user_ids, "low": low, "high": high}, query)


def chunks_ending_since(connection: Connection, user_ids: NDArray[np.int64], since_ms: NDArray[np.int64]) -> ChunkRows:
    """Of each asked user, the chunks that end at or after a time, up to the tail."""

    def query(wanted: FromClause) -> Select[Any]:
        return _chunks_of(wanted).where(history_chunk.c.last_ms >= wanted.c.since_ms)

    return _fetch(connection, {"user_id": user_ids, "since_ms": since_ms}, query)


def history_ends(connection: Connection, user_ids: NDArray[np.int64], chunk_len: int) -> NDArray[np.int64]:
    """i64[B], how many interactions the whole history of each asked user has by its chunk numbers; 0 if unknown."""
    ends = np.zeros(len(user_ids), np.int64)
    other = history_chunk.alias("other")
    for start in range(0, len(user_ids), IDS_PER_STATEMENT):
        wanted = values_table(connection.dialect.name, {"user_id": user_ids[start : start + IDS_PER_STATEMENT]})
        last = select(func.max(other.c.chunk_no)).where(other.c.user_id == wanted.c.user_id).scalar_subquery()
        columns = (wanted.c.pos, history_chunk.c.chunk_no, history_chunk.c.n)
        is_asked = history_chunk.c.user_id == wanted.c.user_id
        query = select(*columns).join_from(wanted, history_chunk, is_asked).where(history_chunk.c.chunk_no == last)
        for row in connection.execute(query):
            ends[start + row.pos] = row.chunk_no * chunk_len + row.n
    return ends


def all_chunks(connection: Connection) -> Generator[ChunkRows, None, None]:
    """Every stored chunk, in bounded parts."""
    query = select(literal(0), *_ROW).execution_options(yield_per=IDS_PER_STATEMENT)
    with connection.execute(query) as result:
        for rows in result.partitions():
            *found, payloads = zip(*rows, strict=True)
            yield ChunkRows.ordered([np.array(values, np.int64) for values in found], list(payloads))


def count_users(connection: Connection) -> int:
    """How many users have at least one interaction stored."""
    query = select(func.count(history_chunk.c.user_id.distinct())).where(history_chunk.c.n > 0)
    return connection.execute(query).scalar_one()


def _chunks_of(wanted: FromClause) -> Select[Any]:
    return select(wanted.c.pos, *_ROW).join_from(wanted, history_chunk, history_chunk.c.user_id == wanted.c.user_id)


def _fetch(
    connection: Connection, columns: Mapping[str, NDArray[np.int64]], query: Callable[[FromClause], Select[Any]]
) -> ChunkRows:
    numbers: list[list[NDArray[np.int64]]] = [[np.empty(0, np.int64)] for _ in range(6)]
    payloads: list[bytes] = []
    for start in range(0, len(columns["user_id"]), IDS_PER_STATEMENT):
        part = {name: values[start : start + IDS_PER_STATEMENT] for name, values in columns.items()}
        rows = connection.execute(query(values_table(connection.dialect.name, part))).all()
        if rows:
            *found, found_payloads = zip(*rows, strict=True)
            arrays = [np.array(values, np.int64) for values in found]
            arrays[0] += start
            for parts, array in zip(numbers, arrays, strict=True):
                parts.append(array)
            payloads.extend(found_payloads)
    return ChunkRows.ordered([np.concatenate(parts) for parts in numbers], payloads)
