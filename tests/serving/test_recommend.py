"""Which items a recommendation may hold, in which order, and from what: filters, sessions, diversity, outages."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional

from feature_store.config import FeatureStoreConfig
from feature_store.errors import StoreUnavailableError
from feature_store.records import Item
from feature_store.store import FeatureStore
from serving.diversity import diversified
from serving.item_categories import ItemCategories
from stream.events import EventRules
from tests.faults.postgres import OwnPostgres
from tests.serving.building import NOW_MS, SERVING, Served, Town, eventually, ids_of, scores_of, to_id

QUICK = replace(SERVING, categories_refresh_ms=20)
CATEGORIES: dict[int | str, tuple[str, ...]] = {
    0: ("drama",),
    3: ("drama", "horror"),
    6: ("horror",),
    8: ("comedy", "comedy"),
    1: ("drama",),
    "film/eleven": ("comedy",),
}


def categorise(town: Town, categories: dict[int | str, tuple[str, ...]]) -> None:
    with town.store.transaction() as transaction:
        transaction.upsert_items([Item(item_id=to_id(item), categories=held) for item, held in categories.items()])


async def until_read(served: Served) -> None:
    await eventually(lambda: served.worker._categories.by_category is not None)


# --- categories --------------------------------------------------------------------------------------------------


async def test_only_items_of_the_categories_asked_for_are_recommended_in_the_order_of_all(town: Town) -> None:
    categorise(town, CATEGORIES)
    async with town.worker(version=1) as served:
        await until_read(served)
        everything = scores_of(await served.recommend(7, k=12))
        found = scores_of(await served.recommend(7, k=12, categories=["drama", "comedy", "nothing is in this"]))
        assert set(found) == {0, 3, 8, "film/eleven"}  # 1 has been seen
        assert list(found) == [item for item in everything if item in found]
        assert found == pytest.approx({item: everything[item] for item in found}, rel=1e-5)
        assert 1 in ids_of(await served.recommend(7, k=12, categories=["drama"], exclude_seen=False))
        assert ids_of(await served.recommend(7, k=1, categories=["drama", "comedy"])) == list(found)[:1]
        none = await served.recommend(7, k=12, categories=["nothing is in this"])
        assert (none["items"], none["fallback"]) == ([], False)


async def test_items_of_excluded_categories_are_not_recommended(town: Town) -> None:
    categorise(town, CATEGORIES)
    async with town.worker(version=1) as served:
        await until_read(served)
        assert set(ids_of(await served.recommend(7, k=12, exclude_categories=["horror"]))) == {
            0, 7, 8, 9, "film/ten", "film/eleven",
        }  # fmt: skip
        both = await served.recommend(7, k=12, categories=["drama"], exclude_categories=["horror"], exclude=[8])
        assert ids_of(both) == [0]


async def test_popularity_filters_by_category_too(town: Town) -> None:
    categorise(town, CATEGORIES)
    async with town.worker(version=1) as served:
        await until_read(served)
        answer = await served.recommend("nobody", k=12, categories=["drama"], exclude_categories=["horror"])
        assert answer["fallback"]
        assert set(ids_of(answer)) == {0, 1}


async def test_a_changed_category_counts_from_the_next_reading_on(town: Town) -> None:
    categorise(town, CATEGORIES)
    async with town.worker(QUICK, version=1) as served:
        await until_read(served)
        assert 6 not in ids_of(await served.recommend(7, k=12, exclude_categories=["horror"]))
        categorise(town, {6: ("drama",)})
        for _ in range(500):
            if 6 in ids_of(await served.recommend(7, k=12, exclude_categories=["horror"])):
                return
            await asyncio.sleep(0.01)
        pytest.fail("the change was not noticed")


async def test_rows_of_a_category_follow_the_weights(town: Town) -> None:
    categorise(town, CATEGORIES | {500: ("drama",)})
    async with town.worker(QUICK, version=1) as served:
        await until_read(served)
        assert 500 not in ids_of(await served.recommend(7, k=12, categories=["drama"]))
        town.publisher.recommender.items.remove(np.array([0]))
        town.publisher.learn([500])
        town.publisher.publish()
        await served.until_version(2)
        assert set(ids_of(await served.recommend(7, k=12, categories=["drama"]))) == {3, 500}


async def test_a_filter_that_cannot_be_honoured_is_refused_and_others_are_answered(town: Town) -> None:
    async with town.worker(replace(SERVING, categories_refresh_ms=0), version=1) as served:
        for field in ("categories", "exclude_categories"):
            refused = await served.client.post("/v1/recommend", json={"user_id": 7, field: ["drama"]})
            assert (refused.status_code, refused.json()["error"]["code"]) == (503, "categories_unavailable")
            assert refused.headers["retry-after"] == "1"
        assert not (await served.recommend(7))["fallback"]


def test_categories_outlive_an_outage_of_the_store_and_are_read_in_slices(
    town_store: FeatureStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    with town_store.transaction() as transaction:
        transaction.upsert_items([Item(item_id=n, categories=("even",) if n % 2 == 0 else ()) for n in range(25)])
    monkeypatch.setattr("serving.item_categories._ITEMS_PER_READ", 4)
    categories = ItemCategories(town_store, 1_000)
    categories.read()
    assert categories.ids_of(["even", "odd"]).tolist() == list(range(0, 25, 2))

    def away(**_: Any) -> dict[int, tuple[str, ...]]:
        raise StoreUnavailableError("gone")

    monkeypatch.setattr(town_store, "item_categories", away)
    categories.read()
    assert categories.problem == "gone"
    categories.require_known()
    assert len(categories.ids_of(["even"])) == 13


@pytest.fixture
def town_store(town: Town) -> FeatureStore:
    return town.store


# --- sessions ----------------------------------------------------------------------------------------------------


async def test_a_session_stands_in_for_a_history_that_is_not_there(town: Town) -> None:
    now = town.clock.now_ms()
    async with town.worker(version=1) as served:
        cold = await served.recommend("nobody", k=12, session=[4, "never heard of", 5])
        assert (cold["fallback"], cold["from_session"], cold["history_event_time"]) == (False, True, None)
        assert {4, 5}.isdisjoint(ids_of(cold))
        # The same as for a user who did just that now, whatever the order of what happened in one moment.
        town.happen([("somebody", 4, now)])
        await served.until_applied(1)
        warm = await served.recommend("somebody", k=12)
        alone = await served.recommend("nobody", k=12, session=[4])
        assert scores_of(warm) == pytest.approx(scores_of(alone), rel=1e-5, abs=1e-5)
        seen = await served.recommend("nobody", k=12, session=[4, 5], exclude_seen=False)
        assert {4, 5} <= set(ids_of(seen))


async def test_the_order_of_a_session_counts(town: Town) -> None:
    async with town.worker(version=1) as served:
        one, other = [await served.recommend("nobody", k=12, session=session) for session in ([4, 5], [5, 4])]
        assert scores_of(one) != scores_of(other)


async def test_a_session_changes_nothing_for_a_user_with_a_history_but_what_has_been_seen(town: Town) -> None:
    async with town.worker(version=1) as served:
        answer = await served.recommend(7, k=12, session=[9])
        assert not answer["from_session"]
        plain = scores_of(await served.recommend(7, k=12))
        del plain[9]
        assert scores_of(answer) == pytest.approx(plain, rel=1e-5)


async def test_a_session_of_unknown_items_falls_back_to_popularity(town: Town) -> None:
    async with town.worker(version=1) as served:
        answer = await served.recommend("nobody", k=12, session=["never heard of"])
        assert (answer["fallback_reason"], answer["from_session"]) == ("no_history", False)


async def test_nothing_is_kept_of_a_session_and_a_history_is_not_mixed_up_with_it(town: Town) -> None:
    async with town.worker(version=1) as served:
        answers = await asyncio.gather(
            *(served.recommend(user, k=12, session=[user_item]) for user, user_item in (("x", 1), ("x", 2), (7, 3)))
        )
        assert [answer["from_session"] for answer in answers] == [True, True, False]
        assert scores_of(answers[0]) != scores_of(answers[1])
        assert served.worker.status()["user_states"]["users"] == 1  # type: ignore[index]


# --- blocking ----------------------------------------------------------------------------------------------------


async def test_what_a_user_blocked_never_comes_back_though_seen_items_may(town: Town) -> None:
    # The actions of a town's interactions are all bit 0, `rating`.
    async with town.worker(replace(SERVING, blocking_actions=("rating",)), version=1) as served:
        assert {1, 2, 4, 5}.isdisjoint(ids_of(await served.recommend(7, k=12, exclude_seen=False)))
        # Also where popularity orders: the weights know nothing that user 8 has seen.
        town.publisher.recommender.items.remove(np.array([5]))
        town.happen([(8, 5, NOW_MS - 50)])
        town.publisher.publish()
        await served.until_version(2)
        answer = await served.recommend(8, k=12, exclude_seen=False)
        assert (answer["fallback_reason"], 5 in ids_of(answer)) == ("history_unknown_to_weights", False)
    async with town.worker(replace(SERVING, blocking_actions=("view",)), version=2) as served:
        assert {1, 2, 4} <= set(ids_of(await served.recommend(7, k=12, exclude_seen=False)))


async def test_a_blocking_action_that_is_not_declared_is_refused_at_the_start(town: Town) -> None:
    with pytest.raises(ValueError, match=r"serving\.blocking_actions names hide; declared in events\.actions are"):
        town.build(replace(SERVING, blocking_actions=("hide",)))
    town.build(replace(SERVING, blocking_actions=("hide",)), rules=EventRules(actions=("view", "hide")))


# --- diversity ---------------------------------------------------------------------------------------------------


def test_diversity_is_maximal_marginal_relevance() -> None:
    generator = torch.Generator().manual_seed(0)
    unit_PD = functional.normalize(torch.randn(12, 4, generator=generator), dim=1)
    scores_P = torch.randn(12, generator=generator).sort(descending=True).values
    relevance = ((scores_P - scores_P.min()) / (scores_P.max() - scores_P.min())).tolist()
    for diversity in (0.0, 0.3, 0.7, 1.0):
        expected = [0]
        while len(expected) < 6:
            values = {
                at: (1 - diversity) * relevance[at] - diversity * max(float(unit_PD[at] @ unit_PD[b]) for b in expected)
                for at in range(12)
                if at not in expected
            }
            expected.append(max(values, key=lambda at: values[at]))
        assert diversified(scores_P, unit_PD, 6, diversity=diversity).tolist() == expected
    assert diversified(scores_P, unit_PD, 6, diversity=0.0).tolist() == list(range(6))
    assert sorted(diversified(scores_P, unit_PD, 50, diversity=0.5).tolist()) == list(range(12))


def test_of_equal_items_the_first_is_chosen_and_twins_come_last() -> None:
    unit_PD = torch.eye(3)[[0, 0, 1, 2]]
    assert diversified(torch.ones(4), unit_PD, 4, diversity=0.5).tolist() == [0, 2, 3, 1]


async def test_a_diversified_answer_holds_other_items_with_the_scores_of_the_model(town: Town) -> None:
    async with town.worker(replace(SERVING, diversity_pool=8), version=1) as served:
        plain = scores_of(await served.recommend(7, k=12))
        same = scores_of(await served.recommend(7, k=4, diversity=0.0))
        assert list(same) == list(plain)[:4]
        diverse = scores_of(await served.recommend(7, k=4, diversity=1.0))
        assert next(iter(diverse)) == next(iter(plain))
        assert list(diverse) != list(same)
        assert diverse == pytest.approx({item: plain[item] for item in diverse}, rel=1e-5)
        assert scores_of(await served.recommend(7, k=4, diversity=1.0)) == pytest.approx(diverse, rel=1e-5)
        refused = await served.client.post("/v1/recommend", json={"user_id": 7, "diversity": 1.5})
        assert refused.status_code == 422


# --- limits ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("field", ["session", "categories", "exclude_categories"])
async def test_lists_have_limits(town: Town, field: str) -> None:
    async with town.worker(replace(SERVING, session_max=2, categories_max=2), version=1) as served:
        refused = await served.client.post("/v1/recommend", json={"user_id": 7, field: ["a", "b", "c"]})
        assert (refused.status_code, refused.json()["error"]["code"]) == (422, "too_many_items")


# --- outages -----------------------------------------------------------------------------------------------------


@pytest.fixture
def postgres(tmp_path: Path) -> Iterator[OwnPostgres]:
    with OwnPostgres(tmp_path) as server:
        yield server


async def test_while_the_database_server_is_stopped_others_get_what_is_popular_or_their_session(
    town: Town, postgres: OwnPostgres
) -> None:
    """A real server that stops, fast and with open connections, and comes back."""
    elsewhere = replace(town, store=FeatureStore(FeatureStoreConfig(url=postgres.url, connect_timeout_s=2)))
    elsewhere.happen([("anna", 0, NOW_MS - 9_000), (7, 1, NOW_MS - 8_000), (8, 5, NOW_MS - 7_000)], announced=False)
    async with elsewhere.worker(version=1) as served:
        warm = scores_of(await served.recommend(7, k=12))
        await asyncio.to_thread(postgres.stop_immediately)
        assert scores_of(await served.recommend(7, k=12)) == pytest.approx(warm, rel=1e-5, abs=1e-5)
        cold = await served.recommend(8, k=12)
        assert (cold["fallback"], cold["fallback_reason"]) == (True, "store_unavailable")
        assert cold["items"]
        by_session = await served.recommend(8, k=12, session=[4])
        assert (by_session["fallback"], by_session["from_session"]) == (False, True)
        await eventually(lambda: any("store" in reason for reason in served.worker.reasons_not_ready()), within_s=20)
        await asyncio.to_thread(postgres.start)
        await eventually(lambda: not served.worker.reasons_not_ready(), within_s=30)
        await asyncio.sleep(1.1)  # for so long no request waits for a store that failed
        assert not (await served.recommend(8, k=12))["fallback"]
        assert served.worker.status()["errors"] == 0
    elsewhere.store.close()
