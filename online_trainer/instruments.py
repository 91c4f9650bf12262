"""What the trainer knows about its own quality, as OpenTelemetry gauges that are read when metrics are collected."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict

from opentelemetry.metrics import CallbackOptions, Meter, Observation

from online_trainer.action_metrics import ActionMetrics
from online_trainer.prequential import MeasuredRanks
from online_trainer.value_metrics import ValueMetrics


def observe_ranks(meter: Meter, read: Callable[[], list[MeasuredRanks]]) -> None:
    """Publish rank metrics by arm, span, group and metric; those without interactions are left out."""

    def quality(_options: CallbackOptions) -> Iterator[Observation]:
        for one in read():
            for name, value in asdict(one.metrics).items():
                if name != "count" and value is not None:
                    yield Observation(value, _of(one) | {"headrace.metric": name})

    def evaluated(_options: CallbackOptions) -> Iterator[Observation]:
        # Every arm is tested on the same interactions.
        measured = read()
        for one in measured:
            if one.arm == measured[0].arm:
                attributes = _of(one)
                del attributes["headrace.arm"]
                yield Observation(one.metrics.count, attributes)

    meter.create_observable_gauge("headrace.trainer.quality", [quality], description="Prequential rank metrics")
    meter.create_observable_gauge(
        "headrace.trainer.evaluated", [evaluated], unit="{interaction}", description="Interactions they are means over"
    )


_ReadActions = Callable[[], Mapping[tuple[str, str], ActionMetrics | ValueMetrics]]


def _observe(meter: Meter, name: str, read: _ReadActions, description: str) -> None:
    def quality(_options: CallbackOptions) -> Iterator[Observation]:
        for (task, span), metrics in read().items():
            for metric, value in asdict(metrics).items():
                if value is not None:
                    attributes = {"headrace.task": task, "headrace.span": span, "headrace.metric": metric}
                    yield Observation(value, attributes)

    meter.create_observable_gauge(name, [quality], description=description)


def observe_tasks(meter: Meter, read: _ReadActions) -> None:
    """Publish metrics of what the upstream model predicts of actions and values, just before it learns."""
    _observe(meter, "headrace.upstream.actions", read, "Prequential metrics of the upstream model's tasks")


def observe_actions(meter: Meter, read: _ReadActions, read_served: _ReadActions) -> None:
    """Publish metrics of predicted actions and values by task, span and metric; what is not defined is left out.

    read: of predictions just before learning. read_served: of those that were made when the items were shown.
    """
    _observe(meter, "headrace.trainer.actions", read, "Prequential metrics of predicted actions and values")
    _observe(meter, "headrace.trainer.actions.served", read_served, "The same of predictions as they were served")


def _of(one: MeasuredRanks) -> dict[str, str]:
    return {"headrace.arm": one.arm, "headrace.span": one.span, "headrace.group": one.group}
