"""One training step after another: test on the new interactions, then learn from them. No I/O but reading histories."""

from __future__ import annotations

import logging
import math
from dataclasses import asdict, dataclass, field

import numpy as np
import torch
from torch import Tensor

from feature_store.hot import HotHistories
from feature_store.interactions import Interactions, JaggedHistories
from model.batch import HistoryBatch, Targets
from model.config import LossConfig, ModelConfig, OptimizerConfig
from model.learning import SupervisedPass, supervised_pass
from model.optimizer import RecommenderOptimizer
from model.ranking import ranks, seen_before
from model.recommender import Recommender
from model.trend import add_interactions, decay_rate_per_ms
from online_trainer.batching import MicroBatch
from online_trainer.checkpoint import Checkpoint
from online_trainer.config import TrainerConfig
from online_trainer.drift import DriftDecision, DriftMonitor, signals_of
from online_trainer.drift_config import SIGNALS, DriftConfig
from online_trainer.examples import Examples, build_examples
from online_trainer.ledger import Ledger
from online_trainer.prequential import PrequentialMeter
from online_trainer.rehearsal import rehearsal_targets
from online_trainer.rollback import LastGoodWeights

logger = logging.getLogger(__name__)

ARMS = ("model", "popularity")
"""What is evaluated on the same interactions: the model, and decayed popularity as the baseline to beat."""


