"""Predictions as they were served, against NumPy; absent where there were none; across restarts."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from model.action_heads import ActionTask
from online_trainer.action_metrics import ActionMetrics
from online_trainer.task_meters import TaskMeters
from online_trainer.value_metrics import ValueMetrics

TASKS = (
    ActionTask(name="click", kind="bce", action_bit=0),
    ActionTask(name="value", kind="mse", center=10.0, scale=4.0),
    ActionTask(name="like", kind="bce", action_bit=1),
)
RNG = np.random.default_rng(0)
NUM = 60
CLICKED = RNG.integers(0, 2, NUM)
VALUE = RNG.gamma(2.0, 5.0, NUM)
SERVED_CK = np.column_stack([RNG.uniform(0.01, 0.99, NUM), VALUE + RNG.normal(1.0, 2.0, NUM), np.full(NUM, np.nan)])
SERVED_CK[::7] = np.nan
IS_LABELLED_CK = np.ones((NUM, 3), np.bool_)
IS_LABELLED_CK[::5, 1] = False


def filled(window: int = 20) -> TaskMeters:
    meters = TaskMeters(TASKS, window)
    values_CK = np.column_stack([CLICKED, VALUE, CLICKED]).astype(np.float64)
    for start in range(0, NUM, 9):
        part = slice(start, start + 9)
        meters.add(SERVED_CK[part].astype(np.float32), values_CK[part], IS_LABELLED_CK[part])
    return meters


def test_it_says_what_numpy_says_of_what_was_served_and_nothing_of_the_rest() -> None:
    found = filled().measured()
    assert {task for task, _ in found} == {"click", "value"}
    rows = np.flatnonzero(np.isfinite(SERVED_CK[:, 0]))
    for span, part in (("lifetime", rows), ("window", rows[-20:])):
        p, y = SERVED_CK[part, 0], CLICKED[part]
        mean = y.mean()
        entropy = -(mean * np.log(mean) + (1 - mean) * np.log(1 - mean))
        of_clicks = found["click", span]
        assert isinstance(of_clicks, ActionMetrics)
        assert of_clicks.count == len(part)
        assert of_clicks.ne == pytest.approx(-np.mean(np.where(y == 1, np.log(p), np.log(1 - p))) / entropy, rel=1e-5)
        assert of_clicks.auc == pytest.approx(np.mean(p[y == 1][:, None] > p[y == 0][None]), abs=2e-2)
        assert of_clicks.calibration == pytest.approx(p.mean() / mean, rel=1e-5)
    rows = np.flatnonzero(np.isfinite(SERVED_CK[:, 1]) & IS_LABELLED_CK[:, 1])
    for span, part in (("lifetime", rows), ("window", rows[-20:])):
        error = SERVED_CK[part, 1] - VALUE[part]
        of_values = found["value", span]
        assert isinstance(of_values, ValueMetrics)
        assert (of_values.count, of_values.rmse_item_mean, of_values.rmse_to_item_mean) == (len(part), None, None)
        assert of_values.rmse == pytest.approx(np.sqrt(np.mean(error**2)), rel=1e-5)
        assert of_values.bias == pytest.approx(error.mean(), rel=1e-5)


def test_without_predictions_it_is_absent_and_not_zero() -> None:
    meters = TaskMeters(TASKS, 20)
    meters.add(np.full((2, 3), np.nan, np.float32), np.zeros((2, 3)), np.ones((2, 3), np.bool_))
    assert meters.measured() == {}
    assert meters.summary() == {}


def test_certainty_in_float32_is_measured_and_what_is_no_probability_is_counted() -> None:
    meters = TaskMeters(TASKS[:1], 20)
    served_CK = np.array([[1.0], [0.0], [1.5], [np.inf], [-0.1]], np.float32)
    meters.add(served_CK, np.array([[1.0], [0.0], [1.0], [1.0], [1.0]]), np.ones((5, 1), np.bool_))
    summary = meters.summary()
    assert (summary["click.lifetime.count"], summary["click.lifetime.not_finite"]) == (2, 3)
    assert summary["click.lifetime.ne"] == pytest.approx(0.0, abs=1e-6)
    meters.add(np.ones((1, 1), np.float32), np.zeros((1, 1)), np.ones((1, 1), np.bool_))
    # A certainty that was wrong costs what lies between 1 and the next smaller number.
    loss = 25 * np.log(2) / 3
    assert meters.summary()["click.lifetime.ne"] * (np.log(3) - 2 / 3 * np.log(2)) == pytest.approx(loss, rel=1e-5)


def test_it_continues_from_its_state_and_starts_empty_without_one() -> None:
    meters, again = filled(), TaskMeters(TASKS, 20)
    again.load_state({})
    assert again.measured() == {}
    again.load_state(meters.state())
    assert again.summary() == meters.summary()
    for name, array in meters.state().items():
        assert torch.equal(
            torch.from_numpy(array).nan_to_num(7.0), torch.from_numpy(again.state()[name]).nan_to_num(7.0)
        )
