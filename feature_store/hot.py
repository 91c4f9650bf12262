"""Hot histories: the newest interactions of recently used users, in memory, kept up by the update log.

What is here is always a copy: a user that is not resident is read from SQL, and evicting loses nothing: how far an
evicted user had come is remembered, and SQL is waited for until it has come as far. Updates are numbered per user
(`seq`), so a block knows what it has: an update it holds already is dropped, a gap makes it read the user again.

Calls may come from several threads. One lock guards the arena, and answers are copied out under it, so that nobody sees
a block that moves; it is never held while SQL is read. What was read is put in place only if it is still wanted: not
over a block that an update or another reader has made meanwhile, and not if the user was forgotten meanwhile. Every
call may block on SQL, so asynchronous callers use `asyncio.to_thread`.

Retention cuts what is given, not what is held, as of a watermark that the same lock guards and that only rises: what
was read from SQL as of an earlier one holds all that is wanted, and what was read as of a later one raises it.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from feature_store.arena import HistoryArena
from feature_store.config import HotHistoriesConfig
from feature_store.errors import HistoryBehindError
from feature_store.forgotten import ForgottenUsers
from feature_store.interactions import COLUMN_DTYPES, Interactions, JaggedHistories
from feature_store.jagged import concat_ranges, copy_ranges, offsets_of
from feature_store.merging import Places, merge
from feature_store.reading import CurrentHistories
from feature_store.store import FeatureStore
from feature_store.user_rows import UserRows


@dataclass(frozen=True, kw_only=True, slots=True)
class HotStats:
    """How the hot histories are doing; counts are since the start."""

    resident_users: int
    bytes_used: int
    hits: int
    """Rows gathered from memory."""
    misses: int
    """Rows gathered from SQL, because the user was not resident or its block does not reach back far enough."""
    repairs: int
    """Users read again because an update did not follow the one before it."""
    evictions: int


@dataclass(frozen=True, kw_only=True, slots=True)
class _Gap:
    """New interactions that do not follow what is in memory, and what SQL must say first."""

    rows: UserRows
    below_seq: NDArray[np.int64]
    """i64[U], every interaction with a smaller arrival number is needed."""
    moment: int
    """When it was found, in forgotten users."""
    watermark_ms: int
    """The watermark then."""


@dataclass(frozen=True, kw_only=True, slots=True)
class _InMemory:
    """What memory says to a query of B rows."""

    histories: JaggedHistories
    """B rows, empty where memory has no answer."""
    is_missing: NDArray[np.bool_]
    """bool[B], the user is not resident."""
    sql_below: NDArray[np.int64]
    """i64[B], of a resident user whose block cannot answer: SQL can, below this arrival number. Otherwise -1."""
    known: NDArray[np.int64]
    """i64[B], arrival number that the user's next interaction will have, as far as memory knows."""
    moment: int
    """When, in forgotten users."""
    sql_watermark_ms: int | None
    """What SQL is read as of: the update log, for a query below arrival numbers; None: the store."""


