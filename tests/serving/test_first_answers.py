"""Hop F4: which version was answered with first, when, and how old its events were by then."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from typing import Any

import pytest

from model.snapshot import load_snapshot, move_pointer
from tests.serving.building import NAME, NOW_MS, SERVING, Served, Town, ages, eventually

PATIENT = replace(SERVING, snapshot_poll_ms=30_000, snapshot_retry_max_ms=30_000)


def freshness(served: Served) -> Any:
    return served.worker.status()["freshness"]["F4"]  # type: ignore[index]


def recorded(town: Town) -> dict[tuple[int, str], int]:
    return {(one.version, one.replica): one.at_ms for one in town.store.first_served(NAME)}


async def test_the_first_answer_with_a_version_is_recorded_and_later_ones_are_not(town: Town) -> None:
    town.publisher.learn([1])
    town.publisher.publish("anchor", event_age=ages(100, 100, 900), append_age=ages(10, 10, 10))
    async with town.worker(version=2) as served:
        town.clock.advance(2_000)
        await served.recommend(7)
        await eventually(lambda: recorded(town) == {(2, "one"): NOW_MS + 2_000})
        town.clock.advance(60_000)
        await served.recommend(7)
        await eventually(lambda: freshness(served)["event"]["count"] == 3)
    assert recorded(town) == {(2, "one"): NOW_MS + 2_000}
    assert freshness(served)["event"]["p50_ms"] == pytest.approx(2_100, rel=0.1)
    assert freshness(served)["event"]["p99_ms"] == pytest.approx(2_900, rel=0.1)
    assert freshness(served)["append"]["p99_ms"] == pytest.approx(2_010, rel=0.1)


async def test_versions_that_were_passed_over_count_with_the_first_answer_that_contains_them(town: Town) -> None:
    async with town.worker(PATIENT, version=1) as served:
        await served.recommend(7)
        for version in (2, 3, 4):
            town.publisher.learn([1])
            manifest = town.publisher.publish(
                "anchor" if version == 4 else "delta", event_age=ages(*[1_000] * version), append_age=ages(500)
            )
        town.announce_snapshot(manifest)
        await served.until_version(4)
        town.clock.advance(3_000)
        await served.recommend(7)
        await eventually(lambda: len(recorded(town)) == 4)
        await eventually(lambda: freshness(served)["event"]["count"] == 2 + 3 + 4)
    assert {version for version, at_ms in recorded(town).items() if at_ms == NOW_MS + 3_000} == {
        (2, "one"),
        (3, "one"),
        (4, "one"),
    }
    assert {one.swapped_at_ms for one in town.store.first_served(NAME)} == {NOW_MS}


async def test_an_answer_by_popularity_is_no_answer_of_the_weights(town: Town) -> None:
    async with town.worker(version=1) as served:
        await served.recommend("nobody")
        await served.recommend(7)
        await eventually(lambda: recorded(town))
        assert served.worker._first_answers._waiting == served.worker._first_answers._waiting.__class__()


async def test_a_restarted_replica_counts_what_it_missed_and_nothing_twice(town: Town) -> None:
    async with town.worker(version=1) as served:
        await served.recommend(7)
        await eventually(lambda: len(recorded(town)) == 1)
    for _ in range(2):
        town.publisher.learn([1])
        town.publisher.publish(event_age=ages(10))
    async with town.worker(version=3) as served:
        await served.recommend(7)
        await eventually(lambda: len(recorded(town)) == 3)
        await eventually(lambda: freshness(served)["event"]["count"] == 2)
    async with town.worker(version=3) as served:
        await served.recommend(7)
        await served.recommend(8)
        assert freshness(served)["event"]["count"] == 0
    assert set(recorded(town)) == {(1, "one"), (2, "one"), (3, "one")}


async def test_what_could_not_be_recorded_is_recorded_when_the_worker_stops(town: Town) -> None:
    async with town.worker(version=1) as served:
        await served.recommend(7)
    assert recorded(town) == {(1, "one"): NOW_MS}


async def test_tables_that_are_missing_for_a_while_end_no_worker(town: Town, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("serving.first_answers._RETRY_S", 0.01)
    engine = town.store._engine
    with engine.begin() as connection:
        connection.exec_driver_sql("ALTER TABLE first_served RENAME TO elsewhere")
    async with town.worker(version=1) as served:
        await served.recommend(7)
        await asyncio.sleep(0.1)
        assert served.worker.failure is None
        with engine.begin() as connection:
            connection.exec_driver_sql("ALTER TABLE elsewhere RENAME TO first_served")
        await eventually(lambda: recorded(town) == {(1, "one"): NOW_MS})


async def test_every_replica_records_for_itself(town: Town) -> None:
    async with town.worker(version=1) as one, town.worker(version=1, replica="two") as two:
        await one.recommend(7)
        await two.recommend(7)
        await eventually(lambda: set(recorded(town)) == {(1, "one"), (1, "two")})


async def test_a_version_that_comes_back_after_a_rollback_is_not_counted_again(town: Town) -> None:
    async with town.worker(version=1) as served:
        town.publisher.learn([1])
        second = town.publisher.publish(event_age=ages(10, 20))
        await served.until_version(2)
        await served.recommend(7)
        await eventually(lambda: freshness(served)["event"]["count"] == 2)
        for manifest in (load_snapshot(town.root, NAME, 1).manifest, second):
            move_pointer(town.root, manifest)
            await served.until_version(manifest.version)
            await served.recommend(7)
        await asyncio.sleep(0.1)
        assert freshness(served)["event"]["count"] == 2
