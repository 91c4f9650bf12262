from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from feature_store.records import FirstServed, PublishedSnapshot
from ops.demo.state import Ages, GrowingCount, Rate, SnapshotFreshness
from stream.freshness import AgeHistogram


def _published(version: int, *, created_at_ms: int, ages_ms: list[int], kind: str = "delta") -> PublishedSnapshot:
    ages = AgeHistogram()
    ages.add(np.array(ages_ms, np.int64))
    return PublishedSnapshot(
        model="default",
        version=version,
        kind=kind,
        parent=version - 1,
        created_at_ms=created_at_ms,
        published_at_ms=created_at_ms + 100,
        watermark_ms=0,
        append_age=ages.to_dict(),
    )


def _served(version: int, replica: str, at_ms: int) -> FirstServed:
    return FirstServed(model="default", version=version, replica=replica, at_ms=at_ms)


def _about(expected_ms: float) -> Any:
    return pytest.approx(expected_ms, rel=0.1)  # two roundings into buckets of 9 %


def test_an_event_counts_as_answered_with_at_the_slowest_replica() -> None:
    freshness = SnapshotFreshness(["a", "b"])
    freshness.add([_published(1, created_at_ms=10_000, ages_ms=[200])], [_served(1, "a", 10_300)])
    assert freshness.answered.count == 0
    freshness.add([], [_served(1, "b", 10_800)])
    assert Ages.of(freshness.published).p50_ms == _about(300)
    assert Ages.of(freshness.answered).p50_ms == _about(1_000)


def test_a_version_that_a_replica_passed_over_counts_from_its_next_answer() -> None:
    freshness = SnapshotFreshness(["a", "b"])
    published = [_published(version, created_at_ms=10_000 + version, ages_ms=[500]) for version in (1, 2)]
    freshness.add(published, [_served(1, "a", 10_100), _served(2, "a", 10_200), _served(2, "b", 10_900)])
    assert freshness.answered.count == 2
    assert Ages.of(freshness.answered).p50_ms == _about(1_400)


def test_rows_read_again_and_replicas_of_others_change_nothing() -> None:
    freshness = SnapshotFreshness(["a"])
    rows = [_published(1, created_at_ms=10_000, ages_ms=[100, 100], kind="anchor")]
    for _ in range(3):
        freshness.add(rows, [_served(1, "a", 10_100), _served(1, "somebody else", 99_000)])
    assert (freshness.answered.count, freshness.published.count) == (2, 2)
    assert (freshness.num_published, freshness.num_anchors) == (1, 1)
    assert (freshness.published_up_to, freshness.answered_up_to) == (1, 1)


def test_what_is_read_from_the_store_next_follows_the_slowest_replica() -> None:
    freshness = SnapshotFreshness(["a", "b"])
    freshness.add([], [_served(1, "a", 1), _served(2, "a", 2), _served(1, "b", 3)])
    assert freshness.answered_up_to == 1


def test_recent_freshness_forgets_what_lies_back() -> None:
    freshness = SnapshotFreshness(["a"])
    slow = _published(1, created_at_ms=10_000, ages_ms=[8_000])
    fast = _published(2, created_at_ms=60_000, ages_ms=[100])
    freshness.add([slow, fast], [_served(1, "a", 10_000), _served(2, "a", 60_000)])
    assert freshness.recent().p99_ms == _about(100)
    assert Ages.of(freshness.answered).p99_ms == _about(8_000)


def test_a_rate_is_that_of_the_newest_seconds_and_survives_a_restart_of_the_count() -> None:
    rate = Rate(window_s=5.0)
    assert rate.add(0.0, 0) == 0.0
    for second in range(1, 11):
        latest = rate.add(float(second), second * 100 if second <= 5 else 500 + (second - 5) * 10)
    assert latest == pytest.approx(10.0)
    assert rate.add(11.0, 3) == 0.0


def test_a_count_that_begins_again_goes_on_growing() -> None:
    count = GrowingCount()
    assert [count.of(seen) for seen in (0, 10, 25, 3, 8, 0, 1)] == [0, 10, 25, 28, 33, 33, 34]
