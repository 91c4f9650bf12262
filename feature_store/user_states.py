"""SQL of user states: one vector per user, cached for readers, each with what it was made of and when it was written.

A vector is a function of (model, version of the upstream model, user, the user's interactions with arrival numbers
below `next_seq`): that is its key, so writing it again changes nothing. Vectors are never overwritten, only followed;
what is read as of a moment is therefore what a reader found at that moment, for as long as it is kept.

*Versions never mix.* One version at a time is in effect: the one whose `serving_from_ms` is the newest before the
moment asked for. Another one is filled beside it, unseen, until every user has a vector of it.

Shapes: U users or rows, R queries, W numbers of a vector.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray
from sqlalchemy import Connection, delete, func, or_, select, text

from feature_store.tables import upstream_version, user_state
from feature_store.values import insert_missing, values_table

Int64s = NDArray[np.int64]
Float32s = NDArray[np.float32]

ANY: Final = int(np.iinfo(np.int64).max)
"""A limit that nothing reaches."""
_USERS_PER_STATEMENT: Final = 4_000
_CHECKSUM_BYTES: Final = 4

_state, _version = user_state.c, upstream_version.c


@dataclass(frozen=True, kw_only=True, slots=True)
class NewVectors:
    """U vectors to store, each of another user."""

    user_id: Int64s
    next_seq: Int64s
    """i64[U], made of the interactions with smaller arrival numbers."""
    as_of_ms: Int64s
    """i64[U], event time of the newest of them."""
    vector: Float32s
    """f32[U, W], finite."""

    def __post_init__(self) -> None:
        if self.vector.dtype != np.float32 or self.vector.ndim != 2 or len(self.vector) != len(self.user_id):
            raise ValueError(f"vectors must be float32[U, W], not {self.vector.dtype}{list(self.vector.shape)}")
        if not np.isfinite(self.vector).all():
            raise ValueError("a vector with a number that is not finite must not be stored: leave its user out")


@dataclass(frozen=True, kw_only=True, slots=True)
class StateQuery:
    """R questions: the newest vector of a user that was there at a moment and knows nothing of what came after."""

    user_id: Int64s
    before_ms: Int64s
    """i64[R], made of what happened strictly before this event time (`ANY`: of whatever there is)."""
    known_before_ms: Int64s
    """i64[R], written, and its version in effect, strictly before this processing time."""
    below_seq: Int64s
    """i64[R], made of arrival numbers below this one only (`ANY`: of whatever there is)."""


@dataclass(frozen=True, kw_only=True, slots=True)
class UserVectors:
    """Vectors of R users or queries, in the order asked for; zeros and -1 where there is none."""

    user_id: Int64s
    version: Int64s
    """i64[R], of the upstream model; -1: no vector."""
    next_seq: Int64s
    as_of_ms: Int64s
    vector: Float32s
    """f32[R, W]"""
    damaged: Int64s
    """i64[K], users whose stored vector is not what was written, or not W finite numbers: as if they had none."""

    @property
    def is_there(self) -> NDArray[np.bool_]:
        """bool[R]."""
        return self.version >= 0

    def ages_s(self, at_ms: Int64s | int) -> Float32s:
        """f32[R], seconds of event time from what a vector knows to a moment, at least 0; NaN without a vector."""
        ages = np.maximum(at_ms - self.as_of_ms, 0) / 1000
        return np.where(self.is_there, ages, np.nan).astype(np.float32)


@dataclass(frozen=True, kw_only=True, slots=True)
class StoredVectors:
    """N vectors as they are stored, ascending by user, version and next_seq; i64[N], and f32[N, W]."""

    user_id: Int64s
    version: Int64s
    next_seq: Int64s
    as_of_ms: Int64s
    written_at_ms: Int64s
    vector: Float32s

    def columns(self) -> dict[str, NDArray[Any]]:
        """By name."""
        return {name: getattr(self, name) for name in self.__dataclass_fields__}


@dataclass(frozen=True, kw_only=True, slots=True)
class UpstreamVersion:
    """One version of the upstream model, as far as its vectors are concerned."""

    version: int
    created_at_ms: int
    serving_from_ms: int | None
    """Since when readers get its vectors; None: it is still being filled."""
    filled_up_to: int
    """Users up to this id have been looked at by its back-fill; -1: none. `ANY` once it has taken effect."""


@dataclass(frozen=True, kw_only=True, slots=True)
class StatePruning:
    """How long vectors that nobody would be served any more are kept for those who look back."""

    before_ms: int
    """Processing time: what was superseded before it goes."""
    states_max: int
    """Vectors kept per user and version."""
    expired_ms: int | None
    """Event time: vectors of users whose newest interaction has expired go; None: nothing expires."""


class UserStates:
    """The user states of one writer transaction: handed out by `StoreTransaction.user_states`."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection

    def lock(self) -> None:
        """Hold off `forget` until the transaction ends, so that nothing written here outlives its user."""
        if self._connection.dialect.name == "postgresql":
            self._connection.execute(text("LOCK TABLE user_state IN ROW EXCLUSIVE MODE"))

    def write(self, model: str, version: int, new: NewVectors, *, written_at_ms: Int64s | int) -> None:
        """Store vectors; those that are stored already stay as they are. written_at_ms: of each, or of all."""
        rows = [
            {
                "user_id": user_id,
                "model": model,
                "version": version,
                "next_seq": next_seq,
                "as_of_ms": as_of_ms,
                "written_at_ms": at_ms,
                "vector": _encoded(vector),
            }
            for user_id, next_seq, as_of_ms, at_ms, vector in zip(
                new.user_id.tolist(),
                new.next_seq.tolist(),
                new.as_of_ms.tolist(),
                np.broadcast_to(written_at_ms, new.user_id.shape).tolist(),
                new.vector,
                strict=True,
            )
        ]
        if rows:
            self._connection.execute(insert_missing(self._connection.dialect.name, user_state), rows)

    def begin_version(self, model: str, version: int, *, created_at_ms: int) -> None:
        """Note a version whose back-fill begins; one that is known stays as it is."""
        statement = insert_missing(self._connection.dialect.name, upstream_version)
        row = {"model": model, "version": version, "created_at_ms": created_at_ms, "filled_up_to": -1}
        self._connection.execute(statement.values(row))

    def filled(self, model: str, version: int, up_to: int) -> None:
        """Note how far the back-fill of a version has come."""
        statement = upstream_version.update().filter_by(model=model, version=version)
        self._connection.execute(statement.values(filled_up_to=up_to))

    def serve_version(self, model: str, version: int, *, from_ms: int) -> int:
        """From now on readers get the vectors of this version; returns since when, never before the version before."""
        newest = select(func.coalesce(func.max(_version.serving_from_ms), -1)).where(_version.model == model)
        at_ms = max(from_ms, int(self._connection.execute(newest).scalar_one()) + 1)
        statement = upstream_version.update().filter_by(model=model, version=version)
        # Everybody has been looked at: the last user's id must not stay behind when that user is forgotten.
        self._connection.execute(statement.values(serving_from_ms=at_ms, filled_up_to=ANY))
        return at_ms

    def drop_version(self, model: str, version: int) -> None:
        """Give a version up that was being filled; its vectors go with the next pruning."""
        self._connection.execute(
            delete(upstream_version).where(
                _version.model == model, _version.version == version, _version.serving_from_ms.is_(None)
            )
        )

    def forget(self, user_ids: Int64s) -> None:
        """Remove all vectors of users, and their ids."""
        if self._connection.dialect.name == "postgresql":
            # Waits for what is being written and holds off what comes; see `lock`.
            self._connection.execute(text("LOCK TABLE user_state IN SHARE ROW EXCLUSIVE MODE"))
        for part in _parts(user_ids):
            wanted = values_table(self._connection.dialect.name, {"user_id": part})
            ids = select(wanted.c.user_id)
            self._connection.execute(delete(user_state).where(_state.user_id.in_(ids)))
            # How far a back-fill has come is said by an id; one lower says the same once the user is gone.
            is_named = upstream_version.update().where(_version.filled_up_to.in_(ids))
            self._connection.execute(is_named.values(filled_up_to=_version.filled_up_to - 1))


