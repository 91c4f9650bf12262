"""A stream through store, batcher and learner in one process, without a broker."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np

from feature_store.config import FeatureStoreConfig, HotHistoriesConfig
from feature_store.hot import HotHistories
from feature_store.interactions import Interactions
from feature_store.schema import migrate
from feature_store.store import FeatureStore
from online_trainer.batching import MicroBatch, MicroBatcher
from online_trainer.learner import OnlineLearner
from online_trainer.learner_config import LearnerConfig
from stream.messages import HistoryUpdate

_LOG_ID = "benchmark"


@contextmanager
def learner_with_store(config: LearnerConfig) -> Iterator[tuple[OnlineLearner, FeatureStore]]:
    """A new learner, and the SQLite store in a temporary folder that it reads histories from."""
    with tempfile.TemporaryDirectory() as folder:
        url = f"sqlite:///{folder}/store.db"
        migrate(url)
        store = FeatureStore(FeatureStoreConfig(url=url))
        hot = HotHistories(store, HotHistoriesConfig(max_len=config.model.max_len + 1, budget_bytes=1 << 30))
        yield OnlineLearner(config, hot, log_id=_LOG_ID), store
        store.close()


def batches(
    learner: OnlineLearner, store: FeatureStore, config: LearnerConfig, stream: Interactions, *, poll: int = 5_000
) -> Iterator[MicroBatch]:
    """Micro-batches of a stream, as if every poll of ingest held so many events; appended to the store as they come."""
    trainer = config.trainer
    batcher = MicroBatcher(
        max_interactions=trainer.batch_interactions,
        max_tokens=trainer.batch_tokens,
        max_len=config.model.max_len,
        positions=learner.ledger.positions,
    )
    for first in range(0, len(stream), poll):
        batcher.add(_update(store, stream.take(slice(first, first + poll)), first), first // poll)
        is_last = first + poll >= len(stream)
        while batcher.is_full() or (is_last and batcher.num_pending):
            batch = batcher.take()
            assert batch is not None
            yield batch


def _update(store: FeatureStore, events: Interactions, first: int) -> HistoryUpdate:
    with store.transaction() as transaction:
        result = transaction.append(events)
    offsets = np.flatnonzero(result.accepted) + first
    return HistoryUpdate(
        log_id=_LOG_ID,
        partition=0,
        first_offset=first,
        last_offset=first + len(events) - 1,
        watermark_ms=int(events.event_time_ms.max()),
        offsets=offsets,
        append_ms=events.event_time_ms[result.accepted],
        interactions=result.accepted_from(events),
    )
