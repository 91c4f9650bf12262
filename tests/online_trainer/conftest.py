"""A recorded stream in a real store, as the updates that ingest would have sent."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from feature_store.config import FeatureStoreConfig, HotHistoriesConfig
from feature_store.hot import HotHistories
from feature_store.interactions import Interactions
from feature_store.schema import migrate
from feature_store.store import FeatureStore
from model.config import LossConfig, ModelConfig, OptimizerConfig
from online_trainer.batching import LagRule, MicroBatcher
from online_trainer.config import ItemsConfig, TrainerConfig
from online_trainer.learner import OnlineLearner
from online_trainer.learner_config import LearnerConfig
from stream.messages import HistoryUpdate

MODEL = ModelConfig(embedding_dim=16, num_layers=2, num_heads=1, attention_dim=8, hidden_dim=8, max_len=8)
HOT = HotHistoriesConfig(max_len=9, budget_bytes=1 << 20)


@pytest.fixture
def store(tmp_path: Path) -> Iterator[FeatureStore]:
    url = f"sqlite:///{tmp_path}/store.db"
    migrate(url)
    store = FeatureStore(FeatureStoreConfig(url=url))
    yield store
    store.close()


@dataclass(frozen=True, slots=True)
class RecordedStream:
    """Updates of one source partition, all of them durable in the store."""

    store: FeatureStore
    updates: list[HistoryUpdate]

    @staticmethod
    def config(
        *, items: ItemsConfig | None = None, loss: LossConfig | None = None, max_items: int = 1000, **trainer: Any
    ) -> LearnerConfig:
        return LearnerConfig(
            trainer=TrainerConfig(**({"metrics_window": 100} | trainer)),
            items=items or ItemsConfig(),
            model=dataclasses.replace(MODEL, max_items=max_items),
            loss=loss or LossConfig(),
            optimizer=OptimizerConfig(),
        )

    def learner(self, **config: Any) -> OnlineLearner:
        return OnlineLearner(self.config(**config), HotHistories(self.store, HOT), log_id="main")

    def batcher(self, learner: OnlineLearner, max_interactions: int = 16, lag: LagRule | None = None) -> MicroBatcher:
        """A batcher that continues where the learner stands, with every update queued."""
        batcher = MicroBatcher(
            max_interactions=max_interactions,
            max_tokens=10_000,
            max_len=8,
            positions=learner.ledger.positions,
            lag=lag,
        )
        for number, update in enumerate(self.updates):
            batcher.add(update, number)
        return batcher


def record_stream(
    store: FeatureStore, interactions: Interactions, *, poll: int = 50, log_id: str = "main"
) -> RecordedStream:
    """Append interactions in polls of `poll`, as ingest does."""
    updates = []
    for first in range(0, len(interactions), poll):
        batch = interactions.take(slice(first, first + poll))
        with store.transaction() as transaction:
            transaction.lock_position(log_id, "interactions", 0)
            result = transaction.append(batch)
            transaction.set_position(log_id, "interactions", 0, first + len(batch))
        offsets = np.flatnonzero(result.accepted) + first
        updates.append(
            HistoryUpdate(
                log_id=log_id,
                partition=0,
                first_offset=first,
                last_offset=first + len(batch) - 1,
                watermark_ms=int(batch.event_time_ms.max()),
                offsets=offsets,
                append_ms=offsets + 1_000_000,
                interactions=result.accepted_from(batch),
            )
        )
    return RecordedStream(store, updates)


def walks(num_events: int, *, num_users: int = 30, num_items: int = 40, seed: int = 0) -> Interactions:
    """Users who walk through the items in a circle from a random start: the next item follows from the last one."""
    rng = np.random.default_rng(seed)
    users = rng.integers(0, num_users, num_events)
    position = rng.integers(0, num_items, num_users)
    items = np.empty(num_events, np.int64)
    for n, user in enumerate(users):
        position[user] = (position[user] + 1) % num_items
        items[n] = position[user]
    return Interactions(
        user_id=users,
        item_id=items,
        event_time_ms=1_700_000_000_000 + np.arange(num_events) * 1_000,
        action=np.ones(num_events, np.uint32),
        value=np.full(num_events, np.nan, np.float32),
        event_key=rng.integers(0, 2**63, num_events).astype(np.uint64),
        seq=np.zeros(num_events, np.uint32),
        arrival_ms=np.full(num_events, 1_700_000_000_000, np.int64),
    )