@dataclass(frozen=True, kw_only=True, slots=True)
class LearnerConfig:
    """Everything that decides what a step computes."""

    trainer: TrainerConfig
    model: ModelConfig
    loss: LossConfig
    optimizer: OptimizerConfig
    drift: DriftConfig = field(default_factory=DriftConfig)


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
        self.drift = DriftMonitor(config.drift)
        self._last_good = LastGoodWeights(config.drift.rollback_interval) if config.drift.rolls_back() else None
        self._unreported: list[DriftDecision] = []
        self._generator = torch.Generator().manual_seed(config.trainer.seed)
        self._meters = {arm: PrequentialMeter(config.trainer.metrics_window) for arm in ARMS}
        self._baseline_rate_per_ms = decay_rate_per_ms(config.trainer.baseline_half_life_h * 3600)
        self._baseline = torch.full((config.model.initial_capacity,), -torch.inf, dtype=torch.float64)

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
        self._reserve_baseline()
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
        rank_parts: dict[str, list[Tensor]] = {arm: [] for arm in ARMS}
        signal_parts: dict[str, list[Tensor]] = {signal: [] for signal in SIGNALS}
        popularity_V = self._baseline[: self.num_items]

        def test(part: slice, logits_pV: Tensor) -> None:
            seen = seen_before(rows_L, history.offsets, targets.positions_P[part])
            for arm, scores in (("model", logits_pV), ("popularity", popularity_V)):
                rank_parts[arm].append(ranks(scores, targets.rows_P[part], seen, num_known=num_known))
            if self.drift.is_on:
                for signal, values_p in signals_of(logits_pV, targets.rows_P[part]).items():
                    signal_parts[signal].append(values_p)

        learned = supervised_pass(
            self.model, history, targets, self._config.loss, generator=self._generator, on_logits=test
        )
        for arm, meter in self._meters.items():
            meter.add(torch.cat(rank_parts[arm]).numpy())
        if not math.isfinite(loss := float(learned.loss.detach())):
            # Weights stay at the last good state; the interactions count as taken, so that training goes on.
            self.ledger.num_quarantined += len(examples.positions)
            logger.error("the loss of step %d is %s: not learned from", self.ledger.num_steps + 1, loss)
            return
        decisions = self._watch_drift(signal_parts, examples)
        self._train(learned)
        if (since_ms := self.drift.rehearse_since_ms) is not None:
            in_order_L = torch.from_numpy(examples.is_in_order)
            self._rehearse(history, rehearsal_targets(history, targets, in_order_L, since_ms=since_ms))
        self.ledger.num_supervised += len(examples.positions)
        self._keep_or_roll_back(decisions)

    def _train(self, learned: SupervisedPass) -> None:
        learned.loss.backward()  # type: ignore[no-untyped-call]
        row_factor, dense_factor = self.drift.learning_rate_factors
        self._optimizer.step(learned.active, row_factor=row_factor, dense_factor=dense_factor)

    def _rehearse(self, history: HistoryBatch, targets: Targets) -> None:
        for _ in range(self._config.drift.rehearse_steps):
            learned = supervised_pass(self.model, history, targets, self._config.loss, generator=self._generator)
            if not math.isfinite(loss := float(learned.loss.detach())):
                logger.error("a rehearsal's loss in step %d is %s: it ends there", self.ledger.num_steps + 1, loss)
                return
            self._train(learned)

    def _watch_drift(self, signal_parts: dict[str, list[Tensor]], examples: Examples) -> list[DriftDecision]:
        if not self.drift.is_on:
            return []
        signals = {signal: torch.cat(parts).numpy() for signal, parts in signal_parts.items()}
        newest_ms = int(examples.query_time_ms[examples.positions].max())
        decisions = self.drift.observe(
            signals, step=self.ledger.num_steps + 1, event_time_ms=max(self.ledger.watermark_ms, newest_ms)
        )
        self._unreported += decisions
        return decisions

    def _keep_or_roll_back(self, decisions: list[DriftDecision]) -> None:
        """After training: what this batch taught the weights of before is given up with them."""
        if self._last_good is None:
            return
        if any("rollback" in decision.reactions for decision in decisions):
            self._last_good.restore(self.model)
        else:
            self._last_good.take_if_due(self.model, self.drift.num_tested)

    def take_drift_decisions(self) -> list[DriftDecision]:
        """Decisions since the last call, oldest first."""
        taken, self._unreported = self._unreported, []
        return taken

    def _observe(self, new: Interactions) -> None:
        rows = self.model.items.lookup(new.item_id)
        self.model.items.observe(rows, new.event_time_ms)
        add_interactions(self._baseline, rows, new.event_time_ms, rate_per_ms=self._baseline_rate_per_ms)

    def _reserve_baseline(self) -> None:
        if len(self._baseline) < self.model.items.capacity:
            grown = torch.full((self.model.items.capacity,), -torch.inf, dtype=torch.float64)
            grown[: len(self._baseline)] = self._baseline
            self._baseline = grown

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
        summary: dict[str, float] = {}
        for arm, meter in self._meters.items():
            for span, metrics in (("lifetime", meter.lifetime()), ("window", meter.windowed())):
                summary |= {
                    f"{arm}.{span}.{name}": value for name, value in asdict(metrics).items() if value is not None
                }
        return summary

    def capture_checkpoint(self) -> Checkpoint:
        """Copies of everything that a later step depends on."""
        tensors = {f"dense.{name}": tensor for name, tensor in self.model.dense_state().items()}
        tensors |= {f"items.{name}": tensor for name, tensor in self.model.items.state_dict().items()}
        tensors |= {f"optimizer.{name}": tensor for name, tensor in self._optimizer.state_dict().items()}
        for arm, meter in self._meters.items():
            tensors |= {f"metrics.{arm}.{name}": torch.from_numpy(a.copy()) for name, a in meter.state().items()}
        tensors["baseline"] = self._baseline[: self.num_items].clone()
        tensors["generator"] = self._generator.get_state()
        if self._last_good is not None:
            tensors |= {f"last_good.{name}": tensor for name, tensor in self._last_good.tensors().items()}
        config_hash = self._config.model.config_hash()
        state = {"ledger": self.ledger.to_dict(), "drift": self.drift.state()}
        return Checkpoint(self.ledger.num_steps, config_hash, tensors, state)

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
        for arm, meter in self._meters.items():
            meter.load_state({name: tensor.numpy() for name, tensor in part(f"metrics.{arm}.").items()})
        self._baseline = torch.full((self.model.items.capacity,), -torch.inf, dtype=torch.float64)
        self._baseline[: self.num_items] = checkpoint.tensors["baseline"]
        self._generator.set_state(checkpoint.tensors["generator"])
        if "drift" in checkpoint.state:
            self.drift.load_state(checkpoint.state["drift"])
        else:
            logger.warning("the checkpoint is from before drift detection: its detectors begin afresh")
        if self._last_good is not None:
            self._last_good.load_tensors(part("last_good."))
