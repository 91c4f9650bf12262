"""Sweeps run beside ingest: at their interval, by one worker, and again after the database was busy."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from feature_store.config import FeatureStoreConfig
from feature_store.store import FeatureStore
from stream.pruning import Sweeper
from tests.feature_store.databases import migrated_database
from tests.feature_store.retained import findings_in, ingest
from tests.feature_store.truth import Row

WAIT_S = 20


@pytest.fixture
def store(tmp_path: Path) -> Iterator[FeatureStore]:
    """450 users whose only interactions are past the horizon: three slices of a sweep; and one who is not."""
    with migrated_database("sqlite", tmp_path) as url:
        store = FeatureStore(FeatureStoreConfig(url=url, max_age_ms=10, removal_delay_ms=0, busy_timeout_ms=20))
        ingest(store, [Row(user, 1, user) for user in range(450)])
        ingest(store, [Row(450, 50, 1)])
        yield store
        store.close()


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(WAIT_S):
        while not condition():  # noqa: ASYNC110 - watched from outside
            await asyncio.sleep(0.01)


async def test_every_interval_all_users_are_looked_at(store: FeatureStore) -> None:
    sweeper, stopping = Sweeper(store, interval_ms=5, is_ours=lambda: True), asyncio.Event()
    task = asyncio.create_task(sweeper.run(stopping))
    await until(lambda: sweeper.num_sweeps >= 1)
    assert sweeper.num_interactions == 450
    ingest(store, [Row(451, 100, 1)])
    await until(lambda: sweeper.num_interactions == 451)
    stopping.set()
    await asyncio.wait_for(task, WAIT_S)
    assert findings_in(store) == []


async def test_it_waits_for_a_database_that_is_busy(store: FeatureStore) -> None:
    sweeper, stopping = Sweeper(store, interval_ms=5, is_ours=lambda: True), asyncio.Event()
    with store.transaction():
        task = asyncio.create_task(sweeper.run(stopping))
        await asyncio.sleep(0.2)
        assert (sweeper.num_interactions, task.done()) == (0, False)
    await until(lambda: sweeper.num_interactions == 450)
    stopping.set()
    await asyncio.wait_for(task, WAIT_S)


async def test_only_the_worker_whose_turn_it_is_sweeps(store: FeatureStore) -> None:
    asked: list[bool] = []

    def is_ours() -> bool:
        asked.append(len(asked) >= 3)
        return asked[-1]

    sweeper, stopping = Sweeper(store, interval_ms=1, is_ours=is_ours), asyncio.Event()
    task = asyncio.create_task(sweeper.run(stopping))
    await until(lambda: len(asked) >= 3)
    assert sweeper.num_interactions == 0
    await until(lambda: sweeper.num_interactions == 450)
    stopping.set()
    await asyncio.wait_for(task, WAIT_S)


async def test_a_sweep_stops_between_two_slices(store: FeatureStore) -> None:
    sweeper, stopping = Sweeper(store, interval_ms=5, is_ours=lambda: True), asyncio.Event()
    stopping.set()
    await sweeper.sweep(stopping)
    assert (sweeper.num_sweeps, sweeper.num_interactions) == (0, 200)


@pytest.mark.parametrize(("interval_ms", "max_age_ms"), [(0, 10), (5, 0)])
async def test_without_interval_or_limits_there_is_nothing_to_do(
    store: FeatureStore, interval_ms: int, max_age_ms: int
) -> None:
    other = FeatureStore(FeatureStoreConfig(url=store.config.url, max_age_ms=max_age_ms))
    sweeper = Sweeper(other, interval_ms=interval_ms, is_ours=lambda: True)
    await asyncio.wait_for(sweeper.run(asyncio.Event()), WAIT_S)
    assert (sweeper.num_sweeps, store.totals().num_removed) == (0, 0)
    other.close()
