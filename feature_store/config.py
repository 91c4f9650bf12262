"""Settings of the feature store and of the hot histories."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Final, Literal

from sqlalchemy.engine import URL, make_url
from sqlalchemy.exc import ArgumentError

from feature_store.interactions import BYTES_PER_INTERACTION

MAX_CHUNK_LEN: Final = 4096

MAX_AGE_MS: Final = 100 * 366 * 24 * 3_600_000
"""A century: longer is a slip of the unit."""

SLOT_BYTES: Final = 160
"""Memory per user in the hot histories besides its interactions: six numbers in arrays, and an entry in the index."""


@dataclass(frozen=True, kw_only=True, slots=True)
class FeatureStoreConfig:
    """Where the database is and how to use it."""

    url: str = field(repr=False)
    """SQLAlchemy URL: `sqlite:///path/to/file.db` or `postgresql://user:password@host/database` (driver: psycopg).
    Not shown in the repr: it may hold a password."""
    chunk_len: int = 64
    """Interactions per stored chunk. Only the tail chunk is rewritten by an append, so small writes little and large
    reads fast; fixed for the life of a store."""
    max_history: int = 0
    """Newest interactions kept of each user; 0: all. At least hot.max_len, better twice that: the difference is how
    many newer interactions of a user a trainer may be behind and still read all that it needs."""
    max_age_ms: int = 0
    """Interactions this much older (ms of event time) than the newest event applied are no longer part of a history; 0:
    of any age."""
    removal_delay_ms: int = 3_600_000
    """How much longer (ms of event time) an interaction past max_age_ms stays in the database, seen by no reader but a
    trainer that is behind: repeating what it did before a crash, it reads what it read then."""
    busy_timeout_ms: int = 10_000
    """How long a SQLite writer waits for another writer before it gives up (milliseconds)."""
    sqlite_synchronous: Literal["NORMAL", "FULL"] = "NORMAL"
    """SQLite fsync policy. NORMAL survives any crash of the process; FULL also never loses the last commits to a power
    cut, and costs an fsync a transaction. (Lost commits are read from the log again: positions are lost with them.)"""
    sqlite_wal_pages: int = 16_384
    """Pages of 4 KiB the write-ahead log may reach before it is moved into the database: 64 MiB. Small values make
    every large commit pay for a move (measured here: 1,000 pages cost a quarter of the append rate)."""
    tail_cache_bytes: int = 16_777_216
    """Memory for the ends of histories that an ingest process wrote last (bytes), which the next append need not read
    back. Processes that only read use none of it."""
    pool_size: int = 5
    """Connections kept open per process: one writer and a few readers."""
    pool_timeout_s: float = 10.0
    """How long a caller waits for a free connection (seconds)."""
    connect_timeout_s: int = 5
    """How long to wait for PostgreSQL to accept a connection (seconds)."""

    def __post_init__(self) -> None:
        url = parse_url(self.url)
        if url.get_backend_name() == "sqlite" and url.database in (None, "", ":memory:"):
            raise ValueError(
                f"store.url={self.url!r} keeps the store in one connection's memory, but it is shared by "
                "several connections and processes: name a file, e.g. sqlite:///headrace.db"
            )
        _check_range("store.chunk_len", self.chunk_len, 1, MAX_CHUNK_LEN)
        _check_range("store.max_history", self.max_history, 0, 1_000_000_000)
        _check_range("store.max_age_ms", self.max_age_ms, 0, MAX_AGE_MS)
        _check_range("store.removal_delay_ms", self.removal_delay_ms, 0, MAX_AGE_MS)
        _check_range("store.busy_timeout_ms", self.busy_timeout_ms, 0, 3_600_000)
        _check_range("store.sqlite_wal_pages", self.sqlite_wal_pages, 1, 10_000_000)
        _check_range("store.tail_cache_bytes", self.tail_cache_bytes, 0, 2**40)
        _check_range("store.pool_size", self.pool_size, 2, 1_000)
        _check_range("store.pool_timeout_s", self.pool_timeout_s, 0.001, 3_600)
        _check_range("store.connect_timeout_s", self.connect_timeout_s, 1, 3_600)
        if self.sqlite_synchronous not in ("NORMAL", "FULL"):
            raise ValueError(
                f"store.sqlite_synchronous={self.sqlite_synchronous!r} must be 'NORMAL' or 'FULL': OFF could "
                "corrupt the store in a power cut"
            )


@dataclass(frozen=True, kw_only=True, slots=True)
class HotHistoriesConfig:
    """How much history is kept in memory."""

    max_len: int = 512
    """Newest interactions kept per user; the longest history that `gather` can be asked for."""
    budget_bytes: int = 256 * 1024 * 1024
    """Memory for all resident histories; beyond it the least recently touched users are evicted to about half."""
    behind_retry_interval_ms: int = 50
    """Pause between looks for an interaction that was announced but is not committed in SQL yet (milliseconds)."""
    behind_num_retries: int = 200
    """Looks before `HistoryBehindError`: with the pause above, ten seconds."""

    def __post_init__(self) -> None:
        _check_range("hot.max_len", self.max_len, 1, 1_000_000)
        smallest = 2 * (2 * self.max_len * BYTES_PER_INTERACTION + SLOT_BYTES)
        if self.budget_bytes < smallest:
            raise ValueError(
                f"hot.budget_bytes={self.budget_bytes} cannot hold one growing history of "
                f"max_len={self.max_len}: raise it to at least {smallest}, or lower max_len"
            )
        _check_range("hot.behind_retry_interval_ms", self.behind_retry_interval_ms, 1, 60_000)
        _check_range("hot.behind_num_retries", self.behind_num_retries, 0, 1_000_000)


@dataclass(frozen=True, kw_only=True, slots=True)
class UserVectorsConfig:
    """How long vectors of users are kept, and how inference workers keep up with them."""

    keep_ms: int = 86_400_000
    """How long (ms) a vector that was superseded stays in the store: for training that looks back, on labels that took
    their time and in a trainer that is behind."""
    states_max: int = 256
    """Vectors of one user and version kept at most, the newest."""
    refresh_ms: int = 1_000
    """How often (ms) an inference worker looks for new vectors of the users it holds in memory."""
    cached_users: int = 50_000
    """Users whose vectors an inference worker holds in memory; the longest unused make room."""

    def __post_init__(self) -> None:
        _check_range("user_vectors.keep_ms", self.keep_ms, 0, MAX_AGE_MS)
        _check_range("user_vectors.states_max", self.states_max, 1, 1_000_000)
        _check_range("user_vectors.refresh_ms", self.refresh_ms, 10, 3_600_000)
        _check_range("user_vectors.cached_users", self.cached_users, 1, 100_000_000)


def parse_url(text: str) -> URL:
    """The database URL with the driver this project ships (psycopg 3 for PostgreSQL).

    Raises:
        ValueError: not a URL, or neither SQLite nor PostgreSQL.
    """
    try:
        url = make_url(text)
    except ArgumentError as error:
        raise ValueError(
            f"store.url={text!r} is not a database URL: use sqlite:///headrace.db or postgresql://user@host/db"
        ) from error
    backend = url.get_backend_name()
    if backend == "postgresql":
        return url.set(drivername="postgresql+psycopg")
    if backend == "sqlite":
        return url.set(drivername="sqlite")
    raise ValueError(f"store.url={text!r} names {backend!r}: only sqlite and postgresql are supported")


def _check_range(name: str, value: float, smallest: float, largest: float) -> None:
    if not smallest <= value <= largest:
        raise ValueError(f"{name}={value} must be between {smallest} and {largest}: change {name}")
