"""Appending interactions to the stored histories: deduplicated, in order, rewriting only the chunks that change.

With retention, what it would not keep is refused: it has expired. That must hold also for what was stored and removed,
so that nothing is accepted twice: an event is expired if it is before the horizon, if `max_history` newer ones are
stored, or if it is from before the last interaction that was removed. Newer events of the same batch count for nothing:
whether an event is learned from does not depend on how many were polled with it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Final

import numpy as np
from numpy.typing import NDArray
from sqlalchemy import Connection, text

from feature_store.chunk_rows import ChunkRows, chunks_ending_since, newest_chunks
from feature_store.chunk_writes import ChunkWrite, write_chunks
from feature_store.chunks import encode_chunks
from feature_store.interactions import COLUMN_DTYPES, AppendResult, Columns, Interactions
from feature_store.jagged import concat_ranges, offsets_of, rank_in_group
from feature_store.merging import Merge, Places, merge
from feature_store.publications import load_watermark
from feature_store.removing import GrownUsers, count_removals, remove_after_growth
from feature_store.retention import Retention
from feature_store.tails import TailCache

_NO_FLOOR = np.iinfo(np.int64).min
ROWS_AT_ONCE: Final = 32_768
"""Rows of a batch that are appended together, about: what is stored of their users is in memory at the same time."""
_MIXER: Final = np.uint64(0x9E3779B97F4A7C15)
"""2^64 over the golden ratio: multiplying by it spreads numbers over the upper bits."""


@dataclass(frozen=True, kw_only=True, slots=True)
class _Users:
    """The U users of a batch, in order of their ids, and the end of what is stored of each."""

    ids: NDArray[np.int64]
    first_chunk: NDArray[np.int64]
    """i64[U], row of the user's first loaded chunk that has not been emptied."""
    num_chunks: NDArray[np.int64]
    """i64[U], loaded chunks from that one on."""
    base_chunk_no: NDArray[np.int64]
    """i64[U], number of that chunk, or of the one to be written first; 0 for a new user."""
    floor_ms: NDArray[np.int64]
    """i64[U], time of the last interaction removed, if the emptied chunk that says so was loaded."""
    next_seq: NDArray[np.int64]
    """i64[U], arrivals accepted so far."""

    @staticmethod
    def of(ids: NDArray[np.int64], chunks: ChunkRows) -> _Users:
        num_chunks = np.bincount(chunks.pos, minlength=len(ids))
        offsets = offsets_of(num_chunks)
        base_chunk_no = np.zeros(len(ids), np.int64)
        next_seq = np.zeros(len(ids), np.int64)
        floor_ms = np.full(len(ids), _NO_FLOOR)
        is_known = num_chunks > 0
        first = offsets[:-1][is_known]
        base_chunk_no[is_known] = chunks.chunk_no[first]
        next_seq[is_known] = chunks.next_seq[offsets[1:][is_known] - 1]
        is_emptied = np.zeros(len(ids), np.bool_)
        is_emptied[is_known] = chunks.length[first] == 0
        floor_ms[is_emptied] = chunks.first_ms[offsets[:-1][is_emptied]]
        return _Users(
            ids=ids,
            first_chunk=offsets[:-1] + is_emptied,
            num_chunks=num_chunks - is_emptied,
            base_chunk_no=base_chunk_no + is_emptied,
            floor_ms=floor_ms,
            next_seq=next_seq,
        )


@dataclass(kw_only=True, slots=True)
class Appending:
    """What the appends of one transaction share."""

    connection: Connection
    retention: Retention
    tails: TailCache
    """Where to look for tails before SQL."""
    written: list[ChunkWrite] = field(default_factory=list)
    """What was written so far."""
    removals: int | None = None
    """What had been forgotten and pruned when this transaction first looked tails up."""

    def keep_tails(self) -> None:
        """Let later transactions find what this one wrote; to be called once it is committed."""
        for write in self.written:
            assert self.removals is not None
            self.tails.keep(write, self.retention.chunk_len, self.removals)


