"""Predictions of what a user will do with an item: several tasks on one small network.

Shapes: P positions, K tasks, D model width, F hidden width.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional


@dataclass(frozen=True, kw_only=True, slots=True)
class ActionTask:
    """One thing to predict about an interaction."""

    name: str
    """What it is called in metrics and answers."""
    kind: Literal["bce", "mse"]
    """bce: the probability of an action. mse: the interaction's value (such as seconds watched)."""
    action_bit: int | None = None
    """The kind of action whose probability a bce task predicts: its bit among an interaction's actions."""
    value_at_least: float | None = None
    """Or, of a bce task, the value whose reaching it predicts (a rating of 8 or more)."""
    center: float = 0.0
    """Of an mse task: (value - center) / scale is what the network predicts."""
    scale: float = 1.0
    """Of an mse task."""
    weight: float = 1.0
    """Factor of the task's loss in the sum."""

    def __post_init__(self) -> None:
        if self.kind not in ("bce", "mse"):
            raise ValueError(f"kind of task {self.name!r} is {self.kind!r}; it must be bce or mse")
        if (self.action_bit is not None) + (self.value_at_least is not None) != (self.kind == "bce"):
            raise ValueError(
                f"task {self.name!r}: a bce task names an action_bit or a value_at_least, an mse task neither"
            )
        if self.action_bit is not None and not 0 <= self.action_bit < 62:
            raise ValueError(f"action_bit of task {self.name!r} is {self.action_bit}; it must be 0 to 61")
        if not math.isfinite(self.center) or not 0 < self.scale < math.inf:
            raise ValueError(
                f"task {self.name!r} has center {self.center} and scale {self.scale}; both must be finite, and the"
                " scale above 0"
            )
        if not self.weight >= 0:
            raise ValueError(f"weight of task {self.name!r} is {self.weight}; it must be 0 or more")


@dataclass(frozen=True, kw_only=True, slots=True)
class ActionLabels:
    """What happened, for each task. values_PK: float[P, K]. labelled_PK: bool[P, K], False where it is not known."""

    values_PK: Tensor
    labelled_PK: Tensor

    def __post_init__(self) -> None:
        if self.values_PK.dim() != 2 or not self.values_PK.is_floating_point():
            raise ValueError(f"values_PK must be float[P, K], got {self.values_PK.dtype} {tuple(self.values_PK.shape)}")
        if self.labelled_PK.dtype != torch.bool or self.labelled_PK.shape != self.values_PK.shape:
            raise ValueError(
                f"labelled_PK must be bool{list(self.values_PK.shape)}, got {self.labelled_PK.dtype} of shape"
                f" {tuple(self.labelled_PK.shape)}"
            )