def load_versions(connection: Connection, model: str) -> list[UpstreamVersion]:
    """All versions known of a model, ascending."""
    query = select(upstream_version).where(_version.model == model).order_by(_version.version)
    return [
        UpstreamVersion(
            version=row.version,
            created_at_ms=row.created_at_ms,
            serving_from_ms=row.serving_from_ms,
            filled_up_to=row.filled_up_to,
        )
        for row in connection.execute(query)
    ]


def load_vectors(connection: Connection, model: str, query: StateQuery, width: int) -> UserVectors:
    """The vector that answers each query; see `FeatureStore.user_vectors`."""
    versions = _versions_at(load_versions(connection, model), query.known_before_ms)
    found = _Found(query.user_id, width)
    for start in range(0, len(query.user_id), _USERS_PER_STATEMENT):
        part = slice(start, start + _USERS_PER_STATEMENT)
        columns = {
            "user_id": query.user_id[part],
            "version": versions[part],
            "before_ms": query.before_ms[part],
            "known_before_ms": query.known_before_ms[part],
            "below_seq": query.below_seq[part],
        }
        wanted = values_table(connection.dialect.name, columns)
        older = user_state.alias("older")
        newest_seq = (
            select(func.max(older.c.next_seq))
            .where(
                older.c.user_id == wanted.c.user_id,
                older.c.model == model,
                older.c.version == wanted.c.version,
                older.c.as_of_ms < wanted.c.before_ms,
                older.c.written_at_ms < wanted.c.known_before_ms,
                older.c.next_seq <= wanted.c.below_seq,
            )
            .scalar_subquery()
        )
        is_answer = (
            (_state.user_id == wanted.c.user_id)
            & (_state.model == model)
            & (_state.version == wanted.c.version)
            & (_state.next_seq == newest_seq)
        )
        for row in connection.execute(select(wanted.c.pos, user_state).join_from(wanted, user_state, is_answer)):
            found.put(start + row.pos, row)
    return found.vectors()


