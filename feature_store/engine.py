"""Connections: the engine for either database, its transactions, and its errors in our words.

SQLite runs in WAL mode: writers begin with BEGIN IMMEDIATE (the write lock is taken before the first read, so nothing
read can be stale), readers begin deferred and see one snapshot. PostgreSQL writers run READ COMMITTED (a locked row is
read as its last writer left it), readers REPEATABLE READ and READ ONLY.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Final

from opentelemetry import metrics, trace
from sqlalchemy import Connection, Engine, create_engine, event
from sqlalchemy.exc import DBAPIError, InterfaceError, OperationalError
from sqlalchemy.exc import TimeoutError as PoolTimeoutError

from feature_store.config import FeatureStoreConfig, parse_url
from feature_store.errors import (
    ConcurrentAppendError,
    FeatureStoreError,
    SchemaRevisionError,
    StoreBusyError,
    StoreUnavailableError,
)

_WRITER_OPTION: Final = "headrace_writer"
_NO_TRANSACTION_OPTION: Final = "headrace_no_transaction"

_SQLITE_BUSY: Final = ("SQLITE_BUSY", "SQLITE_LOCKED")
_SQLITE_AWAY: Final = ("SQLITE_CANTOPEN", "SQLITE_READONLY", "SQLITE_FULL", "SQLITE_IOERR", "SQLITE_NOTADB")
_POSTGRES_RETRY: Final = ("40001", "40P01")
"""serialization_failure and deadlock_detected: two writers met; one of them must start again."""
_POSTGRES_AWAY: Final = ("08", "25006", "25P03", "25P04", "28", "3D", "42501", "53", "57", "58")
"""SQLSTATE classes: connection, authorisation, no such database, resources exhausted, operator intervention, system
error; and read-only (a replica, after a failover), two time limits that end a transaction, a privilege revoked."""
_POSTGRES_BUSY: Final = ("55P03",)

_tracer = trace.get_tracer("headrace.feature_store")
_durations = metrics.get_meter("headrace.feature_store").create_histogram(
    "db.client.operation.duration", unit="s", description="One transaction"
)


def build_engine(config: FeatureStoreConfig) -> Engine:
    """An engine whose pool may be used from any thread. Connects to nothing yet."""
    url = parse_url(config.url)
    pool: dict[str, Any] = {
        "pool_size": config.pool_size,
        "max_overflow": config.pool_size,
        "pool_timeout": config.pool_timeout_s,
    }
    if url.get_backend_name() == "postgresql":
        connect_args = {"connect_timeout": config.connect_timeout_s, "application_name": "headrace"}
        return create_engine(url, connect_args=connect_args, pool_pre_ping=True, **pool)
    # The pool hands a connection to one thread at a time, which is all SQLite asks for.
    connect_args = {"check_same_thread": False, "timeout": config.busy_timeout_ms / 1000}
    engine = create_engine(url, connect_args=connect_args, **pool)
    event.listen(engine, "connect", _sqlite_connection_setup(config))
    event.listen(engine, "begin", _begin_sqlite)
    return engine


@contextmanager
def writing(engine: Engine) -> Iterator[Connection]:
    """A transaction that may write: committed on leaving, rolled back on any error."""
    # Only SQLite looks at the option; READ COMMITTED is PostgreSQL's default.
    options = {_WRITER_OPTION: True}
    with (
        _timed(engine, "write"),
        errors_in_our_words(engine),
        engine.execution_options(**options).begin() as connection,
    ):
        yield connection


@contextmanager
def reading(engine: Engine) -> Iterator[Connection]:
    """A transaction that sees one state of the database throughout."""
    options: dict[str, Any] = {}
    if engine.dialect.name == "postgresql":
        options = {"isolation_level": "REPEATABLE READ", "postgresql_readonly": True}
    with (
        _timed(engine, "read"),
        errors_in_our_words(engine),
        engine.execution_options(**options).connect() as connection,
        connection.begin(),
    ):
        yield connection


@contextmanager
def _timed(engine: Engine, operation: str) -> Iterator[None]:
    """Measure a transaction, with what its caller does inside, by OpenTelemetry's database conventions."""
    started_s = time.perf_counter()
    attributes = {"db.system.name": engine.dialect.name, "db.operation.name": operation}
    # Only as a part of something that is traced; not made current, since a transaction may be left in another context.
    span: trace.Span = trace.INVALID_SPAN
    if trace.get_current_span().is_recording():
        span = _tracer.start_span(f"headrace.store.{operation}", kind=trace.SpanKind.CLIENT, attributes=attributes)
    try:
        yield
    except FeatureStoreError as error:
        attributes["error.type"] = type(error).__name__
        span.set_attribute("error.type", attributes["error.type"])
        raise
    finally:
        _durations.record(time.perf_counter() - started_s, attributes)
        span.end()


