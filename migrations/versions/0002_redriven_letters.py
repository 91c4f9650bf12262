"""Which dead letters have been sent back.

Revision ID: 0002
Revises: 0001
"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Build the table."""
    op.create_table(
        "redriven_letter",
        sa.Column("log_id", sa.String(128), nullable=False),
        sa.Column("topic", sa.String(249), nullable=False),
        sa.Column("partition", sa.Integer(), autoincrement=False, nullable=False),
        sa.Column("source_offset", sa.BigInteger(), autoincrement=False, nullable=False),
        sa.Column("redriven_at_ms", sa.BigInteger(), nullable=False),
        sa.PrimaryKeyConstraint("log_id", "topic", "partition", "source_offset", name="pk_redriven_letter"),
        comment="Places in the log whose refused record was sent back by `headrace dlq redrive`.",
    )


def downgrade() -> None:
    """Drop it: every letter counts as never sent back, and histories drop what they hold already."""
    op.drop_table("redriven_letter")
