"""What users did with items whose labels wait for more.

Revision ID: 0008
Revises: 0007
"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0008"
down_revision = "0007"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """No label waits yet."""
    op.add_column("open_impression", sa.Column("pending", sa.LargeBinary(), nullable=True))


def downgrade() -> None:
    """Labels that wait are made from the histories when their windows end, with what is found there."""
    op.drop_column("open_impression", "pending")
