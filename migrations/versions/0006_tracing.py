"""Where one event was on its way: the steps inside a snapshot, and when a replica changed to a version.

Revision ID: 0006
Revises: 0005
"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0006"
down_revision = "0005"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Rows from before this revision tell neither."""
    op.add_column("published_snapshot", sa.Column("steps", sa.JSON(), nullable=True))
    op.add_column("first_served", sa.Column("swapped_at_ms", sa.BigInteger(), nullable=True))


def downgrade() -> None:
    """Forget both; `headrace trace` then knows less."""
    op.drop_column("first_served", "swapped_at_ms")
    op.drop_column("published_snapshot", "steps")
