"""RMSE of a predicted value, beside the item's mean so far: against NumPy, over windows, and across restarts."""

from __future__ import annotations

import json
from dataclasses import asdict

import numpy as np
import pytest
import torch

from model.config import ModelConfig
from model.item_table import ItemTable
from online_trainer.value_metrics import PSEUDO_COUNT, ItemMeans, ValueMeter, ValueMetrics

RNG = np.random.default_rng(0)
ROWS = RNG.integers(0, 5_000, 400)
VALUES = RNG.gamma(2.0, 30.0, 400)
PREDICTED = VALUES + RNG.normal(3.0, 10.0, 400)


def filled(window: int = 100, *, size: int = 7, num: int = 400) -> ValueMeter:
    meter = ValueMeter(window)
    for first in range(0, num, size):
        part = slice(first, min(first + size, num))
        meter.add(ROWS[part], PREDICTED[part], VALUES[part])
    return meter


def baseline(size: int = 7) -> np.ndarray:
    """What was to be expected of each, with a dictionary and a loop."""
    seen: dict[int, list[float]] = {}
    everything: list[float] = []
    found = []
    for first in range(0, len(ROWS), size):
        part = slice(first, first + size)
        overall = float(np.mean(everything)) if everything else 0.0
        for row in ROWS[part].tolist():
            of_item = seen.get(row, [])
            found.append((sum(of_item) + PSEUDO_COUNT * overall) / (len(of_item) + PSEUDO_COUNT))
        for row, value in zip(ROWS[part].tolist(), VALUES[part].tolist(), strict=True):
            seen.setdefault(row, []).append(value)
            everything.append(value)
    return np.array(found)


def test_it_says_what_numpy_says() -> None:
    meter, error, of_mean = filled(), PREDICTED - VALUES, baseline() - VALUES
    for found, part in ((meter.lifetime(), slice(None)), (meter.windowed(), slice(-100, None))):
        rmse, rmse_of_mean = (float(np.sqrt(np.mean(one[part] ** 2))) for one in (error, of_mean))
        assert asdict(found) == pytest.approx(
            {
                "count": len(error[part]),
                "rmse": rmse,
                "rmse_item_mean": rmse_of_mean,
                "rmse_to_item_mean": rmse / rmse_of_mean,
                "bias": float(error[part].mean()),
            }
        )


def test_without_labels_there_is_only_the_count() -> None:
    assert ValueMeter(5).lifetime() == ValueMeter(5).windowed() == ValueMetrics(0)
    assert ValueMeter(5).summary() == {"lifetime.count": 0, "window.count": 0, "lifetime.not_finite": 0}
    meter = ValueMeter(5)
    meter.add(np.empty(0, np.int64), np.empty(0), np.empty(0))
    assert meter.lifetime() == ValueMetrics(0)


def test_a_prediction_that_is_no_number_is_counted_and_left_out() -> None:
    meter = ValueMeter(5)
    meter.add(np.array([1, 2, 3]), np.array([1.0, np.nan, np.inf]), np.array([3.0, 4.0, 5.0]))
    assert (meter.lifetime().count, meter.lifetime().rmse, meter.num_not_finite) == (1, 2.0, 2)
    assert all(np.isfinite(value) for value in meter.summary().values())
    json.dumps(asdict(meter.lifetime()), allow_nan=False)


@pytest.mark.parametrize("window", [100, 40, 250])
def test_it_goes_on_from_its_state_also_with_another_window(window: int) -> None:
    whole, first, second = ValueMeter(window), filled(num=203), ValueMeter(window)
    for part in (slice(0, 203), slice(203, 400)):
        for start in range(part.start, part.stop, 7):
            rows = slice(start, min(start + 7, part.stop))
            whole.add(ROWS[rows], PREDICTED[rows], VALUES[rows])
    second.load_state(first.state())
    for start in range(203, 400, 7):
        rows = slice(start, min(start + 7, 400))
        second.add(ROWS[rows], PREDICTED[rows], VALUES[rows])
    assert second.lifetime() == whole.lifetime()
    if window <= 197:
        assert second.windowed() == whole.windowed()


def test_means_follow_their_items_when_rows_move() -> None:
    table = ItemTable(ModelConfig(embedding_dim=4, max_items=100))
    ids = np.arange(10) * 7
    rows = table.admit(ids)
    means = ItemMeans()
    means.add(rows, ids.astype(np.float64))
    kept = ids[[0, 1, 3, 4, 5, 8, 9]]
    before = dict(zip(kept.tolist(), means.of(table.lookup(kept)).tolist(), strict=True))
    means.follow(table.remove(ids[[2, 6, 7]]))
    assert dict(zip(kept.tolist(), means.of(table.lookup(kept)).tolist(), strict=True)) == before
    # An item that comes into a row that became free starts with the mean of all.
    overall = means.of(np.array([5_000]))[0]
    assert means.of(table.admit(np.array([1_000])))[0] == overall
    assert torch.isfinite(means._of_row).all()