def append(appending: Appending, interactions: Interactions, source: str) -> AppendResult:
    """Append a batch inside the caller's transaction; see `StoreTransaction.append`.

    `source`: who removes what this append pushes out, for the account.
    """
    connection, retention = appending.connection, appending.retention
    if connection.dialect.name == "postgresql":
        # Shared by appends, exclusive against forget_users: no append can write back a history it read before that.
        connection.execute(text("LOCK TABLE history_chunk IN ROW EXCLUSIVE MODE"))
    horizon_ms = retention.horizon_ms(load_watermark(connection)) if retention.max_age_ms else None
    rows = np.arange(len(interactions))
    if horizon_ms is not None:
        rows = np.flatnonzero(interactions.event_time_ms >= horizon_ms)
    result = AppendResult.of_expired(len(interactions))
    for group in _groups_of_users(interactions.user_id, rows):
        result.put(group, _append_users(appending, interactions.take(group), source))
    return result


def _groups_of_users(user_id: NDArray[np.int64], rows: NDArray[np.int64]) -> Iterator[NDArray[np.int64]]:
    """The rows in groups of about `ROWS_AT_ONCE` that have no user in common.

    What is stored of the users, held several times over, is most of the memory of an append.
    """
    num_groups = 1 + len(rows) // ROWS_AT_ONCE
    # Mixed, because the users of one batch may all have the same remainder: that of their partition.
    mixed = (user_id[rows].astype(np.uint64) * _MIXER) >> np.uint64(32)
    group = mixed % np.uint64(num_groups)
    for number in range(num_groups):
        found = rows[group == number]
        if len(found):
            yield found


def _append_users(appending: Appending, interactions: Interactions, source: str) -> AppendResult:
    """Append all rows that a batch has of some users, none of them before the horizon."""
    connection, retention = appending.connection, appending.retention
    # Step 1: read the end of each history, as far back as the new interactions reach.
    ids, group = np.unique(interactions.user_id, return_inverse=True)
    first_new_ms = np.full(len(ids), np.iinfo(np.int64).max)
    np.minimum.at(first_new_ms, group, interactions.event_time_ms)
    chunks = _load_ends(appending, ids, first_new_ms)
    stored = chunks.interactions()
    users = _Users.of(ids, chunks)
    # Step 2: decide order and duplicates; number the accepted in order of arrival.
    stored_places = Places.of(np.repeat(chunks.pos, chunks.length), stored)
    new_places = Places.of(group, interactions.columns)
    kept = np.flatnonzero(~_are_expired(users, stored_places, new_places, retention.max_history))
    num_rows = len(interactions)
    if len(kept) < num_rows:
        interactions, group = interactions.take(kept), group[kept]
    merged = merge(stored_places, new_places.take(kept), len(ids))
    seq = _assign_seq(group, merged.accepted, users.next_seq)
    # Step 3: write the chunks from the first changed interaction on.
    new = interactions.columns | {"seq": seq}
    columns = {name: np.concatenate([stored[name], new[name]]) for name in COLUMN_DTYPES}
    num_accepted = np.bincount(group[merged.accepted], minlength=len(ids))
    users = replace(users, next_seq=users.next_seq + num_accepted)
    write = _changed_chunks(users, chunks, columns, merged, retention.chunk_len)
    write_chunks(connection, write)
    appending.written.append(write)
    # Step 4: remove what these histories have left behind.
    if retention.is_on:
        _remove_left_behind(connection, users, merged, retention, source)
    result = AppendResult.of_expired(num_rows)
    is_expired = np.zeros(len(kept), np.bool_)
    result.put(kept, AppendResult(accepted=merged.accepted, seq=seq, late=merged.late, expired=is_expired))
    return result


def _are_expired(users: _Users, stored: Places, new: Places, max_history: int) -> NDArray[np.bool_]:
    """bool[N]: new rows that were removed once, or that max_history (0: any number of) stored ones leave behind."""
    is_expired: NDArray[np.bool_] = new.event_time_ms <= users.floor_ms[new.group]
    if len(stored) == 0:
        return is_expired
    offsets = offsets_of(np.bincount(stored.group, minlength=len(users.ids)))
    num_stored = np.diff(offsets)
    if is_expired.any():
        # Of the floor's millisecond, only what is before the first interaction that is left.
        first = stored.take(np.minimum(offsets[new.group], len(stored) - 1))
        is_expired &= (num_stored[new.group] == 0) | new.is_before(first)
    is_full = num_stored >= max_history
    if max_history and is_full.any():
        oldest_kept = stored.take(np.maximum(offsets[1:] - max_history, 0))
        is_expired |= is_full[new.group] & new.is_before(oldest_kept.take(new.group))
    return is_expired


