"""Hot histories against brute force: any order of events, announcements, losses, readers and forgetting."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from feature_store.arena import working_set_bytes
from feature_store.config import FeatureStoreConfig, HotHistoriesConfig
from feature_store.hot import HotHistories
from feature_store.interactions import Interactions
from feature_store.store import FeatureStore
from tests.feature_store.databases import migrated_database
from tests.feature_store.truth import Row, Truth, append, batch, content_of, rows_of

MAX_LEN = 4
NUM_USERS = 6
SMALLEST_BUDGET = 2 * working_set_bytes(MAX_LEN)

EVENTS = st.lists(st.tuples(st.integers(0, NUM_USERS - 1), st.integers(0, 25)), min_size=1, max_size=8)
STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("announce"), EVENTS),
        st.tuples(st.just("announce"), EVENTS),
        st.tuples(st.sampled_from(["commit", "deliver", "deliver all", "deliver again", "lose"]), st.none()),
        st.tuples(st.just("gather"), st.lists(st.integers(0, NUM_USERS), min_size=1, max_size=5)),
        st.tuples(st.just("gather"), st.lists(st.integers(0, NUM_USERS), min_size=1, max_size=5)),
        st.tuples(st.just("forget"), st.integers(0, NUM_USERS - 1)),
    ),
    max_size=25,
)


class World:
    """A log of updates that is ahead of SQL, SQL, hot histories that may be behind both, and what is true."""

    def __init__(self, store: FeatureStore, budget_bytes: int) -> None:
        config = HotHistoriesConfig(max_len=MAX_LEN, budget_bytes=budget_bytes, behind_num_retries=1)
        self.store, self.truth = store, Truth()
        # Whoever waits for SQL waits until ingest has committed.
        self.hot = HotHistories(store, config, pause=lambda _seconds: self.commit())
        self.uncommitted: list[list[Row]] = []
        self.undelivered: list[Interactions] = []
        self.delivered: list[Interactions] = []
        self.applied = np.zeros(NUM_USERS + 1, np.int64)

    def announce(self, events: list[tuple[int, int]]) -> None:
        rows = [content_of(user, time, time % 3) for user, time in events]
        accepted, seq, _ = self.truth.append(rows)
        update = [row._replace(seq=n) for row, n, is_new in zip(rows, seq, accepted, strict=True) if is_new]
        self.uncommitted.append(rows)
        self.undelivered.append(batch(update))

    def commit(self) -> None:
        for rows in self.uncommitted:
            append(self.store, rows)
        self.uncommitted.clear()

    def deliver(self) -> None:
        if self.undelivered:
            self.delivered.append(self.undelivered.pop(0))
            self.apply(self.delivered[-1])

    def apply(self, update: Interactions) -> None:
        self.hot.apply(update)
        np.maximum.at(self.applied, update.user_id, update.seq.astype(np.int64) + 1)
        # What an update log says up to here is answered exactly, however much more SQL knows.
        self.check_known(np.unique(update.user_id))

    def check_known(self, users: np.ndarray[Any, np.dtype[np.int64]]) -> None:
        below = self.applied[users]
        histories = self.hot.gather(users, max_len=MAX_LEN, below_seq=below)
        assert rows_of(histories) == [
            self.truth.read(user, MAX_LEN, below_seq=n) for user, n in zip(users.tolist(), below.tolist(), strict=True)
        ]

    def gather(self, users: list[int]) -> None:
        asked = np.array(users)
        self.check_known(asked)
        max_len = 1 + sum(users) % MAX_LEN
        for before_ms in (None, 5 + 4 * users[0]):
            found = rows_of(self.hot.gather(asked, max_len=max_len, before_ms=before_ms))
            for user, rows in zip(users, found, strict=True):
                num_true = len(self.truth.rows.get(user, []))
                moments = range(int(self.applied[user]), num_true + 1)
                possible = [self.truth.read(user, max_len, before_ms=before_ms, below_seq=n) for n in moments]
                assert rows in possible, "a state of this user, and none before the last update"

    def forget(self, user: int) -> None:
        # The command comes after everything before it, as it does in the log.
        self.commit()
        while self.undelivered:
            self.deliver()
        self.delivered.clear()
        with self.store.transaction() as transaction:
            transaction.forget_users(np.array([user]))
        self.truth.rows.pop(user, None)
        self.applied[user] = 0
        self.hot.forget(np.array([user]))

    def step(self, kind: str, argument: Any) -> None:
        if kind == "deliver all":
            while self.undelivered:
                self.deliver()
        elif kind == "deliver again":
            for update in self.delivered:
                self.apply(update)
        elif kind == "lose":
            self.undelivered[:1] = []
        elif argument is None:
            getattr(self, kind)()
        else:
            getattr(self, kind)(argument)


@settings(max_examples=40)
@given(STEPS, st.sampled_from([SMALLEST_BUDGET, 3 * SMALLEST_BUDGET, 1 << 20]))
def test_every_answer_is_a_true_state_and_never_an_earlier_one(steps: list[tuple[str, Any]], budget_bytes: int) -> None:
    with tempfile.TemporaryDirectory() as name, migrated_database("sqlite", Path(name)) as url:
        store = FeatureStore(FeatureStoreConfig(url=url, chunk_len=4))
        world = World(store, budget_bytes)
        for kind, argument in steps:
            world.step(kind, argument)
            assert world.hot.stats.bytes_used <= budget_bytes
        world.commit()
        while world.undelivered:
            world.deliver()
        world.check_known(np.arange(NUM_USERS))
        store.close()
