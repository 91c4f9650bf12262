"""One learner of a run with the arms that answer by its weights."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from backtest.answers import Answers
from backtest.batch_feed import ClosedBatch
from backtest.online_arms import DelayedArm, OnlineArm, OnlineArms, OwnHistories
from backtest.queries import Queries
from backtest.replicas import ChangedRows
from online_trainer.checkpoint import Checkpoint
from online_trainer.learner import MeasuredStep, OnlineLearner

Asking = Callable[[MeasuredStep], tuple[Queries, OwnHistories] | None]
"""The queries of a step that was tested; None: nothing is asked (yet)."""


class Training:
    """A learner, stepped batch by batch; its arms are asked before each step trains, and publish after it."""

    def __init__(self, learner: OnlineLearner, arms: list[OnlineArm], answers: Answers, *, late_ms: int) -> None:
        self.learner = learner
        self.changed = ChangedRows()
        self.arm_names = [arm.name for arm in arms]
        # The trainer's own test cannot answer for rows that are rounded when they are published.
        is_exact = learner.row_precision == "float32"
        at_once = [arm for arm in arms if late_ms == 0 and arm.weights_lag_ms == 0 and is_exact]
        self._online = OnlineArms(learner, at_once, self.changed, answers)
        self._delayed = [
            DelayedArm(learner, arm, self.changed, answers, late_ms=late_ms) for arm in arms if arm not in at_once
        ]

    def step(self, closed: ClosedBatch, asking: Asking, *, evaluates_next: bool) -> None:
        """Test on, then learn from, one batch."""

        def on_tested(measured: MeasuredStep) -> None:
            asked = asking(measured)
            if asked is None:
                return
            self._online.ask(measured, *asked)
            for delayed in self._delayed:
                delayed.ask(*asked, closed.closed_ms)

        self._online.before_step(closed.closed_ms, is_evaluating=evaluates_next)
        self.learner.on_tested = on_tested
        self.learner.step(closed.batch)
        ledger = self.learner.ledger
        self.changed.after_step(self.learner.model, ledger.num_steps, ledger.num_items_retired)
        self._online.after_step(closed.closed_ms, is_evaluating=evaluates_next)
        for delayed in self._delayed:
            delayed.after_step(closed.closed_ms, is_evaluating=evaluates_next)

    def settle_all(self) -> None:
        """Answer everything that waits."""
        self._online.settle_all()
        for delayed in self._delayed:
            delayed.settle_all()

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Tensors and JSON; nothing waits."""
        checkpoint = self.learner.capture_checkpoint()
        tensors = {f"learner.{name}": tensor for name, tensor in checkpoint.tensors.items()}
        tensors |= {f"changed.{name}": tensor for name, tensor in self.changed.state().items()}
        state: dict[str, Any] = {"learner": checkpoint.state}
        own, state["online"] = self._online.state()
        tensors |= {f"online.{key}": tensor for key, tensor in own.items()}
        for delayed in self._delayed:
            name = f"delayed-{delayed.arm.name}"
            own, state[name] = delayed.state()
            tensors |= {f"{name}.{key}": tensor for key, tensor in own.items()}
        return tensors, state

    def load_state(self, step: int, config_hash: str, tensors: dict[str, Tensor], state: dict[str, Any]) -> None:
        """Continue from a ``state``."""

        def part(prefix: str) -> dict[str, Tensor]:
            return {n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)}

        self.learner.load_checkpoint(Checkpoint(step, config_hash, part("learner."), state["learner"]))
        self.changed.load_state(part("changed."))
        self._online.load_state(part("online."), state["online"])
        for one in self._delayed:
            name = f"delayed-{one.arm.name}"
            one.load_state(part(f"{name}."), state[name])
