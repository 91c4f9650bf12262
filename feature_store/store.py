"""The feature store: durable, ordered, deduplicated histories in SQL, and the small tables beside them.

Safe to use from several threads: each call takes its own connection from the pool. Every call blocks on the database,
so asynchronous callers wrap it: `await asyncio.to_thread(store.read, user_ids, max_len=512)`; a whole transaction
belongs in one function that runs in one thread.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import contextmanager
from typing import Final

import numpy as np
from numpy.typing import NDArray
from sqlalchemy import Connection, select, text

from feature_store import audit, catalogue, event_search, publications, reading, redriven, removing
from feature_store.appending import Appending
from feature_store.config import FeatureStoreConfig
from feature_store.engine import build_engine, erase_deleted
from feature_store.engine import reading as read_transaction
from feature_store.engine import writing as write_transaction
from feature_store.errors import ConcurrentAppendError, StoreLayoutError
from feature_store.interactions import JaggedHistories
from feature_store.reading import CurrentHistories, HistoryQuery
from feature_store.records import (
    AuditTotals,
    Finding,
    FirstServed,
    IdKind,
    Item,
    PruneSlice,
    PublicationFloor,
    PublishedSnapshot,
    SourcePlace,
    StoredEvent,
    StoreStats,
    StoreTotals,
)
from feature_store.retention import Retention
from feature_store.revision import require_revision
from feature_store.tables import store_property
from feature_store.tails import TailCache
from feature_store.transaction import StoreTransaction
from feature_store.user_state_store import UserStateStore
from feature_store.values import insert_missing

_PRUNE_ATTEMPTS: Final = 5


class FeatureStore:
    """One database of histories. Opening it connects to nothing; `close` it when done."""

    def __init__(self, config: FeatureStoreConfig) -> None:
        self.config = config
        self.retention = Retention.of(config)
        self._engine = build_engine(config)
        self._tails = TailCache(config.tail_cache_bytes)
        self._layout_is_checked = False

    def close(self) -> None:
        """Close all pooled connections."""
        self._engine.dispose()

    def ping(self) -> None:
        """Do nothing, if the database is there.

        Raises:
            StoreUnavailableError: it is not; the message is one sentence for an operator.
        """
        with read_transaction(self._engine) as connection:
            connection.execute(text("SELECT 1"))

    def require_current_schema(self) -> None:
        """Refuse to work on a schema this code was not written for.

        Raises:
            SchemaRevisionError: run `headrace migrate`.
            StoreLayoutError: the store was built with another chunk_len.
            StoreUnavailableError: the database is away.
        """
        with read_transaction(self._engine) as connection:
            require_revision(connection)
            self._check_layout(connection)

    @contextmanager
    def transaction(self) -> Iterator[StoreTransaction]:
        """One writer transaction: committed on leaving the block, rolled back if the block raises.

        Raises:
            ConcurrentAppendError: two writers met; retry the whole block.
            StoreUnavailableError: the database is away (StoreBusyError: locked by another writer); nothing was stored.
        """
        if not self._layout_is_checked:
            self._fix_layout()
        try:
            with write_transaction(self._engine) as connection:
                appending = Appending(connection=connection, retention=self.retention, tails=self._tails)
                yield StoreTransaction(connection, appending)
        except BaseException:
            self._tails.clear()
            raise
        appending.keep_tails()

    def read(
        self,
        user_ids: NDArray[np.int64],
        *,
        max_len: int,
        before_ms: NDArray[np.int64] | int | None = None,
        known_at_ms: NDArray[np.int64] | int | None = None,
        below_seq: NDArray[np.integer] | int | None = None,
        watermark_ms: int | None = None,
    ) -> JaggedHistories:
        """Histories as of a point in time, in the order asked for (a user may be asked for more than once).

        Only what retention keeps is seen, as of now: an earlier time does not bring back what has expired since.

        Args:
            user_ids: i64[B].
            max_len: the newest this many interactions that pass the limits below.
            before_ms: i64[B] or one for all: strictly before this event time.
            known_at_ms: i64[B] or one for all: arrived at or before this processing time.
            below_seq: integer[B] or one for all: with a smaller arrival number.
            watermark_ms: retention by age as of an earlier watermark, for a reader that is behind the store; for
                store.removal_delay_ms nothing that it needs has been removed.

        Raises:
            ChunkCorruptError: a stored chunk is damaged.
            StoreUnavailableError: the database is away.
        """
        query = _query(user_ids, max_len, before_ms, below_seq, known_at_ms=known_at_ms, watermark_ms=watermark_ms)
        with read_transaction(self._engine) as connection:
            self._require_layout(connection)
            return reading.read(connection, query, self.retention)

    def read_current(
        self,
        user_ids: NDArray[np.int64],
        *,
        max_len: int,
        before_ms: NDArray[np.int64] | int | None = None,
        below_seq: NDArray[np.integer] | int | None = None,
        watermark_ms: int | None = None,
    ) -> CurrentHistories:
        """`read`, together with each user's next arrival number in the same state of the database."""
        query = _query(user_ids, max_len, before_ms, below_seq, watermark_ms=watermark_ms)
        with read_transaction(self._engine) as connection:
            self._require_layout(connection)
            return reading.read_current(connection, query, self.retention)

    def positions(self, log_id: str, topic: str) -> dict[int, int]:
        """Partition → next log offset to apply, for partitions that have been applied from."""
        with read_transaction(self._engine) as connection:
            return publications.load_positions(connection, log_id, topic)

    def current_log_id(self, log_id: str) -> str:
        """The name under which a log's positions are kept now: its own, or `name~n` after n accepted resets."""
        with read_transaction(self._engine) as connection:
            return publications.generation_name(log_id, publications.log_generation(connection, log_id))

    def names(self, kind: IdKind, ids: NDArray[np.int64] | Iterable[int]) -> dict[int, str]:
        """The strings behind hashed ids; ids that were numbers from the start are absent."""
        with read_transaction(self._engine) as connection:
            return catalogue.load_names(connection, kind, _ids(ids))

    def items(self, ids: NDArray[np.int64] | Iterable[int]) -> dict[int, Item]:
        """What is known about items; unknown ones are absent."""
        with read_transaction(self._engine) as connection:
            return catalogue.load_items(connection, _ids(ids))

    def item_categories(self, *, after: int, limit: int) -> dict[int, tuple[str, ...]]:
        """Categories of at most `limit` items with ids above `after`, by ascending id; empty: there are no more."""
        with read_transaction(self._engine) as connection:
            return catalogue.load_categories(connection, after=after, limit=limit)

    def unavailable_items(self) -> NDArray[np.int64]:
        """i64[K], ids of retired items, ascending."""
        with read_transaction(self._engine) as connection:
            return catalogue.unavailable_items(connection)

    def record_published(self, snapshot: PublishedSnapshot) -> None:
        """Store what was published; a version published again (after a crash) replaces its record."""
        with write_transaction(self._engine) as connection:
            publications.record_published(connection, snapshot)

    def published_snapshots(
        self, model: str, since_version: int = 0, *, created_from_ms: int = 0, limit: int | None = None
    ) -> list[PublishedSnapshot]:
        """Published versions above `since_version`, made at or after a time, oldest first; at most `limit`."""
        with read_transaction(self._engine) as connection:
            return publications.load_published(connection, model, since_version, created_from_ms, limit)

    def newest_snapshot(self, model: str) -> PublishedSnapshot | None:
        """The published version with the highest number; None before the first."""
        with read_transaction(self._engine) as connection:
            return publications.load_newest(connection, model)

    def record_first_served(
        self, model: str, version: int, replica: str, at_ms: int, *, swapped_at_ms: int | None = None
    ) -> None:
        """Store when a replica changed to and first answered with a version; the earliest answer stays."""
        served = FirstServed(model=model, version=version, replica=replica, at_ms=at_ms, swapped_at_ms=swapped_at_ms)
        with write_transaction(self._engine) as connection:
            publications.record_first_served(connection, served)

    def first_served(self, model: str, since_version: int = 0) -> list[FirstServed]:
        """First answers with versions above `since_version`, by version and replica."""
        with read_transaction(self._engine) as connection:
            return publications.load_first_served(connection, model, since_version)

    def first_answers(self, model: str, version: int) -> list[FirstServed]:
        """Of each replica, its first answer with `version` or a later one, by replica."""
        with read_transaction(self._engine) as connection:
            return publications.load_first_answers(connection, model, version)

    def prune_publications(self, model: str, *, before_ms: int, kept: Collection[int], max_versions: int = 500) -> int:
        """Remove what the store knows of old versions: that they were published, and who answered with them first.

        Removed are versions below every one that was made at or after `before_ms`, but never the newest and none of
        `kept` (those whose snapshots are still stored). One short transaction, that also says what has been removed
        (`publication_floor`): call it again until it removes nothing.

        Returns how many versions were removed, at most `max_versions`. Raises StoreUnavailableError.
        """
        with write_transaction(self._engine) as connection:
            return publications.prune(connection, model, before_ms=before_ms, kept=kept, limit=max_versions)

    def publication_floor(self, model: str) -> PublicationFloor:
        """From which version on everything that was published is known."""
        with read_transaction(self._engine) as connection:
            return publications.load_floor(connection, model)

    def find_event(self, key: int, user_ids: Collection[int] | None = None) -> list[StoredEvent]:
        """Everything stored under an event key, expired or not, by user and event time.

        With `user_ids`, only these histories are looked at; without, the database searches all chunks for the key.

        Raises ChunkCorruptError or StoreUnavailableError.
        """
        with read_transaction(self._engine) as connection:
            self._require_layout(connection)
            return event_search.find_event(connection, key, user_ids, self.retention)

    def record_redriven(self, log_id: str, places: Collection[SourcePlace], at_ms: int) -> None:
        """Store that the records refused at these places were sent back; the first time stays."""
        with write_transaction(self._engine) as connection:
            redriven.record_redriven(connection, log_id, places, at_ms)

    def redriven_among(self, log_id: str, places: Collection[SourcePlace]) -> set[SourcePlace]:
        """Those of these places whose refused record was sent back."""
        with read_transaction(self._engine) as connection:
            return redriven.load_redriven(connection, log_id, places)

    @property
    def user_states(self) -> UserStateStore:
        """The cached vectors of users."""
        return UserStateStore(self._engine, self.retention)

    def prune(self, *, after_user: int = -1, max_users: int = 200, max_chunks: int = 500) -> PruneSlice:
        """Remove what has expired, of the next users only: one short transaction, so that ingest hardly waits.

        Call it again with `next_after` of the result until that is None. Chunks go whole, once nothing in them is part
        of a history any more (by age: for `store.removal_delay_ms`); histories are never rewritten.

        Args:
            after_user: look at users with higher ids.
            max_users: at most so many of them.
            max_chunks: remove at most about so many chunks (at least 2).

        Raises:
            ConcurrentAppendError: other writers changed these chunks again and again; nothing of the slice was removed.
            StoreUnavailableError: the database is away.
        """
        for attempts_left in reversed(range(_PRUNE_ATTEMPTS)):
            try:
                with write_transaction(self._engine) as connection:
                    self._require_layout(connection)
                    return removing.prune(
                        connection, self.retention, after_user=after_user, max_users=max_users, max_chunks=max_chunks
                    )
            except ConcurrentAppendError:
                if not attempts_left:
                    raise
        raise AssertionError("the last attempt returns or raises")

    def erase_deleted(self) -> None:
        """Make sure that what was deleted is in no file of the database any more; blocks writers meanwhile.

        SQLite keeps deleted rows in free pages, in free space within pages and in its write-ahead log. Overwriting them
        as they are deleted (secure_delete) is not enough: rows that moved within a page leave copies. So the whole
        file is written anew and the log truncated: half a minute a gigabyte. PostgreSQL is left to its own VACUUM.

        Raises:
            StoreBusyError: a reader or writer held on to the file for longer than the busy timeout; try again.
        """
        erase_deleted(self._engine)

    def totals(self) -> StoreTotals:
        """Counts and fingerprints of all interactions, stored and removed; reads every chunk.

        Raises:
            ChunkCorruptError: a stored chunk is damaged.
        """
        with read_transaction(self._engine) as connection:
            return reading.totals(connection)

    def stats(self) -> StoreStats:
        """How much is stored, from the rows alone: fast, and nothing is checked."""
        with read_transaction(self._engine) as connection:
            return audit.stats(connection, self.retention)

    def verify(self, on_finding: Callable[[Finding], None]) -> AuditTotals:
        """Look at everything stored, in one state of the database; `on_finding` hears what is wrong, and where.

        Raises:
            StoreLayoutError: the store was built with another chunk_len.
        """
        with read_transaction(self._engine) as connection:
            self._require_layout(connection)
            return audit.verify(connection, self.config.chunk_len, on_finding)

    def _require_layout(self, connection: Connection) -> None:
        if not self._layout_is_checked:
            self._check_layout(connection)

    def _check_layout(self, connection: Connection) -> None:
        query = select(store_property.c.value).where(store_property.c.name == "chunk_len")
        stored = connection.execute(query).scalar_one_or_none()
        if stored is None:
            return  # nothing has been written yet
        if int(stored) != self.config.chunk_len:
            raise StoreLayoutError(
                f"the store was built with chunk_len={stored}, but store.chunk_len={self.config.chunk_len}: "
                f"set it to {stored}, or replay the log into an empty database"
            )
        self._layout_is_checked = True

    def _fix_layout(self) -> None:
        # A transaction of its own: the flag must not outlive a rollback, nor two first writers wait for each other.
        row = {"name": "chunk_len", "value": str(self.config.chunk_len)}
        with write_transaction(self._engine) as connection:
            connection.execute(insert_missing(connection.dialect.name, store_property).values(row))
        with read_transaction(self._engine) as connection:
            self._check_layout(connection)


def _query(
    user_ids: NDArray[np.int64],
    max_len: int,
    before_ms: NDArray[np.int64] | int | None,
    below_seq: NDArray[np.integer] | int | None,
    *,
    known_at_ms: NDArray[np.int64] | int | None = None,
    watermark_ms: int | None = None,
) -> HistoryQuery:
    shape = np.shape(user_ids)
    return HistoryQuery(
        user_ids=user_ids,
        max_len=max_len,
        before_ms=None if before_ms is None else np.broadcast_to(np.asarray(before_ms, np.int64), shape),
        known_at_ms=None if known_at_ms is None else np.broadcast_to(np.asarray(known_at_ms, np.int64), shape),
        below_seq=None if below_seq is None else np.broadcast_to(np.asarray(below_seq, np.int64), shape),
        watermark_ms=watermark_ms,
    )


def _ids(ids: NDArray[np.int64] | Iterable[int]) -> NDArray[np.int64]:
    return ids if isinstance(ids, np.ndarray) else np.fromiter(ids, np.int64)
