"""New interactions, by user: the form in which hot histories take in an update."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from feature_store.interactions import Interactions
from feature_store.jagged import concat_ranges, offsets_of
from feature_store.merging import Places


@dataclass(frozen=True, kw_only=True, slots=True)
class UserRows:
    """N interactions of U distinct users, back to back by user; a user may have none."""

    user_ids: NDArray[np.int64]
    """i64[U]."""
    offsets: NDArray[np.int64]
    """i64[U + 1], user u owns the rows `[offsets[u], offsets[u + 1])`."""
    columns: dict[str, NDArray[Any]]
    """The columns, each of length N."""

    @staticmethod
    def of(interactions: Interactions) -> UserRows:
        """Interactions in any order, by user and each user's by `seq`; those with an equal `seq` count once."""
        order = np.argsort(interactions.user_id, kind="stable")
        user_id, seq = interactions.user_id[order], interactions.seq[order]
        is_first = _is_first_of_run(user_id)
        if not (is_first[1:] | (seq[1:] > seq[:-1])).all():
            # Never so in an update as it was announced: several of them were put together, or rows came twice.
            order = np.lexsort((interactions.seq, interactions.user_id))
            user_id, seq = interactions.user_id[order], interactions.seq[order]
            is_kept = _is_first_of_run(user_id) | _is_first_of_run(seq)
            order, user_id = order[is_kept], user_id[is_kept]
            is_first = _is_first_of_run(user_id)
        starts = np.flatnonzero(is_first)
        return UserRows(
            user_ids=user_id[starts],
            offsets=np.append(starts, len(user_id)),
            columns={name: column[order] for name, column in interactions.columns.items()},
        )

    @property
    def num_users(self) -> int:
        """U."""
        return len(self.user_ids)

    def counts(self) -> NDArray[np.int64]:
        """i64[U], rows of each user."""
        return np.diff(self.offsets)

    def first_seq(self) -> NDArray[np.int64]:
        """i64[U], the smallest arrival number of each user's rows; of a user without rows, any number."""
        return self._seq_at(self.offsets[:-1])

    def last_seq(self) -> NDArray[np.int64]:
        """i64[U], the largest arrival number of each user's rows; of a user without rows, any number."""
        return self._seq_at(self.offsets[1:] - 1)

    def part(self, low: int, high: int) -> UserRows:
        """Users low … high-1."""
        offsets = self.offsets[low : high + 1]
        rows = slice(offsets[0], offsets[-1])
        return UserRows(
            user_ids=self.user_ids[low:high],
            offsets=offsets - offsets[0],
            columns={name: column[rows] for name, column in self.columns.items()},
        )

    def select(self, is_selected: NDArray[np.bool_]) -> UserRows:
        """The users marked in bool[U]."""
        if is_selected.all():
            return self
        counts = self.counts()[is_selected]
        return self._with(
            self.user_ids[is_selected], offsets_of(counts), concat_ranges(self.offsets[:-1][is_selected], counts)
        )

    def since(self, next_seq: NDArray[np.int64]) -> UserRows:
        """The same users, with only the rows whose arrival number is at least i64[U]."""
        group = self._group()
        is_kept = self.columns["seq"] >= next_seq[group]
        if is_kept.all():
            return self
        offsets = offsets_of(np.bincount(group[is_kept], minlength=self.num_users))
        return self._with(self.user_ids, offsets, np.flatnonzero(is_kept))

    def in_place_order(self) -> UserRows:
        """Each user's rows in the order of its history, instead of arrival."""
        places = Places.of(self._group(), self.columns)
        earlier, later = places.take(slice(None, -1)), places.take(slice(1, None))
        if ((earlier.group != later.group) | earlier.is_before(later)).all():
            return self
        return self._with(self.user_ids, self.offsets, places.order())

    def places(self) -> Places:
        """The rows' places, grouped by user number 0 … U-1."""
        return Places.of(self._group(), self.columns)

    def first_places(self) -> Places:
        """The place of each user's first row; every user has one."""
        return Places(
            group=np.arange(self.num_users),
            event_time_ms=self.columns["event_time_ms"][self.offsets[:-1]],
            event_key=self.columns["event_key"][self.offsets[:-1]],
        )

    def _group(self) -> NDArray[np.int64]:
        return np.repeat(np.arange(self.num_users), self.counts())

    def _seq_at(self, rows: NDArray[np.int64]) -> NDArray[np.int64]:
        seq = self.columns["seq"]
        if len(seq) == 0:
            return np.zeros(self.num_users, np.int64)
        return seq.take(rows, mode="clip").astype(np.int64)

    def _with(self, user_ids: NDArray[np.int64], offsets: NDArray[np.int64], rows: NDArray[np.int64]) -> UserRows:
        columns = {name: column[rows] for name, column in self.columns.items()}
        return UserRows(user_ids=user_ids, offsets=offsets, columns=columns)


def _is_first_of_run(values: NDArray[Any]) -> NDArray[np.bool_]:
    """Whether each value differs from the one before it."""
    is_first = np.ones(len(values), np.bool_)
    is_first[1:] = values[1:] != values[:-1]
    return is_first
