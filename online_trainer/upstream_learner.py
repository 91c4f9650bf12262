"""Learning of the upstream model: predict what a user did next from the vector of what came before, then learn it.

The tasks are learned from what the ranker learns them from. From interactions: of each user in a batch the newest is
what is predicted, behind the history of before it: what happened strictly earlier, and had arrived earlier. From labels
of impressions: each, once, behind the history that its answer could have read; which item comes next is learned from
interactions all the same. Every prediction is made before its interaction or label is learned from.

Shapes: C interactions or labels predicted, R rows of them (one user at one moment), K tasks.
"""

from __future__ import annotations

import logging
import math
from collections import deque
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from feature_store.hot import HotHistories
from feature_store.interactions import Interactions, JaggedHistories
from model.action_heads import ActionLabels
from model.optimizer import RecommenderOptimizer
from model.ranking_learning import RankingPass
from model.ranking_settings import RankingSettings
from model.upstream_model import UpstreamExamples, UpstreamModel, UpstreamModelConfig
from online_trainer.action_metrics import ActionMetrics
from online_trainer.batching import MicroBatch
from online_trainer.checkpoint import Checkpoint
from online_trainer.config import ItemsConfig
from online_trainer.item_content import ItemNews
from online_trainer.item_lifetimes import least_popular
from online_trainer.label_account import LabelAccount, LabelBook
from online_trainer.label_queue import LabelBatch
from online_trainer.labelled_items import LabelledItems, histories_before, shown_batch
from online_trainer.ledger import Ledger
from online_trainer.quarantine import LossGuard
from online_trainer.task_meters import TaskMeters, values_in_units
from online_trainer.told_items import ToldItems
from online_trainer.upstream_settings import UpstreamDaemonConfig
from online_trainer.value_metrics import ValueMetrics
from online_trainer.vector_batches import parts_within

logger = logging.getLogger(__name__)
Int64s = NDArray[np.int64]

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
    num_labels_passed_over: int = 0
    """Labelled items not learned from because more came than there was time for."""


