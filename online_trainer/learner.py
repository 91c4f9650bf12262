"""One training step after another: test on the new interactions, then learn from them. No I/O but reading histories."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from feature_store.hot import HotHistories
from feature_store.interactions import Interactions, JaggedHistories
from model.batch import HistoryBatch, Targets
from model.compute import Compute
from model.config import RowPrecision
from model.item_table import RowMoves
from model.learning import SupervisedPass, supervised_pass
from model.load_balance import LengthBalancer
from model.manifest import Lineage
from model.optimizer import RecommenderOptimizer
from model.recommender import Recommender
from online_trainer.action_weights import ActionWeights
from online_trainer.batching import MicroBatch
from online_trainer.catalogue import Catalogue
from online_trainer.checkpoint import Checkpoint
from online_trainer.drift import DriftDecision, DriftMonitor, signals_of
from online_trainer.evaluation import Evaluation
from online_trainer.examples import Examples, build_examples
from online_trainer.item_content import ItemNews
from online_trainer.label_queue import LabelBatch
from online_trainer.learner_config import LearnerConfig
from online_trainer.ledger import Ledger
from online_trainer.quarantine import RANKING, LossGuard, SetAside
from online_trainer.ranking_learner import RankingLearner, RefusedLabels
from online_trainer.rehearsal import rehearsal_targets
from online_trainer.rollback import LastGoodWeights
from online_trainer.stale_replay import StaleReplay
from online_trainer.vectors_as_of import VectorsAsOf

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True)
class MeasuredStep:
    """What the test of a step found, told before the step trains; P tested interactions."""

    new: Interactions
    examples: Examples
    ranks: Mapping[str, NDArray[np.int64]]
    """int64[P] by arm of ``online_trainer.evaluation.ARMS``."""
    cells_P: NDArray[np.int64]
    """Kinds of item and user, as ``online_trainer.prequential.cells``."""
    num_known: int
    """Items in the catalogue before this step."""


class OnlineLearner:
    """The model, its optimiser, its metrics and the account of what it has learned.

    A function of the sequence of micro-batches, the configuration and the seed: on the CPU, bit by bit.
    """

    def __init__(
        self, config: LearnerConfig, hot: HotHistories, *, log_id: str, vectors: VectorsAsOf | None = None
    ) -> None:
        """vectors: as of `RankingLearner`."""
        if config.trainer.num_threads:
            torch.set_num_threads(config.trainer.num_threads)
        self.ledger = Ledger(log_id)
        self.model = Recommender(config.model)
        trainer = config.trainer
        self.model.use(Compute.chosen(trainer.device, trainer.precision, trainer.device_rows))
        self._config, self._hot = config, hot
        self._optimizer = RecommenderOptimizer(self.model, config.optimizer)
        self.drift = DriftMonitor(config.drift)
        self._last_good = LastGoodWeights(config.drift.rollback_interval) if config.drift.rolls_back() else None
        self._unreported: list[DriftDecision] = []
        self._generator = torch.Generator().manual_seed(config.trainer.seed)
        self._replay = StaleReplay()
        self._lengths = LengthBalancer.of(config.model, config.loss)
        self._catalogue = Catalogue(self.model.items, config.items, on_moved=self._follow)
        self._action_weights = ActionWeights(config.loss.action_weights, config.actions)
        self._guard = LossGuard(
            spike_deviations=config.trainer.spike_deviations, max_in_a_row=config.trainer.max_spikes_in_a_row
        )
        self.set_aside: list[tuple[SetAside, Interactions]] = []
        """Batches that were not learned from, since somebody last emptied this list."""
        self.evaluation = Evaluation(config.trainer)
        self.on_tested: Callable[[MeasuredStep], None] | None = None
        """Hears of every test while the weights are those that were tested: for backtests."""
        self.ranking = self._ranking_learner(log_id, vectors) if self.model.ranking is not None else None
        """None where the model has no ranking head."""

    def _ranking_learner(self, log_id: str, vectors: VectorsAsOf | None) -> RankingLearner:
        config = self._config
        return RankingLearner(
            self.model,
            self._hot,
            settings=config.ranking,
            optimizer=config.optimizer,
            trainer=config.trainer,
            log_id=log_id,
            vectors=vectors,
        )

    @property
    def num_items(self) -> int:
        """Size of the live catalogue."""
        return self.model.items.num_items

    @property
    def items_read(self) -> dict[int, int]:
        """Partition of `items` → next offset to be told of."""
        return self._catalogue.items_read

    @property
    def row_precision(self) -> RowPrecision:
        """With which item embeddings are published."""
        return self._config.trainer.row_precision

    def step(self, batch: MicroBatch) -> None:
        """Test on, then learn from, one micro-batch. Raises StoreUnavailableError with nothing changed."""
        new, taken = batch.interactions, batch.taken()
        if len(taken):
            # The ledger's watermark: after a restart it is what it was, and with it what had expired.
            self._hot.apply(taken, watermark_ms=self.ledger.watermark_ms)
        if len(new):
            self._learn(new)
        # What was thinned counts in trends as well, of items with a row: a burst is when they matter most.
        self._observe(taken)
        self.ledger.record(batch)

    def learn_labels(self, batch: LabelBatch) -> None:
        """Test the ranking head on labels, then learn from them: a step of its own.

        Raises StoreUnavailableError with nothing changed.
        """
        assert self.ranking is not None, "only a ranking head learns from labels"
        self._note_refused(self.ranking.learn_labels(batch), self.ledger.watermark_ms)
        self.ledger.num_steps += 1

    def tell(self, news: Sequence[ItemNews]) -> None:
        """What has been said about items since the last step; those with content and no interaction may get a row."""
        self.ledger.num_cold += self._catalogue.tell(news, watermark_ms=self.ledger.watermark_ms)

    def _learn(self, new: Interactions) -> None:
        examples = build_examples(self._histories(new), new, max_len=self._config.model.max_len)
        if self.ranking is not None and self.ranking.learns_from_interactions:
            # Reads before it changes anything, like the line above: a step that fails there can be tried again.
            self._note_refused(self.ranking.learn_interactions(new), int(new.event_time_ms.max()))
        weight_L = None if self._action_weights.is_uniform else self._action_weights.of(examples.next_action)
        if weight_L is not None:
            examples = self._without_weightless(examples, weight_L)
        self.ledger.num_items_retired += self._catalogue.retire(new, before_ms=self.ledger.watermark_ms)
        # Items of this batch get their rows now, but are no candidates in its test: they were not known before it.
        num_known = self.num_items
        self._catalogue.admit(new)
        if len(examples.positions):
            self._test_and_train(examples, weight_L, new, num_known)
        self.ledger.num_first += examples.num_first
        self.ledger.num_out_of_reach += examples.num_out_of_reach

    def _follow(self, moves: RowMoves) -> None:
        """Whatever is kept by row goes where the rows went."""
        self._optimizer.follow(moves)
        self.evaluation.follow(moves)
        self._replay.follow(moves)
        if self.ranking is not None:
            self.ranking.follow(moves)

    def _histories(self, new: Interactions) -> JaggedHistories:
        """Histories of the users touched up to this batch, whatever more SQL knows by now."""
        users, row_of = np.unique(new.user_id, return_inverse=True)
        below_seq = np.zeros(len(users), np.int64)
        np.maximum.at(below_seq, row_of, new.seq.astype(np.int64) + 1)
        return self._hot.gather(users, max_len=self._config.model.max_len + 1, below_seq=below_seq)

    def _without_weightless(self, examples: Examples, weight_L: NDArray[np.float32]) -> Examples:
        """Without the targets whose actions count nothing: neither measured nor learned from."""
        is_kept_P = weight_L[examples.positions] > 0
        self.ledger.num_weightless += int((~is_kept_P).sum())
        return replace(
            examples,
            positions=examples.positions[is_kept_P],
            target_item_id=examples.target_item_id[is_kept_P],
            target_rows=examples.target_rows[is_kept_P],
        )

    def _test_and_train(
        self, examples: Examples, weights: NDArray[np.float32] | None, new: Interactions, num_known: int
    ) -> None:
        rows_L = torch.from_numpy(self.model.items.lookup(examples.item_id))
        history = HistoryBatch(
            # What was not known before this batch reads as unknown, in the test and in training.
            rows_L=torch.where(rows_L < num_known, rows_L, -1),
            timestamps_ms_L=torch.from_numpy(examples.event_time_ms),
            query_times_ms_L=torch.from_numpy(examples.query_time_ms),
            offsets=torch.from_numpy(examples.offsets),
            actions_L=torch.from_numpy(examples.acts),
            values_L=torch.from_numpy(examples.value),
        )
        target_rows = torch.from_numpy(self.model.items.lookup(examples.target_item_id))
        is_listed = target_rows >= 0  # the others were not admitted: misses, and nothing to learn from
        weight_L = None if weights is None else torch.from_numpy(weights)
        positions_P = torch.from_numpy(examples.positions)[is_listed]
        targets = Targets(
            positions_P=positions_P,
            rows_P=target_rows[is_listed],
            weights_P=None if weight_L is None else weight_L[positions_P],
        )
        self.ledger.num_unlisted += int((~is_listed).sum())
        test = self.evaluation.start(examples, rows_L, target_rows, num_known=num_known)
        supervised = self._with_replay(history, targets, examples, weight_L)
        num_tested = targets.rows_P.shape[0]
        learned = supervised_pass(
            self.model,
            history,
            supervised,
            self._config.loss,
            generator=self._generator,
            on_logits=test.on_logits,
            lengths=self._lengths,
        )
        found = self.evaluation.finish(test)
        if self.on_tested is not None:
            step = MeasuredStep(new=new, examples=examples, ranks=found, cells_P=test.cells_P, num_known=num_known)
            self.on_tested(step)
        if not is_listed.any():
            return
        typical_loss = self._guard.typical_loss
        reason = self._guard.objection(float(learned.loss.detach()), supervised.rows_P.shape[0])
        decisions = self._watch_drift(learned, num_tested, examples) if reason is None else []
        if reason is None and not self._train(learned):
            reason = "gradient"
        if reason is not None:
            self._set_aside(reason, learned, new, typical_loss)
            self.ledger.num_quarantined += targets.rows_P.shape[0]
            return
        if (since_ms := self.drift.rehearse_since_ms) is not None:
            in_order_L = torch.from_numpy(examples.is_in_order)
            again = rehearsal_targets(history, targets, in_order_L, since_ms=since_ms, weight_L=weight_L)
            self._rehearse(history, again)
        self._replay.learned(supervised.rows_P, self.ledger.watermark_ms)
        self.ledger.num_supervised += num_tested
        self.ledger.num_replayed += supervised.rows_P.shape[0] - num_tested
        self._keep_or_roll_back(decisions)

    def _with_replay(
        self, history: HistoryBatch, targets: Targets, examples: Examples, weight_L: Tensor | None
    ) -> Targets:
        """The targets and, behind them, what is replayed."""
        in_force = self.drift.replay_share
        share = self._config.trainer.replay_share if in_force is None else in_force
        # A rehearsal teaches what holds since a change; what is older may be wrong now.
        if not share or self.drift.rehearse_since_ms is not None:
            return targets
        older = rehearsal_targets(
            history, targets, torch.from_numpy(examples.is_in_order), since_ms=-1, weight_L=weight_L
        ).without(targets)
        count = round(share / (1 - share) * targets.rows_P.shape[0])
        chosen = self._replay.choose(older, count, now_ms=self.ledger.watermark_ms, generator=self._generator)
        return targets.followed_by(chosen)

    def _train(self, learned: SupervisedPass) -> bool:
        """Step the weights; False, and nothing changed, where a gradient is no finite number."""
        learned.backward()
        tensors = [*self.model.parameters(), learned.active.weight_RD, learned.active.bias_R]
        sums = [tensor.grad.sum().cpu() for tensor in tensors if tensor.grad is not None]
        if not torch.isfinite(torch.stack(sums)).all():
            self._optimizer.zero_grad()
            return False
        row_factor, dense_factor = self.drift.learning_rate_factors
        self._optimizer.step(learned.active, row_factor=row_factor, dense_factor=dense_factor)
        return True

    def _set_aside(self, reason: str, learned: SupervisedPass, new: Interactions, typical_loss: float | None) -> None:
        """Weights stay at the last good state; the interactions count as taken, so that training goes on."""
        loss = float(learned.loss.detach())
        why = SetAside(
            step=self.ledger.num_steps + 1,
            reason=reason,
            loss=loss if math.isfinite(loss) else None,
            typical_loss=typical_loss,
            num_interactions=len(new),
            watermark_ms=max(self.ledger.watermark_ms, int(new.event_time_ms.max())),
        )
        self.set_aside.append((why, new))
        logger.error("step %d is not learned from (%s): loss %s, typically %s", why.step, reason, loss, typical_loss)

    def _note_refused(self, refused: RefusedLabels | None, watermark_ms: int) -> None:
        if refused is None:
            return
        assert self.ranking is not None, "it refused them"
        why = SetAside(
            step=self.ranking.account.num_steps,
            reason=RANKING + refused.reason,
            loss=refused.loss if math.isfinite(refused.loss) else None,
            typical_loss=refused.typical_loss,
            num_interactions=len(refused.items),
            watermark_ms=max(self.ledger.watermark_ms, watermark_ms),
        )
        self.set_aside.append((why, refused.items.as_interactions()))
        logger.error(
            "step %d of the ranking head is not learned from (%s): loss %s, typically %s",
            why.step,
            refused.reason,
            refused.loss,
            refused.typical_loss,
        )

    def _rehearse(self, history: HistoryBatch, targets: Targets) -> None:
        for _ in range(self._config.drift.rehearse_steps):
            learned = supervised_pass(
                self.model, history, targets, self._config.loss, generator=self._generator, lengths=self._lengths
            )
            if not (math.isfinite(loss := float(learned.loss.detach())) and self._train(learned)):
                logger.error("a rehearsal's loss in step %d is %s: it ends there", self.ledger.num_steps + 1, loss)
                return

    def _watch_drift(self, learned: SupervisedPass, num_tested: int, examples: Examples) -> list[DriftDecision]:
        if not self.drift.is_on or learned.summary is None:
            return []
        signals = signals_of(learned.summary.first(num_tested), num_items=self.num_items)
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
        rows, times_ms = rows[rows >= 0], new.event_time_ms[rows >= 0]
        self.model.items.observe(rows, times_ms)
        self.evaluation.observe(rows, times_ms)

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
        return self.evaluation.summary() | self._ranking_metrics()

    def detailed_metrics(self) -> dict[str, float]:
        """`metrics_summary` and `arm.span.group.metric`."""
        return self.evaluation.detailed() | self._ranking_metrics()

    def _ranking_metrics(self) -> dict[str, float]:
        return {} if self.ranking is None else self.ranking.summary()

    def lineage(self) -> Lineage:
        """Which events and labels are inside, as manifests state it."""
        num_labels = 0 if self.ranking is None else self.ranking.account.num_learned
        return replace(self.ledger.lineage(), num_labels=num_labels)

    def capture_checkpoint(self) -> Checkpoint:
        """Copies of everything that a later step depends on."""
        tensors = {f"dense.{name}": tensor for name, tensor in self.model.dense_state().items()}
        tensors |= {f"items.{name}": tensor for name, tensor in self.model.items.state_dict().items()}
        tensors |= {f"optimizer.{name}": tensor for name, tensor in self._optimizer.state_dict().items()}
        tensors |= {f"metrics.{name}": tensor for name, tensor in self.evaluation.state().items()}
        tensors |= {f"replay.{name}": tensor for name, tensor in self._replay.state().items()}
        tensors |= self._catalogue.tensors()
        if self._lengths is not None:
            tensors |= {f"lengths.{name}": tensor for name, tensor in self._lengths.state().items()}
        tensors["generator"] = self._generator.get_state()
        if self._last_good is not None:
            tensors |= {f"last_good.{name}": tensor for name, tensor in self._last_good.tensors().items()}
        config_hash = self._config.model.config_hash()
        state = {
            "ledger": self.ledger.to_dict(),
            "guard": self._guard.state(),
            "drift": self.drift.state(),
            **self._catalogue.state(),
        }
        if self.ranking is not None:
            tensors |= {f"ranking.{name}": tensor for name, tensor in self.ranking.tensors().items()}
            state["ranking"] = self.ranking.state()
        return Checkpoint(self.ledger.num_steps, config_hash, tensors, state)

    def load_checkpoint(self, checkpoint: Checkpoint) -> None:
        """Continue from a checkpoint, also when the log has another name now."""

        def part(prefix: str) -> dict[str, Tensor]:
            return {n.removeprefix(prefix): t for n, t in checkpoint.tensors.items() if n.startswith(prefix)}

        log_id = self.ledger.log_id
        self.ledger = Ledger.from_dict(checkpoint.state["ledger"])
        is_same_log = self.ledger.log_id == log_id
        if not is_same_log:
            logger.warning("the log is now %r, it was %r: reading updates from their start", log_id, self.ledger.log_id)
            self.ledger.continue_with(log_id)
        self.model.load_dense_state(part("dense."))
        self.model.items.load_state_dict(part("items."))
        self._optimizer.load_state_dict(part("optimizer."))
        self.evaluation.load_state(part("metrics."))
        self._replay.load_state(part("replay."))
        self._catalogue.load(checkpoint.tensors, checkpoint.state, is_same_log=is_same_log)
        if self._lengths is not None:
            self._lengths.load_state(part("lengths."))
        self._guard.load_state(checkpoint.state["guard"])
        self._generator.set_state(checkpoint.tensors["generator"])
        self.drift.load_state(checkpoint.state["drift"])
        if self.ranking is not None:
            self.ranking.load(part("ranking."), checkpoint.state["ranking"])
        if self._last_good is not None:
            self._last_good.load_tensors(part("last_good."))
