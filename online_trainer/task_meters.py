"""Metrics of predictions in their own units, a meter for each task: of what was served, and of the upstream model.

*As served*: predictions that a worker made when the items were shown, measured when labels come. The trainer predicts
each label again just before it learns it, with weights that may have learned since what the user did next; these here
are of the weights, histories and vectors that the answer was made from: what a user of the answer could rely on, the
age of the weights included. Both are of the same labels; these of those alone whose impression carries predictions of
the ranking head.

Shapes: C labelled items, K tasks.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Final

import numpy as np
from numpy.typing import NDArray

from model.action_heads import ActionLabels, ActionTask
from online_trainer.action_metrics import ActionMeter, ActionMetrics
from online_trainer.value_metrics import ValueMeter, ValueMetrics

Float64s = NDArray[np.float64]

_SMALLEST: Final = float(np.finfo(np.float32).tiny)
_LARGEST: Final = 1 - 2.0**-25
"""What rounds to 1 in float32 lies above it. The sigmoid of a large logit does, and a label can still contradict it."""


class TaskMeters:
    """A meter for each task. Only tasks of which a prediction has come are in what it says.

    May be read from another thread than the one that adds.
    """

    def __init__(self, tasks: Sequence[ActionTask], window: int) -> None:
        self._meters: dict[str, ActionMeter | ValueMeter] = {
            task.name: ActionMeter(window) if task.kind == "bce" else ValueMeter(window, has_baseline=False)
            for task in tasks
        }

    def add(self, answers_CK: NDArray[np.float32], values_CK: Float64s, is_labelled_CK: NDArray[np.bool_]) -> None:
        """Add predictions with their labels, in stream order; those that are NaN were not made.

        answers_CK: probabilities in 0..1 and, of tasks about values, values in their own unit; what is not is counted
        and left out. values_CK: 0 or 1, or values; where is_labelled_CK.
        """
        for column, meter in enumerate(self._meters.values()):
            rows = is_labelled_CK[:, column] & ~np.isnan(answers_CK[:, column])
            if not rows.any():
                continue
            answers, values = answers_CK[rows, column].astype(np.float64), values_CK[rows, column]
            if isinstance(meter, ValueMeter):
                meter.add(np.zeros(len(answers), np.int64), answers, values)
            else:
                meter.add(_logits(answers), values.astype(np.int64))

    def measured(self) -> dict[tuple[str, str], ActionMetrics | ValueMetrics]:
        """(task, `lifetime` or `window`) → metrics; from any thread."""
        return {
            (task, span): metrics
            for task, meter in self._met()
            for span, metrics in (("lifetime", meter.lifetime()), ("window", meter.windowed()))
        }

    def summary(self) -> dict[str, float]:
        """`task.span.metric`, and `task.lifetime.not_finite`; absent where it is not defined."""
        named = {
            f"{task}.{span}.{name}": value
            for (task, span), metrics in self.measured().items()
            for name, value in asdict(metrics).items()
            if value is not None
        }
        return named | {f"{task}.lifetime.not_finite": meter.num_not_finite for task, meter in self._met()}

    def _met(self) -> list[tuple[str, ActionMeter | ValueMeter]]:
        return [(task, meter) for task, meter in self._meters.items() if meter.lifetime().count or meter.num_not_finite]

    def state(self) -> dict[str, NDArray[np.generic]]:
        """Copies that ``load_state`` reads back."""
        return {f"{task}.{n}": array for task, meter in self._meters.items() for n, array in meter.state().items()}

    def load_state(self, state: Mapping[str, NDArray[np.generic]]) -> None:
        """Continue from a ``state``; a task that is not in it, as in an earlier version's checkpoint, starts empty."""
        for task, meter in self._meters.items():
            of_task = {n.removeprefix(f"{task}."): array for n, array in state.items() if n.startswith(f"{task}.")}
            if of_task:
                meter.load_state(of_task)


def values_in_units(tasks: Sequence[ActionTask], labels: ActionLabels, value_C: NDArray[np.float32]) -> Float64s:
    """float64[C, K]: what ``TaskMeters.add`` compares answers with: labels and, of tasks about values, value_C."""
    values_CK: Float64s = labels.values_PK.double().numpy().copy()
    for column, task in enumerate(tasks):
        if task.kind == "mse":
            values_CK[:, column] = value_C
    return values_CK


def _logits(probabilities: Float64s) -> Float64s:
    """NaN for what is no probability."""
    is_valid = (probabilities >= 0) & (probabilities <= 1)
    within = np.clip(np.where(is_valid, probabilities, np.nan), _SMALLEST, _LARGEST)
    logits: Float64s = np.log(within) - np.log1p(-within)
    return logits
