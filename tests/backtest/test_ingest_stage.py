"""Columns enter the commit protocol as the records of the same events would."""

from __future__ import annotations

import asyncio
from pathlib import Path

import numpy as np

from backtest.event_columns import EventColumns
from backtest.ingest_stage import IngestStage
from backtest.recording import EventBatch
from feature_store.config import FeatureStoreConfig
from feature_store.interactions import COLUMN_DTYPES
from feature_store.schema import migrate
from feature_store.store import FeatureStore
from stream.batch import decode_batch
from stream.clock import ManualClock
from stream.commit import Committer
from stream.events import EventDecoder, EventRules, encode_event
from stream.log import Record
from stream.memory_log import MemoryLog

NOW_MS = 1_700_000_000_000
RULES = EventRules(surface_key="page", surfaces=("home", "search", "3"))


def mixed() -> EventBatch:
    """Text and missing values; an action that is not declared, and a clock that runs an hour ahead."""
    count = 40
    times = NOW_MS + np.arange(count) * 10
    times[7] += 3_600_000
    times[20] = times[14]  # with its id: the same event again
    ids = [f"e{number}" for number in range(count)]
    ids[20] = ids[14]
    actions = ["click", "view"] * (count // 2)
    actions[5] = "stare"
    return EventBatch(
        first=0,
        user_id=[f"user {number % 6}" for number in range(count)],
        item_id=np.arange(count) % 9,
        event_time_ms=times,
        arrival_ms=NOW_MS + np.arange(count) * 10,
        action=actions,
        value=np.where(np.arange(count) % 3 == 0, np.nan, 2.5),
        event_id=ids,
        surface=[None if number % 5 == 0 else ("home", "3", "elsewhere")[number % 3] for number in range(count)],
    )


def store_in(folder: Path) -> FeatureStore:
    folder.mkdir()
    url = f"sqlite:///{folder}/store.db"
    migrate(url)
    return FeatureStore(FeatureStoreConfig(url=url))


def _encoded(events: EventColumns, row: int) -> bytes:
    return encode_event(events.as_event(row, RULES.surface_key))


async def _through_records(store: FeatureStore, events: EventColumns) -> Committer:
    clock = ManualClock(NOW_MS + 400)
    log = MemoryLog(clock)
    await log.create_topics()
    committer = Committer(
        store=store,
        writer=log.writer(),
        topics=log.topics,
        log_id=log.log_id,
        decoder=EventDecoder(RULES),
        clock=clock,
    )
    records = [
        Record("interactions", 0, row, int(events.arrival_ms[row]), None, _encoded(events, row), ())
        for row in range(len(events))
    ]
    await committer.commit(0, records)
    committer.close()
    return committer


async def _through_columns(store: FeatureStore, events: EventColumns) -> IngestStage:
    stage = IngestStage(store, RULES)
    await stage.start()
    # The log says the arrival of a wrong clock's event, whatever that clock said.
    for part in (slice(0, 13), slice(13, None)):
        updates = await stage.commit(events.take(part))
        assert sum(len(update.offsets) for _, update in updates) > 0
    stage.close()
    return stage


def test_columns_and_records_give_the_same_histories_and_refusals(tmp_path: Path) -> None:
    batch = mixed()
    events = EventColumns.of(batch)
    # `of` takes an event for arrived when it happened at the earliest: here its producer's clock is wrong instead.
    events.arrival_ms[:] = batch.arrival_ms
    stores = store_in(tmp_path / "records"), store_in(tmp_path / "columns")
    committer = asyncio.run(_through_records(stores[0], events))
    stage = asyncio.run(_through_columns(stores[1], events))
    assert stage.counts.num_refused == committer.counts.num_refused == {"unknown_action": 1, "future_time": 1}
    assert stage.counts.num_duplicate == committer.counts.num_duplicate == 1
    users = np.unique(events.user_id)
    records, columns = (store.read(users, max_len=100) for store in stores)
    for name in COLUMN_DTYPES:
        if name != "arrival_ms":  # when ingest handled it: a record's poll, a column's own arrival
            assert np.array_equal(getattr(records, name), getattr(columns, name), equal_nan=name == "value"), name
    assert stores[1].names("user", users) == stores[0].names("user", users)
    assert sorted(stores[1].names("user", users).values()) == [f"user {number}" for number in range(6)]


def test_decoding_the_records_again_gives_the_same_batch(tmp_path: Path) -> None:
    """Which happens after a hash collision."""
    events = EventColumns.of(mixed())
    store = store_in(tmp_path / "store")
    decoded = IngestStage(store, RULES)._decoded(events)
    again = decode_batch(decoded.source, EventDecoder(RULES), int(events.arrival_ms.max()))
    assert set(decoded.interactions.surface.tolist()) == {0, 1, 3}
    assert np.array_equal(decoded.interactions.surface, again.interactions.surface)
    assert np.array_equal(decoded.interactions.event_key, again.interactions.event_key)
    assert np.array_equal(decoded.interactions.user_id, again.interactions.user_id)
    assert decoded.user_names == again.user_names