def erase_deleted(engine: Engine) -> None:
    """See `FeatureStore.erase_deleted`."""
    if engine.dialect.name != "sqlite":
        return
    options = {_NO_TRANSACTION_OPTION: True}
    with errors_in_our_words(engine), engine.execution_options(**options).connect() as connection:
        # The copy may be larger than memory.
        connection.exec_driver_sql("PRAGMA temp_store = FILE")
        try:
            connection.exec_driver_sql("VACUUM")
            is_held = connection.exec_driver_sql("PRAGMA wal_checkpoint(TRUNCATE)").one()[0]
        finally:
            connection.exec_driver_sql("PRAGMA temp_store = MEMORY")
    if is_held:
        raise StoreBusyError(f"the write-ahead log of {_where(engine)} is being read, so it keeps what was deleted")


@contextmanager
def errors_in_our_words(engine: Engine) -> Iterator[None]:
    """Turn database errors that an operator or a retry can cure into this room's errors; let our bugs through."""
    try:
        yield
    except PoolTimeoutError as error:
        raise StoreBusyError(
            f"no free connection to the feature store at {_where(engine)} within pool_timeout_s: "
            "raise store.pool_size, or use fewer threads"
        ) from error
    except DBAPIError as error:
        translated = _translate(error, engine)
        if translated is None:
            raise
        raise translated from error


def _translate(error: DBAPIError, engine: Engine) -> FeatureStoreError | None:
    cause = " ".join(str(error.orig).split())
    if engine.dialect.name == "sqlite":
        return _translate_sqlite(getattr(error.orig, "sqlite_errorname", None) or "", cause, engine)
    if getattr(error.orig, "sqlstate", None) is None and not isinstance(error, OperationalError | InterfaceError):
        return None  # psycopg refused it before the server saw it: our bug
    return _translate_postgres(getattr(error.orig, "sqlstate", None), cause, engine)


def _translate_sqlite(code: str, cause: str, engine: Engine) -> FeatureStoreError | None:
    if code.startswith(_SQLITE_BUSY):
        return StoreBusyError(f"the feature store at {_where(engine)} is held by another writer ({cause}): retry")
    if code.startswith(_SQLITE_AWAY):
        return StoreUnavailableError(
            f"cannot use the feature store at {_where(engine)} ({cause}): "
            "check that its directory exists, is writable and has free space"
        )
    if "no such table" in cause or "no such column" in cause:
        return _no_schema(cause, engine)
    return None


def _translate_postgres(sqlstate: str | None, cause: str, engine: Engine) -> FeatureStoreError | None:
    if sqlstate in _POSTGRES_RETRY:
        return ConcurrentAppendError(f"two writers met in the feature store at {_where(engine)} ({cause}): retry")
    if sqlstate in _POSTGRES_BUSY:
        return StoreBusyError(f"the feature store at {_where(engine)} is held by another writer ({cause}): retry")
    if sqlstate is None or sqlstate.startswith(_POSTGRES_AWAY):
        return StoreUnavailableError(
            f"cannot use the feature store at {_where(engine)} ({cause}): check store.url and that "
            "PostgreSQL is running"
        )
    if sqlstate in ("42P01", "42703"):  # undefined table, undefined column
        return _no_schema(cause, engine)
    return None


def _no_schema(cause: str, engine: Engine) -> SchemaRevisionError:
    return SchemaRevisionError(f"the feature store at {_where(engine)} lacks tables ({cause}): run `headrace migrate`")


def _where(engine: Engine) -> str:
    return engine.url.render_as_string(hide_password=True)


def _sqlite_connection_setup(config: FeatureStoreConfig) -> Any:
    def set_up(connection: Any, _record: object) -> None:
        connection.isolation_level = None  # sqlite3 must not begin transactions behind our back; _begin_sqlite does
        connection.execute(f"PRAGMA busy_timeout = {config.busy_timeout_ms}")
        connection.execute("PRAGMA journal_mode = WAL")
        connection.execute(f"PRAGMA synchronous = {config.sqlite_synchronous}")
        connection.execute(f"PRAGMA wal_autocheckpoint = {config.sqlite_wal_pages}")
        # KiB: the upper levels of a big table stay in memory. Four times as much made appends 2 to 5 % faster.
        connection.execute("PRAGMA cache_size = -16384")
        connection.execute("PRAGMA temp_store = MEMORY")

    return set_up


def _begin_sqlite(connection: Connection) -> None:
    if connection.get_execution_options().get(_NO_TRANSACTION_OPTION, False):
        return
    is_writer = connection.get_execution_options().get(_WRITER_OPTION, False)
    connection.exec_driver_sql("BEGIN IMMEDIATE" if is_writer else "BEGIN DEFERRED")
