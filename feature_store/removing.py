"""Removing interactions: chunks that retention has left behind, forgotten users, and the account of both.

Chunks are removed from the old end of a history, whole, and never rewritten. The last one removed stays as an *emptied
chunk*: no interactions, its bytes gone, `first_ms` = `last_ms` = the time of the last interaction it held. It keeps the
user's arrival numbers going when nothing else is left, and says up to where everything was removed: an event from
before that comes again is refused, not accepted a second time. So a history's first row is chunk 0 or an emptied chunk.

Every removal is added to the table `removal` in its transaction: accepted = stored + removed, always.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray
from sqlalchemy import BigInteger, ColumnElement, Connection, Row, Select, cast, false, func, or_, select

from feature_store.chunk_writes import remove_chunks
from feature_store.chunks import decode_chunks, encode_chunks
from feature_store.errors import ChunkCorruptError
from feature_store.interactions import COLUMN_DTYPES
from feature_store.publications import load_watermark
from feature_store.records import PruneSlice
from feature_store.retention import Retention
from feature_store.tables import history_chunk, removal
from feature_store.values import insert_missing, values_table

PRUNE_SOURCE: Final = "prune"
FORGET_SOURCE: Final = "forget"
"""Writers in the account; ingest workers go by their partition."""

_CHUNKS_CAUGHT_UP: Final = 3
"""Chunks that a history may lose beyond those it grows by: it catches up with new settings in short transactions."""
_USERS_PER_STATEMENT: Final = 4_000
_ROWS_PER_PART: Final = 1_000

_chunk = history_chunk.c
_REMOVABLE: Final[tuple[ColumnElement[Any], ...]] = (
    _chunk.user_id,
    _chunk.chunk_no,
    _chunk.n,
    _chunk.next_seq,
    _chunk.payload,
)


@dataclass(frozen=True, kw_only=True, slots=True)
class GrownUsers:
    """U users whose tail has moved into a new chunk."""

    user_id: NDArray[np.int64]
    ends: NDArray[np.int64]
    """i64[U], interactions of the whole history: the number of the next one in it."""
    num_begun: NDArray[np.int64]
    """i64[U], chunks that this append has begun."""


def count_removals(connection: Connection) -> int:
    """Interactions forgotten and pruned since ever: what may have changed the end of a history without an append."""
    query = select(func.coalesce(func.sum(removal.c.num_interactions), 0))
    return int(connection.execute(query.where(removal.c.source.in_((PRUNE_SOURCE, FORGET_SOURCE)))).scalar_one())


def count_forgotten(connection: Connection) -> int:
    """Interactions forgotten since ever."""
    query = select(func.coalesce(func.sum(removal.c.num_interactions), 0)).where(removal.c.source == FORGET_SOURCE)
    return int(connection.execute(query).scalar_one())


def remove_after_growth(connection: Connection, users: GrownUsers, retention: Retention, source: str) -> None:
    """Remove the oldest chunks of users whose histories have just grown by whole chunks: as many, and a few more.

    Raises:
        ConcurrentAppendError: another writer was at the same chunks; the transaction must be rolled back.
    """
    first = slice(0, _USERS_PER_STATEMENT)  # the others have their turn when they grow again
    columns = {
        "user_id": users.user_id,
        "kept_no": retention.first_chunk(users.ends),
        "most": users.num_begun + _CHUNKS_CAUGHT_UP,
    }
    wanted = values_table(connection.dialect.name, {name: values[first] for name, values in columns.items()})
    oldest = history_chunk.alias("oldest")
    oldest_no = select(func.min(oldest.c.chunk_no)).where(oldest.c.user_id == wanted.c.user_id).scalar_subquery()
    is_left_behind = _chunk.chunk_no < wanted.c.kept_no
    removal_ms = _removal_ms(connection, retention)
    query = (
        select(*_REMOVABLE)
        .join_from(wanted, history_chunk, _chunk.user_id == wanted.c.user_id)
        .where(_chunk.chunk_no <= oldest_no + wanted.c.most)
        .where(_is_removable(is_left_behind, removal_ms))
        .order_by(_chunk.user_id, _chunk.chunk_no)
    )
    _remove(connection, connection.execute(query).all(), source)


def prune(
    connection: Connection, retention: Retention, *, after_user: int, max_users: int, max_chunks: int
) -> PruneSlice:
    """Remove what has expired of the next users; see `FeatureStore.prune`."""
    query = select(_chunk.user_id).distinct().where(_chunk.user_id > after_user).order_by(_chunk.user_id)
    user_ids = connection.execute(query.limit(max_users)).scalars().all()
    if not user_ids:
        return PruneSlice(num_users=0, num_chunks=0, num_interactions=0, next_after=None)
    found = connection.execute(_expired_of_range(connection, retention, after_user, user_ids[-1]).limit(max_chunks))
    rows = found.all()
    removed = _remove(connection, rows, PRUNE_SOURCE)
    next_after = user_ids[-1] if len(user_ids) == max_users else None
    if len(rows) == max_chunks:  # there may be more of the last user, and of those after
        next_after = rows[-1].user_id - 1
    return PruneSlice(
        num_users=len(user_ids),
        num_chunks=removed.num_chunks,
        num_interactions=removed.num_interactions,
        next_after=next_after,
    )


def forget_histories(connection: Connection, user_ids: NDArray[np.int64]) -> int:
    """Remove all chunks of these (distinct) users, damaged ones too; returns how many users had any."""
    num_forgotten = 0
    for start in range(0, len(user_ids), _USERS_PER_STATEMENT):
        part = {"user_id": user_ids[start : start + _USERS_PER_STATEMENT]}
        wanted = values_table(connection.dialect.name, part)
        is_wanted = _chunk.user_id.in_(select(wanted.c.user_id))
        query = select(*_REMOVABLE).where(is_wanted).execution_options(yield_per=_ROWS_PER_PART)
        found: set[int] = set()
        num_interactions, fingerprint = 0, 0
        with connection.execute(query) as result:
            for rows in result.partitions():
                sums = _sums(rows)
                num_interactions += sums.num_interactions
                fingerprint += sums.fingerprint
                found.update(row.user_id for row in rows)
        record_removed(connection, FORGET_SOURCE, num_interactions, fingerprint)
        num_forgotten += len(found)
        connection.execute(history_chunk.delete().where(is_wanted))
    return num_forgotten


def record_removed(connection: Connection, source: str, num_interactions: int, fingerprint: int) -> None:
    """Add to what one writer has removed; the sum wraps around modulo 2**64 and is stored as a signed number."""
    if num_interactions == 0:
        return
    empty = {"source": source, "num_interactions": 0, "fingerprint": 0}
    connection.execute(insert_missing(connection.dialect.name, removal).values(empty))
    # Locked and added here: SQL would overflow where the sum is meant to wrap around.
    query = select(removal.c.num_interactions, removal.c.fingerprint).filter_by(source=source).with_for_update()
    before = connection.execute(query).one()
    values = {
        "num_interactions": before.num_interactions + num_interactions,
        "fingerprint": _signed(before.fingerprint + fingerprint),
    }
    connection.execute(removal.update().filter_by(source=source).values(values))


def load_removed(connection: Connection) -> dict[str, Row[Any]]:
    """Writer → its row of `removal`: `num_interactions`, and `fingerprint`, a signed number."""
    return {row.source: row for row in connection.execute(select(removal).order_by(removal.c.source))}


def emptied_payload() -> bytes:
    """The bytes of a chunk without interactions."""
    (payload,) = encode_chunks({name: np.empty(0, dtype) for name, dtype in COLUMN_DTYPES.items()}, np.array([0]))
    return payload


@dataclass(frozen=True, kw_only=True, slots=True)
class _Sums:
    num_chunks: int = 0
    num_interactions: int = 0
    fingerprint: int = 0


def _removal_ms(connection: Connection, retention: Retention) -> int | None:
    return retention.removal_ms(load_watermark(connection)) if retention.max_age_ms else None


def _is_removable(is_left_behind: ColumnElement[bool], removal_ms: int | None) -> ColumnElement[bool]:
    """Left behind by count or by age; and emptied chunks, which go when another one takes their place."""
    is_removable = or_(_chunk.n == 0, is_left_behind)
    return is_removable if removal_ms is None else or_(is_removable, _chunk.last_ms < removal_ms)


def _expired_of_range(connection: Connection, retention: Retention, after_user: int, last_user: int) -> Select[Any]:
    """Chunks that may be removed, and emptied ones, of users in (after_user, last_user], ordered."""
    other, tail = history_chunk.alias("other"), history_chunk.alias("tail")
    tails = (
        select(other.c.user_id, func.max(other.c.chunk_no).label("chunk_no"))
        .where(other.c.user_id > after_user, other.c.user_id <= last_user)
        .group_by(other.c.user_id)
        .subquery("tails")
    )
    is_left_behind: ColumnElement[bool] = false()
    if retention.max_history:  # left behind when so many interactions follow the chunk: the tail never is
        chunk_end = (cast(_chunk.chunk_no, BigInteger) + 1) * retention.chunk_len
        history_end = cast(tail.c.chunk_no, BigInteger) * retention.chunk_len + tail.c.n
        is_left_behind = chunk_end <= history_end - retention.max_history
    return (
        select(*_REMOVABLE)
        .join_from(tails, tail, (tail.c.user_id == tails.c.user_id) & (tail.c.chunk_no == tails.c.chunk_no))
        .join(history_chunk, _chunk.user_id == tails.c.user_id)
        .where(_is_removable(is_left_behind, _removal_ms(connection, retention)))
        .order_by(_chunk.user_id, _chunk.chunk_no)
    )


def _remove(connection: Connection, rows: Sequence[Row[Any]], source: str) -> _Sums:
    """Remove chunks, ordered by user and number, each user's the oldest there are; the last of each is emptied."""
    # An emptied chunk alone stays as it is.
    users_with_content = {row.user_id for row in rows if row.n > 0}
    rows = [row for row in rows if row.user_id in users_with_content]
    if not rows:
        return _Sums()
    columns = {
        name: np.array([getattr(row, name) for row in rows], np.int64)
        for name in ("user_id", "chunk_no", "n", "next_seq")
    }
    is_last = np.append(columns["user_id"][1:] != columns["user_id"][:-1], True)
    remove_chunks(connection, columns, is_last, emptied_payload())
    sums = _sums(rows)
    record_removed(connection, source, sums.num_interactions, sums.fingerprint)
    return sums


