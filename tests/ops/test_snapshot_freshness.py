"""F3 and F4 put together from what the store knows: the slowest replica, versions passed over, what is recent."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from feature_store.records import FirstServed, PublishedSnapshot
from ops.snapshot_freshness import SnapshotFreshness
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
        event_age=ages.shifted(1_000).to_dict(),
        append_age=ages.to_dict(),
    )


def _served(version: int, replica: str, at_ms: int) -> FirstServed:
    return FirstServed(model="default", version=version, replica=replica, at_ms=at_ms)


def _about(expected_ms: float) -> Any:
    return pytest.approx(expected_ms, rel=0.1)  # two roundings into buckets of 9 %


def test_an_event_counts_as_answered_with_at_the_slowest_replica() -> None:
    freshness = SnapshotFreshness(["a", "b"])
    freshness.add([_published(1, created_at_ms=10_000, ages_ms=[200])], [_served(1, "a", 10_300)])
    assert freshness.answered.append.count == 0
    freshness.add([], [_served(1, "b", 10_800)])
    assert freshness.published.append.quantile_ms(0.5) == _about(300)
    assert freshness.answered.append.quantile_ms(0.5) == _about(1_000)


def test_a_version_that_a_replica_passed_over_counts_from_its_next_answer() -> None:
    freshness = SnapshotFreshness(["a", "b"])
    published = [_published(version, created_at_ms=10_000 + version, ages_ms=[500]) for version in (1, 2)]
    freshness.add(published, [_served(1, "a", 10_100), _served(2, "a", 10_200), _served(2, "b", 10_900)])
    assert freshness.answered.append.count == 2
    assert freshness.answered.append.quantile_ms(0.5) == _about(1_400)


def test_rows_read_again_and_replicas_of_others_change_nothing() -> None:
    freshness = SnapshotFreshness(["a"])
    rows = [_published(1, created_at_ms=10_000, ages_ms=[100, 100], kind="anchor")]
    for _ in range(3):
        freshness.add(rows, [_served(1, "a", 10_100), _served(1, "somebody else", 99_000)])
    assert (freshness.answered.append.count, freshness.published.append.count) == (2, 2)
    assert (freshness.num_published, freshness.num_anchors) == (1, 1)
    assert (freshness.published_up_to, freshness.answered_up_to) == (1, 1)


def test_what_is_read_from_the_store_next_follows_the_slowest_replica() -> None:
    freshness = SnapshotFreshness(["a", "b"])
    freshness.add([], [_served(1, "a", 1), _served(2, "a", 2), _served(1, "b", 3)])
    assert freshness.answered_up_to == 1


def test_recent_freshness_forgets_what_lies_back() -> None:
    freshness = SnapshotFreshness(["a"], recent_ms=15_000)
    slow = _published(1, created_at_ms=10_000, ages_ms=[8_000])
    fast = _published(2, created_at_ms=60_000, ages_ms=[100])
    freshness.add([slow, fast], [_served(1, "a", 10_000), _served(2, "a", 60_000)])
    assert freshness.recent_answered(60_000).append.quantile_ms(0.99) == _about(100)
    assert freshness.answered.append.quantile_ms(0.99) == _about(8_000)


def test_each_replica_has_its_own_ages_from_both_starts() -> None:
    freshness = SnapshotFreshness(["fast", "slow"])
    freshness.add(
        [_published(1, created_at_ms=10_000, ages_ms=[200])], [_served(1, "fast", 10_300), _served(1, "slow", 10_800)]
    )
    found = {replica: freshness.recent_of(replica, 11_000) for replica in ("fast", "slow")}
    assert {replica: ages.append.quantile_ms(0.5) for replica, ages in found.items()} == {
        "fast": _about(500),
        "slow": _about(1_000),
    }
    assert found["fast"].event.quantile_ms(0.5) == _about(1_500)
    assert freshness.recent_of("fast", 1_000_000).append.count == 0
