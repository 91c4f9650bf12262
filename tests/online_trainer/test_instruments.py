"""Gauges say what the meters say, with the attributes that the documentation names."""

from __future__ import annotations

import numpy as np
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import InMemoryMetricReader, NumberDataPoint

from online_trainer.action_metrics import ActionMeters
from online_trainer.instruments import observe_actions, observe_ranks
from online_trainer.prequential import PrequentialMeter, cells
from online_trainer.value_metrics import ValueMeter


def collected(reader: InMemoryMetricReader) -> dict[str, dict[tuple[object, ...], float]]:
    """Instrument -> values of its attributes, in order of their names -> value."""
    data = reader.get_metrics_data()
    assert data is not None
    found: dict[str, dict[tuple[object, ...], float]] = {}
    for metric in data.resource_metrics[0].scope_metrics[0].metrics:
        points = [point for point in metric.data.data_points if isinstance(point, NumberDataPoint)]
        found[metric.name] = {
            tuple(value for _, value in sorted((point.attributes or {}).items())): point.value for point in points
        }
    return found


def test_rank_metrics_are_published_by_arm_group_metric_and_span() -> None:
    reader = InMemoryMetricReader()
    ranks = PrequentialMeter(("model", "popularity"), 10)
    ranks.add({"model": np.array([1, 30]), "popularity": np.array([2, 60])}, cells(np.array([2, 2]), np.array([0, 1])))
    observe_ranks(MeterProvider([reader]).get_meter("test"), ranks.measured)
    found = collected(reader)
    quality = found["headrace.trainer.quality"]
    assert quality["model", "all", "hr_at_10", "lifetime"] == 0.5
    assert quality["popularity", "known_user", "hr_at_50", "window"] == 0.0
    assert ("model", "new_item", "mrr", "window") not in quality
    assert found["headrace.trainer.evaluated"]["known_item", "window"] == 2
    assert found["headrace.trainer.evaluated"]["new_item", "window"] == 0


def test_metrics_of_actions_are_published_by_metric_span_and_task() -> None:
    reader = InMemoryMetricReader()
    actions = ActionMeters(("click",), 10)
    actions["click"].add(np.array([1.0, -1.0]), np.array([1, 0]))
    served = ActionMeters(("click",), 10)
    served["click"].add(np.array([1.0, 2.0, -1.0]), np.array([0, 1, 0]))
    observe_actions(MeterProvider([reader]).get_meter("test"), actions.measured, served.measured)
    found = collected(reader)
    assert found["headrace.trainer.actions"]["auc", "window", "click"] == 1.0
    assert found["headrace.trainer.actions"]["count", "lifetime", "click"] == 2
    assert found["headrace.trainer.actions.served"]["count", "lifetime", "click"] == 3


def test_metrics_of_values_are_published_like_those_of_actions() -> None:
    reader = InMemoryMetricReader()
    values = ValueMeter(10)
    values.add(np.array([0]), np.array([3.0]), np.array([1.0]))
    measured = {("value", "window"): values.windowed()}
    observe_actions(MeterProvider([reader]).get_meter("test"), lambda: measured, dict)
    assert "headrace.trainer.actions.served" not in collected(reader)
    found = collected(reader)["headrace.trainer.actions"]
    assert found["rmse", "window", "value"] == 2.0
    assert found["rmse_item_mean", "window", "value"] == 1.0
    assert found["rmse_to_item_mean", "window", "value"] == 2.0
