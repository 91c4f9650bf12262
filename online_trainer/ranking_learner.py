"""The ranking head in training: predict what became of each item that was shown, then learn it, once.

Predictions are made with the weights of the moment the label is learned: weights that have not learned from this label,
though they may have learned next-item prediction from what the user did since. What was predicted when the items were
shown comes with the labels and is measured beside them (`served`). Steps of its own, with an optimiser,
guard and random numbers of its own: what is learned for retrieval is the same bit by bit up to the first label.

Shapes: C labelled items, K tasks.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from feature_store.hot import HotHistories
from feature_store.interactions import Interactions, JaggedHistories
from model.action_heads import ActionLabels
from model.config import OptimizerConfig
from model.item_table import RowMoves
from model.optimizer import RecommenderOptimizer
from model.ranking_learning import RankingPass, ranking_pass
from model.ranking_settings import RankingSettings
from model.recommender import Recommender
from model.upstream_input import UpstreamVectors
from online_trainer.action_metrics import ActionMeters, ActionMetrics
from online_trainer.config import TrainerConfig
from online_trainer.label_account import LabelAccount, LabelBook
from online_trainer.label_queue import LabelBatch
from online_trainer.labelled_items import LabelledItems, histories_before, shown_batch
from online_trainer.quarantine import LossGuard
from online_trainer.task_meters import TaskMeters, values_in_units
from online_trainer.value_metrics import ValueMeter, ValueMetrics
from online_trainer.vectors_as_of import VectorsAsOf

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True)
class RefusedLabels:
    """A batch that was not learned from."""

    reason: str
    """`loss`, `gradient` or `spike`, as of a batch of interactions."""
    loss: float
    typical_loss: float | None
    items: LabelledItems


class RankingLearner:
    """Trains the ranking head of a recommender. A function of the sequence of batches, settings and seed."""

    def __init__(
        self,
        model: Recommender,
        hot: HotHistories,
        *,
        settings: RankingSettings,
        optimizer: OptimizerConfig,
        trainer: TrainerConfig,
        log_id: str,
        vectors: VectorsAsOf | None = None,
    ) -> None:
        """vectors: where users' vectors are read for a ranker that reads them; None: nobody has one."""
        assert model.ranking is not None, "there is a ranking head"
        self._book = LabelBook(log_id, remembered=settings.remembered_labels)
        self._model, self._network, self._hot, self._settings = model, model.ranking, hot, settings
        self._vectors = vectors
        self._optimizer = RecommenderOptimizer(
            model,
            replace(
                optimizer,
                dense_learning_rate=settings.dense_learning_rate,
                row_learning_rate=settings.row_learning_rate,
            ),
            parameters=model.ranking_parameters(),
        )
        tasks = self._network.heads.tasks
        self._meters = ActionMeters(tuple(one.name for one in tasks if one.kind == "bce"), trainer.metrics_window)
        self._values = {one.name: ValueMeter(trainer.metrics_window) for one in tasks if one.kind == "mse"}
        self.served = TaskMeters(tasks, trainer.metrics_window)
        """Of what was predicted when the items were shown."""
        self.on_tested: Callable[[Tensor, ActionLabels], None] | None = None
        """Hears of the predictions of every step, float32[C, K], and of the labels, before it trains: for backtests."""
        self._guard = LossGuard(spike_deviations=trainer.spike_deviations, max_in_a_row=trainer.max_spikes_in_a_row)
        self._generator = torch.Generator().manual_seed(trainer.seed)

    @property
    def account(self) -> LabelAccount:
        """What has become of the labels, or interactions, read."""
        return self._book.account

    @property
    def learns_from_interactions(self) -> bool:
        """Whether interactions are what it learns from; else labels of impressions."""
        return self._settings.learn_from == "interactions"

    def learn_interactions(self, new: Interactions) -> RefusedLabels | None:
        """Predict and learn what was done in each interaction; a batch that would do harm comes back instead.

        Raises StoreUnavailableError with nothing changed.
        """
        return self._learn(LabelledItems.of_interactions(new))

    def learn_labels(self, batch: LabelBatch) -> RefusedLabels | None:
        """Predict and learn each label that has not been learned from yet; a batch that would do harm comes back.

        Raises StoreUnavailableError with nothing changed.
        """
        is_new = self._book.are_new(batch)
        refused = self._learn(batch.items, is_new, batch.served_CK)
        self._book.record(batch, is_new)
        return refused

    def _learn(
        self,
        items: LabelledItems,
        is_new: NDArray[np.bool_] | None = None,
        served_CK: NDArray[np.float32] | None = None,
    ) -> RefusedLabels | None:
        """is_new: bool[C]; None: all are. served_CK: as in LabelBatch."""
        is_new = np.ones(len(items), np.bool_) if is_new is None else is_new
        is_listed = self._model.items.lookup(items.item_id) >= 0
        learned = items.take(is_new & is_listed, max_items=self._settings.max_candidates)
        if len(learned) == 0:
            self.account.num_unlisted += int((is_new & ~is_listed).sum())
            return None
        histories = histories_before(learned, self._hot, max_len=self._model.config.max_len)
        upstream = None if self._vectors is None else self._vectors.read(learned)
        # Nothing is changed before this line: until here, the store may turn out to be away.
        self.account.num_unlisted += int((is_new & ~is_listed).sum())
        self.account.num_steps += 1
        served_CK = None if served_CK is None else served_CK[is_new & is_listed]
        return self._test_and_train(learned, histories, upstream, served_CK)

    def _test_and_train(
        self,
        items: LabelledItems,
        histories: JaggedHistories,
        upstream: UpstreamVectors | None,
        served_CK: NDArray[np.float32] | None,
    ) -> RefusedLabels | None:
        labels = self._network.heads.labels(
            torch.from_numpy(items.action.astype(np.int64)), torch.from_numpy(items.value)
        )
        batch = replace(shown_batch(items, histories, self._model.items), upstream=upstream)
        found = ranking_pass(self._model, batch, labels, generator=self._generator)
        self._measure(found.predictions_CK, labels, items, batch.shown_rows_C)
        if self.on_tested is not None:
            self.on_tested(found.predictions_CK, labels)
        if served_CK is not None:
            self._measure_served(served_CK, labels, items)
        loss, typical_loss = float(found.loss.detach()), self._guard.typical_loss
        reason = self._guard.objection(loss, len(items))
        if reason is None and not self._train(found):
            reason = "gradient"
        if reason is not None:
            self.account.num_quarantined += len(items)
            return RefusedLabels(reason=reason, loss=loss, typical_loss=typical_loss, items=items)
        self.account.num_learned += len(items)
        return None

    def _measure(self, predictions_CK: Tensor, labels: ActionLabels, items: LabelledItems, item_rows_C: Tensor) -> None:
        measured_C = torch.from_numpy(items.is_measured)
        answers_CK = self._network.heads.answers(predictions_CK)
        for column, task in enumerate(self._network.heads.tasks):
            rows = labels.labelled_PK[:, column] & measured_C
            if task.kind == "mse":
                self._values[task.name].add(
                    item_rows_C[rows].numpy(),
                    answers_CK[rows, column].double().numpy(),
                    items.value[rows.numpy()].astype(np.float64),
                )
                continue
            self._meters[task.name].add(
                predictions_CK[rows, column].double().numpy(), labels.values_PK[rows, column].long().numpy()
            )

    def _measure_served(self, served_CK: NDArray[np.float32], labels: ActionLabels, items: LabelledItems) -> None:
        values_CK = values_in_units(self._network.heads.tasks, labels, items.value)
        self.served.add(served_CK, values_CK, labels.labelled_PK.numpy() & items.is_measured[:, None])

    def _train(self, found: RankingPass) -> bool:
        """Step the weights; False, and nothing changed, where a gradient is no finite number."""
        found.loss.backward()  # type: ignore[no-untyped-call]
        tensors = [*self._network.parameters(), found.active.weight_RD]
        sums = [tensor.grad.sum() for tensor in tensors if tensor.grad is not None]
        if not torch.isfinite(torch.stack(sums)).all():
            self._optimizer.zero_grad()
            return False
        self._optimizer.step(found.active)
        return True

    def follow(self, moves: RowMoves) -> None:
        """Move what is kept by row as ``ItemTable.remove`` moved the rows."""
        self._optimizer.follow(moves)
        for meter in self._values.values():
            meter.follow(moves)

    def measured(self) -> dict[tuple[str, str], ActionMetrics | ValueMetrics]:
        """(task, `lifetime` or `window`) → prequential metrics; from any thread."""
        values: dict[tuple[str, str], ActionMetrics | ValueMetrics] = {}
        for task, meter in self._values.items():
            values |= {(task, "lifetime"): meter.lifetime(), (task, "window"): meter.windowed()}
        return values | self._meters.measured()

    def summary(self) -> dict[str, float]:
        """`ranking.task.span.metric`, and `ranking.served.task.span.metric`; absent where it is not defined."""
        named = self._meters.summary()
        for task, meter in self._values.items():
            named |= {f"{task}.{name}": value for name, value in meter.summary().items()}
        named |= {f"served.{name}": value for name, value in self.served.summary().items()}
        return {f"ranking.{name}": value for name, value in named.items()}

    def status(self) -> dict[str, object]:
        """Counts, JSON-ready."""
        counts = self.account.counts()
        return counts if self._vectors is None else counts | {"vectors": self._vectors.status()}

    def tensors(self) -> dict[str, Tensor]:
        """Copies of everything that a later step depends on, with `state()`."""
        held = {f"optimizer.{name}": one for name, one in self._optimizer.state_dict().items()}
        held |= {f"meters.{name}": torch.from_numpy(one) for name, one in self._meters.state().items()}
        held |= {f"served.{name}": torch.from_numpy(one) for name, one in self.served.state().items()}
        for task, meter in self._values.items():
            held |= {f"values.{task}.{name}": torch.from_numpy(one) for name, one in meter.state().items()}
        return held | {
            "learned": self._book.keys(),
            "generator": self._generator.get_state(),
        }

    def state(self) -> dict[str, Any]:
        """JSON-ready."""
        return {"account": self.account.to_dict(), "guard": self._guard.state()}

    def load(self, tensors: Mapping[str, Tensor], state: dict[str, Any]) -> None:
        """Continue from `tensors()` and `state()`, also when the log has another name now: labels begin anew there."""

        def part(prefix: str) -> dict[str, Tensor]:
            return {name.removeprefix(prefix): one for name, one in tensors.items() if name.startswith(prefix)}

        self._book.load(state["account"], tensors["learned"])
        self._optimizer.load_state_dict(part("optimizer."))
        self._meters.load_state({name: one.numpy() for name, one in part("meters.").items()})
        self.served.load_state({name: one.numpy() for name, one in part("served.").items()})
        for task, meter in self._values.items():
            meter.load_state({name: one.numpy() for name, one in part(f"values.{task}.").items()})
        self._generator.set_state(tensors["generator"])
        self._guard.load_state(state["guard"])


def is_finite_or_none(loss: float) -> float | None:
    """What JSON can hold of a loss."""
    return loss if math.isfinite(loss) else None
