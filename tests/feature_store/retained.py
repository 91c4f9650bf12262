"""What a feature store with retention should hold: the rule in sets and sorted lists, over all ever applied."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from sqlalchemy import text

from feature_store.engine import writing
from feature_store.interactions import AppendResult
from feature_store.records import Finding
from feature_store.retention import Retention
from feature_store.store import FeatureStore
from tests.feature_store.truth import Row, batch, rows_of

EVERYTHING = 10_000
"""A max_len longer than any history here."""


def empty(store: FeatureStore) -> None:
    """As after the migration, but for the chunk length."""
    with writing(store._engine) as connection:
        for table in ("history_chunk", "log_position", "removal"):
            connection.execute(text(f"DELETE FROM {table}"))
    store._tails.clear()  # no API takes back what was appended


def ingest(store: FeatureStore, rows: Sequence[Row], partition: int = 0) -> AppendResult:
    """What an ingest worker does with one batch of its partition."""
    with store.transaction() as transaction:
        locked = transaction.lock_position("log", "interactions", partition)
        result = transaction.append(batch(rows))
        watermark_ms = max([locked.watermark_ms, *(row.event_time_ms for row in rows)])
        transaction.set_position(
            "log", "interactions", partition, locked.next_offset + len(rows), watermark_ms=watermark_ms
        )
    return result


def forget(store: FeatureStore, user_id: int) -> None:
    with store.transaction() as transaction:
        transaction.forget_users(np.array([user_id]))


def prune_all(store: FeatureStore, *, max_users: int = 3, max_chunks: int = 2) -> int:
    """Sweep over all users in small slices; how many interactions were removed."""
    after_user, num_interactions = -1, 0
    while True:
        pruned = store.prune(after_user=after_user, max_users=max_users, max_chunks=max_chunks)
        num_interactions += pruned.num_interactions
        if pruned.next_after is None:
            return num_interactions
        after_user = pruned.next_after


def findings_in(store: FeatureStore) -> list[Finding]:
    findings: list[Finding] = []
    store.verify(findings.append)
    return findings


def stored_rows(store: FeatureStore) -> list[tuple[int, int, int, int]]:
    """(user_id, chunk_no, n, bytes) of every chunk."""
    query = text("SELECT user_id, chunk_no, n, length(payload) FROM history_chunk ORDER BY user_id, chunk_no")
    with writing(store._engine) as connection:
        return [tuple(row) for row in connection.execute(query)]


def contents(store: FeatureStore, users: Sequence[int]) -> list[list[Row]]:
    """The whole histories as read, without what depends on the order of arrival."""
    histories = rows_of(store.read(np.array(users), max_len=EVERYTHING))
    return [[row._replace(seq=0, arrival_ms=0) for row in rows] for rows in histories]


class RetainedTruth:
    """Everything applied since a user was last forgotten, what was accepted of it, and the rule."""

    def __init__(self, retention: Retention) -> None:
        self.retention = retention
        self.watermark_ms = 0
        self.applied: dict[int, dict[tuple[int, int, int], Row]] = {}
        self.accepted: dict[tuple[int, int, int], Row] = {}
        self.num_accepted = 0
        self.fingerprint = 0

    def retained(self, user_id: int, watermark_ms: int | None = None) -> list[Row]:
        """The rule, over all that was applied; rows that were accepted carry their seq."""
        horizon_ms = self.retention.horizon_ms(self.watermark_ms if watermark_ms is None else watermark_ms)
        rows = sorted(
            self.accepted.get(place, row)
            for place, row in self.applied.get(user_id, {}).items()
            if horizon_ms is None or row.event_time_ms >= horizon_ms
        )
        return rows[-self.retention.max_history :] if self.retention.max_history else rows

    def ingest(self, rows: Sequence[Row], result: AppendResult) -> None:
        """Take in a batch, and check what the store says became of it."""
        before_ms = self.watermark_ms
        known = set(self.accepted)
        num_accepted = {row.user_id: self.next_seq(row.user_id) for row in rows}
        for number, row in enumerate(rows):
            assert [result.accepted[number], result.expired[number]] != [True, True]
            was_applied = row.place in self.applied.setdefault(row.user_id, {})
            self.applied[row.user_id].setdefault(row.place, row)
            if result.accepted[number]:
                assert not was_applied, f"{row} was accepted twice, or after it had expired"
                assert result.seq[number] == num_accepted[row.user_id]
                num_accepted[row.user_id] += 1
                self.accepted[row.place] = row._replace(seq=int(result.seq[number]))
                self.num_accepted += 1
                self.fingerprint = (self.fingerprint + row.event_key) % 2**64
            elif not result.expired[number]:
                assert row.place in self.accepted, f"{row} is called a duplicate"
        for number, row in enumerate(rows):
            # By what was there before the batch: what the batch itself leaves behind may still be accepted.
            if result.expired[number]:
                assert row.place not in {one.place for one in self.retained(row.user_id, before_ms)}
                assert row.place not in set(self.accepted) - known
            self.watermark_ms = max(self.watermark_ms, row.event_time_ms)

    def next_seq(self, user_id: int) -> int:
        return 1 + max((row.seq for row in self.accepted.values() if row.user_id == user_id), default=-1)

    def forget(self, user_id: int) -> None:
        self.applied.pop(user_id, None)
        self.accepted = {place: row for place, row in self.accepted.items() if row.user_id != user_id}

    def read(
        self,
        user_id: int,
        max_len: int,
        *,
        before_ms: int | None = None,
        known_at_ms: int | None = None,
        below_seq: int | None = None,
    ) -> list[Row]:
        passing = [
            row
            for row in self.retained(user_id)
            if (before_ms is None or row.event_time_ms < before_ms)
            and (known_at_ms is None or row.arrival_ms <= known_at_ms)
            and (below_seq is None or row.seq < below_seq)
        ]
        return passing[-max_len:]

    def check(self, store: FeatureStore, users: Sequence[int]) -> None:
        """Whole histories, what was accepted = stored + removed, and nothing contradicts itself."""
        assert rows_of(store.read(np.array(users), max_len=EVERYTHING)) == [self.retained(user) for user in users]
        totals = store.totals()
        assert (totals.num_accepted, totals.accepted_fingerprint) == (self.num_accepted, self.fingerprint)
        assert findings_in(store) == []
