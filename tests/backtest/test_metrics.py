"""Metrics are those of LensKit and of RecTools, and of the trainer; what they have no word for is counted by hand."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from backtest.metrics import (
    RANK_METRICS,
    FirstMeetings,
    catalogue_aucs,
    coverage,
    novelties,
    overlaps,
    shown_action_metrics,
)
from model.ranking import MISS_RANK
from online_trainer.prequential import RankMetrics
from tests.backtest import yardsticks

YARDSTICKS: dict[str, dict[str, float]] = json.loads(
    (Path(__file__).parent / "yardsticks.json").read_text(encoding="utf-8")
)


def _ours() -> dict[str, float]:
    first, second, came, before = yardsticks.lists()
    shown, other = np.array(first), np.array(second)
    rank = np.array(
        [items.index(item) + 1 if item in items else MISS_RANK for items, item in zip(first, came, strict=True)]
    )
    user, item = np.array(before).T
    met = FirstMeetings.of(np.arange(len(user)), user, item)
    now = np.full(len(shown), len(user))
    return {
        **{name: float(RANK_METRICS[name](rank).mean()) for name in ("hr_at_1", "hr_at_10", "hr_at_20")},
        **{name: float(RANK_METRICS[name](rank).mean()) for name in ("ndcg_at_10", "ndcg_at_20")},
        "mrr_at_20": float(RANK_METRICS["mrr"](rank).mean()),
        "novelty_at_10": float(novelties(shown[:, :10], now, met).mean()),
        "overlap_at_10": float(overlaps(shown[:, :10], other[:, :10]).mean()),
        "coverage_at_1": coverage(shown[:, :1], yardsticks.NUM_ITEMS),
    }


@pytest.mark.parametrize("library", YARDSTICKS)
def test_metrics_equal_those_of_other_libraries_to_a_billionth(library: str) -> None:
    ours = _ours()
    assert len(YARDSTICKS[library]) >= 6
    for name, theirs in YARDSTICKS[library].items():
        assert 0 < theirs < 100
        assert ours[name] == pytest.approx(theirs, abs=1e-9), name


@given(ranks=st.lists(st.one_of(st.integers(1, 60), st.just(MISS_RANK)), min_size=1, max_size=50))
def test_their_means_are_the_trainers_own_metrics(ranks: list[int]) -> None:
    rank = np.array(ranks)
    theirs = RankMetrics.of_ranks(rank)
    for name, of in RANK_METRICS.items():
        assert of(rank).mean() == pytest.approx(getattr(theirs, name), abs=1e-12), name


def test_catalogue_auc_is_the_share_of_other_candidates_below() -> None:
    found = catalogue_aucs(np.array([1, 3, 5, MISS_RANK, 1]), np.array([5, 5, 5, 5, 1]))
    assert found.tolist() == [1.0, 0.5, 0.0, 0.0, 1.0]


def test_overlap_counts_the_second_list_and_leaves_padding_out() -> None:
    first, second = np.array([[1, 2, 3], [1, 2, -1], [4, -1, -1]]), np.array([[3, 2, 9], [2, -1, -1], [-1, -1, -1]])
    found = overlaps(first, second)
    assert found[:2] == pytest.approx([2 / 3, 1.0])
    assert math.isnan(found[2])


@given(
    rows=st.lists(st.tuples(st.integers(0, 5), st.integers(0, 5)), max_size=30),
    now=st.integers(0, 31),
    item=st.integers(0, 6),
)
def test_meetings_are_counted_as_of_the_query(rows: list[tuple[int, int]], now: int, item: int) -> None:
    users, items = np.array(rows, np.int64).reshape(-1, 2).T
    met = FirstMeetings.of(np.arange(len(rows)), users, items)
    before = rows[:now]
    assert met.num_users_of(np.array([item]), np.array([now])).tolist() == [len({u for u, i in before if i == item})]
    assert met.num_users(np.array([now])).tolist() == [len({u for u, _ in before})]


def test_novelty_is_in_bits_and_an_item_that_nobody_met_counts_as_met_by_one() -> None:
    met = FirstMeetings.of(np.arange(4), np.array([1, 2, 3, 4]), np.array([7, 7, 8, 9]))
    shown = np.array([[7, -1], [8, 5], [-1, -1]])
    found = novelties(shown, np.array([4, 4, 4]), met)
    assert found[:2] == pytest.approx([1.0, 2.0])
    assert math.isnan(found[2])


def test_probabilities_are_judged_as_the_trainer_judges_actions() -> None:
    probability, label = np.array([0.0, 0.25, 0.5, 1.0]), np.array([0, 0, 1, 1])
    found = shown_action_metrics(probability, label)
    assert (found.count, found.auc) == (4, 1.0)
    assert found.calibration == pytest.approx(1.75 / 2)
    assert found.ne == pytest.approx(-(math.log(0.75) + math.log(0.5)) / 4 / math.log(2), abs=1e-9)
