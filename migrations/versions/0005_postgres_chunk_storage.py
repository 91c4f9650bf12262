"""How PostgreSQL stores history chunks: whole, uncompressed, with room to rewrite them in their page.

Revision ID: 0005
Revises: 0004
"""

from __future__ import annotations

from alembic import op

revision = "0005"
down_revision = "0004"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Tails are rewritten all the time.

    A chunk has at most 3 KiB of which half are random keys: compressing it costs time and saves nothing, and moving it
    to a table of its own (from 2 KiB on, by default) doubles the writes. Room in each page lets a rewritten tail stay
    where its index entry points. Holds for rows written from now on; SQLite needs nothing of it.
    """
    if op.get_bind().dialect.name == "postgresql":
        op.execute("ALTER TABLE history_chunk ALTER COLUMN payload SET STORAGE EXTERNAL")
        op.execute("ALTER TABLE history_chunk SET (toast_tuple_target = 8160, fillfactor = 70)")


def downgrade() -> None:
    """Back to what PostgreSQL does by itself."""
    if op.get_bind().dialect.name == "postgresql":
        op.execute("ALTER TABLE history_chunk RESET (toast_tuple_target, fillfactor)")
        op.execute("ALTER TABLE history_chunk ALTER COLUMN payload SET STORAGE EXTENDED")
