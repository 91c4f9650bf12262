"""What the store says about items: their ids as producers write them, and which must not be recommended."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from threading import Lock
from typing import Final

import numpy as np
from numpy.typing import NDArray

from feature_store.errors import FeatureStoreError

Int64s = NDArray[np.int64]
ReadNames = Callable[[Int64s], Mapping[int, str]]
"""Texts of those ids that stand for one; raises FeatureStoreError."""

_RECHECKS: Final = 15


class ItemNames:
    """Texts of item ids, complete for every id that has been resolved.

    Whether an integer is an id or the hash of a text is known to the store alone. Until it has been asked, an item
    is withheld from answers: its hash would mean nothing to the caller. `resolve` may be called from any thread; the
    arrays handed out are never changed afterwards.
    """

    def __init__(self, read_names: ReadNames) -> None:
        self._read_names = read_names
        self._lock = Lock()
        self._texts: dict[int, str] = {}
        self._resolved: Int64s = np.empty(0, np.int64)
        self._unresolved: Int64s = np.empty(0, np.int64)
        self._doubtful: list[tuple[Int64s, int]] = []

    @property
    def unresolved(self) -> Int64s:
        """Ids (ascending) that could not be looked up yet."""
        return self._unresolved

    def resolve(self, item_ids: Int64s) -> bool:
        """Look up what is new among `item_ids` and what is still unresolved; False if the store is away."""
        with self._lock:
            wanted = np.union1d(item_ids[item_ids >= 0], self._unresolved)
            wanted = wanted[~_contained(wanted, self._resolved)]
            if len(wanted) == 0:
                return True
            try:
                texts = self._read_names(wanted)
            except FeatureStoreError:
                self._unresolved = wanted
                return False
            if len(self._resolved):
                self._doubtful.append((_without_text(wanted, texts), _RECHECKS))
            self._texts.update(texts)
            self._resolved = np.union1d(self._resolved, wanted)
            self._unresolved = np.empty(0, np.int64)
            return True

    def recheck(self) -> bool:
        """Look again for texts of ids that came up lately without one; False if the store is away.

        An item may be learned from and published while the transaction that names it is still to be repeated,
        because ingest was killed in the middle of it.
        """
        with self._lock:
            doubtful = self._doubtful
            if not doubtful:
                return True
            try:
                texts = self._read_names(np.concatenate([ids for ids, _ in doubtful]))
            except FeatureStoreError:
                return False
            self._texts.update(texts)
            self._doubtful = [(_without_text(ids, texts), left - 1) for ids, left in doubtful if left > 1]
            return True

    def original(self, item_id: int) -> int | str:
        """The id as producers write it."""
        return self._texts.get(item_id, item_id)


class WithheldItems:
    """Items that are never recommended: unavailable ones, and those whose names are not known yet."""

    def __init__(self, names: ItemNames) -> None:
        self._names = names
        self.unavailable: Int64s = np.empty(0, np.int64)
        """Ids, ascending; replaced as a whole."""

    @property
    def item_ids(self) -> Int64s:
        """Ids, ascending."""
        unresolved = self._names.unresolved
        # Mostly there are none: sorting would let go of the interpreter in the middle of a swap.
        return self.unavailable if len(unresolved) == 0 else np.union1d(self.unavailable, unresolved)


def _without_text(item_ids: Int64s, texts: Mapping[int, str]) -> Int64s:
    return item_ids[~np.isin(item_ids, np.fromiter(texts, np.int64, len(texts)))]


def _contained(values: Int64s, ascending: Int64s) -> NDArray[np.bool_]:
    if len(ascending) == 0:
        return np.zeros(len(values), bool)
    place = np.minimum(np.searchsorted(ascending, values), len(ascending) - 1)
    found: NDArray[np.bool_] = ascending[place] == values
    return found
