"""SQL of the dead letters that were sent back."""

from __future__ import annotations

from collections.abc import Collection
from itertools import groupby

import numpy as np
from sqlalchemy import Connection, select

from feature_store.records import SourcePlace
from feature_store.tables import redriven_letter
from feature_store.values import insert_missing, values_table


def record_redriven(connection: Connection, log_id: str, places: Collection[SourcePlace], at_ms: int) -> None:
    """Store that the records refused at these places were sent back; the first time stays."""
    rows = [
        {
            "log_id": log_id,
            "topic": place.topic,
            "partition": place.partition,
            "source_offset": place.offset,
            "redriven_at_ms": at_ms,
        }
        # In order: two writers then wait for each other instead of deadlocking.
        for place in _in_order(places)
    ]
    if rows:
        connection.execute(insert_missing(connection.dialect.name, redriven_letter), rows)


def load_redriven(connection: Connection, log_id: str, places: Collection[SourcePlace]) -> set[SourcePlace]:
    """Those of these places whose record was sent back; one statement a partition."""
    found: set[SourcePlace] = set()
    for (topic, partition), group in groupby(_in_order(places), key=lambda place: (place.topic, place.partition)):
        offsets = np.array([place.offset for place in group], np.int64)
        wanted = values_table(connection.dialect.name, {"source_offset": offsets})
        column = redriven_letter.c.source_offset
        query = (
            select(column)
            .join_from(wanted, redriven_letter, column == wanted.c.source_offset)
            .where(
                redriven_letter.c.log_id == log_id,
                redriven_letter.c.topic == topic,
                redriven_letter.c.partition == partition,
            )
        )
        found |= {SourcePlace(topic, partition, offset) for offset in connection.execute(query).scalars()}
    return found


def _in_order(places: Collection[SourcePlace]) -> list[SourcePlace]:
    return sorted(places, key=lambda place: (place.topic, place.partition, place.offset))
