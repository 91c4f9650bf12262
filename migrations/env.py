"""Alembic's entry point: runs the revisions on the connection that `feature_store.schema` opened."""

from __future__ import annotations

from alembic import context

from feature_store.tables import metadata


def run_migrations() -> None:
    """Run inside the caller's transaction, so that a failing revision leaves nothing behind on either database."""
    context.configure(
        connection=context.config.attributes["connection"],
        target_metadata=metadata,
        compare_type=True,
        compare_server_default=True,
        # SQLite cannot alter a table in place; batch mode copies it.
        render_as_batch=True,
    )
    context.run_migrations()


run_migrations()
