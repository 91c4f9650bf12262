"""Which revision of the schema a database is at, and whether that is ours.

Reads what Alembic wrote without importing it: daemons never migrate, and it would take 10 MiB of each.
"""

from __future__ import annotations

from typing import Final

from sqlalchemy import Column, Connection, MetaData, String, Table, inspect, select

from feature_store.errors import SchemaRevisionError
from feature_store.tables import SCHEMA_REVISION

_VERSION: Final = Table("alembic_version", MetaData(), Column("version_num", String(32)))


def current_revision(connection: Connection) -> str | None:
    """The revision of the database behind a connection; None if it has never been migrated."""
    if not inspect(connection).has_table(_VERSION.name):
        return None
    return connection.execute(select(_VERSION.c.version_num)).scalar_one_or_none()


def require_revision(connection: Connection) -> None:
    """Raise SchemaRevisionError unless the database behind a connection is at this code's revision."""
    found = current_revision(connection)
    if found != SCHEMA_REVISION:
        state = "has no schema yet" if found is None else f"is at schema revision {found}"
        where = connection.engine.url.render_as_string(hide_password=True)
        raise SchemaRevisionError(
            f"the feature store at {where} {state}, this code needs {SCHEMA_REVISION}: run `headrace migrate`"
        )
