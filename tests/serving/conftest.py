"""A town: the surroundings of a worker, fresh for every test."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from tests.serving.building import NOW_MS, Publisher, Town, build_town, migrated_database


@pytest.fixture(scope="session")
def database(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An empty, migrated database."""
    return migrated_database(tmp_path_factory.mktemp("database"))


@pytest.fixture
async def town(tmp_path: Path, database: Path) -> AsyncIterator[Town]:
    """Twelve items, two of them named by text; four users with histories; version 1 is published."""
    town = build_town(tmp_path, database)
    await town.log.create_topics()
    items: list[int | str] = [*range(10), "film/ten", "film/eleven"]
    town.happen(
        [("anna", items[n % 12], NOW_MS - 3_600_000 + 1_000 * n) for n in (0, 3, 10)]
        + [(7, items[n], NOW_MS - 1_800_000 + 1_000 * n) for n in (1, 2, 4, 5)]
        + [(8, 5, NOW_MS - 600_000), ("bert", "film/eleven", NOW_MS - 600_000)],
        announced=False,
    )
    town.publisher.learn(items)
    town.publisher.learn([5, 5, 5, 2, 2], at_ms=NOW_MS - 30_000)
    town.publisher.publish("anchor")
    yield town
    town.store.close()


@pytest.fixture
def town_publisher(tmp_path: Path) -> Publisher:
    """Snapshots alone."""
    return Publisher(tmp_path / "snapshots")
