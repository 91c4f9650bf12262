"""The baselines' ranks equal those of their scores written out for every item."""

from __future__ import annotations

from collections import defaultdict

import numpy as np
import pytest
import torch

from model.ranking import MISS_RANK, SeenRows, ranks
from online_trainer.baselines import PRIOR, Baselines, EvaluatedTargets
from online_trainer.followers import Followers
from tests.online_trainer.row_moves import moves_without

HALF_LIFE_S = 3_600.0
START_MS = 1_700_000_000_000


def baselines() -> Baselines:
    return Baselines(half_life_s=HALF_LIFE_S, followers=Followers(max_items=1_000, per_item=64))


class WrittenOut:
    """The same definitions with a loop over everything that happened."""

    def __init__(self) -> None:
        self.interactions: list[tuple[int, int]] = []
        self.transitions: list[tuple[int, int, int]] = []

    def scores(self, last_row: int, num_known: int) -> tuple[np.ndarray, np.ndarray]:
        now_ms = max(time for _, time in self.interactions)

        def weight(time: int) -> float:
            return float(2.0 ** (-(now_ms - time) / 1000 / HALF_LIFE_S))

        popularity: dict[int, float] = defaultdict(float)
        for row, time in self.interactions:
            popularity[row] += weight(time)
        followed: dict[int, float] = defaultdict(float)
        for row, next_row, time in self.transitions:
            if row == last_row < num_known:
                followed[next_row] += weight(time)
        by_popularity = np.array([popularity[row] for row in range(num_known)])
        prior = PRIOR * by_popularity / sum(popularity.values())
        return by_popularity, np.array([followed[row] for row in range(num_known)]) + prior


def evaluated(last: list[int], targets: list[int], seen: list[list[int]], num_known: int) -> EvaluatedTargets:
    pairs = [(place, row) for place, rows in enumerate(seen) for row in sorted(set(rows))]
    return EvaluatedTargets(
        last_rows_P=np.array(last, np.int64),
        target_rows_P=np.array(targets, np.int64),
        seen_place_S=np.array([place for place, _ in pairs], np.int64),
        seen_rows_S=np.array([row for _, row in pairs], np.int64),
        num_known=num_known,
    )


@pytest.mark.parametrize("seed", range(5))
def test_ranks_equal_those_of_the_scores_of_every_item(seed: int) -> None:
    rng = np.random.default_rng(seed)
    counted, written = baselines(), WrittenOut()
    for step in range(8):
        rows = rng.zipf(1.4, 30) % 40
        times = START_MS + rng.integers(0, 3_600_000, 30) + step * 1_800_000
        counted.observe(rows, times)
        written.interactions += list(zip(rows.tolist(), times.tolist(), strict=True))
        counted.observe_transitions(rows[:-1], rows[1:], times[1:])
        came_next = zip(rows[:-1].tolist(), rows[1:].tolist(), times[1:].tolist(), strict=True)
        written.transitions += [(row, next_row, time) for row, next_row, time in came_next if row != next_row]
    last = rng.integers(-1, 40, 60).tolist()
    targets = rng.integers(-1, 40, 60).tolist()
    seen = [rng.integers(0, 40, rng.integers(0, 8)).tolist() for _ in range(60)]
    for num_known in (40, 25):
        got = counted.ranks(evaluated(last, targets, seen, num_known))
        for place in range(60):
            hidden = SeenRows(rows_S=torch.tensor(seen[place]).long(), offsets=torch.tensor([0, len(seen[place])]))
            for arm, scores in zip(("popularity", "cooccurrence"), written.scores(last[place], num_known), strict=True):
                # Rounded: sums in another order differ in the last bits, and what is equal must stay a tie.
                expected = ranks(
                    torch.from_numpy(scores.round(9))[None], torch.tensor([targets[place]]), hidden, num_known=num_known
                )
                assert got[arm][place] == int(expected), (arm, place)


def test_what_followed_the_last_item_comes_first_and_the_popular_fill_up() -> None:
    counted = baselines()
    rows = np.array([0] * 300 + [1] * 200 + [2] * 100 + [3])
    counted.observe(rows, np.full(len(rows), START_MS))
    counted.observe_transitions(np.full(60, 2), np.full(60, 3), np.full(60, START_MS))
    after_2 = counted.ranks(evaluated([2] * 3, [3, 0, 1], [[2]] * 3, 4))
    assert after_2["cooccurrence"].tolist() == [1, 2, 3]
    assert after_2["popularity"].tolist() == [3, 1, 2]
    for unknown in (-1, 1, 9):
        elsewhere = counted.ranks(evaluated([unknown] * 3, [3, 0, 1], [[2]] * 3, 4))
        assert elsewhere["cooccurrence"].tolist() == elsewhere["popularity"].tolist() == [3, 1, 2]


def test_equally_popular_items_count_as_worse() -> None:
    counted = baselines()
    counted.observe(np.array([0, 1, 2]), np.full(3, START_MS))
    assert counted.ranks(evaluated([-1], [1], [[]], 3))["popularity"].tolist() == [3]
    assert counted.ranks(evaluated([-1], [1], [[0]], 3))["cooccurrence"].tolist() == [2]


def test_items_unknown_or_seen_are_missed_and_an_empty_catalogue_misses_all() -> None:
    counted = baselines()
    counted.observe(np.array([0, 1, 2]), np.full(3, START_MS))
    for arm_ranks in counted.ranks(evaluated([0, 0, 0], [-1, 2, 1], [[], [], [1]], 2)).values():
        assert arm_ranks.tolist() == [MISS_RANK] * 3
    for arm_ranks in baselines().ranks(evaluated([-1], [0], [[]], 0)).values():
        assert arm_ranks.tolist() == [MISS_RANK]


def test_a_retired_item_is_behind_everything() -> None:
    counted = baselines()
    counted.observe(np.array([0, 0, 1]), np.full(3, START_MS))
    counted.follow(moves_without([0], num_before=2))  # what was 1 is 0, and 1 is a newcomer
    assert counted.ranks(evaluated([-1, -1], [0, 1], [[], []], 2))["popularity"].tolist() == [1, 2]


def test_restored_they_rank_alike() -> None:
    rng = np.random.default_rng(3)
    counted, again = baselines(), baselines()
    rows, times = rng.integers(0, 30, 200), START_MS + np.arange(200) * 60_000
    counted.observe(rows, times)
    counted.observe_transitions(rows[:-1], rows[1:], times[1:])
    again.load_state(counted.state())
    for each in (counted, again):
        each.observe(rows[:9] + 25, times[:9])
        each.observe_transitions(rows[:9], rows[:9] + 25, times[:9])
    for name, array in counted.state().items():
        np.testing.assert_array_equal(array, again.state()[name])