def load_stored(connection: Connection, model: str, width: int) -> StoredVectors:
    """Every vector of a model; see `UserStateStore.stored`."""
    query = select(user_state).where(_state.model == model).order_by(_state.user_id, _state.version, _state.next_seq)
    rows = connection.execute(query).all()
    vectors = [_decoded(row.vector, width) for row in rows]
    kept = [row for row, vector in zip(rows, vectors, strict=True) if vector is not None]
    names = ("user_id", "version", "next_seq", "as_of_ms", "written_at_ms")
    return StoredVectors(
        **{name: np.array([getattr(row, name) for row in kept], np.int64) for name in names},
        vector=np.array([vector for vector in vectors if vector is not None], np.float32).reshape(-1, width),
    )


def load_written_since(
    connection: Connection, model: str, version: int, since_ms: int, after: tuple[int, int], limit: int
) -> list[tuple[int, int]]:
    """(written_at_ms, user) of vectors written at or after a time, behind a pair of the same, in their order."""
    written_ms, user_id = after
    query = (
        select(_state.written_at_ms, _state.user_id)
        .where(_state.model == model, _state.version == version, _state.written_at_ms >= max(since_ms, written_ms))
        .where(or_(_state.written_at_ms > written_ms, _state.user_id > user_id))
        .order_by(_state.written_at_ms, _state.user_id)
        .limit(limit)
    )
    return [(row.written_at_ms, row.user_id) for row in connection.execute(query)]


def load_newest_seq(connection: Connection, model: str, version: int, user_ids: Int64s) -> Int64s:
    """i64[U], `next_seq` of each user's newest vector of a version; -1 where there is none."""
    newest = np.full(len(user_ids), -1)
    for start in range(0, len(user_ids), _USERS_PER_STATEMENT):
        wanted = values_table(connection.dialect.name, {"user_id": user_ids[start : start + _USERS_PER_STATEMENT]})
        query = (
            select(wanted.c.pos, func.max(_state.next_seq).label("next_seq"))
            .join_from(wanted, user_state, _state.user_id == wanted.c.user_id)
            .where(_state.model == model, _state.version == version)
            .group_by(wanted.c.pos)
        )
        for row in connection.execute(query):
            newest[start + row.pos] = row.next_seq
    return newest


def prune(
    connection: Connection, model: str, pruning: StatePruning, *, after_user: int, max_users: int
) -> tuple[int, int | None]:
    """Remove what nobody asks for any more, of the next users; (vectors removed, user to go on after or None)."""
    ids = select(_state.user_id).where(_state.user_id > after_user).distinct().order_by(_state.user_id)
    user_ids = connection.execute(ids.limit(max_users)).scalars().all()
    kept = _kept_versions(load_versions(connection, model), pruning.before_ms)
    num_removed = 0
    if user_ids:
        newer, kin = user_state.alias("newer"), user_state.alias("kin")
        is_same = (newer.c.user_id == _state.user_id) & (newer.c.model == model) & (newer.c.version == _state.version)
        is_superseded = (
            select(newer.c.user_id)
            .where(is_same, newer.c.next_seq > _state.next_seq, newer.c.written_at_ms < pruning.before_ms)
            .exists()
        )
        num_newer = (
            select(func.count())
            .select_from(kin)
            .where(kin.c.user_id == _state.user_id, kin.c.model == model, kin.c.version == _state.version)
            .where(kin.c.next_seq > _state.next_seq)
            .scalar_subquery()
        )
        reasons = [_state.version.not_in(kept), is_superseded, num_newer >= pruning.states_max]
        if pruning.expired_ms is not None:
            reasons.append(_state.as_of_ms < pruning.expired_ms)
        is_in_slice = (_state.user_id > after_user) & (_state.user_id <= user_ids[-1]) & (_state.model == model)
        # The keys first: what is deleted must not change which others are superseded.
        doomed = connection.execute(
            select(_state.user_id, _state.version, _state.next_seq).where(is_in_slice, or_(*reasons))
        ).all()
        num_removed = len(doomed)
        _delete(connection, model, doomed)
    if len(user_ids) == max_users:
        return num_removed, user_ids[-1]
    connection.execute(delete(upstream_version).where(_version.model == model, _version.version.not_in(kept)))
    return num_removed, None


