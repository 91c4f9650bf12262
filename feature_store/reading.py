"""Point-in-time reads of the stored histories: within what retention keeps now, what was there then."""

from __future__ import annotations

from contextlib import closing
from dataclasses import dataclass, replace
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray
from sqlalchemy import Connection

from feature_store.chunk_rows import ChunkRows, all_chunks, chunk_ranges, count_users, history_ends, newest_chunks
from feature_store.interactions import COLUMN_DTYPES, JaggedHistories
from feature_store.jagged import copy_ranges, offsets_of
from feature_store.publications import load_watermark
from feature_store.records import StoreTotals
from feature_store.removing import load_removed
from feature_store.retention import Retention

_NO_MORE: Final = np.iinfo(np.int64).max


@dataclass(frozen=True, kw_only=True, slots=True)
class HistoryQuery:
    """Whose history, and as of when. B rows; limits are one value for all rows, one per row, or None."""

    user_ids: NDArray[np.int64]
    max_len: int
    before_ms: NDArray[np.int64] | None = None
    """i64[B]: only interactions that happened strictly before."""
    known_at_ms: NDArray[np.int64] | None = None
    """i64[B]: only interactions that had arrived at or before."""
    below_seq: NDArray[np.int64] | None = None
    """i64[B]: only interactions with a smaller arrival number."""
    watermark_ms: int | None = None
    """Retention by age as of this watermark; None: the store's."""

    def __post_init__(self) -> None:
        if self.max_len < 1:
            raise ValueError(f"max_len={self.max_len} must be at least 1: ask for the newest interactions you need")


@dataclass(frozen=True, kw_only=True, slots=True)
class CurrentHistories:
    """Histories together with how many arrivals the store had accepted of each user at that moment."""

    histories: JaggedHistories
    next_seq: NDArray[np.int64]
    """i64[B], the arrival number the user's next interaction will get; 0 for an unknown user."""
    watermark_ms: int
    """The watermark that retention by age was applied at; 0 without such retention."""


@dataclass(frozen=True, kw_only=True, slots=True)
class _Found:
    """Interactions found so far: their query row and their columns, in (row, history) order."""

    pos: NDArray[np.int64]
    columns: dict[str, NDArray[Any]]


@dataclass(frozen=True, kw_only=True, slots=True)
class _Kept:
    """What retention keeps of the B asked histories."""

    horizon_ms: int | None
    first_number: NDArray[np.int64]
    """i64[B], number of the first interaction in the user's whole history that is kept."""


def read(connection: Connection, query: HistoryQuery, retention: Retention) -> JaggedHistories:
    """Read histories as of a point in time; see `FeatureStore.read`."""
    return _read_on(connection, query, retention, _newest(connection, query, retention))


def read_current(connection: Connection, query: HistoryQuery, retention: Retention) -> CurrentHistories:
    """`read`, together with every user's next arrival number in the same state of the database."""
    if retention.max_age_ms and query.watermark_ms is None:
        query = replace(query, watermark_ms=load_watermark(connection))
    chunks = _newest(connection, query, retention)
    # Chunks that start too late are not among those, and the last chunk may be one.
    last = chunks if query.before_ms is None else newest_chunks(connection, query.user_ids, 1)
    is_last = np.append(last.pos[1:] != last.pos[:-1], True)[: len(last)]
    next_seq = np.zeros(len(query.user_ids), np.int64)
    next_seq[last.pos[is_last]] = last.next_seq[is_last]
    histories = _read_on(connection, query, retention, chunks)
    return CurrentHistories(histories=histories, next_seq=next_seq, watermark_ms=query.watermark_ms or 0)


def _newest(connection: Connection, query: HistoryQuery, retention: Retention) -> ChunkRows:
    # The newest max_len interactions never span more chunks than this; a filter may make us look further back.
    return newest_chunks(connection, query.user_ids, _num_chunks(query, retention), query.before_ms)


