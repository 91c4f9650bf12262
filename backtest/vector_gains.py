"""What users' vectors bring the ranker, and how that falls as they come later: rankers compared on the same labels.

Every ranker is trained on the same steps and predicts each label before it learns it; they differ in how long after it
was computed a vector reaches them, the last in the row in having none if `never` is asked for. A task's normalised loss
is its mean loss over that of always predicting the mean: NE of probabilities, the share of the variance that is left of
values. Gains are differences to the ranker without vectors in percent of that loss of the mean, with the standard error
of paired differences over labels; what another seed would change is not in it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from model.action_heads import ActionLabels, ActionTask

Float64s = NDArray[np.float64]

NEVER: Final = "never"
"""Of `backtest.vectors_lag`: a ranker that reads no vectors."""


@dataclass(slots=True)
class _Sums:
    """Of one task: over its labels, and over their losses by ranker."""

    count: int
    labels: float
    squares: float
    losses: list[float]
    gains: list[float]
    """Of the last ranker's loss less each one's."""
    squared_gains: list[float]

    def mean_loss(self, *, is_value: bool) -> float:
        """Of always predicting the mean; 0 where labels are all the same."""
        mean = self.labels / self.count
        if is_value:
            return max(self.squares / self.count - mean**2, 0.0)
        return -sum(share * math.log(share) for share in (mean, 1 - mean) if share > 0)


class VectorGains:
    """Collects losses step by step. Shapes: R rankers, C labels, K tasks."""

    def __init__(self, names: Sequence[str], tasks: Sequence[ActionTask]) -> None:
        """names: of the rankers, as told; the last is what others are compared with if it is `never`."""
        self._names, self._tasks = tuple(names), tuple(tasks)
        nothing = [0.0] * len(names)
        self._sums = {task.name: _Sums(0, 0.0, 0.0, list(nothing), list(nothing), list(nothing)) for task in tasks}
        self._told: dict[int, tuple[Tensor, ActionLabels]] = {}

    def hear(self, ranker: int, predictions_CK: Tensor, labels: ActionLabels) -> None:
        """What one ranker predicted in the present step."""
        self._told[ranker] = predictions_CK, labels

    def settle(self, *, counts: bool) -> None:
        """All rankers have been heard of in this step. counts: False while nothing is evaluated yet."""
        told, self._told = self._told, {}
        if not told or not counts:
            return
        assert len(told) == len(self._names), "all rankers learn the same steps"
        for column, task in enumerate(self._tasks):
            labels = told[0][1]
            is_labelled_C = labels.labelled_PK[:, column]
            label_C = labels.values_PK[is_labelled_C, column].double()
            losses_RC = np.stack(
                [
                    _losses(told[ranker][0][is_labelled_C, column].double(), label_C, task)
                    for ranker in range(len(self._names))
                ]
            )
            self._add(self._sums[task.name], label_C.numpy(), losses_RC)

    def _add(self, sums: _Sums, label_C: Float64s, losses_RC: Float64s) -> None:
        sums.count += len(label_C)
        sums.labels += float(label_C.sum())
        sums.squares += float((label_C**2).sum())
        gains_RC = losses_RC[-1] - losses_RC
        for ranker in range(len(self._names)):
            sums.losses[ranker] += float(losses_RC[ranker].sum())
            sums.gains[ranker] += float(gains_RC[ranker].sum())
            sums.squared_gains[ranker] += float((gains_RC[ranker] ** 2).sum())

    def summary(self) -> dict[str, dict[str, dict[str, float]]]:
        """Task → ranker → `count`, `normalised_loss` and, beside one without vectors, `gain_percent` and its
        `standard_error`. Tasks without labels, or whose labels are all the same, are left out.
        """
        found: dict[str, dict[str, dict[str, float]]] = {}
        for task in self._tasks:
            sums = self._sums[task.name]
            mean_loss = sums.mean_loss(is_value=task.kind == "mse") if sums.count else 0.0
            if mean_loss > 0:
                found[task.name] = {name: self._of(sums, at, mean_loss) for at, name in enumerate(self._names)}
        return found

    def _of(self, sums: _Sums, ranker: int, mean_loss: float) -> dict[str, float]:
        told: dict[str, float] = {
            "count": sums.count,
            "normalised_loss": sums.losses[ranker] / sums.count / mean_loss,
        }
        if self._names[-1] == NEVER and ranker < len(self._names) - 1:
            mean = sums.gains[ranker] / sums.count
            variance = max(sums.squared_gains[ranker] / sums.count - mean**2, 0.0)
            told["gain_percent"] = 100 * mean / mean_loss
            told["standard_error"] = 100 * math.sqrt(variance / sums.count) / mean_loss
        return told

    def state(self) -> dict[str, Any]:
        """JSON-ready; no step is under way."""
        return {name: asdict(sums) for name, sums in self._sums.items()}

    def load_state(self, state: dict[str, Any]) -> None:
        """Continue from a `state`."""
        self._sums = {name: _Sums(**sums) for name, sums in state.items()}


def _losses(prediction_C: Tensor, label_C: Tensor, task: ActionTask) -> Float64s:
    if task.kind == "mse":
        found = (prediction_C - label_C).square()
    else:
        found = functional.binary_cross_entropy_with_logits(prediction_C, label_C, reduction="none")
    losses: Float64s = found.numpy()
    return losses
