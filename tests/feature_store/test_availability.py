"""With the database away, every call says so in one sentence that names the place and the cure."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from sqlalchemy import create_engine, event, text

from feature_store import schema
from feature_store.config import FeatureStoreConfig, parse_url
from feature_store.errors import SchemaRevisionError, StoreBusyError, StoreUnavailableError
from feature_store.store import FeatureStore
from ops.ports import free_port
from tests.feature_store.truth import Row, append

USERS = np.arange(3)


def away_urls(directory: Path) -> list[tuple[str, str]]:
    """URL of a database that is away, and the place that the message must name."""
    (directory / "not_a_database.db").write_bytes(b"something else entirely" * 100)
    port = free_port()
    return [
        (f"postgresql://ann:secret@127.0.0.1:{port}/headrace", f"ann:***@127.0.0.1:{port}/headrace"),
        (f"sqlite:///{directory}/no/such/directory/store.db", "no/such/directory/store.db"),
        (f"sqlite:///{directory}", str(directory)),
        (f"sqlite:///{directory}/not_a_database.db", "not_a_database.db"),
    ]


def test_every_call_says_in_one_line_where_and_why(tmp_path: Path) -> None:
    for url, place in away_urls(tmp_path):
        store = FeatureStore(FeatureStoreConfig(url=url, connect_timeout_s=2))
        calls: list[Callable[[], object]] = [
            store.ping,
            store.require_current_schema,
            store.totals,
            partial(append, store, [Row(1, 1, 1)]),
            partial(store.read, USERS, max_len=3),
            partial(schema.check, url),
        ]
        for call in calls:
            with pytest.raises(StoreUnavailableError, match="cannot use the feature store at") as error:
                call()
            message = str(error.value)
            assert place in message
            assert "secret" not in message
            assert "\n" not in message
            assert "check" in message
        store.close()


def test_a_directory_that_cannot_be_made_is_a_clear_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StoreUnavailableError, match=r"cannot create .*file/sub.* choose a writable store.url"):
        schema.migrate(f"sqlite:///{tmp_path}/file/sub/store.db")


def test_a_read_only_file_refuses_writes_but_not_for_good(tmp_path: Path) -> None:
    if os.geteuid() == 0:
        pytest.skip("root may write to read-only files")
    path = tmp_path / "store.db"
    schema.migrate(f"sqlite:///{path}")
    path.chmod(0o400)
    store = FeatureStore(FeatureStoreConfig(url=f"sqlite:///{path}"))
    with pytest.raises(StoreUnavailableError):
        append(store, [Row(1, 1, 1)])
    store.close()


def test_a_database_without_schema_asks_for_migrate(tmp_path: Path) -> None:
    store = FeatureStore(FeatureStoreConfig(url=f"sqlite:///{tmp_path}/empty.db"))
    with pytest.raises(SchemaRevisionError, match="has no schema yet, this code needs .*: run `headrace migrate`"):
        store.require_current_schema()
    for call in (lambda: store.read(USERS, max_len=3), lambda: append(store, [Row(1, 1, 1)])):
        with pytest.raises(SchemaRevisionError, match="run `headrace migrate`"):
            call()
    store.close()


def test_a_store_comes_back_after_its_connections_were_cut(store: FeatureStore) -> None:
    append(store, [Row(1, 1, 1)])
    if store.config.url.startswith("sqlite"):
        pytest.skip("SQLite has no server to lose")
    killer = create_engine(parse_url(store.config.url), isolation_level="AUTOCOMMIT")
    with killer.connect() as connection:
        cut = "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE pid <> pg_backend_pid()"
        others = text(f"{cut} AND datname = current_database()")

        def cut_in_the_middle() -> None:
            with store.transaction() as transaction:
                transaction.lock_position("log", "interactions", 0)
                connection.execute(others)
                transaction.set_position("log", "interactions", 0, 1)

        with pytest.raises(StoreUnavailableError):
            cut_in_the_middle()
        connection.execute(others)
    killer.dispose()
    assert store.read(np.array([1]), max_len=9).num_interactions == 1
    assert store.positions("log", "interactions") == {}


def test_a_server_that_only_reads_after_a_failover_is_away(store: FeatureStore) -> None:
    if store.config.url.startswith("sqlite"):
        pytest.skip("SQLite has no server that fails over")
    append(store, [Row(1, 1, 1)])
    operator = create_engine(parse_url(store.config.url), isolation_level="AUTOCOMMIT")
    with operator.connect() as connection:
        name = connection.execute(text("SELECT current_database()")).scalar_one()
        connection.execute(text(f'ALTER DATABASE "{name}" SET default_transaction_read_only = on'))
    operator.dispose()
    store._engine.dispose()
    with pytest.raises(StoreUnavailableError, match="read-only transaction"):
        append(store, [Row(1, 2, 2)])
    assert store.read(np.array([1]), max_len=9).num_interactions == 1


def test_a_transaction_that_the_server_ended_for_idling_is_to_be_tried_again(store: FeatureStore) -> None:
    if store.config.url.startswith("sqlite"):
        pytest.skip("SQLite has no such limit")

    def idle() -> None:
        with store.transaction() as transaction:
            transaction.lock_position("log", "interactions", 0)
            transaction._connection.execute(text("SET LOCAL idle_in_transaction_session_timeout = 20"))
            time.sleep(0.2)
            transaction.set_position("log", "interactions", 0, 1)

    with pytest.raises(StoreUnavailableError):
        idle()
    assert append(store, [Row(1, 1, 1)]).accepted.all()


def test_what_goes_wrong_while_chunks_are_copied_is_said_in_our_words(store: FeatureStore) -> None:
    if store.config.url.startswith("sqlite"):
        pytest.skip("SQLite has no COPY")

    def revoke(connection: Any, _cursor: Any, statement: str, *_rest: object) -> None:
        if statement.startswith("SET LOCAL enable_hashjoin"):  # the last one before the copy
            connection.connection.driver_connection.execute("SET LOCAL ROLE pg_monitor")

    event.listen(store._engine, "after_cursor_execute", revoke)
    with pytest.raises(StoreUnavailableError, match="permission denied"):
        append(store, [Row(1, 1, 1)])
    event.remove(store._engine, "after_cursor_execute", revoke)
    assert append(store, [Row(1, 1, 1)]).accepted.all()


def test_more_threads_than_connections_wait_and_then_give_up(open_store: Callable[..., FeatureStore]) -> None:
    store = open_store(pool_size=2, pool_timeout_s=0.05)
    append(store, [Row(1, 1, 1)])
    with ThreadPoolExecutor(8) as pool:
        for histories in pool.map(lambda _: store.read(np.array([1]), max_len=3), range(4)):
            assert histories.num_interactions == 1
        are_in, may_leave = threading.Barrier(5), threading.Event()

        def hold_a_connection() -> None:
            with store._engine.connect():
                are_in.wait(20)
                may_leave.wait(20)

        holders = [pool.submit(hold_a_connection) for _ in range(4)]
        are_in.wait(20)
        with pytest.raises(StoreBusyError, match="raise store.pool_size"):
            store.ping()
        may_leave.set()
        for holder in holders:
            holder.result(20)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"url": "sqlite://"}, "keeps the store in one connection's memory"),
        ({"url": "sqlite:///:memory:"}, "name a file"),
        ({"url": "mysql://host/db"}, "only sqlite and postgresql are supported"),
        ({"url": "no url"}, "is not a database URL"),
        ({"url": "sqlite:///x.db", "chunk_len": 0}, "store.chunk_len=0 must be between 1 and 4096"),
        ({"url": "sqlite:///x.db", "sqlite_synchronous": "OFF"}, "must be 'NORMAL' or 'FULL'"),
        ({"url": "sqlite:///x.db", "pool_size": 1}, "store.pool_size=1 must be between 2"),
    ],
)
def test_wrong_settings_are_refused_with_the_fix(settings: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        FeatureStoreConfig(**settings)  # type: ignore[arg-type]


def test_a_password_does_not_show_in_the_settings() -> None:
    assert "secret" not in repr(FeatureStoreConfig(url="postgresql://ann:secret@host/db"))
