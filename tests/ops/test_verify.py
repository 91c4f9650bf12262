"""The account of `headrace verify`: what was accepted, removed since or not, against what was learned."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from feature_store.config import FeatureStoreConfig
from feature_store.store import FeatureStore
from model.manifest import Lineage
from ops.verify import Account
from tests.feature_store.databases import migrated_database
from tests.feature_store.retained import ingest
from tests.feature_store.truth import Row
from tests.ops.command_line import Headrace, assert_refused

ROWS = [Row(number % 3, 1_000 + number, 2**60 + number) for number in range(60)]


@pytest.fixture
def store(tmp_path: Path) -> Iterator[FeatureStore]:
    """Sixty accepted interactions, some of which retention has removed."""
    with migrated_database("sqlite", tmp_path) as url:
        store = FeatureStore(FeatureStoreConfig(url=url, chunk_len=4, max_history=6))
        for row in ROWS:
            ingest(store, [row])
        yield store
        store.close()


def account(store: FeatureStore, rows: list[Row]) -> Account:
    """As if a snapshot had learned from these rows."""
    fingerprint = str(sum(row.event_key for row in rows) % 2**64)
    return Account(
        stored=store.totals(), version=7, learned=Lineage(num_interactions=len(rows), fingerprint=int(fingerprint))
    )


def test_what_was_learned_is_all_that_was_ever_accepted(store: FeatureStore) -> None:
    done = account(store, ROWS)
    assert done.is_equal
    removed = store.totals().num_removed
    assert removed > 0
    assert done.sentence() == (
        f"version 7 has learned from each of the 60 accepted ({removed} removed since) interactions exactly once"
    )


def test_it_stays_right_after_a_user_is_forgotten(store: FeatureStore) -> None:
    with store.transaction() as transaction:
        transaction.forget_users(np.array([1]))
    assert account(store, ROWS).is_equal


def test_one_missing_and_one_other_are_told_apart(store: FeatureStore) -> None:
    behind = account(store, ROWS[1:])
    assert (behind.is_equal, behind.is_caught_up) == (False, False)
    assert behind.sentence().startswith("version 7: 59 of 60 accepted")
    other = account(store, [*ROWS[1:], ROWS[1]])
    assert (other.is_equal, other.is_caught_up) == (False, True)
    assert other.sentence().endswith("that is a fault")


def test_a_disk_that_cannot_be_read_is_one_sentence(headrace: Headrace, tmp_path: Path) -> None:
    version = tmp_path / "snapshots" / "default" / "v00000001"
    version.mkdir(parents=True)
    (version / "READY").symlink_to("READY")
    assert_refused(headrace("verify", HEADRACE_HEADRACE__DATA_DIR=str(tmp_path)), "Too many levels of symbolic links")
