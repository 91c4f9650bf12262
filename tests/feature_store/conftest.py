"""Tests that ask for `database_url`, `open_store` or `store` run on SQLite and on PostgreSQL, migrated and empty."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from feature_store.config import FeatureStoreConfig
from feature_store.store import FeatureStore
from tests.feature_store.databases import migrated_database


@pytest.fixture(params=["sqlite", "postgresql"])
def database_url(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    """URL of a fresh database with the current schema."""
    with migrated_database(request.param, tmp_path) as url:
        yield url


@pytest.fixture
def open_store(database_url: str) -> Iterator[Callable[..., FeatureStore]]:
    """Opens stores on the test's database, with short chunks unless told otherwise; closes them all."""
    opened: list[FeatureStore] = []

    def open_one(**settings: Any) -> FeatureStore:
        with_defaults: dict[str, Any] = {"url": database_url, "chunk_len": 4} | settings
        store = FeatureStore(FeatureStoreConfig(**with_defaults))
        opened.append(store)
        return store

    yield open_one
    for store in opened:
        store.close()


@pytest.fixture
def store(open_store: Callable[..., FeatureStore]) -> FeatureStore:
    """An empty store with chunks of four, so that few events make several chunks."""
    return open_store()
