"""Learning of the upstream model: predict what a user did next from the vector of what came before, then learn it.

Of each user in a batch the newest interaction is what is predicted, behind the history of before it: what happened
strictly earlier, and had arrived earlier. Every prediction is made before its interaction is learned from.

Shapes: C interactions predicted, K tasks.
"""

from __future__ import annotations

import logging
import math
from collections import deque
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from feature_store.hot import HotHistories
from feature_store.interactions import Interactions
from model.optimizer import RecommenderOptimizer
from model.ranking_learning import RankingPass
from model.upstream_model import UpstreamExamples, UpstreamModel, UpstreamModelConfig
from online_trainer.batching import MicroBatch
from online_trainer.checkpoint import Checkpoint
from online_trainer.labelled_items import LabelledItems, histories_before, shown_batch
from online_trainer.ledger import Ledger
from online_trainer.quarantine import LossGuard
from online_trainer.task_meters import TaskMeters, values_in_units
from online_trainer.upstream_settings import UpstreamDaemonConfig

logger = logging.getLogger(__name__)

_LOSSES: Final = 200
_METRICS_WINDOW: Final = 5_000


@dataclass(slots=True)
class UpstreamCounts:
    """What became of the interactions taken; part of every checkpoint."""

    num_learned: int = 0
    """Predicted, then learned from."""
    num_followed: int = 0
    """Of users with a newer one in the same batch: in histories, and not predicted themselves."""
    num_passed_over: int = 0
    """Not learned from because more came than there was time for."""
    num_refused: int = 0
    """In batches whose loss or gradient said that they would do harm."""


