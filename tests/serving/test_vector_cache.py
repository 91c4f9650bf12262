"""Vectors of users in a worker: read once, kept up, of one version, gone with their user, never in an answer's way."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from feature_store.config import UserVectorsConfig
from feature_store.errors import StoreUnavailableError
from feature_store.store import FeatureStore
from feature_store.user_state_store import UserStateStore
from feature_store.user_states import NewVectors
from serving.batcher import ModelThread
from serving.vector_cache import UserVectorCache
from tests.serving.building import NAME, NOW_MS, TestClock, Town, eventually, scores_of
from tests.serving.test_ranking_head import head_town

WIDTH = 3


def write(store: FeatureStore, version: int, *rows: tuple[int, int, int], width: int = WIDTH, model: str = "m") -> None:
    """(user, next_seq, written at); as of a minute ago; every number is 100 times the version plus next_seq."""
    for user_id, next_seq, at_ms in rows:
        new = NewVectors(
            user_id=np.array([user_id]),
            next_seq=np.array([next_seq]),
            as_of_ms=np.array([NOW_MS - 60_000]),
            vector=np.full((1, width), (100 * version + next_seq) / 10, np.float32),
        )
        with store.transaction() as transaction:
            transaction.user_states.write(model, version, new, written_at_ms=at_ms)


def serve(store: FeatureStore, version: int, from_ms: int, model: str = "m") -> None:
    with store.transaction() as transaction:
        transaction.user_states.begin_version(model, version, created_at_ms=from_ms)
        transaction.user_states.serve_version(model, version, from_ms=from_ms)


@contextmanager
def store_away(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    def away(*_: Any, **__: Any) -> Any:
        raise StoreUnavailableError("cannot use the feature store")

    with monkeypatch.context() as patched:
        for name in ("vectors", "versions", "written_since"):
            patched.setattr(UserStateStore, name, away)
        yield


MakeCache = Callable[..., UserVectorCache]


@pytest.fixture
async def cache_of(town: Town) -> AsyncIterator[MakeCache]:
    thread, made = ModelThread(), []

    def make(**settings: Any) -> UserVectorCache:
        config = UserVectorsConfig(**settings)
        made.append(UserVectorCache(town.store, config, thread, TestClock(NOW_MS), model="m", width=WIDTH))
        return made[-1]

    yield make
    thread.close()
    for one in made:
        one.close()


def values(cache: UserVectorCache, *users: int) -> dict[int, float]:
    return {user: round(float(one.vector[0]), 1) for user, one in cache.read(users).items()}


async def test_a_vector_is_read_with_the_first_request_and_kept_up_off_its_way(town: Town, cache_of: MakeCache) -> None:
    serve(town.store, 1, 10)
    write(town.store, 1, (7, 1, 100), (8, 2, 100))
    cache = cache_of()
    assert values(cache, 7, 9) == {7: 10.1}
    assert values(cache, 7, 9, 8) == {7: 10.1, 8: 10.2}
    assert (cache.num_misses, cache.num_hits) == (3, 2)
    write(town.store, 1, (7, 3, 200), (9, 1, 200))
    assert values(cache, 7) == {7: 10.1}
    await cache.look()
    assert values(cache, 7, 8, 9) == {7: 10.3, 8: 10.2, 9: 10.1}
    assert cache.num_misses == 3


async def test_a_vector_that_was_committed_after_a_later_stamp_is_found_as_well(
    town: Town, cache_of: MakeCache
) -> None:
    serve(town.store, 1, 10)
    cache = cache_of()
    assert values(cache, 7, 8) == {}
    await cache.look()
    write(town.store, 1, (8, 1, 5_000))
    await cache.look()
    write(town.store, 1, (7, 1, 4_500))
    await cache.look()
    assert values(cache, 7, 8) == {7: 10.1, 8: 10.1}
    assert cache.num_misses == 2


async def test_what_was_read_is_looked_for_again_and_not_read_again(
    town: Town, cache_of: MakeCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    serve(town.store, 1, 10)
    write(town.store, 1, (7, 1, 100), (8, 1, 100), (9, 1, 100))
    cache = cache_of()
    assert values(cache, 7, 8) == {7: 10.1, 8: 10.1}
    await cache.look()
    read: list[list[int]] = []
    true_newest = UserStateStore.newest

    def noted(self: UserStateStore, model: str, user_ids: Any, **options: Any) -> Any:
        read.append(user_ids.tolist())
        if len(read) == 2:
            raise StoreUnavailableError("cannot use the feature store")
        found = true_newest(self, model, user_ids, **options)
        if len(read) == 4:  # a request reads a user; its next vector is written while a look is under way
            values(cache, 9)
            write(town.store, 1, (9, 2, 5_002), (8, 3, 5_002))
        return found

    monkeypatch.setattr(UserStateStore, "newest", noted)
    write(town.store, 1, (7, 2, 5_000))
    await cache.look()
    await cache.look()
    assert read == [[7]], "not again, though its stamp is within the overlap"
    write(town.store, 1, (7, 3, 5_001), (8, 2, 5_001))
    await cache.look()
    assert cache.status()["problem"] is not None
    await cache.look()
    assert read[1:] == [[7, 8], [7, 8]], "what could not be read is read with the next look"
    write(town.store, 1, (7, 4, 5_002))
    await cache.look()
    await cache.look()
    assert read[3:] == [[7], [9], [8, 9]]
    assert values(cache, 7, 8, 9) == {7: 10.4, 8: 10.3, 9: 10.2}


async def test_what_was_written_long_before_the_newest_is_found_after_a_pause(
    town: Town, cache_of: MakeCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    serve(town.store, 1, 10)
    write(town.store, 1, (7, 1, 100), (8, 1, 100))
    cache = cache_of(refresh_ms=60_000)
    await cache.look()
    assert values(cache, 7, 8) == {7: 10.1, 8: 10.1}
    write(town.store, 1, (7, 2, 20_000), (8, 2, 60_000))
    await cache.look()
    assert values(cache, 7, 8) == {7: 10.2, 8: 10.2}
    write(town.store, 1, (7, 3, 80_000), (8, 3, 120_000))

    def away(*_: Any, **__: Any) -> Any:
        raise StoreUnavailableError("cannot use the feature store")

    with monkeypatch.context() as patched:  # it goes away between telling who has a new vector and what that is
        patched.setattr(UserStateStore, "newest", away)
        await cache.look()
    await cache.look()
    assert values(cache, 7, 8) == {7: 10.3, 8: 10.3}
    assert (cache.num_misses, cache.status()["problem"]) == (2, None)


async def test_a_first_version_met_by_a_request_is_kept_up_from_then_on(town: Town, cache_of: MakeCache) -> None:
    cache = cache_of(refresh_ms=60_000)
    await cache.look()
    serve(town.store, 1, 10)
    write(town.store, 1, (7, 1, 100))
    assert values(cache, 7, 8) == {7: 10.1}
    write(town.store, 1, (7, 2, 20_000), (8, 1, 60_000))
    await cache.look()
    assert values(cache, 7, 8) == {7: 10.2, 8: 10.1}


async def test_all_change_to_the_next_version_at_once(town: Town, cache_of: MakeCache) -> None:
    serve(town.store, 1, 10)
    write(town.store, 1, (7, 1, 100), (8, 1, 100))
    cache = cache_of()
    assert values(cache, 7, 8) == {7: 10.1, 8: 10.1}
    write(town.store, 2, (7, 1, 150))
    await cache.look()
    assert values(cache, 7, 8) == {7: 10.1, 8: 10.1}
    serve(town.store, 2, 200)
    assert values(cache, 7, 8) == {7: 10.1, 8: 10.1}
    await cache.look()
    assert values(cache, 7, 8) == {7: 20.1}
    assert (cache.version, cache.num_misses) == (2, 2)


async def test_a_batch_that_meets_the_next_version_is_of_it_as_a_whole(town: Town, cache_of: MakeCache) -> None:
    serve(town.store, 1, 10)
    write(town.store, 1, (7, 1, 100), (8, 1, 100))
    cache = cache_of()
    assert values(cache, 7) == {7: 10.1}
    write(town.store, 2, (7, 1, 150), (8, 1, 150))
    serve(town.store, 2, 200)
    assert values(cache, 7, 8) == {7: 20.1, 8: 20.1}
    assert values(cache, 7) == {7: 20.1}


async def test_a_forgotten_user_does_not_come_back_with_what_was_read_before(
    town: Town, cache_of: MakeCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    serve(town.store, 1, 10)
    write(town.store, 1, (7, 1, 100))
    cache = cache_of()
    assert values(cache, 7) == {7: 10.1}
    write(town.store, 1, (7, 2, 200))
    true_vectors = UserStateStore.vectors

    def forgets_meanwhile(self: UserStateStore, *arguments: Any, **options: Any) -> Any:
        found = true_vectors(self, *arguments, **options)
        with town.store.transaction() as transaction:
            transaction.forget_users(np.array([7]))
        cache.forget(np.array([7]))
        return found

    with monkeypatch.context() as patched:
        patched.setattr(UserStateStore, "vectors", forgets_meanwhile)
        await cache.look()
    assert values(cache, 7) == {}


async def test_with_the_store_away_those_in_memory_are_read_and_nobody_waits(
    town: Town, cache_of: MakeCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    serve(town.store, 1, 10)
    write(town.store, 1, (7, 1, 100), (8, 1, 100))
    cache = cache_of()
    assert values(cache, 7) == {7: 10.1}
    with store_away(monkeypatch):
        assert values(cache, 7, 8) == {7: 10.1}
        await cache.look()
        assert cache.status()["problem"] == "cannot use the feature store"
    assert values(cache, 8) == {}, "a moment after a failure nobody waits for the store"
    cache._away_until_s = -1.0
    assert values(cache, 8) == {8: 10.1}
    await cache.look()
    assert cache.status()["problem"] is None


async def test_memory_is_bounded_by_users(town: Town, cache_of: MakeCache) -> None:
    serve(town.store, 1, 10)
    write(town.store, 1, *((user, 1, 100) for user in range(1, 6)))
    cache = cache_of(cached_users=2)
    assert len(values(cache, 1, 2, 3)) == 3
    assert cache.status()["users"] == 2
    values(cache, 4)
    values(cache, 3)
    assert cache.status()["users"] == 2


async def test_answers_are_ranked_with_the_vector_and_say_how_old_it_is(tmp_path: Path, database: Path) -> None:
    town = await head_town(tmp_path, database, "llatte")
    ranking = town.publisher.recommender.config.ranking  # type: ignore[attr-defined]
    town.publish("anchor")
    vectors = UserVectorsConfig(refresh_ms=20)
    async with town.worker(version=1, **town.ranked(reads_vectors=True, vectors=vectors)) as served:
        without = await served.rank(7, [1, 2, 3])
        assert (without["ranked_by"], without["upstream_age"]) == ("head", None)
        serve(town.store, 1, 10, model=NAME)
        write(town.store, 1, (7, 10, 100), width=ranking.upstream_width, model=NAME)
        await eventually(lambda: served.worker.status()["user_vectors"]["version"] == 1)  # type: ignore[index]
        with_vector = await served.rank(7, [1, 2, 3])
        assert with_vector["upstream_age"] == 60.0
        assert scores_of(with_vector) != scores_of(without)
        assert (await served.rank(8, [1, 2, 3]))["upstream_age"] is None
        # The upstream daemon is gone: answers go on, and say so.
        town.clock.advance(3_600_000)
        assert (await served.rank(7, [1, 2, 3]))["upstream_age"] == 3_660.0
    async with town.worker(version=1, **town.ranked()) as served:
        assert (await served.rank(7, [1, 2, 3]))["upstream_age"] is None
        assert served.worker.status()["user_vectors"] is None
