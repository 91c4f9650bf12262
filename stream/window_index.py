"""Which users have impressions, and when their windows lie: by column, in bounded memory."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import numpy as np
from numpy.typing import NDArray

from feature_store.impressions import OpenImpression, UserWindows
from stream.label_rules import LabelConfig

_DROP_EVERY_MS: Final = 60_000


class WindowIndex:
    """Which users have impressions, and when: decides by column which interactions are worth a look into the database.

    Never says no to an interaction that takes an item; may say yes to one that does not. Bounded: with more than
    `limit` users it stops holding them and says yes to all.
    """

    def __init__(self, windows: UserWindows, limit: int) -> None:
        self._limit = limit
        self._user_id, self._from_ms, self._until_ms = windows.user_id, windows.from_ms, windows.until_ms
        self._dropped_at_ms = 0
        self.is_whole = len(windows.user_id) <= limit
        self._shrink()

    @staticmethod
    def empty(limit: int) -> WindowIndex:
        """Of no users."""
        nobody = np.empty(0, np.int64)
        return WindowIndex(UserWindows(user_id=nobody, from_ms=nobody, until_ms=nobody), limit)

    def add(self, impressions: Sequence[OpenImpression]) -> None:
        """Know of these too."""
        if not self.is_whole or not impressions:
            return
        rows = np.array([(one.user_id, one.from_ms, one.until_ms) for one in impressions], np.int64)
        users, group = np.unique(rows[:, 0], return_inverse=True)
        first, last = np.full(len(users), np.iinfo(np.int64).max), np.zeros(len(users), np.int64)
        np.minimum.at(first, group, rows[:, 1])
        np.maximum.at(last, group, rows[:, 2])
        place, is_known = self._places(users)
        known = place[is_known]
        self._from_ms[known] = np.minimum(self._from_ms[known], first[is_known])
        self._until_ms[known] = np.maximum(self._until_ms[known], last[is_known])
        at = place[~is_known]
        self._user_id = np.insert(self._user_id, at, users[~is_known])
        self._from_ms = np.insert(self._from_ms, at, first[~is_known])
        self._until_ms = np.insert(self._until_ms, at, last[~is_known])
        self.is_whole = len(self._user_id) <= self._limit
        self._shrink()

    def may_take(self, user_id: NDArray[np.int64], time_ms: NDArray[np.int64]) -> NDArray[np.bool_]:
        """bool[N]: whether an interaction (i64[N] each) may lie in a window of its user."""
        if not self.is_whole:
            return np.ones(len(user_id), np.bool_)
        if len(self._user_id) == 0:
            return np.zeros(len(user_id), np.bool_)
        place, may = self._places(user_id)
        place = np.minimum(place, len(self._user_id) - 1)
        return may & (time_ms >= self._from_ms[place]) & (time_ms < self._until_ms[place])

    def drop_ended(self, now_ms: int, config: LabelConfig) -> None:
        """Drop, now and then, the users whose impressions have all been removed by `now_ms`."""
        if now_ms - self._dropped_at_ms < _DROP_EVERY_MS:
            return
        self._dropped_at_ms = now_ms
        is_kept = self._until_ms > now_ms - config.removal_ms(0)
        self._user_id, self._from_ms = self._user_id[is_kept], self._from_ms[is_kept]
        self._until_ms = self._until_ms[is_kept]

    def _places(self, user_id: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
        """Where users are, or would be inserted, and whether they are there."""
        place = np.searchsorted(self._user_id, user_id)
        if len(self._user_id) == 0:
            return place, np.zeros(len(user_id), np.bool_)
        return place, self._user_id[np.minimum(place, len(self._user_id) - 1)] == user_id

    def _shrink(self) -> None:
        if not self.is_whole:
            self._user_id = self._from_ms = self._until_ms = np.empty(0, np.int64)
