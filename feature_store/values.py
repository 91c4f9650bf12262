"""Columns of values as a table that a statement can join: one bound parameter however many rows."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray
from sqlalchemy import BigInteger, FromClause, Insert, Integer, Table, bindparam, cast, column, func, select
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.dialects.postgresql import ARRAY


def values_table(dialect_name: str, columns: Mapping[str, NDArray[np.int64]]) -> FromClause:
    """A table named `wanted` with the given 64-bit columns, and `pos`: the row's number from 0."""
    if dialect_name == "postgresql":
        return _unnested(columns)
    return _json_rows(columns)


def upsert(dialect_name: str, table: Table) -> postgresql.Insert | sqlite.Insert:
    """An INSERT of this table that knows ON CONFLICT."""
    return postgresql.insert(table) if dialect_name == "postgresql" else sqlite.insert(table)


def insert_missing(dialect_name: str, table: Table) -> Insert:
    """An INSERT of this table that leaves rows alone whose key exists."""
    return upsert(dialect_name, table).on_conflict_do_nothing()


def _unnested(columns: Mapping[str, NDArray[np.int64]]) -> FromClause:
    arrays = [bindparam(f"wanted_{name}", values.tolist(), ARRAY(BigInteger)) for name, values in columns.items()]
    names = [column(name, BigInteger) for name in columns]
    rows = func.unnest(*arrays).table_valued(*names, with_ordinality="ordinality", name="numbered").render_derived()
    return select((rows.c.ordinality - 1).label("pos"), *(rows.c[name] for name in columns)).subquery("wanted")


def _json_rows(columns: Mapping[str, NDArray[np.int64]]) -> FromClause:
    if len(columns) == 1:
        ((name, values),) = columns.items()
        each = func.json_each(json.dumps(values.tolist())).table_valued(column("key", Integer), column("value"))
        return select(each.c.key.label("pos"), cast(each.c.value, BigInteger).label(name)).subquery("wanted")
    rows: list[Any] = np.stack(list(columns.values()), axis=1).tolist()
    each = func.json_each(json.dumps(rows)).table_valued(column("key", Integer), column("value"))
    fields = [
        func.json_extract(each.c.value, f"$[{place}]", type_=BigInteger).label(name)
        for place, name in enumerate(columns)
    ]
    return select(each.c.key.label("pos"), *fields).subquery("wanted")