def _sums(rows: Sequence[Row[Any]]) -> _Sums:
    """Of chunks that go: how many have content, how many interactions they hold, and the sum of the keys.

    What is in a damaged chunk counts by its row; its keys cannot be known, so that the account no longer fits.
    """
    filled = [row for row in rows if row.n > 0]
    try:
        fingerprint = _sum_of_keys(filled)
    except ChunkCorruptError:
        fingerprint = sum(_sum_of_keys([row]) for row in filled if _is_sound(row))
    return _Sums(num_chunks=len(filled), num_interactions=sum(row.n for row in filled), fingerprint=fingerprint % 2**64)


def _sum_of_keys(rows: Sequence[Row[Any]]) -> int:
    n, user_id, chunk_no = (np.array([getattr(row, name) for row in rows], np.int64) for name in _NUMBERS)
    columns = decode_chunks([row.payload for row in rows], n, user_id, chunk_no)
    return int(columns["event_key"].sum(dtype=np.uint64))


_NUMBERS: Final = ("n", "user_id", "chunk_no")


def _is_sound(row: Row[Any]) -> bool:
    try:
        _sum_of_keys([row])
    except ChunkCorruptError:
        return False
    return True


def _signed(number: int) -> int:
    return (number + 2**63) % 2**64 - 2**63
