"""The upstream daemon: read updates, compute vectors after high-value events, learn meanwhile, release versions.

Vectors come first. While the first event that waits has waited for `upstream_daemon.lag_ms`, nothing is learned and no
version is filled; what is due meanwhile is computed in whole batches, each user once, from all that its history holds
by then: so a backlog costs a computation a user, not one an event.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextvars import copy_context
from typing import Final, TypeVar

from opentelemetry import metrics

from feature_store.config import HotHistoriesConfig
from feature_store.errors import ConcurrentAppendError, HistoryBehindError, StoreUnavailableError
from feature_store.hot import HotHistories
from model.errors import SnapshotError
from online_trainer.batching import LagRule, MicroBatch, MicroBatcher
from online_trainer.checkpoint import read_newest_checkpoint, write_checkpoint
from online_trainer.errors import CheckpointError
from online_trainer.look_ahead import forgotten_ahead
from online_trainer.upstream_learner import UpstreamLearner
from online_trainer.upstream_parts import UpstreamParts
from online_trainer.vector_keeper import VectorKeeper
from stream.errors import LogUnavailableError
from stream.failpoints import fail_point
from stream.log import RETRY_FIRST_S, RETRY_MAX_S, LogReader, PartitionId, Start, start_when_available
from stream.messages import HistoryUpdate

logger = logging.getLogger(__name__)
_Result = TypeVar("_Result")

_AWAY: Final = (StoreUnavailableError, HistoryBehindError, ConcurrentAppendError)
_IDLE_POLL_MS: Final = 50
_LEARN_WAIT_S: Final = 1.0
"""A step of learning that is not full waits for so long."""
_POSITIONS_EVERY_S: Final = 5.0
"""Positions are stored at least this often while nobody is due; reading a part again is harmless."""


class UpstreamDaemon:
    """Keeps the vectors of all users as fresh as its settings ask, each written once."""

    def __init__(self, parts: UpstreamParts) -> None:
        self._parts, self._config = parts, parts.config
        max_len = parts.model_config.upstream.max_len
        hot_config = HotHistoriesConfig(max_len=max_len, budget_bytes=parts.config.history_bytes)
        hot = HotHistories(parts.store, hot_config)
        self._learner = UpstreamLearner(parts.model_config, parts.config, hot, log_id=parts.log.log_id)
        checkpoint = read_newest_checkpoint(parts.checkpoint_root, config_hash=parts.model_config.config_hash())
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
        self._keeper = VectorKeeper(parts)
        self._blocked_by: str | None = "starting"
        self._retry_s = RETRY_FIRST_S
        now_s = parts.clock.monotonic_s()
        self._learn_from_s = now_s
        self._checkpoint_s, self._checkpointed_step = now_s, self._learner.ledger.num_steps
        self._prune_s = now_s
        self._waiting_batch: MicroBatch | None = None
        self._compute = ThreadPoolExecutor(1, thread_name_prefix="upstream")
        meter = metrics.get_meter("headrace.upstream")
        self._learned = meter.create_counter("headrace.upstream.interactions", unit="{interaction}")

    async def run(self, stopping: asyncio.Event) -> None:
        """Work until `stopping` is set, then checkpoint. Raises LogResetError and UpstreamFencedError."""
        reader = self._parts.log.reader()
        try:
            for start in (self._parts.log.create_topics, reader.start):
                if not await start_when_available(
                    start, what="upstream", stopping=stopping, on_failure=self._note_problem
                ):
                    return
            if not await self._take_over(reader, stopping):
                return
            await self._work(reader, stopping)
            await self._in_compute_thread(self._checkpoint)
        finally:
            self._blocked_by = "stopped"
            await reader.stop()
            self._compute.shutdown(wait=True)

    def _note_problem(self, problem: str) -> None:
        self._blocked_by = problem

    async def _take_over(self, reader: LogReader, stopping: asyncio.Event) -> bool:
        """Go on where store, snapshots and checkpoint say; False if told to stop first."""
        log, numbers = self._parts.log, await reader.partitions(self._parts.log.topics.history_updates)

        def load() -> dict[int, int]:
            self._keeper.load(numbers)
            return self._parts.store.positions(log.log_id, log.topics.history_updates)

        given_up: list[dict[int, int]] = []
        while not given_up and not stopping.is_set():
            await self._attempt(lambda: given_up.append(load()), stopping)
        if not given_up:
            return False
        starts = self._starts(numbers, given_up[0])
        for ahead in await forgotten_ahead(log, starts):
            self._batcher.forget(ahead.partition, ahead.user_ids, ahead.offset)
        await reader.assign(starts)
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
            self._batcher.read_up_to(record.partition, record.offset)
            if self._config.learn_share > 0:
                self._batcher.add(update, record.offset, record.headers)
        if not self._batcher.num_pending:
            self._learn_from_s = max(self._learn_from_s, now_s + _LEARN_WAIT_S)

    def _work_aside(self) -> None:
        """What can wait: fill a part of a new version, a step of learning, release what was learned; blocking."""
        if self._keeper.versions.filling is not None:
            self._keeper.fill()
        if self._may_learn():
            self._learn()
        if self._release_is_due():
            self._release()

    def _may_learn(self) -> bool:
        now_s = self._parts.clock.monotonic_s()
        return self._config.learn_share > 0 and self._batcher.num_pending > 0 and now_s >= self._learn_from_s

    def _learn(self) -> None:
        """One step, if there is a batch; afterwards a pause in proportion to the time that it took."""
        started_s = self._parts.clock.monotonic_s()
        if (batch := self._waiting_batch or self._batcher.take()) is None:
            return
        self._waiting_batch = batch  # should the store turn out to be away
        self._learner.step(batch)
        self._waiting_batch = None
        fail_point("upstream.learned")
        self._learned.add(len(batch.interactions))
        now_s = self._parts.clock.monotonic_s()
        self._learn_from_s = now_s + (now_s - started_s) * (1 / self._config.learn_share - 1)

    def _bound_learning(self) -> None:
        """While vectors are behind, what waits to be learned from must not fill memory."""
        if self._batcher.is_behind() and (batch := self._waiting_batch or self._batcher.take()) is not None:
            self._waiting_batch = None
            self._learner.pass_over(batch)

    def _release_is_due(self) -> bool:
        versions, config = self._keeper.versions, self._config
        if versions.filling is not None or config.learn_share == 0:
            return False
        num_new = self._learner.num_learned_from - versions.released_interactions
        if versions.released_at_ms is None:
            return num_new >= config.first_version_interactions
        waited_s = (self._parts.clock.now_ms() - versions.released_at_ms) / 1000
        return num_new >= config.version_interactions and waited_s >= config.version_interval_s

    def _release(self) -> None:
        if not self._learner.weights_are_finite():
            logger.error("the upstream model's weights are not finite: no version is released")
            return
        try:
            self._keeper.versions.release(self._learner)
        except (SnapshotError, OSError) as error:
            logger.error("no version of the upstream model could be released: %s", error)  # noqa: TRY400

    async def _keep_house(self, stopping: asyncio.Event) -> None:
        now_s = self._parts.clock.monotonic_s()
        if now_s - self._keeper.committed_s >= _POSITIONS_EVERY_S:
            await self._attempt(self._keeper.store_positions, stopping)
        if now_s >= self._prune_s and await self._attempt(self._keeper.prune, stopping):
            self._prune_s = now_s + (self._config.prune_interval_s if self._keeper.is_pruned else 0)
        is_new = self._learner.ledger.num_steps > self._checkpointed_step
        if is_new and now_s - self._checkpoint_s >= self._config.checkpoint_interval_s:
            await self._in_compute_thread(self._checkpoint)

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
            await self._in_compute_thread(work)
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

    async def _in_compute_thread(self, call: Callable[[], _Result]) -> _Result:
        return await asyncio.get_running_loop().run_in_executor(self._compute, copy_context().run, call)

    def ready(self) -> tuple[bool, str]:
        """Whether vectors are kept up, and if not, why."""
        return self._blocked_by is None, self._blocked_by or "computing"

    def status(self) -> dict[str, object]:
        """Counts, versions, metrics and freshness, JSON-ready."""
        learning = {"learning": self._learner.status(), "metrics": self._learner.summary()}
        return self._keeper.status() | learning
