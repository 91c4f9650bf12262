"""Histories, positions, names, items and published snapshots.

Revision ID: 0001
Revises:
"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Build every table of the first schema."""
    _create_histories()
    _create_catalogue()
    _create_publications()


def downgrade() -> None:
    """Drop them all."""
    for table in (
        "first_served",
        "published_snapshot",
        "item",
        "id_name",
        "log_position",
        "history_chunk",
        "store_property",
    ):
        op.drop_table(table)


def _create_histories() -> None:
    op.create_table(
        "store_property",
        sa.Column("name", sa.String(64), nullable=False),
        sa.Column("value", sa.String(256), nullable=False),
        sa.PrimaryKeyConstraint("name", name="pk_store_property"),
        comment="Facts fixed for the life of the store, such as chunk_len.",
    )
    op.create_table(
        "history_chunk",
        sa.Column("user_id", sa.BigInteger(), autoincrement=False, nullable=False),
        sa.Column("chunk_no", sa.Integer(), autoincrement=False, nullable=False),
        sa.Column("n", sa.Integer(), nullable=False),
        sa.Column("first_ms", sa.BigInteger(), nullable=False),
        sa.Column("last_ms", sa.BigInteger(), nullable=False),
        sa.Column("next_seq", sa.BigInteger(), nullable=False),
        sa.Column("payload", sa.LargeBinary(), nullable=False),
        sa.PrimaryKeyConstraint("user_id", "chunk_no", name="pk_history_chunk"),
        comment="Chunk k holds its user's interactions [k*chunk_len, (k+1)*chunk_len) by (event_time_ms, event_key).",
    )
    op.create_table(
        "log_position",
        sa.Column("log_id", sa.String(128), nullable=False),
        sa.Column("topic", sa.String(249), nullable=False),
        sa.Column("partition", sa.Integer(), autoincrement=False, nullable=False),
        sa.Column("next_offset", sa.BigInteger(), nullable=False),
        sa.PrimaryKeyConstraint("log_id", "topic", "partition", name="pk_log_position"),
        comment="Next log offset to apply, written in the transaction that stores the effect.",
    )


def _create_catalogue() -> None:
    op.create_table(
        "id_name",
        sa.Column("kind", sa.String(16), nullable=False),
        sa.Column("id", sa.BigInteger(), autoincrement=False, nullable=False),
        sa.Column("name", sa.Text(), nullable=False),
        sa.PrimaryKeyConstraint("kind", "id", name="pk_id_name"),
        comment="The string behind each hashed user or item id.",
    )
    op.create_table(
        "item",
        sa.Column("item_id", sa.BigInteger(), autoincrement=False, nullable=False),
        sa.Column("title", sa.Text(), nullable=False),
        sa.Column("text", sa.Text(), nullable=False),
        sa.Column("categories", sa.JSON(), nullable=False),
        sa.Column("embedding", sa.LargeBinary(), nullable=True),
        sa.Column("available", sa.Boolean(), nullable=False),
        sa.PrimaryKeyConstraint("item_id", name="pk_item"),
    )


def _create_publications() -> None:
    op.create_table(
        "published_snapshot",
        sa.Column("model", sa.String(128), nullable=False),
        sa.Column("version", sa.BigInteger(), autoincrement=False, nullable=False),
        sa.Column("kind", sa.String(16), nullable=False),
        sa.Column("parent", sa.BigInteger(), nullable=True),
        sa.Column("created_at_ms", sa.BigInteger(), nullable=False),
        sa.Column("published_at_ms", sa.BigInteger(), nullable=False),
        sa.Column("watermark_ms", sa.BigInteger(), nullable=True),
        sa.Column("lineage", sa.JSON(), nullable=False),
        sa.Column("event_age", sa.JSON(), nullable=False),
        sa.Column("append_age", sa.JSON(), nullable=False),
        sa.Column("metrics", sa.JSON(), nullable=False),
        sa.Column("traceparent", sa.String(128), nullable=True),
        sa.PrimaryKeyConstraint("model", "version", name="pk_published_snapshot"),
    )
    op.create_table(
        "first_served",
        sa.Column("model", sa.String(128), nullable=False),
        sa.Column("version", sa.BigInteger(), autoincrement=False, nullable=False),
        sa.Column("replica", sa.String(128), nullable=False),
        sa.Column("at_ms", sa.BigInteger(), nullable=False),
        sa.PrimaryKeyConstraint("model", "version", "replica", name="pk_first_served"),
        comment="When each replica first answered with a snapshot version.",
    )
