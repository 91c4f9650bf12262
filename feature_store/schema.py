"""The schema's life: migrate a database up or down, say where it stands, and check that it is what the code expects.

Alembic runs from the installed `migrations` package; there is no alembic.ini. Each call is one transaction.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from importlib.resources import as_file, files
from pathlib import Path
from typing import Final

from alembic import command
from alembic.autogenerate import compare_metadata
from alembic.config import Config
from alembic.migration import MigrationContext
from sqlalchemy import text

from feature_store.config import FeatureStoreConfig, parse_url
from feature_store.engine import build_engine, reading, writing
from feature_store.errors import SchemaDriftError, StoreUnavailableError
from feature_store.revision import current_revision, require_revision
from feature_store.tables import metadata

_MIGRATION_LOCK: Final = 0x68656164  # any constant: processes that migrate one PostgreSQL database queue on it


def migrate(url: str, revision: str = "head") -> None:
    """Bring the database up to a revision; do nothing if it is there. Creates a SQLite file and its directory.

    Raises:
        StoreUnavailableError: the database cannot be reached or written.
    """
    _create_sqlite_directory(url)
    with _alembic(url) as config:
        command.upgrade(config, revision)


def downgrade(url: str, revision: str) -> None:
    """Take the database back to a revision; `base` drops every table with its data.

    Raises:
        StoreUnavailableError: the database cannot be reached or written.
    """
    with _alembic(url) as config:
        command.downgrade(config, revision)


def current(url: str) -> str | None:
    """The revision the database is at, or None if it has never been migrated."""
    engine = build_engine(FeatureStoreConfig(url=url))
    try:
        with reading(engine) as connection:
            return current_revision(connection)
    finally:
        engine.dispose()


def check(url: str) -> None:
    """Refuse a database whose revision or tables are not what this code needs.

    Raises:
        SchemaRevisionError: it is at another revision.
        SchemaDriftError: its tables differ from `feature_store.tables`; the message lists how.
        StoreUnavailableError: the database cannot be reached.
    """
    engine = build_engine(FeatureStoreConfig(url=url))
    try:
        with reading(engine) as connection:
            require_revision(connection)
            context = MigrationContext.configure(
                connection, opts={"compare_type": True, "compare_server_default": True, "target_metadata": metadata}
            )
            differences = compare_metadata(context, metadata)
    finally:
        engine.dispose()
    if differences:
        listed = "; ".join(map(repr, differences))
        raise SchemaDriftError(f"the database's tables differ from feature_store.tables: {listed}; add a revision")


@contextmanager
def _alembic(url: str) -> Iterator[Config]:
    engine = build_engine(FeatureStoreConfig(url=url))
    try:
        with as_file(files("migrations")) as location, writing(engine) as connection:
            if connection.dialect.name == "postgresql":
                connection.execute(text("SELECT pg_advisory_xact_lock(:lock)"), {"lock": _MIGRATION_LOCK})
            config = Config()
            config.set_main_option("script_location", str(location).replace("%", "%%"))
            config.attributes["connection"] = connection
            yield config
    finally:
        engine.dispose()


def _create_sqlite_directory(url: str) -> None:
    parsed = parse_url(url)
    if parsed.get_backend_name() != "sqlite" or parsed.database is None:
        return
    directory = Path(parsed.database).parent
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise StoreUnavailableError(
            f"cannot create {directory} for the feature store ({error.strerror}): choose a writable store.url"
        ) from error
