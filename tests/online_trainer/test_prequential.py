"""Rank metrics over the run and over a window, and their way through a checkpoint."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from model.ranking import MISS_RANK
from online_trainer.prequential import PrequentialMeter, RankMetrics

ranks_lists = st.lists(st.integers(1, 60) | st.just(MISS_RANK), min_size=1, max_size=80)


def test_metrics_of_known_ranks() -> None:
    metrics = RankMetrics.of_ranks(np.array([1, 10, 11, 20, 21, MISS_RANK]))
    assert metrics.count == 6
    assert metrics.hr_at_10 == pytest.approx(2 / 6)
    gains = [1.0, 1 / np.log2(11), 1 / np.log2(12), 1 / np.log2(21)]
    assert metrics.ndcg_at_20 == pytest.approx(sum(gains) / 6)
    assert metrics.mrr == pytest.approx((1 + 1 / 10 + 1 / 11 + 1 / 20 + 1 / 21) / 6)


def test_nothing_evaluated_has_no_metrics() -> None:
    assert PrequentialMeter(5).lifetime() == RankMetrics(0, None, None, None)
    assert PrequentialMeter(5).windowed() == RankMetrics(0, None, None, None)


@given(st.lists(ranks_lists, min_size=1, max_size=6), st.integers(1, 50))
def test_lifetime_and_window_equal_the_metrics_of_all_and_of_the_newest(parts: list[list[int]], window: int) -> None:
    meter = PrequentialMeter(window)
    for part in parts:
        meter.add(np.array(part, np.int64))
    everything = np.array([rank for part in parts for rank in part], np.int64)
    for got, expected in (
        (meter.lifetime(), RankMetrics.of_ranks(everything)),
        (meter.windowed(), RankMetrics.of_ranks(everything[-window:])),
    ):
        assert got.count == expected.count
        assert got.hr_at_10 == pytest.approx(expected.hr_at_10)
        assert got.ndcg_at_20 == pytest.approx(expected.ndcg_at_20)
        assert got.mrr == pytest.approx(expected.mrr)


def test_a_restored_meter_continues() -> None:
    meter, again = PrequentialMeter(3), PrequentialMeter(3)
    meter.add(np.array([1, 30, 2]))
    again.load_state(meter.state())
    for each in (meter, again):
        each.add(np.array([40]))
    assert again.lifetime() == meter.lifetime()
    assert again.windowed() == meter.windowed()


def test_a_meter_of_another_window_is_refused() -> None:
    with pytest.raises(ValueError, match="metrics window"):
        PrequentialMeter(4).load_state(PrequentialMeter(3).state())
