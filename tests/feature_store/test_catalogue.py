"""Names, items, published snapshots and first answers; on both databases."""

from __future__ import annotations

import numpy as np
import pytest

from feature_store.errors import IdCollisionError
from feature_store.records import FirstServed, Item, PublishedSnapshot
from feature_store.store import FeatureStore

ITEM = Item(
    item_id=2**62, title="Así", text="x" * 5000, categories=("Drama", "Été"), embedding=b"\0\xff", available=True
)


def test_names_come_back_and_numbers_have_none(store: FeatureStore) -> None:
    with store.transaction() as transaction:
        transaction.register_names("user", {1: "ann", 2**63 - 1: "bö"})
        transaction.register_names("user", {1: "ann", 3: "cid"})
        transaction.register_names("item", {1: "film"})
        transaction.register_names("item", {})
    assert store.names("user", np.array([1, 3, 4, 2**63 - 1])) == {1: "ann", 3: "cid", 2**63 - 1: "bö"}
    assert store.names("item", [1]) == {1: "film"}


def test_two_names_of_one_id_are_refused_and_the_first_stays(store: FeatureStore) -> None:
    with store.transaction() as transaction:
        transaction.register_names("user", {1: "ann"})

    def register_another() -> None:
        with store.transaction() as transaction:
            transaction.register_names("user", {2: "eve", 1: "bob"})

    with pytest.raises(IdCollisionError, match="user 'bob' hashes to id 1, which already belongs to 'ann'") as error:
        register_another()
    assert (error.value.kind, error.value.hashed_id, error.value.stored, error.value.new) == ("user", 1, "ann", "bob")
    assert store.names("user", [1, 2]) == {1: "ann"}


def test_a_collision_leaves_the_transaction_usable(store: FeatureStore) -> None:
    with store.transaction() as transaction:
        transaction.register_names("user", {1: "ann"})
        with pytest.raises(IdCollisionError):
            transaction.register_names("user", {1: "bob"})
        transaction.register_names("user", {2: "cid"})
    assert store.names("user", [1, 2]) == {1: "ann", 2: "cid"}


def test_items_come_back_whole_and_are_replaced_whole(store: FeatureStore) -> None:
    with store.transaction() as transaction:
        transaction.upsert_items([ITEM, Item(item_id=5, title="old", categories=("a",), embedding=b"1")])
        transaction.upsert_items([Item(item_id=5, title="new")])
        transaction.upsert_items([])
    assert store.items([2**62, 5, 6]) == {2**62: ITEM, 5: Item(item_id=5, title="new")}


def test_categories_are_read_in_slices_by_ascending_id(store: FeatureStore) -> None:
    with store.transaction() as transaction:
        transaction.upsert_items([Item(item_id=n, categories=("a", f"of {n}")) for n in (7, 0, 3)])
        transaction.retire_items([5])
    assert store.item_categories(after=-1, limit=2) == {0: ("a", "of 0"), 3: ("a", "of 3")}
    assert store.item_categories(after=3, limit=2) == {5: (), 7: ("a", "of 7")}
    assert store.item_categories(after=7, limit=2) == {}


def test_retired_items_are_remembered_even_if_never_heard_of(store: FeatureStore) -> None:
    with store.transaction() as transaction:
        transaction.upsert_items([ITEM])
        transaction.retire_items([9, 2**62, 9])
        transaction.retire_items(np.array([], np.int64))
    assert store.unavailable_items().tolist() == [9, 2**62]
    assert store.items([2**62])[2**62].title == "Así"
    with store.transaction() as transaction:
        transaction.upsert_items([ITEM])
    assert store.unavailable_items().tolist() == [9]


def snapshot(version: int, **changes: object) -> PublishedSnapshot:
    fields = {
        "model": "main",
        "version": version,
        "kind": "delta",
        "parent": version - 1,
        "created_at_ms": 10,
        "published_at_ms": 20,
        "watermark_ms": 5,
        "lineage": {"log_id": "l", "positions": {"0": 2**40}, "fingerprint": str(2**64 - 1)},
        "event_age": {"counts": {"3": 7}},
        "append_age": {},
        "metrics": {"hr_at_10": 0.25},
        "traceparent": "00-ab-cd-01",
    }
    return PublishedSnapshot(**(fields | changes))  # type: ignore[arg-type]


def test_published_snapshots_are_listed_by_model_from_a_version_on(store: FeatureStore) -> None:
    anchor = snapshot(1, kind="anchor", parent=None, watermark_ms=None, traceparent=None)
    for published in (snapshot(3), anchor, snapshot(2), snapshot(1, model="other")):
        store.record_published(published)
    assert store.published_snapshots("main") == [anchor, snapshot(2), snapshot(3)]
    assert store.published_snapshots("main", since_version=2) == [snapshot(3)]
    assert (store.newest_snapshot("main"), store.newest_snapshot("nobody")) == (snapshot(3), None)


def test_a_version_published_again_replaces_its_record(store: FeatureStore) -> None:
    store.record_published(snapshot(2))
    store.record_published(snapshot(2, published_at_ms=99, metrics={}))
    assert store.published_snapshots("main") == [snapshot(2, published_at_ms=99, metrics={})]


def test_the_earliest_first_answer_of_each_replica_stays(store: FeatureStore) -> None:
    for at_ms in (50, 40, 60):
        store.record_first_served("main", 2, "serving-1", at_ms)
    store.record_first_served("main", 2, "serving-0", 70)
    store.record_first_served("main", 1, "serving-0", 30)
    store.record_first_served("other", 9, "serving-0", 30)
    second = [
        FirstServed(model="main", version=2, replica="serving-0", at_ms=70),
        FirstServed(model="main", version=2, replica="serving-1", at_ms=40),
    ]
    assert store.first_served("main", since_version=1) == second
    assert len(store.first_served("main")) == 3


def test_the_first_answer_of_each_replica_with_a_version_or_a_later_one(store: FeatureStore) -> None:
    for version, replica, at_ms, swapped_at_ms in (
        (1, "a", 10, 9),
        (2, "a", 40, 30),
        (3, "a", 50, 45),
        # Versions 2 and 3 were passed over, and version 4 made up for them.
        *((version, "b", 90, 80) for version in (2, 3, 4)),
        (1, "c", 20, None),
    ):
        store.record_first_served("main", version, replica, at_ms, swapped_at_ms=swapped_at_ms)
    store.record_first_served("other", 2, "a", 1)
    found = {one.replica: (one.version, one.at_ms, one.swapped_at_ms) for one in store.first_answers("main", 2)}
    assert found == {"a": (2, 40, 30), "b": (4, 90, 80)}
    assert store.first_answers("main", 5) == []


def test_published_snapshots_are_read_from_a_time_on_in_parts(store: FeatureStore) -> None:
    for version in range(1, 6):
        store.record_published(snapshot(version, created_at_ms=100 * version, steps=[{"first_step": version}]))
    found = store.published_snapshots("main", 2, created_from_ms=400, limit=1)
    assert [(one.version, one.steps) for one in found] == [(4, [{"first_step": 4}])]
