"""The simulated stream of moods: the exact forecast is exact, and long histories and fresh ones both count."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from backtest.moods import MoodConfig, forecast, mood_stream

SMALL = MoodConfig(num_users=30, ratings_per_user=80, num_users_at_once=5, num_items=40)


def test_the_same_configuration_gives_the_same_stream_and_another_seed_another() -> None:
    first, again = mood_stream(SMALL), mood_stream(SMALL)
    assert np.array_equal(first.value, again.value)
    assert np.array_equal(first.time_ms, again.time_ms)
    assert not np.array_equal(first.value, mood_stream(replace(SMALL, seed=1)).value)


def test_pages_come_in_order_of_time_and_are_of_one_user() -> None:
    made = mood_stream(SMALL)
    assert len(made.user_id) == 30 * 80
    assert (np.diff(made.time_ms) >= 0).all()
    for column in (made.user_id, made.time_ms):
        paged = column.reshape(-1, SMALL.page_items)
        assert (paged == paged[:, :1]).all()
    assert np.array_equal(made.page, np.repeat(np.arange(300), SMALL.page_items))
    assert np.array_equal(np.bincount(made.user_id), np.full(30, 80))


def test_without_a_history_the_forecast_is_what_is_known_of_everybody() -> None:
    told = forecast(SMALL, np.zeros(0, np.int64), np.zeros(0), 0)
    assert told.mean == 0
    assert told.variance == SMALL.stable_variance + SMALL.drifting_variance + SMALL.noise_variance


def test_forecasts_are_as_far_off_as_they_say_and_less_with_more_of_the_history() -> None:
    config = replace(SMALL, num_users=150, noise_variance=2.0)
    made = mood_stream(config)
    mood = made.value - made.worth_V[made.item_id]
    squares: dict[str, list[float]] = {"8 newest": [], "all": [], "all but the last day": []}
    said: dict[str, list[float]] = {name: [] for name in squares}
    for user in range(config.num_users):
        rows = np.flatnonzero(made.user_id == user)
        last, before = int(rows[-8]), rows[:-8]
        old = before[made.time_ms[before] < made.time_ms[last] - 86_400_000]
        for name, read in (("8 newest", before[-8:]), ("all", before), ("all but the last day", old)):
            told = forecast(config, made.time_ms[read], mood[read], int(made.time_ms[last]))
            squares[name].append((mood[last] - told.mean) ** 2)
            said[name].append(told.variance)
    for name, found in squares.items():
        # The standard error of a mean of n squares of normal numbers is sqrt(2 / n) of it.
        assert np.mean(found) == pytest.approx(np.mean(said[name]), rel=3.5 * (2 / config.num_users) ** 0.5)
    assert np.mean(said["all"]) < np.mean(said["8 newest"])
    assert np.mean(said["all"]) < np.mean(said["all but the last day"])


@pytest.mark.parametrize(
    "changed", [{"num_items": 0}, {"noise_variance": 0.0}, {"drift_h": 0.0}, {"pages_per_visit": 0.5}]
)
def test_settings_that_make_no_stream_are_refused_by_name(changed: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(changed))):
        replace(SMALL, **changed)
