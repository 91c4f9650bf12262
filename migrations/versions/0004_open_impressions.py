"""What answers showed, until their labels can no longer change.

Revision ID: 0004
Revises: 0003
"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0004"
down_revision = "0003"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Build the table."""
    op.create_table(
        "open_impression",
        sa.Column("user_id", sa.BigInteger(), autoincrement=False, nullable=False),
        sa.Column("request_id", sa.String(128), nullable=False),
        sa.Column("from_ms", sa.BigInteger(), nullable=False),
        sa.Column("until_ms", sa.BigInteger(), nullable=False),
        sa.Column("due_ms", sa.BigInteger(), nullable=False),
        sa.Column("is_closed", sa.Boolean(), nullable=False),
        sa.Column("item_ids", sa.LargeBinary(), nullable=False),
        sa.Column("is_taken", sa.LargeBinary(), nullable=False),
        sa.Column("payload", sa.LargeBinary(), nullable=False),
        sa.PrimaryKeyConstraint("user_id", "request_id", name="pk_open_impression"),
        comment="What answers showed, while labels can change: item_ids are int64, is_taken a byte per item.",
    )
    op.create_index("ix_open_impression_due_ms", "open_impression", ["due_ms"])


def downgrade() -> None:
    """Drop it: what was shown and is still open gets no further labels."""
    op.drop_index("ix_open_impression_due_ms", "open_impression")
    op.drop_table("open_impression")
