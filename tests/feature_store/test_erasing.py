"""What was forgotten is in no file of the database any more."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from sqlalchemy import create_engine

from feature_store.config import FeatureStoreConfig
from feature_store.errors import StoreBusyError
from feature_store.interactions import Interactions
from feature_store.store import FeatureStore
from tests.feature_store.databases import migrated_database
from tests.feature_store.truth import rows_of

NUM_USERS = 1_000


def polls(num_polls: int) -> list[Interactions]:
    """Random users with ids and event keys that no other bytes look like."""
    rng = np.random.default_rng(0)
    ids = rng.integers(2**60, 2**62, NUM_USERS)
    return [
        Interactions(
            user_id=ids[rng.integers(0, NUM_USERS, 1_000)],
            item_id=np.arange(1_000),
            event_time_ms=1_700_000_000_000 + 1_000 * number + np.arange(1_000),
            action=np.ones(1_000, np.uint32),
            value=np.ones(1_000, np.float32),
            event_key=rng.integers(2**60, 2**63, 1_000).astype(np.uint64),
            seq=np.zeros(1_000, np.uint32),
            arrival_ms=np.zeros(1_000, np.int64),
        )
        for number in range(num_polls)
    ]


def num_left(directory: Path, ids: np.ndarray[Any, Any], keys: np.ndarray[Any, Any]) -> int:
    """How often an id (as SQLite writes it) or an event key (as chunks hold it) is in any file of the directory."""
    found = 0
    for path in directory.iterdir():
        raw = np.frombuffer(path.read_bytes(), np.uint8)
        for shift in range(8):
            whole = raw[shift : shift + (len(raw) - shift) // 8 * 8]
            found += int(np.isin(whole.view(">i8"), ids).sum() + np.isin(whole.view("<u8"), keys).sum())
    return found


@pytest.fixture
def sqlite_store(tmp_path: Path) -> Iterator[FeatureStore]:
    with migrated_database("sqlite", tmp_path) as url:
        store = FeatureStore(FeatureStoreConfig(url=url, busy_timeout_ms=50))
        yield store
        store.close()


def test_nothing_of_forgotten_users_is_left_in_the_files_of_sqlite(sqlite_store: FeatureStore, tmp_path: Path) -> None:
    recorded = polls(10)
    for poll in recorded:
        with sqlite_store.transaction() as transaction:
            transaction.append(poll)
    everything = Interactions.concat(recorded)
    ids = np.unique(everything.user_id)[::2]
    is_gone = np.isin(everything.user_id, ids)
    with sqlite_store.transaction() as transaction:
        assert transaction.forget_users(ids) == len(ids)
    assert num_left(tmp_path, ids, everything.event_key[is_gone]) > 500
    sqlite_store.erase_deleted()
    assert num_left(tmp_path, ids, everything.event_key[is_gone]) == 0
    assert num_left(tmp_path, np.setdiff1d(everything.user_id, ids), np.empty(0, np.uint64)) > 500
    assert sqlite_store.totals().num_users == NUM_USERS - len(ids)


def test_a_reader_that_holds_on_is_named(sqlite_store: FeatureStore) -> None:
    with sqlite_store.transaction() as transaction:
        transaction.append(polls(1)[0])
    engine = create_engine(sqlite_store.config.url)
    with engine.connect() as reader:
        reader.exec_driver_sql("BEGIN")
        reader.exec_driver_sql("SELECT count(*) FROM history_chunk").one()
        with pytest.raises(StoreBusyError):
            sqlite_store.erase_deleted()
    engine.dispose()
    sqlite_store.erase_deleted()


def test_either_database_can_be_asked_and_keeps_its_histories(store: FeatureStore) -> None:
    poll = polls(1)[0]
    ids = np.unique(poll.user_id)
    with store.transaction() as transaction:
        transaction.append(poll)
    with store.transaction() as transaction:
        assert transaction.forget_users(ids[::2]) == len(ids[::2])
    kept = rows_of(store.read(ids, max_len=len(poll)))
    assert sum(map(len, kept)) == np.isin(poll.user_id, ids[1::2]).sum()
    store.erase_deleted()
    assert rows_of(store.read(ids, max_len=len(poll))) == kept
