"""The tables. Alembic builds them (`migrations/`); nothing here creates anything."""

from __future__ import annotations

from typing import Final

from sqlalchemy import JSON, BigInteger, Boolean, Column, Integer, LargeBinary, MetaData, String, Table, Text

SCHEMA_REVISION: Final = "0009"
"""The Alembic revision this code is written for; a test holds it equal to the newest revision in `migrations/`."""

metadata = MetaData(
    naming_convention={
        "ix": "ix_%(table_name)s_%(column_0_N_name)s",
        "uq": "uq_%(table_name)s_%(column_0_N_name)s",
        "ck": "ck_%(table_name)s_%(constraint_name)s",
        "fk": "fk_%(table_name)s_%(column_0_N_name)s_%(referred_table_name)s",
        "pk": "pk_%(table_name)s",
    }
)

store_property = Table(
    "store_property",
    metadata,
    Column("name", String(64), primary_key=True),
    Column("value", String(256), nullable=False),
    comment="Facts fixed for the life of the store, such as chunk_len.",
)

history_chunk = Table(
    "history_chunk",
    metadata,
    Column("user_id", BigInteger, primary_key=True, autoincrement=False),
    Column("chunk_no", Integer, primary_key=True, autoincrement=False),
    Column("n", Integer, nullable=False),
    Column("first_ms", BigInteger, nullable=False),
    Column("last_ms", BigInteger, nullable=False),
    Column("next_seq", BigInteger, nullable=False),
    Column("payload", LargeBinary, nullable=False),
    comment="Chunk k holds its user's interactions [k*chunk_len, (k+1)*chunk_len) by (event_time_ms, event_key).",
)

log_position = Table(
    "log_position",
    metadata,
    Column("log_id", String(128), primary_key=True),
    Column("topic", String(249), primary_key=True),
    Column("partition", Integer, primary_key=True, autoincrement=False),
    Column("next_offset", BigInteger, nullable=False),
    Column("watermark_ms", BigInteger, nullable=False, server_default="0"),
    comment="Next log offset to apply, written in the transaction that stores the effect.",
)

removal = Table(
    "removal",
    metadata,
    Column("source", String(512), primary_key=True),
    Column("num_interactions", BigInteger, nullable=False),
    Column("fingerprint", BigInteger, nullable=False),
    comment="How many accepted interactions were removed again, by which writer, and the sum of their event keys.",
)

redriven_letter = Table(
    "redriven_letter",
    metadata,
    Column("log_id", String(128), primary_key=True),
    Column("topic", String(249), primary_key=True),
    Column("partition", Integer, primary_key=True, autoincrement=False),
    Column("source_offset", BigInteger, primary_key=True, autoincrement=False),
    Column("redriven_at_ms", BigInteger, nullable=False),
    comment="Places in the log whose refused record was sent back by `headrace dlq redrive`.",
)

open_impression = Table(
    "open_impression",
    metadata,
    Column("user_id", BigInteger, primary_key=True, autoincrement=False),
    Column("request_id", String(128), primary_key=True),
    Column("from_ms", BigInteger, nullable=False),
    Column("until_ms", BigInteger, nullable=False),
    Column("due_ms", BigInteger, nullable=False, index=True),
    Column("is_closed", Boolean, nullable=False),
    Column("item_ids", LargeBinary, nullable=False),
    Column("is_taken", LargeBinary, nullable=False),
    Column("payload", LargeBinary, nullable=False),
    Column("pending", LargeBinary, nullable=True),
    comment="What answers showed, while labels can change: item_ids are int64, is_taken a byte per item.",
)

user_state = Table(
    "user_state",
    metadata,
    Column("user_id", BigInteger, primary_key=True, autoincrement=False),
    Column("model", String(128), primary_key=True),
    Column("version", BigInteger, primary_key=True, autoincrement=False),
    Column("next_seq", BigInteger, primary_key=True, autoincrement=False),
    Column("as_of_ms", BigInteger, nullable=False),
    Column("written_at_ms", BigInteger, nullable=False, index=True),
    Column("vector", LargeBinary, nullable=False),
    comment="A user's vector of an upstream version, of the interactions with arrival numbers below next_seq.",
)

upstream_version = Table(
    "upstream_version",
    metadata,
    Column("model", String(128), primary_key=True),
    Column("version", BigInteger, primary_key=True, autoincrement=False),
    Column("created_at_ms", BigInteger, nullable=False),
    Column("serving_from_ms", BigInteger, nullable=True),
    Column("filled_up_to", BigInteger, nullable=False),
    comment="Since when readers get the vectors of a version; null while it is being filled.",
)

id_name = Table(
    "id_name",
    metadata,
    Column("kind", String(16), primary_key=True),
    Column("id", BigInteger, primary_key=True, autoincrement=False),
    Column("name", Text, nullable=False),
    comment="The string behind each hashed user or item id.",
)

item = Table(
    "item",
    metadata,
    Column("item_id", BigInteger, primary_key=True, autoincrement=False),
    Column("title", Text, nullable=False),
    Column("text", Text, nullable=False),
    Column("categories", JSON, nullable=False),
    Column("embedding", LargeBinary, nullable=True),
    Column("available", Boolean, nullable=False),
)

published_snapshot = Table(
    "published_snapshot",
    metadata,
    Column("model", String(128), primary_key=True),
    Column("version", BigInteger, primary_key=True, autoincrement=False),
    Column("kind", String(16), nullable=False),
    Column("parent", BigInteger, nullable=True),
    Column("created_at_ms", BigInteger, nullable=False),
    Column("published_at_ms", BigInteger, nullable=False),
    Column("watermark_ms", BigInteger, nullable=True),
    Column("lineage", JSON, nullable=False),
    Column("event_age", JSON, nullable=False),
    Column("append_age", JSON, nullable=False),
    Column("metrics", JSON, nullable=False),
    Column("traceparent", String(128), nullable=True),
    Column("steps", JSON, nullable=True),
)

first_served = Table(
    "first_served",
    metadata,
    Column("model", String(128), primary_key=True),
    Column("version", BigInteger, primary_key=True, autoincrement=False),
    Column("replica", String(128), primary_key=True),
    Column("at_ms", BigInteger, nullable=False),
    Column("swapped_at_ms", BigInteger, nullable=True),
    comment="When each replica first answered with a snapshot version.",
)

publication_floor = Table(
    "publication_floor",
    metadata,
    Column("model", String(128), primary_key=True),
    Column("version", BigInteger, nullable=False),
    Column("newest_ms", BigInteger, nullable=False),
    comment="Below which version of a model rows of published_snapshot and first_served have been removed.",
)
