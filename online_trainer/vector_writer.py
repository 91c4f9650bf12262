"""Writing vectors of users with the exactly-once effect of the other writers: vectors and positions in one transaction.

1. Read updates; note who is due. 2. Take those who are due; read their histories, and before that how much had ever
been forgotten. 3. Compute. 4. Begin the SQL transaction; lock the positions, which must be where this writer left them.
5. If somebody was forgotten since step 2, write nothing: what was taken is put back and computed anew. 6. Write the
vectors; one that is there already stays. 7. Write the positions, behind which nobody waits, and how far a back-fill has
come, in the same transaction; commit. 8. Record freshness.

A crash before the commit computes again; after it, nothing is repeated, since a message below the positions is not read
again and a vector is a function of its key.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Final

from feature_store.store import FeatureStore
from feature_store.transaction import StoreTransaction
from feature_store.user_states import NewVectors
from online_trainer.errors import UpstreamFencedError
from stream.clock import Clock
from stream.failpoints import fail_point

_READER: Final = "upstream/"
"""Before the topic in the names of our positions: other readers of `history-updates` keep theirs in the same table."""


@dataclass(frozen=True, kw_only=True, slots=True)
class VectorWrite:
    """What one transaction stores."""

    vectors: Mapping[int, NewVectors]
    """By version."""
    positions: Mapping[int, int]
    """Partition of `history-updates` → offset below which nobody waits for anything."""
    num_forgotten: int
    """`UserStateStore.num_forgotten` before the histories were read."""
    filled_up_to: Mapping[int, int] = field(default_factory=dict)
    """Version → users up to this id have been looked at by its back-fill."""


class VectorWriter:
    """The only writer of one model's vectors; blocking, for one thread."""

    def __init__(self, store: FeatureStore, *, model: str, log_id: str, topic: str, clock: Clock) -> None:
        self._store, self._model, self._log_id, self._topic, self._clock = store, model, log_id, topic, clock
        self._stored: dict[int, int] = {}
        self._attempted: dict[int, int] = {}

    @property
    def positions(self) -> dict[int, int]:
        """Partition → next offset to read, as stored."""
        return dict(self._stored)

    def load(self, partitions: list[int]) -> dict[int, int]:
        """Take the stored positions over from whoever wrote before. Raises StoreUnavailableError."""
        with self._store.transaction() as transaction:
            self._stored = self._lock(transaction, partitions)
        self._attempted = self._stored
        return self.positions

    def commit(self, write: VectorWrite) -> int | None:
        """Store vectors and positions; since when (epoch ms) they are there.

        None, with nothing stored: somebody was forgotten since the histories were read. Raises UpstreamFencedError when
        another daemon writes these vectors, and StoreUnavailableError, after which the same may be tried again.
        """
        positions = self._stored | dict(write.positions)
        with self._store.transaction() as transaction:
            # Of a commit whose answer was lost it is not known whether it was done.
            found = self._lock(transaction, list(positions))
            if found not in ({n: known.get(n, 0) for n in positions} for known in (self._stored, self._attempted)):
                raise UpstreamFencedError(
                    f"another `headrace upstream` writes the vectors of model {self._model!r}: run one of them only"
                )
            self._attempted = positions
            states = transaction.user_states
            states.lock()
            if transaction.num_forgotten() != write.num_forgotten:
                return None
            # As late as can be: whoever looks back counts a vector as there from this moment on.
            written_at_ms = self._clock.now_ms()
            for version, vectors in write.vectors.items():
                states.write(self._model, version, vectors, written_at_ms=written_at_ms)
            for version, up_to in write.filled_up_to.items():
                states.filled(self._model, version, up_to)
            for partition, position in positions.items():
                if position > self._stored.get(partition, 0):
                    transaction.set_position(self._log_id, _READER + self._topic, partition, position)
            fail_point("upstream.written")
        fail_point("upstream.committed")
        self._stored = positions
        return written_at_ms

    def _lock(self, transaction: StoreTransaction, partitions: list[int]) -> dict[int, int]:
        return {
            number: transaction.lock_position(self._log_id, _READER + self._topic, number).next_offset
            for number in sorted(partitions)
        }