def _delete(connection: Connection, model: str, keys: Iterable[Any]) -> None:
    columns = np.array([tuple(key) for key in keys], np.int64).reshape(-1, 3)
    for start in range(0, len(columns), _USERS_PER_STATEMENT):
        user_id, version, next_seq = np.ascontiguousarray(columns[start : start + _USERS_PER_STATEMENT].T)
        wanted = values_table(connection.dialect.name, {"user_id": user_id, "version": version, "next_seq": next_seq})
        is_wanted = (
            select(wanted.c.pos)
            .where(
                wanted.c.user_id == _state.user_id,
                wanted.c.version == _state.version,
                wanted.c.next_seq == _state.next_seq,
            )
            .exists()
        )
        ids = _state.user_id.in_(select(wanted.c.user_id))
        connection.execute(delete(user_state).where(_state.model == model, ids, is_wanted))


def _kept_versions(versions: list[UpstreamVersion], before_ms: int) -> list[int]:
    """In effect at `before_ms` or later, or still being filled."""
    served = sorted((v.serving_from_ms, v.version) for v in versions if v.serving_from_ms is not None)
    kept = [version for (_, version), (end_ms, _) in pairwise([*served, (ANY, 0)]) if end_ms >= before_ms]
    return kept + [v.version for v in versions if v.serving_from_ms is None]


def _versions_at(versions: list[UpstreamVersion], known_before_ms: Int64s) -> Int64s:
    """i64[R], the version in effect just before each time; -1 before the first."""
    served = sorted((v.serving_from_ms, v.version) for v in versions if v.serving_from_ms is not None)
    starts = np.array([from_ms for from_ms, _ in served], np.int64)
    numbers = np.array([-1, *(version for _, version in served)], np.int64)
    found: Int64s = numbers[np.searchsorted(starts, known_before_ms, side="left")]
    return found


def version_in_effect(versions: list[UpstreamVersion]) -> int | None:
    """The version that readers get now; None before the first."""
    served = [(v.serving_from_ms, v.version) for v in versions if v.serving_from_ms is not None]
    return max(served)[1] if served else None


class _Found:
    """Collects the answers to R queries."""

    def __init__(self, user_id: Int64s, width: int) -> None:
        self._user_id, self._width = user_id, width
        self._version, self._next_seq, self._as_of_ms = (np.full(len(user_id), -1) for _ in range(3))
        self._vector = np.zeros((len(user_id), width), np.float32)
        self._damaged: set[int] = set()

    def put(self, place: int, row: Any) -> None:
        vector = _decoded(row.vector, self._width)
        if vector is None:
            self._damaged.add(row.user_id)
            return
        self._version[place], self._next_seq[place], self._as_of_ms[place] = row.version, row.next_seq, row.as_of_ms
        self._vector[place] = vector

    def vectors(self) -> UserVectors:
        return UserVectors(
            user_id=self._user_id,
            version=self._version,
            next_seq=self._next_seq,
            as_of_ms=self._as_of_ms,
            vector=self._vector,
            damaged=np.array(sorted(self._damaged), np.int64),
        )


def count_vectors(connection: Connection) -> dict[str, dict[int, int]]:
    """Model → version → vectors stored."""
    query = select(_state.model, _state.version, func.count()).group_by(_state.model, _state.version)
    found: dict[str, dict[int, int]] = {}
    for model, version, count in connection.execute(query.order_by(_state.model, _state.version)):
        found.setdefault(model, {})[version] = count
    return found


def is_sound(stored: bytes) -> bool:
    """Whether a stored vector is what was written, and finite."""
    return _decoded(stored, max(len(stored) - _CHECKSUM_BYTES, 0) // 4) is not None


def _encoded(vector: Float32s) -> bytes:
    content = vector.astype("<f4").tobytes()
    return zlib.crc32(content).to_bytes(_CHECKSUM_BYTES, "little") + content


def _decoded(stored: bytes, width: int) -> Float32s | None:
    content = stored[_CHECKSUM_BYTES:]
    if len(content) != 4 * width or zlib.crc32(content) != int.from_bytes(stored[:_CHECKSUM_BYTES], "little"):
        return None
    vector = np.frombuffer(content, "<f4").astype(np.float32)
    return vector if np.isfinite(vector).all() else None


def _parts(user_ids: Int64s) -> Iterator[Int64s]:
    for start in range(0, len(user_ids), _USERS_PER_STATEMENT):
        yield user_ids[start : start + _USERS_PER_STATEMENT]
