"""Item-kNN is what its formula says, and the factorisation ranks as river's own predictions do."""

from __future__ import annotations

from collections import Counter
from itertools import pairwise

import numpy as np
import pytest
from river import optim, reco

from backtest.baseline_arms import BaselineArm, ItemKnn, RiverFactorisation
from backtest.queries import Queries

USERS = [0, 1, 2, 3]


def history_queries(histories: list[list[int]]) -> Queries:
    """Of each history (two items or more) the last item is asked about."""
    offsets = np.cumsum([0, *(len(history) - 1 for history in histories)])
    count = len(histories)
    items = np.array([item for history in histories for item in history[:-1]])
    return Queries(
        item_id_L=items,
        event_time_ms_L=np.zeros(len(items), np.int64),
        next_ms_L=np.ones(len(items), np.int64),
        acts_L=np.ones(len(items), np.int64),
        value_L=np.full(len(items), np.nan, np.float32),
        offsets=offsets,
        positions_P=offsets[1:] - 1,
        target_item_id_P=np.array([history[-1] for history in histories]),
        event_P=np.arange(count),
        asked_ms_P=np.ones(count, np.int64),
        history_ms_P=np.zeros(count, np.int64),
        is_repeat_P=np.zeros(count, np.bool_),
        is_sampled_P=np.zeros(count, np.bool_),
    )


def stream(seed: int, num_steps: int = 40) -> list[tuple[Queries, np.ndarray, np.ndarray]]:
    """Steps of one interaction of every user; histories without repeats."""
    rng = np.random.default_rng(seed)
    taken = {user: rng.permutation(12).tolist() for user in USERS}
    steps = []
    for length in range(2, min(num_steps, 12)):
        histories = [taken[user][:length] for user in USERS]
        steps.append((history_queries(histories), np.array(USERS), np.array([h[-1] for h in histories])))
    return steps


def test_item_knn_ranks_by_the_sum_of_cosines() -> None:
    arm, had, both = ItemKnn(), Counter[int](), Counter[tuple[int, int]]()
    for queries, users, items in stream(1):
        ranked = arm.ask(queries, users)
        for place in range(len(queries)):
            history = queries.item_id_L[queries.offsets[place] : queries.offsets[place + 1]].tolist()
            scores = {
                item: sum(both[one, item] / np.sqrt(had[one] * had[item]) for one in history if had[one])
                + 1e-12 * had[item]
                for item in had
                if item not in history
            }
            target = int(queries.target_item_id_P[place])
            if target in scores:
                expected = sum(score >= scores[target] - 1e-15 for score in scores.values())
                assert ranked.rank_P[place] == expected
        arm.learn(queries, users, items)
        had.update(items.tolist())
        for place in range(len(queries)):
            history = queries.item_id_L[queries.offsets[place] : queries.offsets[place + 1]].tolist()
            for one in {one for one in history if had[one]}:
                target = int(queries.target_item_id_P[place])
                both[one, target] += 1
                both[target, one] += 1


def test_the_factorisation_ranks_as_river_predicts() -> None:
    arm = RiverFactorisation(seed=3)
    compared = 0
    for queries, users, items in stream(2):
        ranked = arm.ask(queries, users)
        river: reco.FunkMF = arm._model
        for place, user in enumerate(users.tolist()):
            if user not in river.u_latents:
                continue
            history = queries.item_id_L[queries.offsets[place] : queries.offsets[place + 1]]
            rows = np.setdiff1d(np.arange(ranked.num_candidates), arm._items.rows(history))
            row = int(arm._items.rows(queries.target_item_id_P[place : place + 1])[0])
            if row < 0:
                continue
            vectors = {one: arm._item_VF[one] for one in rows.tolist()}
            predicted = {one: float(river.u_latents[user] @ vector) for one, vector in vectors.items()}
            for one in rows.tolist():
                if one in river.i_latents:
                    assert predicted[one] == pytest.approx(river.predict_one(user=user, item=one))  # type: ignore[no-untyped-call]
            assert ranked.rank_P[place] == sum(score >= predicted[row] for score in predicted.values())
            compared += 1
        arm.learn(queries, users, items)
    assert compared > 10


def test_the_factorisation_learns_what_goes_together() -> None:
    plain = reco.FunkMF(n_factors=2, optimizer=optim.SGD(0.05))
    assert hasattr(plain, "u_latents"), "river's names, which the mirror relies on"
    arm = RiverFactorisation(seed=1)
    groups = [[0, 1, 2, 3], [4, 5, 6, 7]]
    for _ in range(60):
        for user in USERS:
            own = groups[user % 2]
            for before, after in pairwise(own):
                arm.learn(history_queries([[before, after]]), np.array([user]), np.array([after]))
    ranked = arm.ask(history_queries([[0, 3], [4, 7]]), np.array([0, 1]))
    assert ranked.rank_P.max() <= 4


@pytest.mark.parametrize("build", [ItemKnn, lambda: RiverFactorisation(seed=5)])
def test_a_baseline_goes_on_from_its_state(build: type[BaselineArm]) -> None:
    steps = stream(4)
    whole, first, second = build(), build(), build()
    for queries, users, items in steps[:5]:
        whole.learn(queries, users, items)
        first.learn(queries, users, items)
    second.load_state(first.state())
    for queries, users, items in steps[5:]:
        assert whole.ask(queries, users).rank_P.tolist() == second.ask(queries, users).rank_P.tolist()
        whole.learn(queries, users, items)
        second.learn(queries, users, items)
