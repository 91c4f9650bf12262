"""What is remembered of publications goes with their snapshots, in one piece with the floor; on both databases."""

from __future__ import annotations

import pytest
from sqlalchemy import Connection, text

from feature_store import publications
from feature_store.engine import writing
from feature_store.records import PublicationFloor, PublishedSnapshot
from feature_store.store import FeatureStore

DAY_MS = 86_400_000


def publish(store: FeatureStore, version: int, created_at_ms: int, *, model: str = "main") -> None:
    store.record_published(
        PublishedSnapshot(
            model=model,
            version=version,
            kind="anchor",
            parent=None,
            created_at_ms=created_at_ms,
            published_at_ms=created_at_ms,
            watermark_ms=None,
        )
    )


def versions(store: FeatureStore, model: str = "main") -> list[int]:
    return [one.version for one in store.published_snapshots(model)]


def served(store: FeatureStore, model: str = "main") -> list[tuple[int, str]]:
    return [(one.version, one.replica) for one in store.first_served(model)]


@pytest.fixture
def daily(store: FeatureStore) -> FeatureStore:
    """Versions 1 to 9, one a day, each answered with by two replicas; another model's beside them."""
    for version in range(1, 10):
        publish(store, version, version * DAY_MS)
        publish(store, version, version * DAY_MS, model="other")
        for replica in ("a", "b"):
            store.record_first_served("main", version, replica, version * DAY_MS + 5)
    return store


def test_old_versions_are_forgotten_and_the_floor_says_so(daily: FeatureStore) -> None:
    assert daily.publication_floor("main") == PublicationFloor()
    assert daily.prune_publications("main", before_ms=6 * DAY_MS, kept=()) == 5
    assert versions(daily) == [6, 7, 8, 9]
    assert served(daily) == [(version, replica) for version in (6, 7, 8, 9) for replica in ("a", "b")]
    assert daily.publication_floor("main") == PublicationFloor(version=6, newest_ms=5 * DAY_MS)
    assert daily.prune_publications("main", before_ms=6 * DAY_MS, kept=()) == 0
    assert versions(daily, "other") == list(range(1, 10))
    assert daily.publication_floor("other") == PublicationFloor()


def test_what_is_still_stored_stays_with_its_answers_until_it_is_not(daily: FeatureStore) -> None:
    assert daily.prune_publications("main", before_ms=6 * DAY_MS, kept={2, 5}) == 3
    assert versions(daily) == [2, 5, 6, 7, 8, 9]
    assert served(daily)[:4] == [(2, "a"), (2, "b"), (5, "a"), (5, "b")]
    assert daily.publication_floor("main") == PublicationFloor(version=5, newest_ms=4 * DAY_MS)
    # The pin on version 2 is taken away.
    assert daily.prune_publications("main", before_ms=6 * DAY_MS, kept={5}) == 1
    assert versions(daily) == [5, 6, 7, 8, 9]
    assert daily.publication_floor("main") == PublicationFloor(version=5, newest_ms=4 * DAY_MS)


def test_the_newest_stays_however_old_it_is(daily: FeatureStore, store: FeatureStore) -> None:
    assert daily.prune_publications("main", before_ms=100 * DAY_MS, kept=()) == 8
    assert versions(daily) == [9]
    assert store.prune_publications("nobody", before_ms=100 * DAY_MS, kept=()) == 0


def test_a_clock_that_was_set_back_leaves_no_gap_above_the_floor(store: FeatureStore) -> None:
    for version, day in enumerate((5, 6, 1, 2, 7), start=1):
        publish(store, version, day * DAY_MS)
    assert store.prune_publications("main", before_ms=6 * DAY_MS, kept=()) == 1
    assert versions(store) == [2, 3, 4, 5]


def test_many_go_in_short_transactions_that_are_right_after_each(daily: FeatureStore) -> None:
    removed = []
    while count := daily.prune_publications("main", before_ms=8 * DAY_MS, kept={1, 3}, max_versions=2):
        removed.append(count)
        floor = daily.publication_floor("main")
        known = versions(daily)
        assert [version for version in known if version >= floor.version] == list(range(floor.version, 10))
        assert {version for version, _ in served(daily)} == set(known)
    assert removed == [2, 2, 1]
    assert versions(daily) == [1, 3, 8, 9]


def test_an_answer_noted_after_its_version_was_forgotten_goes_the_next_time(daily: FeatureStore) -> None:
    daily.prune_publications("main", before_ms=4 * DAY_MS, kept=())
    daily.record_first_served("main", 2, "late", 1)
    daily.prune_publications("main", before_ms=5 * DAY_MS, kept=())
    assert {version for version, _ in served(daily)} == {5, 6, 7, 8, 9}


def test_one_that_dies_in_the_middle_has_removed_nothing(daily: FeatureStore, monkeypatch: pytest.MonkeyPatch) -> None:
    class PowerCutError(Exception):
        pass

    def die(_connection: Connection, *_arguments: object) -> None:
        raise PowerCutError

    with monkeypatch.context() as broken:
        broken.setattr(publications, "_raise_floor", die)
        with pytest.raises(PowerCutError):
            daily.prune_publications("main", before_ms=6 * DAY_MS, kept=())
    assert versions(daily) == list(range(1, 10))
    assert len(served(daily)) == 18
    assert daily.publication_floor("main") == PublicationFloor()


def test_the_floor_never_comes_down(daily: FeatureStore) -> None:
    daily.prune_publications("main", before_ms=6 * DAY_MS, kept=())
    with writing(daily._engine) as connection:
        publications._raise_floor(connection, "main", 3, 2 * DAY_MS)
        count = connection.execute(text("SELECT count(*) FROM publication_floor")).scalar_one()
    assert count == 1
    assert daily.publication_floor("main") == PublicationFloor(version=6, newest_ms=5 * DAY_MS)
