"""NE, AUC and calibration equal their definitions, pair by pair."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from online_trainer.action_metrics import ActionMeter, ActionMeters, ActionMetrics

predictions = st.lists(
    # Multiples of a quarter make ties, and fall on the edges of bins.
    st.tuples(st.integers(-80, 80).map(lambda n: n / 4) | st.floats(-30, 30), st.integers(0, 1)),
    max_size=60,
)


def added(meter: ActionMeter, *parts: list[tuple[float, int]]) -> ActionMeter:
    for part in parts:
        logits, labels = np.array(part, np.float64).reshape(-1, 2).T
        meter.add(logits, labels.astype(np.int64))
    return meter


def literal(part: list[tuple[float, int]]) -> ActionMetrics:
    positive, negative = [z for z, y in part if y], [z for z, y in part if not y]
    probability = [1 / (1 + math.exp(-z)) for z, _ in part]
    calibration = sum(probability) / len(positive) if positive else None
    if not positive or not negative:
        return ActionMetrics(len(part), calibration=calibration)
    base = len(positive) / len(part)
    # Far out, 1 - p rounds to 0: there the loss is |z| to the last bit.
    losses = [math.log1p(math.exp(-abs(z))) + (max(-z, 0) if y else max(z, 0)) for z, y in part]
    entropy = -(base * math.log(base) + (1 - base) * math.log(1 - base))
    in_order = sum((p > n) + (p == n) / 2 for p in positive for n in negative)
    return ActionMetrics(
        len(part),
        ne=sum(losses) / len(part) / entropy,
        auc=in_order / len(positive) / len(negative),
        calibration=calibration,
    )


def assert_close(got: ActionMetrics, expected: ActionMetrics) -> None:
    assert got.count == expected.count
    assert got.ne == (None if expected.ne is None else pytest.approx(expected.ne, abs=1e-12))
    assert got.calibration == (None if expected.calibration is None else pytest.approx(expected.calibration))


@settings(max_examples=60)
@given(st.lists(predictions, max_size=4), st.integers(1, 50))
def test_the_window_is_exact_and_the_lifetime_says_how_far_its_auc_may_be_off(
    parts: list[list[tuple[float, int]]], window: int
) -> None:
    meter = added(ActionMeter(window), *parts)
    everything = [one for part in parts for one in part]
    lifetime, windowed = literal(everything), literal(everything[-window:])
    assert_close(meter.windowed(), windowed)
    assert_close(meter.lifetime(), lifetime)
    assert meter.windowed().auc == (None if windowed.auc is None else pytest.approx(windowed.auc))
    binned = meter.lifetime()
    if lifetime.auc is None:
        assert binned.auc is None
    else:
        assert binned.auc is not None and binned.auc_error_max is not None  # noqa: PT018
        assert abs(binned.auc - lifetime.auc) <= binned.auc_error_max + 1e-12


def test_the_lifetime_auc_of_many_distinct_predictions_is_off_by_little() -> None:
    rng = np.random.default_rng(0)
    logits = rng.normal(-4, 1, 20_000)
    labels = (rng.uniform(size=20_000) < 1 / (1 + np.exp(-logits))).astype(np.int64)
    meter = ActionMeter(20_000)
    meter.add(logits, labels)
    lifetime, exact = meter.lifetime(), meter.windowed()
    assert lifetime.auc is not None and exact.auc is not None and lifetime.auc_error_max is not None  # noqa: PT018
    assert abs(lifetime.auc - exact.auc) <= lifetime.auc_error_max < 0.002
    assert exact.calibration == pytest.approx(1, abs=0.1)
    assert exact.ne is not None
    assert exact.ne < 1


def test_always_saying_the_base_rate_has_an_ne_of_one_and_an_auc_of_a_half() -> None:
    meter = added(ActionMeter(100), [(math.log(0.2 / 0.8), 1)] * 2 + [(math.log(0.2 / 0.8), 0)] * 8)
    for metrics in (meter.lifetime(), meter.windowed()):
        assert metrics.ne == pytest.approx(1)
        assert metrics.auc == 0.5
        assert metrics.calibration == pytest.approx(1)


def test_predictions_that_are_not_finite_are_counted_and_left_out() -> None:
    meter = added(ActionMeter(10), [(math.nan, 1), (0.0, 1), (math.inf, 0), (-1.0, 0)])
    assert meter.num_not_finite == 2
    assert meter.windowed() == added(ActionMeter(10), [(0.0, 1), (-1.0, 0)]).windowed()


def test_a_label_that_is_neither_yes_nor_no_is_refused() -> None:
    meter = ActionMeter(10)
    with pytest.raises(ValueError, match="must be 0 or 1"):
        meter.add(np.zeros(2), np.array([0, 2]))
    assert meter.lifetime().count == 0


@settings(max_examples=30)
@given(st.lists(predictions, max_size=4), st.lists(predictions, max_size=4), st.integers(1, 40), st.integers(1, 40))
def test_restored_they_continue_and_a_new_task_starts_empty(
    before: list[list[tuple[float, int]]], after: list[list[tuple[float, int]]], window: int, other: int
) -> None:
    meters, again = ActionMeters(("click",), window), ActionMeters(("click", "buy"), window)
    added(meters["click"], *before)
    again.load_state(meters.state())
    added(meters["click"], *after)
    added(again["click"], *after)
    assert again["click"].lifetime() == meters["click"].lifetime()
    assert again["click"].windowed() == meters["click"].windowed()
    assert again["buy"].lifetime() == ActionMetrics(0)
    resized = ActionMeter(other)
    resized.load_state({name.removeprefix("click."): array for name, array in meters.state().items()})
    kept = [one for part in (*before, *after) for one in part][-window:][-other:]
    assert_close(resized.windowed(), literal(kept))


def test_names_say_task_span_and_metric() -> None:
    meters = ActionMeters(("click",), 10)
    added(meters["click"], [(1.0, 1), (0.5, 1)])
    summary = meters.summary()
    assert summary["click.window.count"] == 2
    assert summary["click.lifetime.not_finite"] == 0
    assert "click.window.ne" not in summary
    assert summary["click.window.calibration"] == pytest.approx((1 / (1 + math.exp(-1)) + 1 / (1 + math.exp(-0.5))) / 2)
