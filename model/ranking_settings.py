"""What a person sets of the ranking head. Without torch: commands read settings that compute nothing."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Final, Literal

_VALUE_TASK: Final = "value>="
_REGRESSION: Final = "value"


@dataclass(frozen=True, kw_only=True, slots=True)
class TaskTarget:
    """What a task predicts: the bit of an action, a value to be reached, or, with neither, the value itself."""

    action_bit: int | None = None
    value_at_least: float | None = None

    @property
    def is_value(self) -> bool:
        """Whether it is the value itself."""
        return self.action_bit is None and self.value_at_least is None


@dataclass(frozen=True, kw_only=True, slots=True)
class RankingSettings:
    """The ranking head: probabilities of what a user will do with an item, for `POST /v1/rank`."""

    tasks: tuple[str, ...] = ()
    """What is predicted, at most 16: names of actions ("purchase"), values to be reached ("value>=8"), and the value
    itself ("value", such as seconds watched: what it is where there is one). Without any there is no head, and
    candidates are ranked by the retrieval score. Changing it needs a new model."""
    kind: Literal["hstu", "llatte"] = "hstu"
    """hstu: the candidate is one more token of the history, all layers of the model's own kind. llatte: the settings of
    [llatte], which reads the user's vector from upstream as well."""
    learn_from: Literal["impressions", "interactions"] = "impressions"
    """impressions: from the topic `labels`, what became of each item that an answer showed. interactions: from each
    interaction, what was done given that something was: for teams whose answers are not shown by headrace yet."""
    tokens: Literal["interleaved", "merged"] = "merged"
    """Of kind hstu. interleaved: item and action of a history are two tokens (HSTU). merged: one, with a quarter of the
    attention (ULTRA-HSTU)."""
    task_weights: dict[str, float] = field(default_factory=dict)
    """Factors of the tasks' losses: {purchase = 3.0}; 1 for those not named."""
    score_weights: dict[str, float] = field(default_factory=dict)
    """The score of `/v1/rank` is the sum of weight times prediction over the tasks, of "value" in its own unit; 1 for
    those not named."""
    value_center: float = 0.0
    """Of the task "value": about the mean of your values, in their unit. Squared errors of (value - value_center) /
    value_scale are learned from, so that the task counts about as much as the others. Needs a new model."""
    value_scale: float = 1.0
    """Of the task "value": about their standard deviation. Needs a new model."""
    value_thresholds: tuple[float, ...] = ()
    """Values of the interactions in a history that the head tells apart, ascending: (5, 8) for ratings."""
    surfaces: bool = False
    """The head tells apart where the interactions of a history happened (events.surface_key); of kind llatte, also
    where the request comes from (`surface` of `/v1/rank`), and so does the upstream model. Needs a new model."""
    max_candidates: int = 64
    """Candidates of one user in one pass at most, in training and in answering; more take several passes."""
    task_hidden_dim: int = 64
    """Width of the hidden layer that the tasks share."""
    batch_items: int = 256
    """Labelled items of one step at most."""
    max_pending_items: int = 50_000
    """Labelled items read but not yet learned from; beyond it no more labels are read until the trainer has caught
    up."""
    remembered_labels: int = 65_536
    """Labels learned last that are remembered (about 0.1 kB each), so that one which a crash sent twice is learned
    once."""
    dense_learning_rate: float = 1e-3
    """Step size of the head's own parameters."""
    row_learning_rate: float = 2e-3
    """Step size of item embeddings in the head's steps. They are retrieval's as well: five times as much costs it 3 %
    of its hit rate, and 0 (the head reads them as retrieval has learned them) predicts values worse."""
    min_labels: int = 10_000
    """Answers are ranked by the head once it has learned from so many labels."""

    def __post_init__(self) -> None:
        if len(self.tasks) > 16 or len(set(self.tasks)) != len(self.tasks):
            raise ValueError(f"ranking.tasks = {list(self.tasks)}: must be at most 16, each once")
        choices = {
            "kind": ("hstu", "llatte"),
            "learn_from": ("impressions", "interactions"),
            "tokens": ("interleaved", "merged"),
        }
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                raise ValueError(f"ranking.{name} = {getattr(self, name)!r}: must be {' or '.join(allowed)}")
        for name in ("task_weights", "score_weights"):
            for task, weight in getattr(self, name).items():
                if task not in self.tasks:
                    raise ValueError(f"ranking.{name} names {task!r}: ranking.tasks are {', '.join(self.tasks)}")
                if not math.isfinite(weight) or (name == "task_weights" and weight < 0):
                    raise ValueError(
                        f"ranking.{name} gives {task!r} {weight}: must be finite, and a loss's not below 0"
                    )
        for name in ("max_candidates", "task_hidden_dim", "batch_items", "max_pending_items", "remembered_labels"):
            if not 1 <= getattr(self, name) <= 10_000_000:
                raise ValueError(f"ranking.{name} = {getattr(self, name)}: must be between 1 and 10,000,000")
        if not math.isfinite(self.value_center):
            raise ValueError(f"ranking.value_center = {self.value_center}: must be a finite number")
        if not 0 < self.value_scale < math.inf:
            raise ValueError(f"ranking.value_scale = {self.value_scale}: must be a finite number above 0")
        if self.min_labels < 0:
            raise ValueError(f"ranking.min_labels = {self.min_labels}: must not be negative")
        for name in ("dense_learning_rate", "row_learning_rate"):
            if not 0 <= getattr(self, name) <= 10:
                raise ValueError(f"ranking.{name} = {getattr(self, name)}: must be between 0 and 10")

    def targets(self, actions: Sequence[str]) -> tuple[TaskTarget, ...]:
        """What each task is about. actions: as declared, in the order of their bits.

        ValueError for a task about something else, or one that is always true of an interaction.
        """
        if self.learn_from == "interactions" and len(actions) == 1 and actions[0] in self.tasks:
            raise ValueError(
                f"ranking.tasks names {actions[0]!r}, the only action of events.actions: every interaction has it, so "
                "there is nothing to learn from interactions; learn_from impressions, or predict a value"
            )
        return tuple(_target(name, actions) for name in self.tasks)


def _target(name: str, actions: Sequence[str]) -> TaskTarget:
    if name in actions:
        return TaskTarget(action_bit=actions.index(name))
    if name == _REGRESSION:
        return TaskTarget()
    threshold = _number(name.removeprefix(_VALUE_TASK)) if name.startswith(_VALUE_TASK) else None
    if threshold is None:
        raise ValueError(
            f"ranking.tasks names {name!r}: it must be an action of events.actions ({', '.join(actions)}), a value "
            f'to be reached, such as "{_VALUE_TASK}8", or "{_REGRESSION}"'
        )
    return TaskTarget(value_at_least=threshold)


def _number(text: str) -> float | None:
    try:
        number = float(text)
    except ValueError:
        return None
    return number if math.isfinite(number) else None
