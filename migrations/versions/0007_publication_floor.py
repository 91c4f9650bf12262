"""From which version on the store still knows everything that was published.

Revision ID: 0007
Revises: 0006
"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0007"
down_revision = "0006"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Nothing has been removed yet."""
    op.create_table(
        "publication_floor",
        sa.Column("model", sa.String(128), nullable=False),
        sa.Column("version", sa.BigInteger(), nullable=False),
        sa.Column("newest_ms", sa.BigInteger(), nullable=False),
        sa.PrimaryKeyConstraint("model", name="pk_publication_floor"),
        comment="Below which version of a model rows of published_snapshot and first_served have been removed.",
    )


def downgrade() -> None:
    """What was removed stays removed; `headrace trace` then takes the oldest row for the first."""
    op.drop_table("publication_floor")