def _num_chunks(query: HistoryQuery, retention: Retention) -> int:
    return -(-(query.max_len - 1) // retention.chunk_len) + 1


def _read_on(connection: Connection, query: HistoryQuery, retention: Retention, chunks: ChunkRows) -> JaggedHistories:
    """The answer, of the newest chunks and of as many before them as it takes."""
    chunk_len, num_chunks = retention.chunk_len, _num_chunks(query, retention)
    kept = _kept(connection, query, chunks, retention)
    found = [_filtered(chunks, query, kept, chunk_len)]
    num_found = np.bincount(found[0].pos, minlength=len(query.user_ids))
    low = np.zeros(len(query.user_ids), np.int64)
    np.maximum.at(low, chunks.pos, chunks.chunk_no + 1)
    np.minimum.at(low, chunks.pos, chunks.chunk_no)
    last = kept.first_number // chunk_len
    last[_are_oldest(chunks, kept)] = _NO_MORE
    while True:
        rows = np.flatnonzero((num_found < query.max_len) & (low > last))
        if len(rows) == 0:
            return _assemble(found, num_found, query)
        num_chunks *= 2
        high = low[rows]
        low[rows] = np.maximum(high - num_chunks, last[rows])
        part = chunk_ranges(connection, query.user_ids[rows], low[rows], high)
        part = part.moved_to(rows[part.pos])
        found.append(_filtered(part, query, kept, chunk_len))
        last[_are_oldest(part, kept)] = _NO_MORE
        num_found += np.bincount(found[-1].pos, minlength=len(query.user_ids))


def _kept(connection: Connection, query: HistoryQuery, newest: ChunkRows, retention: Retention) -> _Kept:
    ends = np.zeros(len(query.user_ids), np.int64)
    if retention.max_history and query.before_ms is None:
        np.maximum.at(ends, newest.pos, newest.chunk_no * retention.chunk_len + newest.length)
    elif retention.max_history:
        ends = history_ends(connection, query.user_ids, retention.chunk_len)
    horizon_ms = None
    if retention.max_age_ms:
        watermark_ms = load_watermark(connection) if query.watermark_ms is None else query.watermark_ms
        horizon_ms = retention.horizon_ms(watermark_ms)
    return _Kept(horizon_ms=horizon_ms, first_number=retention.first_number(ends))


def _are_oldest(chunks: ChunkRows, kept: _Kept) -> NDArray[np.int64]:
    """Query rows of chunks before which there is nothing to be found: they are emptied, or begin before the horizon."""
    is_oldest = chunks.length == 0
    if kept.horizon_ms is not None:
        is_oldest |= chunks.first_ms < kept.horizon_ms
    found: NDArray[np.int64] = chunks.pos[is_oldest]
    return found


def _filtered(chunks: ChunkRows, query: HistoryQuery, kept: _Kept, chunk_len: int) -> _Found:
    chunks.refuse_gaps(chunk_len)
    columns = chunks.interactions()
    pos = np.repeat(chunks.pos, chunks.length)
    is_kept = np.ones(len(pos), np.bool_)
    if kept.first_number.any():
        starts = np.repeat(chunks.chunk_no * chunk_len - offsets_of(chunks.length)[:-1], chunks.length)
        is_kept &= starts + np.arange(len(pos)) >= kept.first_number[pos]
    if kept.horizon_ms is not None:
        is_kept &= columns["event_time_ms"] >= kept.horizon_ms
    if query.before_ms is not None:
        is_kept &= columns["event_time_ms"] < query.before_ms[pos]
    if query.known_at_ms is not None:
        is_kept &= columns["arrival_ms"] <= query.known_at_ms[pos]
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
    """Read every chunk: how many users and interactions there are, the sum of their keys, and what was removed."""
    num_interactions, fingerprint = 0, 0
    # Closed at once also when a chunk is corrupt: a server-side cursor must not outlive its transaction.
    with closing(all_chunks(connection)) as parts:
        for chunks in parts:
            columns = chunks.interactions()
            num_interactions += len(columns["event_key"])
            fingerprint += int(columns["event_key"].sum(dtype=np.uint64))
    removed = load_removed(connection).values()
    return StoreTotals(
        num_users=count_users(connection),
        num_interactions=num_interactions,
        fingerprint=fingerprint % 2**64,
        num_removed=sum(one.num_interactions for one in removed),
        removed_fingerprint=sum(one.fingerprint for one in removed) % 2**64,
    )
