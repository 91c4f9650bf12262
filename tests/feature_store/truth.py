"""What a feature store should hold, kept the slow and obvious way."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np

from feature_store.interactions import AppendResult, Interactions, JaggedHistories
from feature_store.store import FeatureStore


class Row(NamedTuple):
    """One interaction; rows of a user sort in history order."""

    user_id: int
    event_time_ms: int
    event_key: int
    item_id: int = 7
    action: int = 1
    value: float = 0.5
    arrival_ms: int = 0
    seq: int = 0
    surface: int = 0

    @property
    def place(self) -> tuple[int, int, int]:
        return self[:3]


def batch(rows: Sequence[Row]) -> Interactions:
    columns = list(zip(*rows, strict=True)) or [()] * len(Row._fields)
    dtypes = {"event_key": np.uint64, "action": np.uint32, "value": np.float32, "seq": np.uint32, "surface": np.uint8}
    return Interactions(
        **{
            name: np.array(values, dtypes.get(name, np.int64))
            for name, values in zip(Row._fields, columns, strict=True)
        }
    )


def rows_of(histories: JaggedHistories) -> list[list[Row]]:
    """One list of rows per asked user."""
    columns = [getattr(histories, name).tolist() for name in Row._fields[1:]]
    return [
        [Row(user_id, *values) for values in zip(*(column[low:high] for column in columns), strict=True)]
        for user_id, low, high in zip(
            histories.user_ids.tolist(), histories.offsets[:-1].tolist(), histories.offsets[1:].tolist(), strict=True
        )
    ]


def append(store: FeatureStore, rows: Sequence[Row]) -> AppendResult:
    with store.transaction() as transaction:
        return transaction.append(batch(rows))


def random_rows(
    random: np.random.Generator, num_rows: int, *, num_users: int = 4, num_times: int = 40, num_keys: int = 3
) -> list[Row]:
    """Rows with many equal users, times and keys, so that duplicates and ties happen all the time."""
    users = random.integers(0, num_users, num_rows).tolist()
    times = random.integers(0, num_times, num_rows).tolist()
    keys = (random.integers(0, num_keys, num_rows).astype(np.uint64) * np.uint64(2**63 + 1)).tolist()
    return [
        content_of(user, time, key)._replace(arrival_ms=number)
        for number, (user, time, key) in enumerate(zip(users, times, keys, strict=True))
    ]


def content_of(user_id: int, event_time_ms: int, event_key: int) -> Row:
    """The same event always has the same content."""
    item_id = (user_id * 1009 + event_time_ms * 31 + event_key) % 2**62
    return Row(
        user_id,
        event_time_ms,
        event_key,
        item_id=item_id,
        action=item_id % 2**32,
        value=float(item_id % 1000),
        surface=item_id % 3,
    )


class Truth:
    """Histories as sorted lists."""

    def __init__(self) -> None:
        self.rows: dict[int, list[Row]] = {}

    def append(self, rows: Iterable[Row]) -> tuple[list[bool], list[int], list[bool]]:
        """Accepted, seq and late of each row."""
        before = {user: max(row.place for row in stored) for user, stored in self.rows.items() if stored}
        accepted, seq, late = [], [], []
        for row in rows:
            history = self.rows.setdefault(row.user_id, [])
            is_new = row.place not in {stored.place for stored in history}
            accepted.append(is_new)
            seq.append(len(history) if is_new else 0)
            late.append(is_new and row.user_id in before and row.place < before[row.user_id])
            if is_new:
                history.append(row._replace(seq=len(history)))
                history.sort()
        return accepted, seq, late

    def read(
        self,
        user_id: int,
        max_len: int,
        before_ms: int | None = None,
        known_at_ms: int | None = None,
        below_seq: int | None = None,
    ) -> list[Row]:
        passing = [
            row
            for row in self.rows.get(user_id, [])
            if (before_ms is None or row.event_time_ms < before_ms)
            and (known_at_ms is None or row.arrival_ms <= known_at_ms)
            and (below_seq is None or row.seq < below_seq)
        ]
        return passing[-max_len:]
