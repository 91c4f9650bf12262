"""Hot histories: the newest interactions of recently used users, in memory, kept up by the update log.

What is here is always a copy: a user that is not resident is read from SQL, and evicting loses nothing. Updates are
numbered per user (`seq`), so a block knows what it has: an update it holds already is dropped, a gap makes it read the
user again. Calls may come from several threads; one at a time gets in, and it may block on SQL, so asynchronous callers
use `asyncio.to_thread`.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from feature_store.arena import HistoryArena
from feature_store.config import HotHistoriesConfig
from feature_store.errors import HistoryBehindError
from feature_store.interactions import COLUMN_DTYPES, Interactions, JaggedHistories
from feature_store.jagged import concat_ranges, offsets_of
from feature_store.merging import Places, merge
from feature_store.reading import CurrentHistories
from feature_store.store import FeatureStore

_FORGOTTEN_MAX: Final = 100_000
"""Forgotten users remembered, so that updates still under way do not wait for histories that will not come; beyond
it they are, and each waits once."""


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


class HotHistories:
    """The newest `max_len` interactions of as many users as fit the budget."""

    def __init__(
        self, store: FeatureStore, config: HotHistoriesConfig, *, pause: Callable[[float], None] = time.sleep
    ) -> None:
        """`pause` waits the given number of seconds; tests pass one that does not."""
        self.config = config
        self._store = store
        self._pause = pause
        self._arena = HistoryArena(config.max_len, config.budget_bytes)
        self._lock = threading.RLock()
        self._forgotten: set[int] = set()
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

    def apply(self, interactions: Interactions) -> None:
        """Take in accepted interactions, with their `seq`, of any users in any order; known ones are dropped.

        Afterwards every user touched is resident (if they fit half the budget), and gathering it gives exactly the
        newest of its interactions whose seq is at most the newest applied: a function of the update log, not of timing.

        Raises:
            HistoryBehindError: earlier interactions of a user did not appear in SQL in time; those of other users may
                have been applied, and applying the same interactions again is safe.
            StoreUnavailableError: SQL was needed and is away.
        """
        order = np.lexsort((interactions.seq, interactions.user_id))
        interactions = interactions.take(order)
        user_ids, starts = np.unique(interactions.user_id, return_index=True)
        bounds = np.append(starts, len(interactions))
        with self._lock:
            step = self._arena.max_users_at_once
            for low in range(0, len(user_ids), step):
                high = min(low + step, len(user_ids))
                self._apply_users(interactions.take(slice(bounds[low], bounds[high])))

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
        with self._lock:
            step = self._arena.max_users_at_once
            parts = []
            for low in range(0, max(len(user_ids), 1), step):
                rows = slice(low, low + step)
                parts.append(
                    self._gather_rows(
                        user_ids[rows],
                        max_len,
                        None if before is None else before[rows],
                        None if below is None else below[rows],
                    )
                )
        return parts[0] if len(parts) == 1 else _concat(parts)

    def forget(self, user_ids: NDArray[np.int64]) -> None:
        """Drop users from memory; what SQL says of them then counts."""
        with self._lock:
            self._arena.drop(user_ids)
            self._note_forgotten(user_ids)

    def _note_forgotten(self, user_ids: NDArray[np.int64]) -> None:
        if len(self._forgotten) > _FORGOTTEN_MAX:
            self._forgotten.clear()
        self._forgotten.update(user_ids.tolist())

    def _apply_users(self, new: Interactions) -> None:
        """Apply interactions ordered by (user, seq), of no more users than fit at once."""
        self._make_followable(new)
        # Every user is resident now, with all that came before its next new row; except forgotten ones, without a slot.
        user_ids, group = np.unique(new.user_id, return_inverse=True)
        slots = self._arena.slots_of(user_ids)
        is_new = (slots[group] >= 0) & (new.seq >= self._arena.next_seq_of(slots)[group])
        is_new &= _is_first_of_run(group, new.seq)
        new, group = new.take(is_new), group[is_new]
        present, group = np.unique(group, return_inverse=True)
        user_ids, slots = user_ids[present], slots[present]
        next_seq = new.seq[np.cumsum(np.bincount(group)) - 1].astype(np.int64) + 1
        places = Places.of(group, new.columns)
        order = places.order()
        new, places = new.take(order), places.take(order)
        fits = self._arena.fits_after(slots, places)
        self._arena.extend(slots, fits, places.group, new.columns, next_seq)
        self._rebuild(user_ids, slots, ~fits, new, places, next_seq)

    def _make_followable(self, new: Interactions) -> None:
        """Make every user of an update resident, read from SQL as it was before the first row we do not know."""
        user_ids, group = np.unique(new.user_id, return_inverse=True)
        slots = self._arena.slots_of(user_ids)
        self._arena.touch(slots[slots >= 0])
        next_seq = self._arena.next_seq_of(slots)
        is_unknown = new.seq >= next_seq[group]
        seq, group = new.seq[is_unknown].astype(np.int64), group[is_unknown]
        first, last = np.full(len(user_ids), np.iinfo(np.int64).max), np.full(len(user_ids), -1)
        np.minimum.at(first, group, seq)
        np.maximum.at(last, group, seq)
        num_distinct = np.bincount(group[_is_first_of_run(group, seq)], minlength=len(user_ids))
        is_whole = last - first + 1 == num_distinct
        must_read = (last >= 0) & ~(is_whole & (first == next_seq) & (slots >= 0))
        self._num_repairs += int((must_read & (slots >= 0)).sum())
        # An update with holes itself cannot be appended: SQL must have all of it.
        below = np.where(is_whole, first, last + 1)[must_read]
        self._arena.drop(user_ids[must_read])
        self._load(user_ids[must_read], below)

    def _load(self, user_ids: NDArray[np.int64], below_seq: NDArray[np.int64]) -> None:
        """Make users resident with everything below an arrival number; not those that were forgotten since."""
        is_new = below_seq == 0
        empty = JaggedHistories.empty(user_ids[is_new])
        self._arena.put(empty.user_ids, empty.offsets, empty.columns, below_seq[is_new])
        user_ids, below_seq = user_ids[~is_new], below_seq[~is_new]
        if len(user_ids) == 0:
            return
        current = self._read_settled(user_ids, below_seq)
        is_known = current.next_seq > 0
        histories = current.histories
        # A forgotten user's row is empty, so leaving it out leaves the columns as they are.
        offsets = offsets_of(histories.lengths()[is_known])
        self._arena.put(user_ids[is_known], offsets, histories.columns, below_seq[is_known])

    def _read_settled(self, user_ids: NDArray[np.int64], below_seq: NDArray[np.int64]) -> CurrentHistories:
        """Read users once SQL has all their interactions below an arrival number, waiting for it within limits.

        Updates are announced just before they are committed, so SQL may be a moment behind. A user of whom SQL holds
        nothing after the wait was forgotten; that is not an error, and the next time there is no wait.
        """
        was_forgotten = np.array([user in self._forgotten for user in user_ids.tolist()], np.bool_)
        num_looks = 0
        while True:
            current = self._store.read_current(user_ids, max_len=self._arena.max_kept, below_seq=below_seq)
            is_gone = current.next_seq == 0
            is_behind = (current.next_seq < below_seq) & ~(is_gone & was_forgotten)
            if not is_behind.any():
                return current
            if num_looks == self.config.behind_num_retries:
                break
            num_looks += 1
            self._pause(self.config.behind_retry_interval_ms / 1000)
        self._note_forgotten(user_ids[is_gone])
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

    def _rebuild(
        self,
        user_ids: NDArray[np.int64],
        slots: NDArray[np.int64],
        is_rebuilt: NDArray[np.bool_],
        new: Interactions,
        places: Places,
        next_seq: NDArray[np.int64],
    ) -> None:
        """Merge late interactions, or those a block has no room for, and put the newest back."""
        rebuilt = np.flatnonzero(is_rebuilt)
        if len(rebuilt) == 0:
            return
        number = np.full(len(user_ids), -1)
        number[rebuilt] = np.arange(len(rebuilt))
        rows = np.flatnonzero(is_rebuilt[places.group])
        stored = self._arena.columns_of(slots[rebuilt])
        stored_group = np.repeat(np.arange(len(rebuilt)), self._arena.length[slots[rebuilt]])
        added = {name: column[rows] for name, column in new.columns.items()}
        merged = merge(Places.of(stored_group, stored), Places.of(number[places.group[rows]], added), len(rebuilt))
        starts = np.maximum(merged.offsets[1:] - self._arena.max_kept, merged.offsets[:-1])
        lengths = merged.offsets[1:] - starts
        source = merged.source[concat_ranges(starts, lengths)]
        content = {name: np.concatenate([stored[name], added[name]])[source] for name in COLUMN_DTYPES}
        self._arena.put(user_ids[rebuilt], offsets_of(lengths), content, next_seq[rebuilt])

    def _gather_rows(
        self,
        user_ids: NDArray[np.int64],
        max_len: int,
        before_ms: NDArray[np.int64] | None,
        below_seq: NDArray[np.int64] | None,
    ) -> JaggedHistories:
        slots = self._arena.slots_of(user_ids)
        is_missing = slots < 0
        if is_missing.any():
            missing = np.unique(user_ids[is_missing])
            self._arena.touch(slots[~is_missing])
            current = self._store.read_current(missing, max_len=self._arena.max_kept)
            histories = current.histories
            self._arena.put(missing, histories.offsets, histories.columns, current.next_seq)
            slots = self._arena.slots_of(user_ids)
        self._arena.touch(slots)
        start, end = self._arena.window(slots, max_len, before_ms)
        # A block that lacks older interactions cannot answer a query for them, nor one that knows too much for it.
        next_seq = self._arena.next_seq[slots]
        must_read = (end - start < max_len) & (self._arena.length[slots] < next_seq)
        if below_seq is not None:
            must_read |= next_seq > below_seq
        num_misses = int((is_missing | must_read).sum())
        self._num_misses += num_misses
        self._num_hits += len(user_ids) - num_misses
        lengths = np.where(must_read, 0, end - start)
        gathered = JaggedHistories(
            user_ids=user_ids,
            offsets=offsets_of(lengths),
            **self._arena.copy(start, lengths),
        )
        if not must_read.any():
            return gathered
        limit = next_seq if below_seq is None else np.minimum(next_seq, below_seq)
        older = self._store.read(
            user_ids[must_read],
            max_len=max_len,
            before_ms=None if before_ms is None else before_ms[must_read],
            below_seq=limit[must_read],
        )
        return _spliced(gathered, older, np.flatnonzero(must_read))


def _is_first_of_run(group: NDArray[np.int64], seq: NDArray[np.integer[Any]]) -> NDArray[np.bool_]:
    """For rows ordered by (group, seq): False where a row repeats the one before it."""
    is_first = np.ones(len(seq), np.bool_)
    is_first[1:] = (group[1:] != group[:-1]) | (seq[1:] != seq[:-1])
    return is_first


def _spliced(histories: JaggedHistories, others: JaggedHistories, rows: NDArray[np.int64]) -> JaggedHistories:
    """`histories` with its (empty) rows replaced by the other histories, in order."""
    lengths = histories.lengths()
    stays = np.repeat(np.arange(len(lengths)), lengths)
    order = np.argsort(np.concatenate([stays, np.repeat(rows, others.lengths())]), kind="stable")
    lengths[rows] = others.lengths()
    return JaggedHistories(
        user_ids=histories.user_ids,
        offsets=offsets_of(lengths),
        **{name: np.concatenate([column, others.columns[name]])[order] for name, column in histories.columns.items()},
    )


def _concat(parts: list[JaggedHistories]) -> JaggedHistories:
    return JaggedHistories(
        user_ids=np.concatenate([part.user_ids for part in parts]),
        offsets=offsets_of(np.concatenate([part.lengths() for part in parts])),
        **{name: np.concatenate([part.columns[name] for part in parts]) for name in COLUMN_DTYPES},
    )