class UpstreamLearner:
    """The upstream model that learns, its optimiser and its account. A function of the sequence of batches and seed."""

    def __init__(
        self,
        config: UpstreamModelConfig,
        settings: UpstreamDaemonConfig,
        hot: HotHistories,
        *,
        log_id: str,
        ranking: RankingSettings,
        items: ItemsConfig,
    ) -> None:
        """ranking: what the tasks are learned from. items: how content is kept, where the model reads it, and which
        items make room for new ones.
        """
        if settings.num_threads:
            torch.set_num_threads(settings.num_threads)
        self.ledger, self.counts = Ledger(log_id), UpstreamCounts()
        self.model = UpstreamModel(config)
        self._config, self._settings, self._ranking, self._items, self._hot = config, settings, ranking, items, hot
        self._optimizer = RecommenderOptimizer(self.model, settings.optimizer())
        self._book = LabelBook(log_id, remembered=ranking.remembered_labels)
        self._told = ToldItems(self.model.items, items) if config.upstream.content else None
        self._meters = TaskMeters(config.tasks, _METRICS_WINDOW)
        # Two, since what is typical of interactions is not of labels.
        self._guard, self._label_guard = (
            LossGuard(spike_deviations=settings.spike_deviations, max_in_a_row=2) for _ in range(2)
        )
        self._generator = torch.Generator().manual_seed(settings.seed)
        self._losses: deque[float] = deque(maxlen=_LOSSES)

    @property
    def learns_from_labels(self) -> bool:
        """Whether labels of impressions are what the tasks are learned from; else interactions."""
        return self._ranking.learn_from == "impressions"

    @property
    def labels(self) -> LabelAccount:
        """What has become of the labels read."""
        return self._book.account

    @property
    def items_read(self) -> dict[int, int] | None:
        """Partition of `items` → next offset to be told of; None: content is not read."""
        return None if self._told is None else self._told.positions

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
            self._admit(new.item_id)
            for part in parts_within(histories.lengths(), self._settings.learn_tokens):
                self._learn_interactions(items.rows(part), histories.rows(part))
        table = self.model.items
        rows = table.lookup(taken.item_id)
        table.observe(rows[rows >= 0], taken.event_time_ms[rows >= 0])
        self.ledger.record(batch)

    def _admit(self, item_ids: Int64s) -> None:
        table = self.model.items
        num_new = len(np.unique(item_ids[table.lookup(item_ids) < 0]))
        if len(leaving := least_popular(table, self._items, num_new=num_new, kept_ids=item_ids)):
            self._optimizer.follow(table.remove(leaving))
            logger.info("%d items of the lowest popularity make room in the upstream model's table", len(leaving))
        if self._told is None:
            table.admit(item_ids)
            return
        table.admit(item_ids, centre_of=self._told.centre_of)
        self._told.describe(item_ids.tolist())

    def pass_over(self, batch: MicroBatch) -> None:
        """Take a batch into the account without learning from it."""
        empty = batch.interactions.take(slice(0, 0))
        self.counts.num_passed_over += len(batch.taken())
        self.ledger.record(replace(batch, interactions=empty, append_ms=batch.append_ms[:0], thinned=batch.taken()))

    def tell(self, news: Sequence[ItemNews]) -> None:
        """What has been said about items since the last step."""
        assert self._told is not None, "only a model that reads content is told"
        self._told.hear(news)
        self._told.describe(one.item_id for one in news if one.content is not None)

    def learn_labels(self, batch: LabelBatch) -> None:
        """Test on, then learn from, each label that has not been learned from yet, in steps that fit in memory.

        Raises StoreUnavailableError with nothing changed.
        """
        is_new = self._book.are_new(batch)
        is_listed = self.model.items.lookup(batch.items.item_id) >= 0
        wanted = batch.items.take(is_new & is_listed, max_items=len(batch.items))
        histories = histories_before(wanted, self._hot, max_len=self._config.upstream.max_len) if len(wanted) else None
        # Nothing is changed before this line: until here, the store may turn out to be away.
        self.labels.num_unlisted += int((is_new & ~is_listed).sum())
        self.labels.num_steps += 1
        self.ledger.num_steps += 1
        if histories is not None:
            for part in parts_within(histories.lengths(), self._settings.learn_tokens):
                self._learn_labels(wanted.rows(part), histories.rows(part))
        self._book.record(batch, is_new)

    def pass_over_labels(self, batch: LabelBatch) -> None:
        """Take labels into the account without learning from them."""
        self.counts.num_labels_passed_over += len(batch.items)
        self.labels.positions.update(batch.positions)

    def _learn_interactions(self, items: LabelledItems, histories: JaggedHistories) -> None:
        labels = self._labels(items)
        if self.learns_from_labels:
            if self._config.upstream.next_item_weight == 0:
                return
            labels = ActionLabels(values_PK=labels.values_PK, labelled_PK=torch.zeros_like(labels.labelled_PK))
        is_taken_C = torch.from_numpy(items.action != 0)
        if self._test_and_train(items, histories, labels, is_taken_C, self._guard):
            self.counts.num_learned += len(items)
        else:
            self.counts.num_refused += len(items)

    def _learn_labels(self, items: LabelledItems, histories: JaggedHistories) -> None:
        # What was taken is an interaction too, and told from others as one.
        is_taken_C = torch.zeros(len(items), dtype=torch.bool)
        if self._test_and_train(items, histories, self._labels(items), is_taken_C, self._label_guard):
            self.labels.num_learned += len(items)
        else:
            self.labels.num_quarantined += len(items)

    def _labels(self, items: LabelledItems) -> ActionLabels:
        actions = torch.from_numpy(items.action.astype(np.int64))
        return self.model.heads.labels(actions, torch.from_numpy(items.value))

    def _test_and_train(
        self,
        items: LabelledItems,
        histories: JaggedHistories,
        labels: ActionLabels,
        is_taken_C: Tensor,
        guard: LossGuard,
    ) -> bool:
        """False: learning from it would do harm, and nothing was learned."""
        shown = shown_batch(items, histories, self.model.items)
        examples = UpstreamExamples.of_shown(shown, labels, is_taken_C)
        found = self.model.learning_pass(examples, generator=self._generator)
        values_CK = values_in_units(self.model.heads.tasks, labels, items.value)
        answers_CK = self.model.heads.answers(found.predictions_CK)
        self._meters.add(answers_CK.numpy(), values_CK, labels.labelled_PK.numpy() & items.is_measured[:, None])
        loss = float(found.loss.detach())
        reason = guard.objection(loss, len(items))
        if reason is None and not self._train(found):
            reason = "gradient"
        if reason is not None:
            logger.error("upstream step %d is not learned from (%s): loss %s", self.ledger.num_steps + 1, reason, loss)
            return False
        self._losses.append(loss)
        return True

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

    def measured(self) -> dict[tuple[str, str], ActionMetrics | ValueMetrics]:
        """(task, `lifetime` or `window`) → prequential metrics; from any thread."""
        return self._meters.measured()

    def summary(self) -> dict[str, float]:
        """Prequential metrics as `task.span.metric`, and `loss`, the mean of the newest steps; absent before them."""
        found = self._meters.summary()
        return found | ({"loss": math.fsum(self._losses) / len(self._losses)} if self._losses else {})

    def status(self) -> dict[str, object]:
        """Counts, JSON-ready."""
        counts = {name.removeprefix("num_"): value for name, value in asdict(self.counts).items()}
        labels = self.labels.counts() if self.learns_from_labels else None
        return {
            "interactions": self.ledger.num_interactions,
            "steps": self.ledger.num_steps,
            **counts,
            "labels": labels,
        }

    def capture_checkpoint(self) -> Checkpoint:
        """Copies of everything that a later step depends on."""
        tensors = {f"dense.{name}": one for name, one in self.model.dense_state().items()}
        tensors |= {f"items.{name}": one for name, one in self.model.items.state_dict().items()}
        tensors |= {f"optimizer.{name}": one for name, one in self._optimizer.state_dict().items()}
        tensors |= {f"meters.{name}": torch.from_numpy(one) for name, one in self._meters.state().items()}
        tensors |= {"generator": self._generator.get_state(), "labels": self._book.keys()}
        state = {
            "ledger": self.ledger.to_dict(),
            "counts": asdict(self.counts),
            "guard": self._guard.state(),
            "label_guard": self._label_guard.state(),
            "labels": self.labels.to_dict(),
            "losses": list(self._losses),
        }
        if self._told is not None:
            tensors |= {f"content.{name}": one for name, one in self._told.tensors().items()}
            state |= self._told.state()
        return Checkpoint(self.ledger.num_steps, self._config.config_hash(), tensors, state)

    def load_checkpoint(self, checkpoint: Checkpoint) -> None:
        """Continue from a checkpoint, also when the log has another name now."""

        def part(prefix: str) -> dict[str, Tensor]:
            return {n.removeprefix(prefix): t for n, t in checkpoint.tensors.items() if n.startswith(prefix)}

        log_id = self.ledger.log_id
        self.ledger = Ledger.from_dict(checkpoint.state["ledger"])
        is_same_log = self.ledger.log_id == log_id
        if not is_same_log:
            self.ledger.continue_with(log_id)
        self.counts = UpstreamCounts(**checkpoint.state["counts"])
        self._losses.extend(checkpoint.state["losses"])
        self.model.load_dense_state(part("dense."))
        self.model.items.load_state_dict(part("items."))
        self._optimizer.load_state_dict(part("optimizer."))
        self._meters.load_state({name: one.numpy() for name, one in part("meters.").items()})
        self._generator.set_state(checkpoint.tensors["generator"])
        self._guard.load_state(checkpoint.state["guard"])
        if "labels" in checkpoint.state:  # not in those from before it learned from labels
            self._label_guard.load_state(checkpoint.state["label_guard"])
            self._book.load(checkpoint.state["labels"], checkpoint.tensors["labels"])
        if self._told is not None:
            self._told.load(part("content."), checkpoint.state, is_same_log=is_same_log)


def _newest_of_each_user(new: Interactions) -> Int64s:
    """Rows, ascending: each user's with the highest arrival number."""
    order = np.lexsort((new.seq, new.user_id))
    is_last = np.append(new.user_id[order][1:] != new.user_id[order][:-1], True)[: len(order)]
    return np.sort(order[is_last])