def _remove_left_behind(
    connection: Connection, users: _Users, merged: Merge, retention: Retention, source: str
) -> None:
    """Remove old chunks of the users whose tail has moved into a new chunk: once per chunk_len interactions."""
    lengths = np.diff(merged.offsets)
    num_chunks = -(-lengths // retention.chunk_len)
    grown = np.flatnonzero(num_chunks > users.num_chunks)
    if len(grown):
        grown_users = GrownUsers(
            user_id=users.ids[grown],
            ends=users.base_chunk_no[grown] * retention.chunk_len + lengths[grown],
            num_begun=num_chunks[grown] - users.num_chunks[grown],
        )
        remove_after_growth(connection, grown_users, retention, source)


def _load_ends(appending: Appending, user_ids: NDArray[np.int64], first_new_ms: NDArray[np.int64]) -> ChunkRows:
    """The tail chunk of every user, and all chunks back to the one that the earliest new interaction falls in."""
    connection = appending.connection
    chunks = _load_tails(appending, user_ids)
    # At the tail's very first millisecond the place may still be in the chunk before it: only the keys could tell.
    reaches_back = (first_new_ms[chunks.pos] <= chunks.first_ms) & (chunks.chunk_no > 0)
    if reaches_back.any():
        asked = chunks.pos[reaches_back]
        deep = chunks_ending_since(connection, user_ids[asked], first_new_ms[asked])
        chunks = chunks.replaced(reaches_back, deep.moved_to(asked[deep.pos]))
    chunks.refuse_gaps(appending.retention.chunk_len)
    return chunks


def _load_tails(appending: Appending, user_ids: NDArray[np.int64]) -> ChunkRows:
    if appending.removals is None:
        appending.removals = count_removals(appending.connection)
    is_written = np.zeros(len(user_ids), np.bool_)
    for write in appending.written:  # by this transaction: not kept yet
        is_written |= np.isin(user_ids, write.user_id)
    asked = np.flatnonzero(~is_written)
    known, unknown = appending.tails.find(user_ids[asked], appending.removals)
    unread = np.concatenate([np.flatnonzero(is_written), asked[unknown]])
    read = newest_chunks(appending.connection, user_ids[unread], 1)
    known = known.moved_to(asked[known.pos])
    return known.replaced(np.zeros(len(known), np.bool_), read.moved_to(unread[read.pos]))


def _assign_seq(
    group: NDArray[np.int64], accepted: NDArray[np.bool_], next_seq: NDArray[np.int64]
) -> NDArray[np.uint32]:
    """Arrival numbers u32[N]: each user's accepted rows count on from its `next_seq`; 0 for the others."""
    rows = np.flatnonzero(accepted)
    rows = rows[np.argsort(group[rows], kind="stable")]
    numbers = next_seq[group[rows]] + rank_in_group(group[rows], len(next_seq))
    assert len(numbers) == 0 or numbers.max() <= np.iinfo(np.uint32).max
    seq = np.zeros(len(accepted), np.uint32)
    seq[rows] = numbers
    return seq


def _changed_chunks(users: _Users, chunks: ChunkRows, columns: Columns, merged: Merge, chunk_len: int) -> ChunkWrite:
    """Cut every changed history into chunks again, from the first interaction that is new or has moved."""
    lengths = np.diff(merged.offsets)
    first_local = merged.first_changed // chunk_len
    num_writes = np.where(merged.first_changed < lengths, -(-lengths // chunk_len) - first_local, 0)
    group = np.repeat(np.arange(len(lengths)), num_writes)
    local = concat_ranges(first_local, num_writes)
    starts = merged.offsets[group] + local * chunk_len
    chunk_lengths = np.minimum(chunk_len, merged.offsets[group + 1] - starts)
    source = merged.source[concat_ranges(starts, chunk_lengths)]
    content = {name: column[source] for name, column in columns.items()}
    ends = np.cumsum(chunk_lengths)
    is_stored = local < users.num_chunks[group]
    expected_seq = np.full(len(group), -1)
    expected_seq[is_stored] = chunks.next_seq[(users.first_chunk[group] + local)[is_stored]]
    return ChunkWrite(
        user_id=users.ids[group],
        chunk_no=users.base_chunk_no[group] + local,
        n=chunk_lengths,
        first_ms=content["event_time_ms"][ends - chunk_lengths],
        last_ms=content["event_time_ms"][ends - 1],
        next_seq=users.next_seq[group],
        expected_seq=expected_seq,
        payload=encode_chunks(content, chunk_lengths),
    )
