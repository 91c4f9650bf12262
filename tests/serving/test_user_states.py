"""What is kept of users between requests: used where it is right, and nowhere else."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import torch

from model.snapshot import chain, load_snapshot, move_pointer
from model.user_state import UserState
from serving.item_names import ItemNames, WithheldItems
from serving.user_states import Reading, UserEncoder, UserStateCache
from serving.weights import PreparedSwap, ServedWeights, WeightsInfo, prepare_swap
from stream.messages import HistoryUpdate
from tests.serving.building import MODEL, NAME, NOW_MS, SERVING, Publisher, Served, Town, scores_of

NOTHING_KEPT = replace(SERVING, user_state_bytes=0, window_hop_share=0.0)


def states_of(served: Served) -> Any:
    return served.worker.status()["user_states"]


async def answers_of(served: Served) -> dict[Any, Any]:
    return {user: scores_of(await served.recommend(user, k=50)) for user in ("anna", 7, 8, 30)}


def assert_close(found: dict[Any, Any], expected: dict[Any, Any]) -> None:
    assert found.keys() == expected.keys()
    for user, scores in found.items():
        assert list(scores) == list(expected[user]), user
        np.testing.assert_allclose(list(scores.values()), list(expected[user].values()), rtol=0, atol=1e-5)


async def test_a_user_who_asks_again_is_a_hit_and_gets_the_same_answer(town: Town) -> None:
    async with town.worker(version=1) as served, town.worker(NOTHING_KEPT, version=1, replica="bare") as bare:
        for _ in range(2):
            assert_close(await answers_of(served), await answers_of(bare))
        # User 30 is unknown, and user 8 has one interaction: nothing of it is settled.
        assert states_of(served) | {"bytes": 0} == {
            "users": 3, "bytes": 0, "hits": 2, "misses": 4, "positions_reused": 5, "positions_computed": 11,
        }  # fmt: skip
        assert states_of(served)["bytes"] == sum((n - 1) * (16 * 4 + 3 * 8) for n in (3, 4, 1))
        assert states_of(bare)["bytes"] == states_of(bare)["hits"] == 0


async def test_new_late_and_forgotten_interactions_are_answered_as_if_nothing_were_kept(town: Town) -> None:
    async with town.worker(version=1) as served, town.worker(NOTHING_KEPT, version=1, replica="bare") as bare:
        await answers_of(served)
        happening: list[list[tuple[int | str, int | str, int]]] = [
            [(7, 6, NOW_MS - 900), ("anna", 2, NOW_MS - 800)],
            [(7, 9, NOW_MS - 1_800_000 + 3_500), (8, 1, NOW_MS - 50)],  # late, between what was kept
            [(7, n % 10, NOW_MS - 500 + n) for n in range(6)],  # more than the model reads
            [(7, 3, NOW_MS - 300_000)],  # late, in a window that has moved
        ]
        for events in happening:
            town.happen(events)
            for one in (served, bare):
                await one.until_applied(town.num_events - 9)
            assert_close(await answers_of(served), await answers_of(bare))
            assert_close(await answers_of(served), await answers_of(bare))
        before = states_of(served)["users"]
        with town.store.transaction() as transaction:
            transaction.forget_users(np.array([7]))
        town.announce(HistoryUpdate.forgetting("memory", 0, (7,)))
        town.happen([(8, 2, NOW_MS)])
        for one in (served, bare):
            await one.until_applied(town.num_events - 9)
        assert states_of(served)["users"] == before - 1
        assert_close(await answers_of(served), await answers_of(bare))
        assert states_of(served)["hits"] > 10


async def test_after_a_swap_nothing_kept_under_other_weights_is_used_also_not_on_the_way_back(town: Town) -> None:
    async with town.worker(version=1) as served:
        of_version_1 = await answers_of(served)
        town.publisher.learn([1, 2, 200])
        town.publisher.publish()
        await served.until_version(2)
        hits = states_of(served)["hits"]
        of_version_2 = await answers_of(served)
        assert states_of(served)["hits"] == hits
        move_pointer(town.root, load_snapshot(town.root, NAME, 1).manifest)
        await served.until_version(1)
        assert_close(await answers_of(served), of_version_1)
        assert states_of(served)["hits"] == hits
        async with town.worker(version=1, replica="fresh") as fresh:
            assert_close(await answers_of(served), await answers_of(fresh))
    assert of_version_1 != of_version_2


def prepared_swap(publisher: Publisher, have: int | None, want: int) -> PreparedSwap:
    versions = chain(publisher.root, NAME, have=have, want=want)
    return prepare_swap(MODEL, [load_snapshot(publisher.root, NAME, version) for version in versions])


def test_after_each_of_100_swaps_states_are_those_of_a_fresh_model_of_that_version(town_publisher: Publisher) -> None:
    """With everything kept that can be; weights change in place under the cache."""
    publisher, rng = town_publisher, np.random.default_rng(8)
    publisher.learn(range(40))
    publisher.publish("anchor")
    weights = ServedWeights(MODEL, WithheldItems(ItemNames(lambda _ids: {})))
    encoder = UserEncoder(SERVING, weights)
    histories = {user: rng.integers(0, 40, user % 7 + 2) for user in range(12)}
    have = None
    for version in range(1, 101):
        snapshots = [
            load_snapshot(publisher.root, NAME, v) for v in chain(publisher.root, NAME, have=have, want=version)
        ]
        prepared = prepare_swap(MODEL, snapshots)
        weights.swap(weights.ready(prepared) if version % 3 else prepared)
        have = version
        fresh = ServedWeights(MODEL, weights.withheld)
        fresh.swap(prepared_swap(publisher, None, version))
        for moment in range(2):
            readings = [
                Reading(
                    user_id=user,
                    rows=weights.items.lookup(ids),
                    times_ms=NOW_MS - 50_000 + 900 * np.arange(len(ids)),
                    acts=np.ones(len(ids), np.int64),
                    values=np.full(len(ids), np.nan, np.float32),
                )
                for user, ids in histories.items()
            ]
            with torch.inference_mode():
                found = weights.score(encoder.encode(readings, NOW_MS + 60_000 * moment))
                bare = UserEncoder(NOTHING_KEPT, fresh)
                theirs = [replace(one, rows=fresh.items.lookup(histories[one.user_id or 0])) for one in readings]
                expected = fresh.score(bare.encode(theirs, NOW_MS + 60_000 * moment))
            rows, others = (one.items.lookup(publisher.recommender.items.ids()) for one in (weights, fresh))
            torch.testing.assert_close(found[:, rows], expected[:, others], rtol=0, atol=1e-5)
            grown = rng.integers(0, 12, 3)
            histories |= {int(user): np.append(histories[int(user)], rng.integers(0, 40))[-8:] for user in grown}
        publisher.learn([int(n) for n in rng.integers(0, 40, 5)] + ([1_000 + version] if version % 4 == 0 else []))
        publisher.publish("anchor" if version % 30 == 0 else "delta")
    assert encoder.cache.num_hits > 500


def test_the_cache_stays_within_its_bytes_and_drops_whoever_asked_longest_ago() -> None:
    info = WeightsInfo(version=1, kind="anchor", watermark_ms=0, created_at_ms=0)
    state = UserState(inputs_IP=np.zeros((3, 5), np.int64), layers=torch.zeros(2, 5, 16))
    cache = UserStateCache(3 * state.num_bytes + 1)
    for user in (1, 2, 3, 1, 4):
        cache.put(user, info, state)
    assert cache.num_bytes == 3 * state.num_bytes <= cache.bytes_max
    assert [user for user in range(6) if cache.get(user, info)] == [1, 3, 4]
    cache.forget([3, 5])
    assert cache.num_bytes == 2 * state.num_bytes
    too_large = UserState(inputs_IP=np.zeros((3, 50), np.int64), layers=torch.zeros(2, 50, 16))
    cache.put(1, info, too_large)
    assert [user for user in range(6) if cache.get(user, info)] == [4]
    assert cache.get(4, replace(info)) is None, "equal weights are not the same weights"
