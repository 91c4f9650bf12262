"""The tail chunks that this process wrote last, so that the next append need not read them back.

Reading the tails costs a fifth of an append, and a worker that owns its users' partitions would only read what it
wrote. What is kept here may be out of date, and is safe all the same: a tail is overwritten only if its `next_seq` is
still the one expected, so a tail that another writer has changed since makes the append fail with
ConcurrentAppendError, after which everything here is dropped. Two changes leave `next_seq` as it was or start it again:
forgetting a user and pruning one. Both are in the account of removals, and when that has moved, everything here is
dropped, too.

Full tails are not kept: the chunk after a full one is inserted, and nothing would be overwritten that could be checked.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from typing import Final

import numpy as np
from numpy.typing import NDArray

from feature_store.chunk_rows import ChunkRows
from feature_store.chunk_writes import ChunkWrite

_ENTRY_BYTES: Final = 300
"""Memory of an entry besides its payload: a tuple of six objects, and its place in the dictionary."""

_Tail = tuple[int, int, int, int, bytes]
"""chunk_no, length, first_ms, next_seq, payload"""


class TailCache:
    """Tail chunks by user, the least recently written dropped first. Safe to use from several threads."""

    def __init__(self, budget_bytes: int) -> None:
        self._budget_bytes = budget_bytes
        self._num_bytes = 0
        # In a plain dict, finding the oldest entry walks over the places that all older ones have left empty.
        self._tails: OrderedDict[int, _Tail] = OrderedDict()
        self._removals: int | None = None
        self._lock = threading.Lock()

    def find(self, user_ids: NDArray[np.int64], removals: int) -> tuple[ChunkRows, NDArray[np.int64]]:
        """The tails known of the asked users, and the rows (i64[M]) of those of whom none is.

        `removals` counts what was forgotten and pruned by the caller's transaction: another count than before empties
        the cache.
        """
        with self._lock:
            if removals != self._removals:
                self._clear()
                self._removals = removals
            tails = [self._tails.get(user) for user in user_ids.tolist()]
        is_known = np.array([tail is not None for tail in tails], np.bool_)
        pos = np.flatnonzero(is_known)
        known = [tail for tail in tails if tail is not None]
        numbers = np.array([tail[:4] for tail in known], np.int64).reshape(-1, 4)
        chunks = ChunkRows(
            pos=pos,
            user_id=user_ids[pos],
            chunk_no=numbers[:, 0],
            length=numbers[:, 1],
            first_ms=numbers[:, 2],
            next_seq=numbers[:, 3],
            payloads=[tail[4] for tail in known],
        )
        return chunks, np.flatnonzero(~is_known)

    def keep(self, write: ChunkWrite, chunk_len: int, removals: int) -> None:
        """Remember the tails among chunks that a transaction has committed, which counted `removals`."""
        is_tail = np.ones(len(write.payload), np.bool_)
        is_tail[:-1] = write.user_id[1:] != write.user_id[:-1]
        rows = np.flatnonzero(is_tail)
        columns = (write.user_id, write.chunk_no, write.n, write.first_ms, write.next_seq)
        numbers = zip(*(column[rows].tolist() for column in columns), strict=True)
        with self._lock:
            if removals != self._removals:
                return
            for (user, *tail), row in zip(numbers, rows.tolist(), strict=True):
                self._drop(user)
                if tail[1] < chunk_len:
                    chunk_no, length, first_ms, next_seq = tail
                    payload = write.payload[row]
                    self._tails[user] = (chunk_no, length, first_ms, next_seq, payload)
                    self._num_bytes += len(payload) + _ENTRY_BYTES
            while self._num_bytes > self._budget_bytes:
                self._drop(next(iter(self._tails)))

    def clear(self) -> None:
        """Forget all: an append has failed, or its outcome is not known."""
        with self._lock:
            self._clear()

    def _clear(self) -> None:
        self._tails.clear()
        self._num_bytes = 0

    def _drop(self, user: int) -> None:
        tail = self._tails.pop(user, None)
        if tail is not None:
            self._num_bytes -= len(tail[4]) + _ENTRY_BYTES
