"""Vectors of users, and which version of the upstream model they are served of.

Revision ID: 0009
Revises: 0008
"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0009"
down_revision = "0008"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Build both tables."""
    op.create_table(
        "user_state",
        sa.Column("user_id", sa.BigInteger(), autoincrement=False, nullable=False),
        sa.Column("model", sa.String(128), nullable=False),
        sa.Column("version", sa.BigInteger(), autoincrement=False, nullable=False),
        sa.Column("next_seq", sa.BigInteger(), autoincrement=False, nullable=False),
        sa.Column("as_of_ms", sa.BigInteger(), nullable=False),
        sa.Column("written_at_ms", sa.BigInteger(), nullable=False),
        sa.Column("vector", sa.LargeBinary(), nullable=False),
        sa.PrimaryKeyConstraint("user_id", "model", "version", "next_seq", name="pk_user_state"),
        comment="A user's vector of an upstream version, of the interactions with arrival numbers below next_seq.",
    )
    op.create_index("ix_user_state_written_at_ms", "user_state", ["written_at_ms"])
    op.create_table(
        "upstream_version",
        sa.Column("model", sa.String(128), nullable=False),
        sa.Column("version", sa.BigInteger(), autoincrement=False, nullable=False),
        sa.Column("created_at_ms", sa.BigInteger(), nullable=False),
        sa.Column("serving_from_ms", sa.BigInteger(), nullable=True),
        sa.Column("filled_up_to", sa.BigInteger(), nullable=False),
        sa.PrimaryKeyConstraint("model", "version", name="pk_upstream_version"),
        comment="Since when readers get the vectors of a version; null while it is being filled.",
    )


def downgrade() -> None:
    """Drop them: vectors are computed anew when they are wanted again."""
    op.drop_table("upstream_version")
    op.drop_index("ix_user_state_written_at_ms", "user_state")
    op.drop_table("user_state")
