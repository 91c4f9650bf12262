"""Intervals cover the truth as often as they say, differences are paired, and blocks decide what is independent."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray

from backtest.bootstrap import BootstrapConfig, Estimate, Resampled, resample, time_blocks

FAST = BootstrapConfig(num_resamples=400)


def _of(values_SB: NDArray[np.float64], config: BootstrapConfig = FAST) -> Resampled:
    """One value a block."""
    return resample(values_SB, np.ones_like(values_SB), config)


def _holds(estimate: Estimate, truth: float) -> bool:
    assert estimate.low is not None
    assert estimate.high is not None
    return estimate.low <= truth <= estimate.high


def test_the_same_seed_gives_the_same_interval_and_another_seed_another() -> None:
    values = np.random.default_rng(0).random((1, 100))
    first, again = _of(values).estimate(0), _of(values).estimate(0)
    assert first == again
    assert _of(values, BootstrapConfig(num_resamples=400, seed=1)).estimate(0) != first
    assert first.mean == pytest.approx(values.mean())


def test_an_interval_covers_the_truth_about_as_often_as_it_says() -> None:
    rng = np.random.default_rng(1)
    covered = [_holds(_of(rng.normal(3.0, 1.0, (1, 100))).estimate(0), 3.0) for _ in range(300)]
    assert 0.91 <= np.mean(covered) <= 0.98


def test_a_difference_is_paired_so_what_is_hard_for_all_cancels() -> None:
    rng = np.random.default_rng(2)
    hard = rng.normal(0, 1, 100)
    found = _of(np.stack([hard + 0.05, hard + rng.normal(0, 0.01, 100)]))
    difference, alone = found.difference(0, 1), found.estimate(0)
    assert difference.low is not None
    assert difference.high is not None
    assert alone.low is not None
    assert alone.high is not None
    assert 0 < difference.low < 0.05 < difference.high
    assert difference.high - difference.low < (alone.high - alone.low) / 20


def test_a_mean_weighs_blocks_by_what_they_hold() -> None:
    sums, counts = np.array([[10.0, 0.0]]), np.array([[10.0, 30.0]])
    assert resample(sums, counts, FAST).estimate(0).mean == 0.25


def test_errors_that_hang_together_need_blocks_of_time_to_be_seen() -> None:
    """Users of one day share its luck: blocks of users give an interval that misses the truth far too often."""
    rng = np.random.default_rng(3)
    num_days, users_a_day = 60, 20
    missed_by_user, missed_by_time = [], []
    for _ in range(60):
        value = np.repeat(rng.normal(0, 1, num_days), users_a_day) + rng.normal(0, 1, num_days * users_a_day)
        missed_by_user.append(not _holds(_of(value[None], BootstrapConfig(num_resamples=100)).estimate(0), 0.0))
        of_day = value.reshape(num_days, -1).sum(1)[None]
        found = resample(of_day, np.full_like(of_day, users_a_day), BootstrapConfig(num_resamples=100))
        missed_by_time.append(not _holds(found.estimate(0), 0.0))
    assert np.mean(missed_by_user) > 0.5
    assert np.mean(missed_by_time) < 0.15


def test_what_was_never_measured_has_no_estimate() -> None:
    empty = resample(np.zeros((1, 5)), np.zeros((1, 5)), FAST).estimate(0)
    assert empty == Estimate(None)


def test_blocks_are_spans_of_equal_time_and_empty_ones_do_not_count() -> None:
    times = np.array([0, 10, 99, 55, 10])
    assert time_blocks(times, 10).tolist() == [0, 1, 3, 2, 1]
    assert time_blocks(np.array([7, 7]), 10).tolist() == [0, 0]


@pytest.mark.parametrize(
    ("options", "word"),
    [({"level": 1.0}, "level"), ({"num_blocks": 2}, "num_blocks"), ({"num_resamples": 1}, "num_resamples"),
     ({"resample": "day"}, "time or user")],
)  # fmt: skip
def test_options_that_mean_nothing_are_refused(options: dict[str, object], word: str) -> None:
    with pytest.raises(ValueError, match=word):
        BootstrapConfig(**options)  # type: ignore[arg-type]
