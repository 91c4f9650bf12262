"""Point-in-time reads of the stored histories."""

from __future__ import annotations

from contextlib import closing
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from sqlalchemy import Connection

from feature_store.chunk_rows import ChunkRows, all_chunks, chunk_ranges, count_users, newest_chunks
from feature_store.interactions import COLUMN_DTYPES, JaggedHistories
from feature_store.jagged import copy_ranges, offsets_of
from feature_store.records import StoreTotals


@dataclass(frozen=True, kw_only=True, slots=True)
class HistoryQuery:
    """Whose history, and as of when. B rows; limits are one value for all rows, one per row, or None."""

    user_ids: NDArray[np.int64]
    max_len: int
    before_ms: NDArray[np.int64] | None = None
    """i64[B]: only interactions that happened strictly before."""
    known_at_ms: int | None = None
    """Only interactions that had arrived at or before."""
    below_seq: NDArray[np.int64] | None = None
    """i64[B]: only interactions with a smaller arrival number."""

    def __post_init__(self) -> None:
        if self.max_len < 1:
            raise ValueError(f"max_len={self.max_len} must be at least 1: ask for the newest interactions you need")


@dataclass(frozen=True, kw_only=True, slots=True)
class CurrentHistories:
    """Histories together with how many arrivals the store had accepted of each user at that moment."""

    histories: JaggedHistories
    next_seq: NDArray[np.int64]
    """i64[B], the arrival number the user's next interaction will get; 0 for an unknown user."""


@dataclass(frozen=True, kw_only=True, slots=True)
class _Found:
    """Interactions found so far: their query row and their columns, in (row, history) order."""

    pos: NDArray[np.int64]
    columns: dict[str, NDArray[Any]]


def read(connection: Connection, query: HistoryQuery, chunk_len: int) -> JaggedHistories:
    """Read histories as of a point in time; see `FeatureStore.read`."""
    return _read_on(connection, query, chunk_len, _newest(connection, query, chunk_len))


def read_current(connection: Connection, query: HistoryQuery, chunk_len: int) -> CurrentHistories:
    """`read`, together with every user's next arrival number in the same state of the database."""
    chunks = _newest(connection, query, chunk_len)
    # Chunks that start too late are not among those, and the last chunk may be one.
    last = chunks if query.before_ms is None else newest_chunks(connection, query.user_ids, 1)
    is_last = np.append(last.pos[1:] != last.pos[:-1], True)[: len(last)]
    next_seq = np.zeros(len(query.user_ids), np.int64)
    next_seq[last.pos[is_last]] = last.next_seq[is_last]
    return CurrentHistories(histories=_read_on(connection, query, chunk_len, chunks), next_seq=next_seq)


def _newest(connection: Connection, query: HistoryQuery, chunk_len: int) -> ChunkRows:
    # The newest max_len interactions never span more chunks than this; a filter may make us look further back.
    return newest_chunks(connection, query.user_ids, _num_chunks(query, chunk_len), query.before_ms)


def _num_chunks(query: HistoryQuery, chunk_len: int) -> int:
    return -(-(query.max_len - 1) // chunk_len) + 1


def _read_on(connection: Connection, query: HistoryQuery, chunk_len: int, chunks: ChunkRows) -> JaggedHistories:
    """The answer, of the newest chunks and of as many before them as it takes."""
    num_chunks = _num_chunks(query, chunk_len)
    found = [_filtered(chunks, query, chunk_len)]
    num_found = np.bincount(found[0].pos, minlength=len(query.user_ids))
    low = np.zeros(len(query.user_ids), np.int64)
    np.maximum.at(low, chunks.pos, chunks.chunk_no + 1)
    np.minimum.at(low, chunks.pos, chunks.chunk_no)
    while True:
        rows = np.flatnonzero((num_found < query.max_len) & (low > 0))
        if len(rows) == 0:
            return _assemble(found, num_found, query)
        num_chunks *= 2
        high = low[rows]
        low[rows] = np.maximum(high - num_chunks, 0)
        part = chunk_ranges(connection, query.user_ids[rows], low[rows], high)
        found.append(_filtered(part.moved_to(rows[part.pos]), query, chunk_len))
        num_found += np.bincount(found[-1].pos, minlength=len(query.user_ids))


def _filtered(chunks: ChunkRows, query: HistoryQuery, chunk_len: int) -> _Found:
    chunks.refuse_gaps(chunk_len)
    columns = chunks.interactions()
    pos = np.repeat(chunks.pos, chunks.length)
    is_kept = np.ones(len(pos), np.bool_)
    if query.before_ms is not None:
        is_kept &= columns["event_time_ms"] < query.before_ms[pos]
    if query.known_at_ms is not None:
        is_kept &= columns["arrival_ms"] <= query.known_at_ms
    if query.below_seq is not None:
        is_kept &= columns["seq"] < query.below_seq[pos]
    if is_kept.all():
        return _Found(pos=pos, columns=columns)
    return _Found(pos=pos[is_kept], columns={name: column[is_kept] for name, column in columns.items()})


def _assemble(found: list[_Found], num_found: NDArray[np.int64], query: HistoryQuery) -> JaggedHistories:
    columns = [found[0].columns[name] for name in COLUMN_DTYPES]
    if len(found) > 1:
        # Each part is older than the one before it, so this puts every row's interactions in order.
        found.reverse()
        order = np.argsort(np.concatenate([part.pos for part in found]), kind="stable")
        columns = [np.concatenate([part.columns[name] for part in found])[order] for name in COLUMN_DTYPES]
    lengths = np.minimum(num_found, query.max_len)
    if (lengths < num_found).any():
        columns = copy_ranges(columns, offsets_of(num_found)[1:] - lengths, lengths)
    return JaggedHistories(
        user_ids=query.user_ids, offsets=offsets_of(lengths), **dict(zip(COLUMN_DTYPES, columns, strict=True))
    )


def totals(connection: Connection) -> StoreTotals:
    """Read every chunk: how many users and interactions there are, and the sum of their keys."""
    num_interactions, fingerprint = 0, 0
    # Closed at once also when a chunk is corrupt: a server-side cursor must not outlive its transaction.
    with closing(all_chunks(connection)) as parts:
        for chunks in parts:
            columns = chunks.interactions()
            num_interactions += len(columns["event_key"])
            fingerprint += int(columns["event_key"].sum(dtype=np.uint64))
    return StoreTotals(
        num_users=count_users(connection), num_interactions=num_interactions, fingerprint=fingerprint % 2**64
    )
