"""One training step after another: test on the new interactions, then learn from them. No I/O but reading histories."""

from __future__ import annotations

import logging
import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from feature_store.hot import HotHistories
from feature_store.interactions import Interactions, JaggedHistories
from model.batch import HistoryBatch, Targets
from model.config import LossConfig, ModelConfig, OptimizerConfig
from model.learning import supervised_pass
from model.optimizer import RecommenderOptimizer
from model.recommender import Recommender
from online_trainer.batching import MicroBatch
from online_trainer.checkpoint import Checkpoint
from online_trainer.config import TrainerConfig
from online_trainer.evaluation import Evaluation
from online_trainer.examples import Examples, build_examples
from online_trainer.ledger import Ledger

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True)
class LearnerConfig:
    """Everything that decides what a step computes."""

    trainer: TrainerConfig
    model: ModelConfig
    loss: LossConfig
    optimizer: OptimizerConfig


class OnlineLearner:
    """The model, its optimiser, its metrics and the account of what it has learned.

    A function of the sequence of micro-batches, the configuration and the seed: on the CPU, bit by bit.
    """

    def __init__(self, config: LearnerConfig, hot: HotHistories, *, log_id: str) -> None:
        if config.trainer.num_threads:
            torch.set_num_threads(config.trainer.num_threads)
        self.ledger = Ledger(log_id)
        self.model = Recommender(config.model)
        self._config, self._hot = config, hot
        self._optimizer = RecommenderOptimizer(self.model, config.optimizer)
        self._generator = torch.Generator().manual_seed(config.trainer.seed)
        self.evaluation = Evaluation(config.trainer)

    @property
    def num_items(self) -> int:
        """Size of the live catalogue."""
        return self.model.items.num_items

    def step(self, batch: MicroBatch) -> None:
        """Test on, then learn from, one micro-batch. Raises StoreUnavailableError with nothing changed."""
        new = batch.interactions
        if len(new):
            self._learn(new)
        self.ledger.record(batch)

    def _learn(self, new: Interactions) -> None:
        # The ledger's watermark: after a restart it is what it was, and with it what had expired.
        self._hot.apply(new, watermark_ms=self.ledger.watermark_ms)
        examples = build_examples(self._histories(new), new, max_len=self._config.model.max_len)
        # Items of this batch get their rows now, but are no candidates in its test: they were not known before it.
        num_known = self.num_items
        self.model.items.admit(new.item_id)
        if len(examples.positions):
            self._test_and_train(examples, num_known)
        self._observe(new)
        self.ledger.num_first += examples.num_first
        self.ledger.num_out_of_reach += examples.num_out_of_reach

    def _histories(self, new: Interactions) -> JaggedHistories:
        """Histories of the users touched up to this batch, whatever more SQL knows by now."""
        users, row_of = np.unique(new.user_id, return_inverse=True)
        below_seq = np.zeros(len(users), np.int64)
        np.maximum.at(below_seq, row_of, new.seq.astype(np.int64) + 1)
        return self._hot.gather(users, max_len=self._config.model.max_len + 1, below_seq=below_seq)

    def _test_and_train(self, examples: Examples, num_known: int) -> None:
        rows_L = torch.from_numpy(self.model.items.lookup(examples.item_id))
        history = HistoryBatch(
            # What was not known before this batch reads as unknown, in the test and in training.
            rows_L=torch.where(rows_L < num_known, rows_L, -1),
            timestamps_ms_L=torch.from_numpy(examples.event_time_ms),
            query_times_ms_L=torch.from_numpy(examples.query_time_ms),
            offsets=torch.from_numpy(examples.offsets),
        )
        targets = Targets(
            positions_P=torch.from_numpy(examples.positions),
            rows_P=torch.from_numpy(self.model.items.lookup(examples.target_item_id)),
        )
        test = self.evaluation.start(examples, rows_L, targets.rows_P, num_known=num_known)
        learned = supervised_pass(
            self.model, history, targets, self._config.loss, generator=self._generator, on_logits=test.on_logits
        )
        self.evaluation.finish(test)
        if not math.isfinite(loss := float(learned.loss.detach())):
            # Weights stay at the last good state; the interactions count as taken, so that training goes on.
            self.ledger.num_quarantined += len(examples.positions)
            logger.error("the loss of step %d is %s: not learned from", self.ledger.num_steps + 1, loss)
            return
        learned.loss.backward()  # type: ignore[no-untyped-call]
        self._optimizer.step(learned.active)
        self.ledger.num_supervised += len(examples.positions)

    def _observe(self, new: Interactions) -> None:
        rows = self.model.items.lookup(new.item_id)
        self.model.items.observe(rows, new.event_time_ms)
        self.evaluation.observe(rows, new.event_time_ms)

    def forget(self, user_ids: tuple[int, ...]) -> None:
        """Drop the histories of forgotten users; what was learned from them stays in the weights."""
        self._hot.forget(np.array(user_ids, np.int64))

    def weights_are_finite(self) -> bool:
        """Whether every dense parameter and every changed row is a finite number."""
        items = self.model.items
        dense = all(bool(torch.isfinite(parameter).all()) for parameter in self.model.parameters())
        return dense and bool(torch.isfinite(items.weight[items.dirty_rows()]).all())

    def metrics_summary(self) -> dict[str, float]:
        """Prequential metrics as `arm.span.metric`, over the whole run and over the window; absent before the first."""
        return self.evaluation.summary()

    def capture_checkpoint(self) -> Checkpoint:
        """Copies of everything that a later step depends on."""
        tensors = {f"dense.{name}": tensor for name, tensor in self.model.dense_state().items()}
        tensors |= {f"items.{name}": tensor for name, tensor in self.model.items.state_dict().items()}
        tensors |= {f"optimizer.{name}": tensor for name, tensor in self._optimizer.state_dict().items()}
        tensors |= {f"metrics.{name}": tensor for name, tensor in self.evaluation.state().items()}
        tensors["generator"] = self._generator.get_state()
        config_hash = self._config.model.config_hash()
        return Checkpoint(self.ledger.num_steps, config_hash, tensors, {"ledger": self.ledger.to_dict()})

    def load_checkpoint(self, checkpoint: Checkpoint) -> None:
        """Continue from a checkpoint, also when the log has another name now."""

        def part(prefix: str) -> dict[str, Tensor]:
            return {n.removeprefix(prefix): t for n, t in checkpoint.tensors.items() if n.startswith(prefix)}

        log_id = self.ledger.log_id
        self.ledger = Ledger.from_dict(checkpoint.state["ledger"])
        if self.ledger.log_id != log_id:
            logger.warning("the log is now %r, it was %r: reading updates from their start", log_id, self.ledger.log_id)
            self.ledger.continue_with(log_id)
        self.model.load_dense_state(part("dense."))
        self.model.items.load_state_dict(part("items."))
        self._optimizer.load_state_dict(part("optimizer."))
        self.evaluation.load_state(part("metrics."))
        self._generator.set_state(checkpoint.tensors["generator"])