class HotHistories:
    """The newest `max_len` interactions of as many users as fit the budget."""

    def __init__(
        self, store: FeatureStore, config: HotHistoriesConfig, *, pause: Callable[[float], None] = time.sleep
    ) -> None:
        """`pause` waits the given number of seconds; tests pass one that does not."""
        self.config = config
        self._store = store
        self._pause = pause
        self._applying = threading.Lock()
        self._lock = threading.Lock()
        """Guards everything below; never held while SQL is read."""
        self._arena = HistoryArena(config.max_len, config.budget_bytes)
        self._watermark_ms = 0
        self._forgotten = ForgottenUsers()
        self._num_hits = 0
        self._num_misses = 0
        self._num_repairs = 0

    @property
    def stats(self) -> HotStats:
        """A snapshot of the counts."""
        with self._lock:
            return HotStats(
                resident_users=self._arena.num_users,
                bytes_used=self._arena.bytes_used,
                hits=self._num_hits,
                misses=self._num_misses,
                repairs=self._num_repairs,
                evictions=self._arena.num_evictions,
            )

    def apply(self, interactions: Interactions, *, watermark_ms: int = 0) -> None:
        """Take in accepted interactions, with their `seq`, of any users in any order; known ones are dropped.

        Afterwards every user touched is resident (if they fit half the budget), and gathering it gives exactly the
        newest of its interactions whose seq is at most the newest applied: a function of the update log, not of timing.
        Retention by age, too, is as of the update log's watermark, not of the store's, which may be ahead. Calls are
        taken one after the other.

        Args:
            interactions: what updates announced.
            watermark_ms: the highest event time that the update log has announced so far, as far as the caller knows
                more of it than was applied here: the watermark in the update, or that of a checkpoint.

        Raises:
            HistoryBehindError: earlier interactions of a user did not appear in SQL in time; those of other users may
                have been applied, and applying the same interactions again is safe.
            StoreUnavailableError: SQL was needed and is away.
        """
        rows = UserRows.of(interactions)
        with self._applying:
            if self._store.retention.max_age_ms:
                newest_ms = int(interactions.event_time_ms.max(initial=watermark_ms))
                with self._lock:
                    self._watermark_ms = max(self._watermark_ms, newest_ms)
            step = self._arena.max_users_at_once
            for low in range(0, rows.num_users, step):
                self._apply_users(rows.part(low, min(low + step, rows.num_users)))

    def gather(
        self,
        user_ids: NDArray[np.int64],
        *,
        max_len: int,
        before_ms: NDArray[np.int64] | int | None = None,
        below_seq: NDArray[np.integer[Any]] | int | None = None,
    ) -> JaggedHistories:
        """The newest interactions of users, in the order asked for; users not resident are read from SQL and stay.

        Args:
            user_ids: i64[B]; a user may be asked for more than once.
            max_len: at most this many of each, up to the configured max_len.
            before_ms: i64[B] or one for all: only interactions strictly before this event time.
            below_seq: integer[B] or one for all: only interactions with a smaller arrival number, however much more
                SQL knows already; makes the answer a function of the update log.

        Raises:
            ValueError: max_len is larger than what is kept.
            HistoryBehindError: SQL does not hold, in time, what had been applied of a user that was evicted since.
            StoreUnavailableError: SQL was needed and is away.
        """
        if not 1 <= max_len <= self.config.max_len:
            raise ValueError(
                f"max_len={max_len} must be between 1 and hot.max_len={self.config.max_len}: "
                "ask for less, or raise hot.max_len"
            )
        shape = np.shape(user_ids)
        before = None if before_ms is None else np.broadcast_to(np.asarray(before_ms, np.int64), shape)
        below = None if below_seq is None else np.broadcast_to(np.asarray(below_seq, np.int64), shape)
        step = self._arena.max_users_at_once
        parts = []
        for low in range(0, max(len(user_ids), 1), step):
            rows = slice(low, low + step)
            parts.append(self._gather_rows(user_ids[rows], max_len, _at(before, rows), _at(below, rows)))
        return parts[0] if len(parts) == 1 else _concat(parts)

    def forget(self, user_ids: NDArray[np.int64]) -> None:
        """Drop users from memory; what SQL says of them then counts."""
        with self._lock:
            self._arena.drop(user_ids)
            self._forgotten.add(user_ids)

    def _apply_users(self, rows: UserRows) -> None:
        """Apply interactions of no more users than fit at once."""
        with self._lock:
            gap = self._follow(rows)
        if gap is None:
            return
        user_ids, below = gap.rows.user_ids, gap.below_seq
        read = partial(
            self._store.read_current,
            user_ids,
            max_len=self._arena.max_kept,
            below_seq=below,
            watermark_ms=gap.watermark_ms,
        )
        current = self._settled(user_ids, below, read)
        with self._lock:
            slots = self._arena.slots_of(user_ids)
            is_wanted = (slots < 0) | (self._arena.next_seq_of(user_ids, slots) < below)
            is_wanted &= (current.next_seq > 0) & ~self._forgotten.since(user_ids, gap.moment)
            self._put(current.histories, below, is_wanted)
            # What still does not follow belongs to users that are gone.
            self._follow(gap.rows)

    def _follow(self, rows: UserRows) -> _Gap | None:
        """Append the new rows of users for whom memory holds all that came before, and return the others'."""
        slots = self._arena.slots_of(rows.user_ids)
        is_resident = slots >= 0
        self._arena.touch(slots[is_resident])
        known = self._arena.next_seq_of(rows.user_ids, slots)
        rows = rows.since(known)
        counts, first, last = rows.counts(), rows.first_seq(), rows.last_seq()
        has_new, is_whole = counts > 0, last - first + 1 == counts
        # Of an evicted user we know how far it had come, but that must be read again.
        follows = has_new & is_whole & (first == known) & (is_resident | (known == 0))
        is_first = follows & ~is_resident
        if is_first.any():
            nothing = JaggedHistories.empty(rows.user_ids[is_first])
            slots[is_first] = self._arena.put(nothing.user_ids, nothing.offsets, nothing.columns, known[is_first])
            self._forgotten.returned(nothing.user_ids)
        self._extend(slots[follows], rows.select(follows))
        must_read = ~follows & (has_new | ~is_resident)
        if not must_read.any():
            return None
        self._num_repairs += int((must_read & is_resident).sum())
        # An update with holes itself cannot be appended: SQL must have all of it.
        below_seq = np.where(has_new, np.where(is_whole, first, last + 1), known)[must_read]
        return _Gap(
            rows=rows.select(must_read),
            below_seq=below_seq,
            moment=self._forgotten.moment,
            watermark_ms=self._watermark_ms,
        )

    def _extend(self, slots: NDArray[np.int64], rows: UserRows) -> None:
        """Add rows that follow, at least one of each user, to resident users' blocks."""
        if rows.num_users == 0:
            return
        next_seq = rows.last_seq() + 1
        rows = rows.in_place_order()
        is_late = ~self._arena.is_before(slots, rows.first_places())
        if is_late.any():
            self._merge(slots[is_late], rows.select(is_late), next_seq[is_late])
            slots, rows, next_seq = slots[~is_late], rows.select(~is_late), next_seq[~is_late]
        self._arena.append(slots, rows.offsets, rows.columns, next_seq)

    def _merge(self, slots: NDArray[np.int64], rows: UserRows, next_seq: NDArray[np.int64]) -> None:
        """Put late interactions where they belong: what follows the first of them is taken out and added in order."""
        lengths, stored = self._arena.cut(slots, rows.first_places().event_time_ms)
        stored_places = Places.of(np.repeat(np.arange(len(slots)), lengths), stored)
        merged = merge(stored_places, rows.places(), len(slots))
        content = {name: np.concatenate([stored[name], rows.columns[name]])[merged.source] for name in COLUMN_DTYPES}
        self._arena.append(slots, merged.offsets, content, next_seq)

    def _settled(
        self, user_ids: NDArray[np.int64], below_seq: NDArray[np.int64], read: Callable[[], CurrentHistories]
    ) -> CurrentHistories:
        """Read users once SQL has all their interactions below an arrival number, waiting for it within limits.

        Updates are announced just before they are committed, so SQL may be a moment behind. A user of whom SQL holds
        nothing after the wait was forgotten; that is not an error, and the next time there is no wait.
        """
        with self._lock:
            was_forgotten = self._forgotten.are_gone(user_ids)
        for num_looks in range(self.config.behind_num_retries + 1):
            if num_looks > 0:
                self._pause(self.config.behind_retry_interval_ms / 1000)
            current = read()
            is_gone = (current.next_seq == 0) & (below_seq > 0)
            is_behind = (current.next_seq < below_seq) & ~(is_gone & was_forgotten)
            if not is_behind.any():
                break
        if is_gone.any():
            self.forget(user_ids[is_gone])
        is_behind &= ~is_gone
        if not is_behind.any():
            return current
        user = int(np.argmax(is_behind))
        raise HistoryBehindError(
            f"SQL holds {current.next_seq[user]} interactions of user {user_ids[user]}, but the update log announced "
            f"number {below_seq[user]} and {num_looks} looks did not find it ({int(is_behind.sum())} users): "
            "check that ingest runs on the same database",
            user_ids[is_behind],
        )

    def _gather_rows(
        self,
        user_ids: NDArray[np.int64],
        max_len: int,
        before_ms: NDArray[np.int64] | None,
        below_seq: NDArray[np.int64] | None,
    ) -> JaggedHistories:
        """The answer for no more rows than fit at once."""
        # Step 1: what memory can answer. Steps 2 and 3 are for the other rows.
        with self._lock:
            found = self._in_memory(user_ids, max_len, before_ms, below_seq)
        gathered, sql_below = found.histories, found.sql_below
        is_missed = np.zeros(len(user_ids), np.bool_)
        # Step 2: users that are not resident are read, put in place and asked again, before anybody can evict them.
        rows = np.flatnonzero(found.is_missing)
        while len(rows):
            is_missed[rows] = True
            users, first = np.unique(user_ids[rows], return_index=True)
            moment = found.moment
            read = partial(
                self._store.read_current, users, max_len=self._arena.max_kept, watermark_ms=found.sql_watermark_ms
            )
            current = self._settled(users, found.known[found.is_missing][first], read)
            with self._lock:
                slots = self._arena.slots_of(users)
                is_wanted = (slots < 0) & (current.next_seq >= self._arena.next_seq_of(users, slots))
                is_wanted &= ~self._forgotten.since(users, moment)
                self._put(current.histories, current.next_seq, is_wanted)
                if current.watermark_ms > self._watermark_ms:
                    # SQL knows of later times than the updates seen here; the rows answered already ought to, too.
                    self._watermark_ms = current.watermark_ms
                    rows = np.arange(len(user_ids))
                found = self._in_memory(user_ids[rows], max_len, _at(before_ms, rows), _at(below_seq, rows))
            gathered = _spliced(gathered, found.histories, rows)
            sql_below[rows] = found.sql_below
            rows = rows[found.is_missing]
        # Step 3: older interactions than blocks hold, or an earlier state than theirs.
        rows = np.flatnonzero(sql_below >= 0)
        is_missed[rows] = True
        with self._lock:
            self._num_misses += int(is_missed.sum())
            self._num_hits += int((~is_missed).sum())
        if len(rows) == 0:
            return gathered
        users, below = user_ids[rows], sql_below[rows]
        read = partial(
            self._store.read_current,
            users,
            max_len=max_len,
            before_ms=_at(before_ms, rows),
            below_seq=below,
            watermark_ms=found.sql_watermark_ms,
        )
        older = self._settled(users, below, read)
        return _spliced(gathered, older.histories, rows)

    def _in_memory(
        self,
        user_ids: NDArray[np.int64],
        max_len: int,
        before_ms: NDArray[np.int64] | None,
        below_seq: NDArray[np.int64] | None,
    ) -> _InMemory:
        slots = self._arena.slots_of(user_ids)
        is_missing = slots < 0
        self._arena.touch(slots[~is_missing])
        next_seq = self._arena.next_seq_of(user_ids, slots)
        slots[is_missing] = 0  # any: the answer is not used
        start, end = self._arena.window(slots, max_len, before_ms)
        # A block that lacks older interactions cannot answer a query for them, nor one that knows too much for it.
        # One shorter than max_kept holds all there was when it was read, and one that holds anything expired lacks only
        # what expired before that.
        length, retention = self._arena.length[slots], self._store.retention
        lacks_older = (length >= self._arena.max_kept) & (length < next_seq)
        if retention.is_on:
            horizon_ms = retention.horizon_ms(self._watermark_ms)
            oldest = self._arena.first_retained(slots, retention.max_history, horizon_ms)
            start = np.maximum(start, oldest)
            end = np.maximum(end, start)
            lacks_older &= oldest == self._arena.start[slots]
        must_read = (end - start < max_len) & lacks_older
        limit = next_seq
        if below_seq is not None:
            must_read |= next_seq > below_seq
            limit = np.minimum(next_seq, below_seq)
        must_read &= ~is_missing
        lengths = np.where(must_read | is_missing, 0, end - start)
        histories = JaggedHistories(user_ids=user_ids, offsets=offsets_of(lengths), **self._arena.copy(start, lengths))
        return _InMemory(
            histories=histories,
            is_missing=is_missing,
            sql_below=np.where(must_read, limit, -1),
            known=next_seq,
            moment=self._forgotten.moment,
            sql_watermark_ms=None if below_seq is None else self._watermark_ms,
        )

    def _put(self, histories: JaggedHistories, next_seq: NDArray[np.int64], is_wanted: NDArray[np.bool_]) -> None:
        """Make the wanted users' histories the content of their blocks."""
        columns, lengths = histories.columns, histories.lengths()
        if not is_wanted.all():
            rows = concat_ranges(histories.offsets[:-1][is_wanted], lengths[is_wanted])
            columns = {name: column[rows] for name, column in columns.items()}
        self._arena.put(histories.user_ids[is_wanted], offsets_of(lengths[is_wanted]), columns, next_seq[is_wanted])


def _at(values: NDArray[np.int64] | None, rows: NDArray[np.int64] | slice) -> NDArray[np.int64] | None:
    return None if values is None else values[rows]


def _spliced(histories: JaggedHistories, others: JaggedHistories, rows: NDArray[np.int64]) -> JaggedHistories:
    """`histories` with its rows of these numbers replaced by the other histories, in order."""
    lengths = histories.lengths()
    starts = histories.offsets[:-1].copy()
    lengths[rows] = others.lengths()
    starts[rows] = others.offsets[:-1] + histories.num_interactions
    columns = [np.concatenate([column, others.columns[name]]) for name, column in histories.columns.items()]
    return JaggedHistories(
        user_ids=histories.user_ids,
        offsets=offsets_of(lengths),
        **dict(zip(histories.columns, copy_ranges(columns, starts, lengths), strict=True)),
    )


def _concat(parts: list[JaggedHistories]) -> JaggedHistories:
    return JaggedHistories(
        user_ids=np.concatenate([part.user_ids for part in parts]),
        offsets=offsets_of(np.concatenate([part.lengths() for part in parts])),
        **{name: np.concatenate([part.columns[name] for part in parts]) for name in COLUMN_DTYPES},
    )
