"""Looking over the whole store: how much is in it, and whether every stored history is what it must be."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import groupby
from operator import attrgetter
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray
from sqlalchemy import Connection, Row, func, or_, select

from feature_store.chunk_rows import count_users
from feature_store.chunks import decode_chunks, encode_chunks
from feature_store.errors import ChunkCorruptError
from feature_store.jagged import offsets_of
from feature_store.publications import load_watermark
from feature_store.records import AuditTotals, Finding, StoreStats
from feature_store.removing import FORGET_SOURCE, load_removed
from feature_store.retention import Retention
from feature_store.tables import history_chunk, log_position, user_state
from feature_store.user_states import count_vectors, is_sound, load_versions, version_in_effect

_CHUNKS_PER_PART: Final = 1_000
"""Chunks looked at together; a part holds whole users, so one with a longer history makes a larger part."""


def stats(connection: Connection, retention: Retention) -> StoreStats:
    """Counts from the rows alone: no chunk is decoded."""
    chunk = history_chunk.c
    query = select(
        func.count(), func.coalesce(func.sum(chunk.n), 0), func.coalesce(func.sum(func.length(chunk.payload)), 0)
    )
    num_chunks, num_interactions, num_bytes = connection.execute(query.select_from(history_chunk)).one()
    positions: dict[str, dict[str, dict[int, int]]] = {}
    for row in connection.execute(select(log_position).order_by(*log_position.primary_key)):
        positions.setdefault(row.log_id, {}).setdefault(row.topic, {})[row.partition] = row.next_offset
    watermark_ms, vectors = load_watermark(connection), count_vectors(connection)
    in_effect = {model: version_in_effect(load_versions(connection, model)) for model in vectors}
    return StoreStats(
        num_users=count_users(connection),
        num_interactions=int(num_interactions),
        num_chunks=num_chunks,
        num_bytes=int(num_bytes),
        positions=positions,
        removed={source: row.num_interactions for source, row in load_removed(connection).items()},
        watermark_ms=watermark_ms,
        horizon_ms=retention.horizon_ms(watermark_ms),
        vectors=vectors,
        upstream_versions={model: version for model, version in in_effect.items() if version is not None},
    )


def verify(connection: Connection, chunk_len: int, on_finding: Callable[[Finding], None]) -> AuditTotals:
    """Look at every chunk of every user and at every position; `on_finding` hears what is wrong, where.

    Each chunk must decode (size, checksum, version) and be the canonical encoding of its content; a user's chunks must
    be numbered from 0 and be full but the last; interactions must rise strictly by (event time, event key) through all
    chunks; `first_ms`, `last_ms` and `n` must be the content's; arrival numbers must be 0, 1, 2, … each once, below
    the `next_seq` of their chunk; the tail's `next_seq` must be the number of interactions.

    A user's first chunk may have been emptied by retention, and then has any number: as many of its interactions may be
    gone as the chunks up to it held, nothing that is left may be from before its time, and the interactions gone from
    all histories may not be more than retention says it has removed.

    A user's vector must have its checksum, be finite, and know no more arrivals than there are.
    """
    removed = load_removed(connection)
    num_expired = sum(row.num_interactions for source, row in removed.items() if source != FORGET_SOURCE)
    num_users, num_chunks, num_interactions, num_gone = 0, 0, 0, 0
    query = select(history_chunk).order_by(*history_chunk.primary_key).execution_options(yield_per=_CHUNKS_PER_PART)
    with connection.execute(query) as result:
        for rows in _whole_users(result):
            part = _Part.of(rows)
            for finding in part.findings(chunk_len, may_be_emptied=num_expired > 0):
                on_finding(finding)
            num_users += int(part.is_first.sum())
            num_chunks += len(rows)
            num_interactions += int(part.n.sum())
            num_gone += int(part.num_gone()[part.has_emptied()].sum())
    if num_gone > num_expired > 0:
        on_finding(
            Finding(f"{num_gone} interactions are gone from histories, but retention has removed only {num_expired}")
        )
    for source in (source for source, row in removed.items() if row.num_interactions < 0):
        on_finding(Finding(f"the number of interactions removed by {source!r} is negative"))
    position = log_position.c
    for row in connection.execute(select(log_position).where(or_(position.next_offset < 0, position.partition < 0))):
        on_finding(
            Finding(
                f"position of {row.topic}/{row.partition} in log {row.log_id!r} is {row.next_offset}: it is negative"
            )
        )
    return AuditTotals(
        num_users=num_users,
        num_chunks=num_chunks,
        num_interactions=num_interactions,
        num_positions=connection.execute(select(func.count()).select_from(log_position)).scalar_one(),
        num_vectors=_verify_vectors(connection, on_finding),
    )


def _verify_vectors(connection: Connection, on_finding: Callable[[Finding], None]) -> int:
    """How many were looked at."""
    chunk, num_vectors = history_chunk.c, 0
    next_seq = select(chunk.user_id, func.max(chunk.next_seq).label("next_seq")).group_by(chunk.user_id).subquery()
    query = (
        select(user_state, next_seq.c.next_seq.label("history_seq"))
        .join_from(user_state, next_seq, user_state.c.user_id == next_seq.c.user_id, isouter=True)
        .order_by(*user_state.primary_key)
        .execution_options(yield_per=_CHUNKS_PER_PART)
    )
    with connection.execute(query) as result:
        for row in result:
            num_vectors += 1
            vector = f"the vector of version {row.version} below {row.next_seq} for model {row.model!r}"
            if not is_sound(row.vector):
                on_finding(Finding(f"{vector} is damaged", row.user_id))
            if row.history_seq is not None and row.next_seq > row.history_seq:
                on_finding(Finding(f"{vector} knows more than the {row.history_seq} arrivals there are", row.user_id))
    return num_vectors


def _whole_users(rows: Iterable[Row[Any]]) -> Iterator[list[Row[Any]]]:
    part: list[Row[Any]] = []
    for _, chunks in groupby(rows, key=attrgetter("user_id")):
        part += chunks
        if len(part) >= _CHUNKS_PER_PART:
            yield part
            part = []
    if part:
        yield part


@dataclass(frozen=True, kw_only=True, slots=True)
class _Part:
    """All chunks of some users, ordered by user and number: C chunks."""

    user_id: NDArray[np.int64]
    chunk_no: NDArray[np.int64]
    n: NDArray[np.int64]
    first_ms: NDArray[np.int64]
    last_ms: NDArray[np.int64]
    next_seq: NDArray[np.int64]
    payloads: list[bytes]
    is_first: NDArray[np.bool_]
    """bool[C], the user's first chunk found."""
    is_tail: NDArray[np.bool_]
    """bool[C], the user's last chunk found."""

    @staticmethod
    def of(rows: list[Row[Any]]) -> _Part:
        names = ("user_id", "chunk_no", "n", "first_ms", "last_ms", "next_seq")
        columns = {name: np.array([getattr(row, name) for row in rows], np.int64) for name in names}
        changes = columns["user_id"][1:] != columns["user_id"][:-1]
        return _Part(
            **columns,
            payloads=[row.payload for row in rows],
            is_first=np.concatenate([[True], changes]),
            is_tail=np.concatenate([changes, [True]]),
        )

    def has_emptied(self) -> NDArray[np.bool_]:
        """bool[U], whether the user's first chunk has been emptied."""
        has_emptied: NDArray[np.bool_] = self.n[self.is_first] == 0
        return has_emptied

    def num_gone(self) -> NDArray[np.int64]:
        """i64[U], how many interactions arrived and are not in the user's chunks."""
        num_interactions: NDArray[np.int64] = np.add.reduceat(self.n, np.flatnonzero(self.is_first))
        return self.next_seq[self.is_tail] - num_interactions

    def findings(self, chunk_len: int, *, may_be_emptied: bool) -> Iterator[Finding]:
        """What is wrong, at most once per chunk and kind."""
        yield from self._of_rows(chunk_len)
        yield from self._of_emptied(chunk_len, may_be_emptied)
        problems = self._decoding_problems()
        for chunk, problem in problems.items():
            yield self._at(chunk, problem)
        sound = np.array([chunk for chunk in range(len(self.n)) if chunk not in problems], np.int64)
        yield from self._of_content(sound)

    def _of_rows(self, chunk_len: int) -> Iterator[Finding]:
        before = np.where(self.is_first, -1, np.roll(self.chunk_no, 1))
        is_emptied = self.is_first & (self.n == 0)
        for chunk in np.flatnonzero((self.chunk_no != before + 1) & ~is_emptied):
            yield self._at(chunk, f"chunk {before[chunk] + 1} should come before it and is missing")
        has_wrong_n = np.where(self.is_tail, (self.n < 1) | (self.n > chunk_len), self.n != chunk_len)
        for chunk in np.flatnonzero(has_wrong_n & ~is_emptied):
            wanted = f"1 to {chunk_len}" if self.is_tail[chunk] else f"exactly {chunk_len}, since others follow it"
            yield self._at(chunk, f"its row says that it holds {self.n[chunk]} interactions; it must hold {wanted}")
        for chunk in np.flatnonzero(self.user_id < 0):
            yield self._at(chunk, "the user id is negative")
        user = np.cumsum(self.is_first) - 1
        num_gone, has_emptied = self.num_gone()[user], self.has_emptied()[user]
        for chunk in np.flatnonzero(self.is_tail & (num_gone != 0) & ~has_emptied):
            count = f"the user's chunks hold {self.next_seq[chunk] - num_gone[chunk]} interactions"
            yield self._at(chunk, f"next_seq is {self.next_seq[chunk]}, but {count}")
        tail_seq = self.next_seq[self.is_tail][user]
        for chunk in np.flatnonzero(self.next_seq > tail_seq):
            yield self._at(chunk, f"next_seq is {self.next_seq[chunk]}, but the tail's is {tail_seq[chunk]}")

    def _of_emptied(self, chunk_len: int, may_be_emptied: bool) -> Iterator[Finding]:
        firsts = np.flatnonzero(self.is_first)
        num_gone = self.num_gone()
        for user in np.flatnonzero(self.has_emptied()):
            chunk = firsts[user]
            most = (self.chunk_no[chunk] + 1) * chunk_len
            if not may_be_emptied:
                yield self._at(chunk, "it is empty, but retention has removed nothing from this store")
            elif not 1 <= num_gone[user] <= most:
                yield self._at(
                    chunk, f"it is empty, {num_gone[user]} of the user's interactions are gone, not 1 to {most}"
                )
            if self.first_ms[chunk] != self.last_ms[chunk]:
                yield self._at(
                    chunk, f"it is empty, but first_ms is {self.first_ms[chunk]}, last_ms {self.last_ms[chunk]}"
                )
            if not self.is_tail[chunk] and self.first_ms[chunk + 1] < self.last_ms[chunk]:
                yield self._at(chunk + 1, "it begins before the last interaction that was removed")

    def _decoding_problems(self) -> dict[int, str]:
        """Chunk → why its bytes cannot be read."""
        try:
            decode_chunks(self.payloads, self.n, self.user_id, self.chunk_no)
        except ChunkCorruptError:
            return {chunk: problem for chunk in range(len(self.n)) if (problem := self._decoding_problem(chunk))}
        return {}

    def _decoding_problem(self, chunk: int) -> str | None:
        one = slice(chunk, chunk + 1)
        try:
            decode_chunks(self.payloads[one], self.n[one], self.user_id[one], self.chunk_no[one])
        except ChunkCorruptError as error:
            return error.problem
        return None

    def _of_content(self, sound: NDArray[np.int64]) -> Iterator[Finding]:
        """Findings in the chunks that can be decoded."""
        n = self.n[sound]
        payloads = [self.payloads[chunk] for chunk in sound.tolist()]
        columns = decode_chunks(payloads, n, self.user_id[sound], self.chunk_no[sound])
        for chunk, found, canonical in zip(sound, payloads, encode_chunks(columns, n), strict=True):
            if found != canonical:
                yield self._at(chunk, "its bytes are not the canonical encoding of its content")
        time_ms, key, seq = columns["event_time_ms"], columns["event_key"], columns["seq"].astype(np.int64)
        starts, filled = offsets_of(n), n > 0
        for name, stated, place in (
            ("first_ms", self.first_ms, starts[:-1][filled]),
            ("last_ms", self.last_ms, starts[1:][filled] - 1),
        ):
            chunks, content = sound[filled], time_ms[place]
            for row in np.flatnonzero(stated[chunks] != content):
                yield self._at(chunks[row], f"{name} is {stated[chunks[row]]}, its content says {content[row]}")

        owner = np.repeat(sound, n)
        user = (np.cumsum(self.is_first) - 1)[owner]
        rises = (time_ms[1:] > time_ms[:-1]) | ((time_ms[1:] == time_ms[:-1]) & (key[1:] > key[:-1]))
        is_bad = np.concatenate([[False], (user[1:] == user[:-1]) & ~rises]) if len(owner) else np.empty(0, np.bool_)
        yield from self._once_per_chunk(
            owner, is_bad, "an interaction is out of (event time, event key) order or there twice"
        )
        yield from self._once_per_chunk(owner, columns["item_id"] < 0, "an item id is negative")
        message = "an arrival number is not below its next_seq"
        yield from self._once_per_chunk(owner, seq >= self.next_seq[owner], message)
        order = np.lexsort((seq, user))
        repeats = (user[order][1:] == user[order][:-1]) & (seq[order][1:] == seq[order][:-1])
        is_repeated = np.zeros(len(owner), np.bool_)
        is_repeated[order[1:][repeats]] = True
        yield from self._once_per_chunk(owner, is_repeated, "an arrival number is there twice")

    def _once_per_chunk(self, owner: NDArray[np.int64], is_bad: NDArray[np.bool_], problem: str) -> Iterator[Finding]:
        for chunk in np.unique(owner[is_bad]):
            yield self._at(chunk, problem)

    def _at(self, chunk: int | np.integer[Any], problem: str) -> Finding:
        return Finding(problem, user_id=int(self.user_id[chunk]), chunk_no=int(self.chunk_no[chunk]))