class UpstreamLearner:
    """The upstream model that learns, its optimiser and its account. A function of the sequence of batches and seed."""

    def __init__(
        self, config: UpstreamModelConfig, settings: UpstreamDaemonConfig, hot: HotHistories, *, log_id: str
    ) -> None:
        if settings.num_threads:
            torch.set_num_threads(settings.num_threads)
        self.ledger, self.counts = Ledger(log_id), UpstreamCounts()
        self.model = UpstreamModel(config)
        self._config, self._hot = config, hot
        self._optimizer = RecommenderOptimizer(self.model, settings.optimizer())
        self._meters = TaskMeters(config.tasks, _METRICS_WINDOW)
        self._guard = LossGuard(spike_deviations=settings.spike_deviations, max_in_a_row=2)
        self._generator = torch.Generator().manual_seed(settings.seed)
        self._losses: deque[float] = deque(maxlen=_LOSSES)

    @property
    def num_learned_from(self) -> int:
        """Interactions taken that were not passed over."""
        return self.ledger.num_interactions - self.ledger.num_thinned

    def step(self, batch: MicroBatch) -> None:
        """Test on, then learn from, a batch. Raises StoreUnavailableError or HistoryBehindError, nothing changed."""
        new, taken = batch.interactions, batch.taken()
        if len(taken):
            self._hot.apply(taken, watermark_ms=self.ledger.watermark_ms)
        newest = _newest_of_each_user(new)
        items = LabelledItems.of_interactions(new.take(newest))
        histories = histories_before(items, self._hot, max_len=self._config.upstream.max_len) if len(newest) else None
        # Nothing is changed before this line: until here, the store may turn out to be away.
        self.counts.num_followed += len(new) - len(newest)
        self.counts.num_passed_over += len(batch.thinned)
        if histories is not None:
            self.model.items.admit(new.item_id)
            self._test_and_train(items, shown_batch(items, histories, self.model.items))
        table = self.model.items
        rows = table.lookup(taken.item_id)
        table.observe(rows[rows >= 0], taken.event_time_ms[rows >= 0])
        self.ledger.record(batch)

    def pass_over(self, batch: MicroBatch) -> None:
        """Take a batch into the account without learning from it."""
        empty = batch.interactions.take(slice(0, 0))
        self.counts.num_passed_over += len(batch.taken())
        self.ledger.record(replace(batch, interactions=empty, append_ms=batch.append_ms[:0], thinned=batch.taken()))

    def _test_and_train(self, items: LabelledItems, shown: Any) -> None:
        labels = self.model.heads.labels(torch.from_numpy(items.action.astype(np.int64)), torch.from_numpy(items.value))
        is_taken_C = torch.from_numpy(items.action != 0)
        examples = UpstreamExamples.of_shown(shown, labels, is_taken_C)
        found = self.model.learning_pass(examples, generator=self._generator)
        values_CK = values_in_units(self.model.heads.tasks, labels, items.value)
        answers_CK = self.model.heads.answers(found.predictions_CK)
        self._meters.add(answers_CK.numpy(), values_CK, labels.labelled_PK.numpy())
        loss = float(found.loss.detach())
        reason = self._guard.objection(loss)
        if reason is None and not self._train(found):
            reason = "gradient"
        if reason is not None:
            self.counts.num_refused += len(items)
            logger.error("upstream step %d is not learned from (%s): loss %s", self.ledger.num_steps + 1, reason, loss)
            return
        self._losses.append(loss)
        self.counts.num_learned += len(items)

    def _train(self, found: RankingPass) -> bool:
        """Step the weights; False, and nothing changed, where a gradient is no finite number."""
        found.loss.backward()  # type: ignore[no-untyped-call]
        tensors = [*self.model.parameters(), found.active.weight_RD, found.active.bias_R]
        sums = [tensor.grad.sum() for tensor in tensors if tensor.grad is not None]
        if not torch.isfinite(torch.stack(sums)).all():
            self._optimizer.zero_grad()
            return False
        self._optimizer.step(found.active)
        return True

    def forget(self, user_ids: Sequence[int]) -> None:
        """Drop the histories of forgotten users; what was learned from them stays in the weights."""
        self._hot.forget(np.array(user_ids, np.int64))

    def weights_are_finite(self) -> bool:
        """Whether every dense parameter and every row is a finite number."""
        items = self.model.items
        dense = all(bool(torch.isfinite(parameter).all()) for parameter in self.model.parameters())
        return dense and bool(torch.isfinite(items.weight[: items.num_items]).all())

    def summary(self) -> dict[str, float]:
        """Prequential metrics as `task.span.metric`, and `loss`, the mean of the newest steps; absent before them."""
        found = self._meters.summary()
        return found | ({"loss": math.fsum(self._losses) / len(self._losses)} if self._losses else {})

    def status(self) -> dict[str, object]:
        """Counts, JSON-ready."""
        counts = {name.removeprefix("num_"): value for name, value in asdict(self.counts).items()}
        return {"interactions": self.ledger.num_interactions, "steps": self.ledger.num_steps, **counts}

    def capture_checkpoint(self) -> Checkpoint:
        """Copies of everything that a later step depends on."""
        tensors = {f"dense.{name}": one for name, one in self.model.dense_state().items()}
        tensors |= {f"items.{name}": one for name, one in self.model.items.state_dict().items()}
        tensors |= {f"optimizer.{name}": one for name, one in self._optimizer.state_dict().items()}
        tensors |= {f"meters.{name}": torch.from_numpy(one) for name, one in self._meters.state().items()}
        tensors["generator"] = self._generator.get_state()
        state = {
            "ledger": self.ledger.to_dict(),
            "counts": asdict(self.counts),
            "guard": self._guard.state(),
            "losses": list(self._losses),
        }
        return Checkpoint(self.ledger.num_steps, self._config.config_hash(), tensors, state)

    def load_checkpoint(self, checkpoint: Checkpoint) -> None:
        """Continue from a checkpoint, also when the log has another name now."""

        def part(prefix: str) -> dict[str, Tensor]:
            return {n.removeprefix(prefix): t for n, t in checkpoint.tensors.items() if n.startswith(prefix)}

        log_id = self.ledger.log_id
        self.ledger = Ledger.from_dict(checkpoint.state["ledger"])
        if self.ledger.log_id != log_id:
            self.ledger.continue_with(log_id)
        self.counts = UpstreamCounts(**checkpoint.state["counts"])
        self._losses.extend(checkpoint.state["losses"])
        self.model.load_dense_state(part("dense."))
        self.model.items.load_state_dict(part("items."))
        self._optimizer.load_state_dict(part("optimizer."))
        self._meters.load_state({name: one.numpy() for name, one in part("meters.").items()})
        self._generator.set_state(checkpoint.tensors["generator"])
        self._guard.load_state(checkpoint.state["guard"])


def _newest_of_each_user(new: Interactions) -> NDArray[np.int64]:
    """Rows, ascending: each user's with the highest arrival number."""
    order = np.lexsort((new.seq, new.user_id))
    is_last = np.append(new.user_id[order][1:] != new.user_id[order][:-1], True)[: len(order)]
    return np.sort(order[is_last])
