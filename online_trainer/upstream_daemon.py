"""The upstream daemon: read updates, compute vectors after high-value events, learn meanwhile, release versions.

Vectors come first. While the first event that waits has waited for `upstream_daemon.lag_ms`, nothing is learned and no
version is filled; what is due meanwhile is computed in whole batches, each user once, from all that its history holds
by then: so a backlog costs a computation a user, not one an event.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from functools import partial
from typing import Final

from opentelemetry import metrics

from feature_store.config import HotHistoriesConfig
from feature_store.errors import ConcurrentAppendError, HistoryBehindError, StoreUnavailableError
from feature_store.hot import HotHistories
from model.errors import SnapshotError
from online_trainer.batching import LagRule, MicroBatch, MicroBatcher
from online_trainer.checkpoint import read_newest_checkpoint, write_checkpoint
from online_trainer.errors import CheckpointError
from online_trainer.instruments import observe_tasks
from online_trainer.item_feed import ItemFeed
from online_trainer.label_feed import LabelFeed
from online_trainer.label_queue import LabelBatch
from online_trainer.look_ahead import forgotten_ahead
from online_trainer.text_content import text_encoder
from online_trainer.upstream_learner import UpstreamLearner
from online_trainer.upstream_parts import UpstreamParts
from online_trainer.vector_keeper import VectorKeeper
from online_trainer.worker_thread import WorkerThread
from stream.errors import LogUnavailableError
from stream.failpoints import fail_point
from stream.log import RETRY_FIRST_S, RETRY_MAX_S, LogReader, PartitionId, Start, start_when_available
from stream.messages import HistoryUpdate

logger = logging.getLogger(__name__)

_AWAY: Final = (StoreUnavailableError, HistoryBehindError, ConcurrentAppendError)
_IDLE_POLL_MS: Final = 50
_LEARN_WAIT_S: Final = 1.0
"""A step of learning that is not full waits for so long."""
_RELEASE_RETRY_S: Final = 30.0
"""After a version that could not be released: an attempt writes all of the model."""
_POSITIONS_EVERY_S: Final = 5.0
"""Positions are stored at least this often while nobody is due; reading a part again is harmless."""


class UpstreamDaemon:
    """Keeps the vectors of all users as fresh as its settings ask, each written once."""

    def __init__(self, parts: UpstreamParts) -> None:
        self._parts, self._config = parts, parts.config
        max_len = parts.model_config.upstream.max_len
        hot_config = HotHistoriesConfig(max_len=max_len, budget_bytes=parts.config.history_bytes)
        hot = HotHistories(parts.store, hot_config)
        self._learner = UpstreamLearner(
            parts.model_config,
            parts.config,
            hot,
            log_id=parts.log.log_id,
            ranking=parts.ranking,
            items=parts.items,
        )
        checkpoint = read_newest_checkpoint(parts.checkpoint_root, config_hash=parts.model_config.config_hash())
        self._is_begun_anew = checkpoint is None
        if checkpoint is not None:
            self._learner.load_checkpoint(checkpoint)
        self._batcher = MicroBatcher(
            max_interactions=parts.config.learn_interactions,
            max_tokens=parts.config.learn_tokens,
            max_len=max_len,
            positions=self._learner.ledger.positions,
            lag=LagRule(
                policy="thin",
                lag_interactions=parts.config.learn_pending_interactions,
                max_interactions=parts.config.learn_interactions,
            ),
        )
        self._labels, self._feed = self._label_feed(), self._item_feed()
        self._keeper = VectorKeeper(parts)
        self._blocked_by: str | None = "starting"
        self._retry_s = RETRY_FIRST_S
        now_s = parts.clock.monotonic_s()
        self._learn_from_s = now_s
        self._checkpoint_s, self._checkpointed_step = now_s, self._learner.ledger.num_steps
        self._prune_s = self._release_from_s = now_s
        self._waiting_batch: MicroBatch | None = None
        self._waiting_labels: LabelBatch | None = None
        self._compute = WorkerThread("upstream")
        meter = metrics.get_meter("headrace.upstream")
        self._learned = meter.create_counter("headrace.upstream.interactions", unit="{interaction}")
        self._labels_learned = meter.create_counter("headrace.upstream.labels", unit="{label}")
        observe_tasks(meter, self._learner.measured)

    def _label_feed(self) -> LabelFeed | None:
        """None where nothing is learned from labels."""
        parts, learner = self._parts, self._learner
        if self._config.learn_share == 0 or not learner.learns_from_labels:
            return None
        return LabelFeed(
            parts.log,
            learner.labels.positions,
            batch_items=parts.ranking.batch_items,
            max_pending_items=parts.ranking.max_pending_items,
            clock=parts.clock,
            tasks=(),
        )

    def _item_feed(self) -> ItemFeed | None:
        """None where content is not read. ValueError for a text encoder that is not installed."""
        if self._config.learn_share == 0 or self._learner.items_read is None:
            return None
        return ItemFeed(self._parts.log, self._parts.clock, text_encoder(self._parts.items.text_encoder))

    async def run(self, stopping: asyncio.Event) -> None:
        """Work until `stopping` is set, then checkpoint. Raises LogResetError and UpstreamFencedError."""
        reader = self._parts.log.reader()
        try:
            for start in self._starting(reader):
                if not await start_when_available(
                    start, what="upstream", stopping=stopping, on_failure=self._note_problem
                ):
                    return
            if not await self._take_over(reader, stopping):
                return
            await self._work(reader, stopping)
            await self._compute.run(self._checkpoint)
        finally:
            self._blocked_by = "stopped"
            for one in (reader, self._labels, self._feed):
                if one is not None:
                    await one.stop()
            self._compute.end()

    def _starting(self, reader: LogReader) -> list[Callable[[], Awaitable[None]]]:
        starts: list[Callable[[], Awaitable[None]]] = [self._parts.log.create_topics, reader.start]
        if self._labels is not None:
            starts.append(self._labels.start)
        if self._feed is not None:
            starts += [self._feed.start, partial(self._feed.begin, self._learner.items_read or {})]
        return starts

    def _note_problem(self, problem: str) -> None:
        self._blocked_by = problem

    async def _take_over(self, reader: LogReader, stopping: asyncio.Event) -> bool:
        """Go on where store, snapshots and checkpoint say; False if told to stop first."""
        log, numbers = self._parts.log, await reader.partitions(self._parts.log.topics.history_updates)

        def load() -> dict[int, int]:
            self._keeper.load(numbers)
            if self._is_begun_anew:
                # What others had learned from is no part of this model: it need not learn as much, and on a log whose
                # beginning has expired, or is passed over, it would not for long.
                self._keeper.versions.released_interactions = 0
            return self._parts.store.positions(log.log_id, log.topics.history_updates)

        given_up: list[dict[int, int]] = []
        while not given_up and not stopping.is_set():
            await self._attempt(lambda: given_up.append(load()), stopping)
        if not given_up:
            return False
        starts = self._starts(numbers, given_up[0])
        for ahead in await forgotten_ahead(log, starts):
            self._keeper.due.forget_ahead(ahead.partition, ahead.user_ids, ahead.offset)
            self._batcher.forget(ahead.partition, ahead.user_ids, ahead.offset)
            if self._labels is not None:
                self._labels.forget(ahead.user_ids, ahead.timestamp_ms)
        await reader.assign(starts)
        if self._labels is not None:
            await self._labels.assign()
        return True

    def _starts(self, numbers: list[int], given_up: dict[int, int]) -> dict[PartitionId, Start]:
        """Of each partition, what vectors or learning have not come to yet; behind what an operator has given up."""
        topic, learned = self._parts.log.topics.history_updates, self._learner.ledger.of_log(self._parts.log.log_id)
        starts: dict[PartitionId, Start] = {}
        for number in numbers:
            offset = self._keeper.writer.positions.get(number, 0)
            if self._config.learn_share > 0:
                offset = min(offset, learned[number].update_offset if number in learned else 0)
            offset = max(offset, given_up.get(number, 0))
            # 0 means that nothing was applied; a log whose first records have expired has no offset 0.
            starts[topic, number] = offset or "earliest"
        return starts

    async def _work(self, reader: LogReader, stopping: asyncio.Event) -> None:
        while not stopping.is_set():
            try:
                await self._read(reader)
            except LogUnavailableError as error:
                await self._wait_for(error, stopping)
                continue
            if self._keeper.is_due() and not await self._attempt(self._keeper.write_due, stopping):
                continue
            if self._keeper.is_behind():
                self._bound_learning()
                self._bound_labels()
            elif not await self._attempt(self._work_aside, stopping):
                continue
            await self._keep_house(stopping)

    async def _read(self, reader: LogReader) -> None:
        if self._keeper.due.num_waiting >= self._config.max_waiting_users:
            return
        is_idle = not self._keeper.is_due() and not self._may_learn() and self._keeper.versions.filling is None
        timeout_ms = _IDLE_POLL_MS if is_idle else 0
        now_s, now_ms = self._parts.clock.monotonic_s(), self._parts.clock.now_ms()
        for record in await reader.poll(timeout_ms=timeout_ms, max_records=self._config.poll_records):
            update = HistoryUpdate.decode(record.value)
            self._keeper.due.add(record.partition, record.offset, update, now_s=now_s, now_ms=now_ms)
            if update.forgotten:
                self._batcher.forget(record.partition, update.forgotten, record.offset)
                self._learner.forget(update.forgotten)
                if self._labels is not None:
                    self._labels.forget(update.forgotten, record.timestamp_ms)
            self._batcher.read_up_to(record.partition, record.offset)
            if self._config.learn_share > 0:
                self._batcher.add(update, record.offset, record.headers)
        if not self._batcher.num_pending and not self._labels_are_due():
            self._learn_from_s = max(self._learn_from_s, now_s + _LEARN_WAIT_S)
        if self._feed is not None:
            await self._feed.read()
        if self._labels is not None:
            await self._labels.read(updates_up_to_ms=await reader.read_up_to_ms(), num_read=self._batcher.num_read)

    def _work_aside(self) -> None:
        """What can wait: fill a part of a new version, a step of learning, release what was learned; blocking."""
        if self._keeper.versions.filling is not None:
            self._keeper.fill()
        if self._may_learn():
            self._learn()
        else:
            self._bound_labels()
        if self._release_is_due():
            self._release()

    def _may_learn(self) -> bool:
        now_s = self._parts.clock.monotonic_s()
        has_any = self._batcher.num_pending > 0 or self._labels_are_due()
        return self._config.learn_share > 0 and has_any and now_s >= self._learn_from_s

    @property
    def _num_taken(self) -> int:
        """Interactions taken by steps or passed over, since this daemon was made."""
        return self._batcher.num_read - self._batcher.num_pending

    def _labels_are_due(self) -> bool:
        if self._waiting_labels is not None:
            return True
        return self._labels is not None and self._labels.is_due(self._num_taken)

    def _learn(self) -> None:
        """A step of interactions and one of labels, if there are; then a pause in proportion to the time they took."""
        started_s = self._parts.clock.monotonic_s()
        if (batch := self._waiting_batch or self._batcher.take()) is not None:
            self._waiting_batch = batch  # should the store turn out to be away
            if self._feed is not None and (news := self._feed.due(batch.log_time_ms())):
                self._learner.tell(news)
            self._learner.step(batch)
            self._waiting_batch = None
            fail_point("upstream.learned")
            self._learned.add(len(batch.interactions))
        self._learn_labels()
        now_s = self._parts.clock.monotonic_s()
        self._learn_from_s = now_s + (now_s - started_s) * (1 / self._config.learn_share - 1)

    def _learn_labels(self) -> None:
        """One step, if labels are there whose histories have been learned from."""
        batch = self._waiting_labels
        if batch is None and self._labels is not None:
            batch = self._labels.take(self._num_taken)
        if batch is None:
            return
        self._waiting_labels = batch
        self._learner.learn_labels(batch)
        self._waiting_labels = None
        fail_point("upstream.labels_learned")
        self._labels_learned.add(len(batch.items))

    def _bound_learning(self) -> None:
        """While vectors are behind, what waits to be learned from must not fill memory."""
        if self._batcher.is_behind() and (batch := self._waiting_batch or self._batcher.take()) is not None:
            self._waiting_batch = None
            self._learner.pass_over(batch)

    def _bound_labels(self) -> None:
        """Where more labels come than there is time for, those that waited longest are passed over."""
        if self._labels is None:
            return
        while self._labels.is_full and (batch := self._waiting_labels or self._labels.take(self._num_taken)):
            self._waiting_labels = None
            self._learner.pass_over_labels(batch)

    def _release_is_due(self) -> bool:
        versions, config = self._keeper.versions, self._config
        if versions.filling is not None or config.learn_share == 0:
            return False
        if self._parts.clock.monotonic_s() < self._release_from_s:
            return False
        num_new = self._learner.num_learned_from - versions.released_interactions
        if versions.released_at_ms is None:
            return num_new >= config.first_version_interactions
        waited_s = (self._parts.clock.now_ms() - versions.released_at_ms) / 1000
        return num_new >= config.version_interactions and waited_s >= config.version_interval_s

    def _release(self) -> None:
        why: object = "weights are not finite"
        if self._learner.weights_are_finite():
            try:
                self._keeper.versions.release(self._learner)
            except (SnapshotError, OSError) as error:
                why = error
            else:
                return
        self._release_from_s = self._parts.clock.monotonic_s() + _RELEASE_RETRY_S
        logger.error(
            "no version of the upstream model could be released, trying again in %.0f s: %s", _RELEASE_RETRY_S, why
        )

    async def _keep_house(self, stopping: asyncio.Event) -> None:
        now_s = self._parts.clock.monotonic_s()
        if now_s - self._keeper.committed_s >= _POSITIONS_EVERY_S:
            await self._attempt(self._keeper.store_positions, stopping)
        if now_s >= self._prune_s and await self._attempt(self._keeper.prune, stopping):
            self._prune_s = now_s + (self._config.prune_interval_s if self._keeper.is_pruned else 0)
        is_new = self._learner.ledger.num_steps > self._checkpointed_step
        if is_new and now_s - self._checkpoint_s >= self._config.checkpoint_interval_s:
            await self._compute.run(self._checkpoint)

    def _checkpoint(self) -> None:
        self._checkpoint_s = self._parts.clock.monotonic_s()
        if self._learner.ledger.num_steps == self._checkpointed_step:
            return
        checkpoint = self._learner.capture_checkpoint()
        try:
            write_checkpoint(self._parts.checkpoint_root, checkpoint, keep=self._config.keep_checkpoints)
            self._checkpointed_step = checkpoint.step
        except CheckpointError as error:
            logger.error("%s; the checkpoint before it stays", error)  # noqa: TRY400 - the sentence says it all

    async def _attempt(self, work: Callable[[], None], stopping: asyncio.Event) -> bool:
        """Do it, or say what is away and wait a little; False: it is to be done again."""
        try:
            await self._compute.run(work)
        except _AWAY as error:
            await self._wait_for(error, stopping)
            return False
        self._blocked_by, self._retry_s = None, RETRY_FIRST_S
        return True

    async def _wait_for(self, error: Exception, stopping: asyncio.Event) -> None:
        self._blocked_by = str(error)
        logger.warning("%s; trying again in %.1f s", error, self._retry_s)
        try:
            await asyncio.wait_for(stopping.wait(), self._retry_s)
        except TimeoutError:
            self._retry_s = min(2 * self._retry_s, RETRY_MAX_S)

    def ready(self) -> tuple[bool, str]:
        """Whether vectors are kept up, and if not, why."""
        return self._blocked_by is None, self._blocked_by or "computing"

    def status(self) -> dict[str, object]:
        """Counts, versions, metrics and freshness, JSON-ready."""
        learning = {"learning": self._learner.status(), "metrics": self._learner.summary()}
        if self._labels is not None:
            learning["label_feed"] = dict(self._labels.status())
        return self._keeper.status() | learning
