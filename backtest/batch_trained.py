"""Arms of a team without online learning: retrained from scratch every day, or fine-tuned every hour.

At a boundary the arm is trained on what had arrived by then, in passes over the histories of the users who were there:
one row a user, supervised at every interaction of the window, as offline training is done. Its weights are shown from
the boundary on, `weights_lag_ms` later. Late answers wait as those of `online_arms.DelayedArm` do.

Shapes: N interactions of the window, B users of a step.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from backtest.answers import Answerer, Answers
from backtest.event_columns import EventColumns
from backtest.online_arms import OwnHistories
from backtest.queries import Queries, rank_queries
from backtest.replicas import num_bytes_of
from backtest.waiting import WaitingQueries
from feature_store.interactions import JaggedHistories
from feature_store.store import FeatureStore
from model.batch import HistoryBatch, Targets
from model.learning import supervised_pass
from model.optimizer import RecommenderOptimizer
from model.recommender import Catalogue, Recommender
from online_trainer.learner_config import LearnerConfig

Int64s = NDArray[np.int64]

_NOTHING: Final = np.zeros((4, 0), np.int64)


@dataclass(frozen=True, kw_only=True, slots=True)
class BatchTrainedArm:
    """How an arm is trained."""

    name: str
    from_scratch: bool
    every_ms: int
    window_ms: int
    epochs: int
    users_per_step: int
    weights_lag_ms: int = 0
    histories_lag_ms: int = 0


class BatchTraining:
    """One arm: its window of interactions, its model, and what it shows."""

    def __init__(
        self, arm: BatchTrainedArm, learner: LearnerConfig, store: FeatureStore, answers: Answers, *, late_ms: int
    ) -> None:
        self.arm, self._learner, self._store, self._answers = arm, learner, store, answers
        self._late_ms = late_ms
        self._window = _NOTHING
        """User, item, time it happened, time it arrived: int64[4, N]."""
        self._added: list[Int64s] = []
        """What has come since, likewise."""
        self._boundary_ms: int | None = None
        self._model = Recommender(learner.model)
        self._optimizer = RecommenderOptimizer(self._model, learner.optimizer)
        self._catalogue: Catalogue | None = None
        self._who = Answerer(arm=arm.name)
        self._waiting = WaitingQueries()
        self._num_trained = 0

    def note(self, events: EventColumns) -> None:
        """Take in the accepted events of a batch, before it is asked about."""
        self._added.append(np.stack([events.user_id, events.item_id, events.event_time_ms, events.arrival_ms]))
        if self._boundary_ms is None:
            self._boundary_ms = (int(events.arrival_ms[0]) // self.arm.every_ms + 1) * self.arm.every_ms

    def ask(self, queries: Queries, own_histories: OwnHistories, at_ms: int) -> None:
        """Take in a step's queries; train, and answer, up to where nothing can come before any more."""
        lag_ms = self.arm.histories_lag_ms
        self._waiting.add(own_histories(lag_ms) if lag_ms or self._late_ms else queries)
        self.advance(at_ms)

    def advance(self, at_ms: int) -> None:
        """Train at every boundary that has passed."""
        with self._answers.spending([self.arm.name]):
            horizon_ms = at_ms - self._late_ms
            while self._boundary_ms is not None and self._boundary_ms + self.arm.weights_lag_ms <= horizon_ms:
                self._answer_before(self._boundary_ms + self.arm.weights_lag_ms + 1)
                self._train(self._boundary_ms)
                self._boundary_ms += self.arm.every_ms
            if self._waiting.are_many:
                self._answer_before(horizon_ms + 1)

    def settle_all(self) -> None:
        """Answer everything that waits."""
        with self._answers.spending([self.arm.name]):
            self._answer_before(math.inf)

    def _answer_before(self, time_ms: float) -> None:
        asked = self._waiting.take_before(time_ms)
        if asked is None:
            return
        if self._num_trained == 0:
            self._answers.nothing(self.arm.name, asked)
            return
        self._catalogue = self._model.catalogue() if self._catalogue is None else self._catalogue
        self._answers.ranked(self._who, asked, rank_queries(self._model, self._catalogue, asked))

    def _train(self, boundary_ms: int) -> None:
        """On what happened in the window and had arrived by the boundary."""
        since_ms = boundary_ms - self.arm.window_ms
        self._join()
        has_arrived_N = self._window[3] <= boundary_ms
        is_recent_N = self._window[2] > since_ms
        users, items, times_ms, _ = self._window[:, has_arrived_N & is_recent_N]
        self._window = self._window[:, is_recent_N | ~has_arrived_N]
        if len(users) == 0:
            return
        if self.arm.from_scratch:
            self._model = Recommender(self._learner.model)
            self._optimizer = RecommenderOptimizer(self._model, self._learner.optimizer)
        in_time = np.argsort(times_ms, kind="stable")
        self._model.items.admit(items[in_time])
        self._model.items.observe(self._model.items.lookup(items), times_ms)
        generator = torch.Generator().manual_seed(self._learner.trainer.seed + self._num_trained)
        self._model.train()
        for _ in range(self.arm.epochs):
            for histories in self._histories(np.unique(users), boundary_ms, generator):
                self._step(histories, since_ms, generator)
        self._model.eval()
        self._publish(boundary_ms, len(users), int(times_ms.max()))

    def _join(self) -> None:
        self._window = np.concatenate([self._window, *self._added], 1)
        self._added.clear()

    def _histories(self, users: Int64s, boundary_ms: int, generator: torch.Generator) -> Iterator[JaggedHistories]:
        """Of all users, in random order, some at a time."""
        shuffled = users[torch.randperm(len(users), generator=generator).numpy()]
        for start in range(0, len(users), self.arm.users_per_step):
            yield self._store.read(
                shuffled[start : start + self.arm.users_per_step],
                max_len=self._learner.model.max_len + 1,
                known_at_ms=boundary_ms,
            )

    def _step(self, histories: JaggedHistories, since_ms: int, generator: torch.Generator) -> None:
        """One step on the positions whose next interaction is in the window."""
        rows_T = torch.from_numpy(self._model.items.lookup(histories.item_id))
        lengths = histories.lengths()
        is_input = np.ones(histories.num_interactions, bool)
        is_input[histories.offsets[1:][lengths > 0] - 1] = False
        inputs = np.flatnonzero(is_input)
        if len(inputs) == 0:
            return
        offsets = np.concatenate([[0], np.cumsum(np.maximum(lengths - 1, 0))])
        next_rows = rows_T[torch.from_numpy(inputs + 1)]
        is_target = (next_rows >= 0) & torch.from_numpy(histories.event_time_ms[inputs + 1] > since_ms)
        positions_P = is_target.nonzero()[:, 0]
        if len(positions_P) == 0:
            return
        batch = HistoryBatch(
            rows_L=rows_T[torch.from_numpy(inputs)],
            timestamps_ms_L=torch.from_numpy(histories.event_time_ms[inputs]),
            query_times_ms_L=torch.from_numpy(histories.event_time_ms[inputs + 1]),
            offsets=torch.from_numpy(offsets),
            actions_L=torch.from_numpy(histories.acts[inputs]),
            values_L=torch.from_numpy(histories.value[inputs]),
        )
        targets = Targets(positions_P=positions_P, rows_P=next_rows[positions_P])
        learned = supervised_pass(self._model, batch, targets, self._learner.loss, generator=generator)
        learned.loss.backward()  # type: ignore[no-untyped-call]
        self._optimizer.step(learned.active)

    def _publish(self, boundary_ms: int, num_interactions: int, watermark_ms: int) -> None:
        self._catalogue = None
        self._num_trained += 1
        self._who = Answerer(arm=self.arm.name, number=self._num_trained - 1, watermark_ms=watermark_ms)
        num_rows = self._model.items.num_items
        num_bytes = num_bytes_of(num_rows, self._model)
        self._answers.published(self.arm.name, num_bytes)
        self._answers.writer.add_publication(
            arm=self.arm.name,
            version=self._who.number,
            time_ms=boundary_ms,
            num_interactions=num_interactions,
            watermark_ms=watermark_ms,
            num_rows=num_rows,
            num_bytes=num_bytes,
        )

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Tensors and JSON; nothing waits."""
        tensors = {f"items.{name}": tensor for name, tensor in self._model.items.state_dict().items()}
        tensors |= {f"dense.{name}": tensor for name, tensor in self._model.dense_state().items()}
        tensors |= {f"optimizer.{name}": tensor for name, tensor in self._optimizer.state_dict().items()}
        self._join()
        tensors["window"] = torch.from_numpy(self._window.copy())
        state = {
            "boundary_ms": self._boundary_ms,
            "num_trained": self._num_trained,
            "watermark_ms": self._who.watermark_ms,
        }
        return tensors, state

    def load_state(self, tensors: dict[str, Tensor], state: dict[str, Any]) -> None:
        """Continue from a ``state``."""

        def part(prefix: str) -> dict[str, Tensor]:
            return {n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)}

        self._model.items.load_state_dict(part("items."))
        self._model.load_dense_state(part("dense."))
        self._optimizer.load_state_dict(part("optimizer."))
        self._model.eval()
        self._window = tensors["window"].numpy().copy()
        self._boundary_ms, self._num_trained = state["boundary_ms"], state["num_trained"]
        self._who = Answerer(arm=self.arm.name, number=self._num_trained - 1, watermark_ms=state["watermark_ms"])
