"""Event-time watermarks beside the positions, and an account of what was removed.

Revision ID: 0003
Revises: 0002
"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0003"
down_revision = "0002"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Positions written before this revision have seen no event time yet, and nothing was ever removed by retention."""
    op.add_column("log_position", sa.Column("watermark_ms", sa.BigInteger(), nullable=False, server_default="0"))
    op.create_table(
        "removal",
        sa.Column("source", sa.String(512), nullable=False),
        sa.Column("num_interactions", sa.BigInteger(), nullable=False),
        sa.Column("fingerprint", sa.BigInteger(), nullable=False),
        sa.PrimaryKeyConstraint("source", name="pk_removal"),
        comment="How many accepted interactions were removed again, by which writer, and the sum of their event keys.",
    )


def downgrade() -> None:
    """Forget what was removed: `headrace verify` then compares with what is left."""
    op.drop_table("removal")
    op.drop_column("log_position", "watermark_ms")
