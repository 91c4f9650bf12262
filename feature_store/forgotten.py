"""Which users were forgotten, so that nothing read before that comes back and nobody waits for what is gone."""

from __future__ import annotations

from typing import Final

import numpy as np
from numpy.typing import NDArray

_USERS_MAX: Final = 100_000
"""Users remembered; beyond it all are dropped, what is being read then is read again, and each may be waited for."""


class ForgottenUsers:
    """The users forgotten, in the order of moments. Not thread-safe."""

    def __init__(self) -> None:
        self.moment = 0
        """Counts the calls of `add`."""
        self._moment_of: dict[int, int] = {}
        self._gone: set[int] = set()
        self._cleared_at = 0

    def add(self, user_ids: NDArray[np.int64]) -> None:
        """These users are forgotten now."""
        self.moment += 1
        if len(self._moment_of) > _USERS_MAX:
            self._moment_of.clear()
            self._gone.clear()
            self._cleared_at = self.moment
        self._moment_of.update(dict.fromkeys(user_ids.tolist(), self.moment))
        self._gone.update(user_ids.tolist())

    def returned(self, user_ids: NDArray[np.int64]) -> None:
        """These users have interactions again: what is announced of them is worth waiting for."""
        if self._gone:
            self._gone.difference_update(user_ids.tolist())

    def since(self, user_ids: NDArray[np.int64], moment: int) -> NDArray[np.bool_]:
        """bool[U], whether each user was forgotten (or may have been) after a moment."""
        if moment == self.moment:
            return np.zeros(len(user_ids), np.bool_)
        if moment < self._cleared_at:
            return np.ones(len(user_ids), np.bool_)
        return np.array([self._moment_of.get(user_id, 0) > moment for user_id in user_ids.tolist()], np.bool_)

    def are_gone(self, user_ids: NDArray[np.int64]) -> NDArray[np.bool_]:
        """bool[U], whether each user was forgotten and has not returned."""
        return np.array([user_id in self._gone for user_id in user_ids.tolist()], np.bool_)