class ActionHeads(nn.Module):
    """``silu(x W + b)`` shared by the tasks, then one row of weights and a bias for each.

    x is the encoder's output at an item's token, which has met the item already; or user state * item embedding.
    """

    weights_K: Tensor

    def __init__(
        self, tasks: Sequence[ActionTask], *, embedding_dim: int, hidden_dim: int, generator: torch.Generator
    ) -> None:
        super().__init__()
        names = [task.name for task in tasks]
        if not names or len(set(names)) != len(names):
            raise ValueError(f"tasks are named {names}; there must be at least one, each with a name of its own")
        self.tasks = tuple(tasks)
        self.hidden_weight = nn.Parameter(_xavier(generator, embedding_dim, hidden_dim))
        self.hidden_bias = nn.Parameter(torch.zeros(hidden_dim))
        self.task_weight = nn.Parameter(_xavier(generator, hidden_dim, len(tasks)))
        self.task_bias = nn.Parameter(torch.zeros(len(tasks)))
        self.register_buffer("weights_K", torch.tensor([task.weight for task in tasks]), persistent=False)

    def forward(self, state_PD: Tensor, item_PD: Tensor | None = None) -> Tensor:
        """float[P, K], a column for each task: logits of bce tasks, of mse tasks values less center, by scale.

        state_PD: float[P, D]. item_PD: float[P, D], to be multiplied with it; None where the state is of the item.
        """
        if item_PD is not None and item_PD.shape != state_PD.shape:
            raise ValueError(f"item_PD must be of shape {tuple(state_PD.shape)}, got {tuple(item_PD.shape)}")
        x_PD = state_PD if item_PD is None else state_PD * item_PD
        hidden_PF = functional.silu(torch.addmm(self.hidden_bias, x_PD, self.hidden_weight))
        return torch.addmm(self.task_bias, hidden_PF, self.task_weight)

    def answers(self, predictions_PK: Tensor) -> Tensor:
        """float[P, K]: probabilities of bce tasks, values of mse tasks in their own unit."""
        answers_PK = torch.sigmoid(predictions_PK)
        for column, task in enumerate(self.tasks):
            if task.kind == "mse":
                answers_PK[:, column] = task.center + task.scale * predictions_PK[:, column]
        return answers_PK

    def probabilities(self, predictions_PK: Tensor) -> dict[str, Tensor]:
        """float[P] in [0, 1] of each bce task, by name."""
        return {
            task.name: torch.sigmoid(predictions_PK[:, column])
            for column, task in enumerate(self.tasks)
            if task.kind == "bce"
        }

    def labels(
        self, actions_P: Tensor, values_P: Tensor | None = None, labelled_P: Tensor | None = None
    ) -> ActionLabels:
        """The labels of every task, from interactions as they are stored.

        actions_P: int64[P], a bit for each kind of action, 0 where nothing was done. values_P: float[P], needed by
        tasks about values, NaN where unknown: no such task is labelled there, but where nothing was done no value was
        reached. labelled_P: bool[P], where actions are known; None: everywhere.
        """
        if values_P is None and any(task.action_bit is None for task in self.tasks):
            raise ValueError("values_P is None, but a task is about values")
        values_PK = torch.stack([self._label(task, actions_P, values_P) for task in self.tasks], dim=1)
        if labelled_P is None:
            labelled_P = torch.ones_like(actions_P, dtype=torch.bool)
        known_PK = torch.stack([self._known(task, actions_P, values_P) for task in self.tasks], dim=1)
        return ActionLabels(values_PK=values_PK, labelled_PK=labelled_P[:, None] & known_PK)

    def _known(self, task: ActionTask, actions_P: Tensor, values_P: Tensor | None) -> Tensor:
        if task.action_bit is not None:
            return torch.ones_like(actions_P, dtype=torch.bool)
        assert values_P is not None
        return values_P.isfinite() if task.kind == "mse" else values_P.isfinite() | (actions_P == 0)

    def _label(self, task: ActionTask, actions_P: Tensor, values_P: Tensor | None) -> Tensor:
        dtype = self.task_bias.dtype
        if task.action_bit is not None:
            return ((actions_P >> task.action_bit) & 1).to(dtype)
        assert values_P is not None
        if task.value_at_least is not None:
            return (values_P >= task.value_at_least).to(dtype)
        return ((values_P - task.center) / task.scale).to(dtype)

    def task_losses(self, predictions_PK: Tensor, labels: ActionLabels) -> Tensor:
        """float[K]: the mean loss of each task over its labelled positions, 0 where there are none.

        ValueError for labels that are not finite, or not between 0 and 1 for a bce task; reads the device once. What
        stands at positions without a label is not looked at.
        """
        if predictions_PK.shape != labels.values_PK.shape:
            raise ValueError(
                f"predictions_PK is {list(predictions_PK.shape)} and the labels are {list(labels.values_PK.shape)}"
            )
        labelled_PK = labels.labelled_PK
        # Where there is no label a prediction is compared with 0 and dropped: NaN times 0 would still be NaN.
        values_PK = torch.where(labelled_PK, labels.values_PK, 0.0)
        self._check_values(values_PK)
        dtype = torch.promote_types(predictions_PK.dtype, values_PK.dtype)
        predictions_PK, values_PK = predictions_PK.to(dtype), values_PK.to(dtype)
        losses_PK = torch.stack(
            [
                _LOSSES[task.kind](predictions_PK[:, column], values_PK[:, column])
                for column, task in enumerate(self.tasks)
            ],
            dim=1,
        )
        return torch.where(labelled_PK, losses_PK, 0.0).sum(0) / labelled_PK.sum(0).clamp_min(1)

    def loss(self, predictions_PK: Tensor, labels: ActionLabels) -> Tensor:
        """Scalar: the weighted sum of ``task_losses``."""
        return (self.task_losses(predictions_PK, labels) * self.weights_K).sum()

    def _check_values(self, values_PK: Tensor) -> None:
        is_bce_K = torch.tensor([task.kind == "bce" for task in self.tasks], device=values_PK.device)
        bad_PK = ~values_PK.isfinite() | (is_bce_K & ((values_PK < 0) | (values_PK > 1)))
        bad_K = bad_PK.any(0).tolist()
        names = [task.name for task, bad in zip(self.tasks, bad_K, strict=True) if bad]
        if names:
            raise ValueError(
                f"labels of {', '.join(names)} are NaN, infinite or outside [0, 1] for bce; leave out what is not known"
                " through labelled_PK"
            )


def _bce(logits_P: Tensor, labels_P: Tensor) -> Tensor:
    return functional.binary_cross_entropy_with_logits(logits_P, labels_P, reduction="none")


def _mse(predictions_P: Tensor, labels_P: Tensor) -> Tensor:
    return (predictions_P - labels_P).square()


_LOSSES = {"bce": _bce, "mse": _mse}


def _xavier(generator: torch.Generator, inputs: int, outputs: int) -> Tensor:
    bound = (6 / (inputs + outputs)) ** 0.5
    return torch.empty(inputs, outputs).uniform_(-bound, bound, generator=generator)


__all__ = ["ActionHeads", "ActionLabels", "ActionTask"]
