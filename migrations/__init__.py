"""The schema's history: Alembic revisions for SQLite and PostgreSQL, run by `feature_store.schema`."""
