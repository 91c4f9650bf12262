"""What one writer transaction can do; everything in it becomes visible at once or not at all."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray
from sqlalchemy import Connection, text

from feature_store import appending, catalogue, publications, removing
from feature_store.impressions import OpenImpressions
from feature_store.interactions import AppendResult, Interactions
from feature_store.records import IdKind, Item, LogPosition
from feature_store.user_states import UserStates


class StoreTransaction:
    """Handed out by `FeatureStore.transaction()`; not to be used after it ends, nor by two threads at once."""

    def __init__(self, connection: Connection, state: appending.Appending) -> None:
        self._connection = connection
        self._appending = state
        self._source = "append"

    def lock_position(self, log_id: str, topic: str, partition: int) -> LogPosition:
        """Lock a partition's position (made at 0 if there is none) until the transaction ends.

        A second writer of the same partition waits here until the first one's transaction ends, and then sees the
        position it left: that is the fence between two workers that both believe they own the partition.

        Returns:
            The next log offset to apply, and the partition's event-time watermark.
        """
        # What appends of this transaction remove is accounted to the partition: no two workers meet in one row.
        self._source = f"{log_id}/{topic}/{partition}"
        return publications.lock_position(self._connection, log_id, topic, partition)

    def set_position(self, log_id: str, topic: str, partition: int, next_offset: int, *, watermark_ms: int = 0) -> None:
        """Store the next log offset to apply, and the highest event time applied; a lower one than stored is ignored.

        The highest watermark of all partitions is the store's, which decides what is too old to be kept.

        Raises:
            PositionError: the position was never locked, or would move backwards.
        """
        publications.set_position(self._connection, log_id, topic, partition, next_offset, watermark_ms)

    def next_log_id(self, log_id: str) -> str:
        """The name for a log that was made anew: in use (`FeatureStore.current_log_id`) once it has a position."""
        return publications.generation_name(log_id, publications.log_generation(self._connection, log_id) + 1)

    def append(self, interactions: Interactions) -> AppendResult:
        """Put interactions into their users' histories: in order, without duplicates, numbered by arrival.

        The batch may hold any users and any event times; `seq` of the input is ignored. What retention would not keep
        by the watermark stored so far, or has removed, is not accepted. An interaction may be accepted and be past the
        horizon once this batch's watermark is stored: readers then do not see it, and it is removed like others.

        Raises:
            ConcurrentAppendError: another writer changed one of the users; retry the whole transaction.
            ChunkCorruptError: a stored chunk that the batch needs is damaged.
        """
        return appending.append(self._appending, interactions, self._source)

    def register_names(self, kind: IdKind, names: Mapping[int, str]) -> None:
        """Remember the strings behind hashed ids.

        Raises:
            IdCollisionError: an id already belongs to another string.
        """
        catalogue.register_names(self._connection, kind, names)

    def upsert_items(self, items: Sequence[Item]) -> None:
        """Store items, replacing what was known about them."""
        catalogue.upsert_items(self._connection, items)

    def retire_items(self, ids: NDArray[np.int64] | Iterable[int]) -> None:
        """Mark items as not to be recommended; remembered also for items never heard of."""
        catalogue.retire_items(self._connection, np.asarray(list(ids), np.int64))

    @property
    def impressions(self) -> OpenImpressions:
        """What answers showed and is not labelled for good."""
        return OpenImpressions(self._connection)

    @property
    def user_states(self) -> UserStates:
        """The cached vectors of users."""
        return UserStates(self._connection)

    def num_forgotten(self) -> int:
        """Interactions forgotten since ever: equal to what was read before only if nobody was forgotten since."""
        return removing.count_forgotten(self._connection)

    def forget_users(self, user_ids: NDArray[np.int64]) -> int:
        """Remove everything about users: histories, names, vectors, and what was shown to them.

        Returns:
            How many of them had a history.
        """
        # First, while no append waits for us: the label join may hold its table for as long as the broker takes.
        self.impressions.forget(user_ids)
        self.user_states.forget(np.unique(user_ids))
        if self._connection.dialect.name == "postgresql":
            # Waits for every append under way and holds off new ones; see appending.append.
            self._connection.execute(text("LOCK TABLE history_chunk IN SHARE ROW EXCLUSIVE MODE"))
        user_ids = np.unique(user_ids)
        num_forgotten = removing.forget_histories(self._connection, user_ids)
        catalogue.forget_names(self._connection, "user", user_ids)
        return num_forgotten
