"""The trainer daemon: read updates, close micro-batches, step, publish, checkpoint."""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Awaitable, Callable, Coroutine
from functools import partial
from typing import Any

from opentelemetry import metrics, trace
from polars.exceptions import PolarsError

from feature_store.errors import StoreUnavailableError
from feature_store.hot import HotHistories
from model.errors import SnapshotError
from model.manifest import Manifest
from online_trainer.batching import LagRule, MicroBatcher
from online_trainer.checkpoint import Checkpoint, read_newest_checkpoint
from online_trainer.checkpointing import Checkpointing
from online_trainer.instruments import observe_actions, observe_ranks
from online_trainer.item_feed import ItemFeed
from online_trainer.label_feed import LabelFeed
from online_trainer.lag import LagWatch
from online_trainer.learner import OnlineLearner
from online_trainer.look_ahead import forgotten_ahead
from online_trainer.metrics_file import MetricsFile
from online_trainer.parts import TrainerParts
from online_trainer.publisher import Publisher
from online_trainer.quarantine import forget_users, write_set_aside
from online_trainer.steps import LearnedSteps
from online_trainer.text_content import text_encoder
from online_trainer.trainer_status import trainer_status
from online_trainer.worker_thread import WorkerThread
from stream.errors import LogResetError, LogUnavailableError
from stream.failpoints import fail_point
from stream.freshness import F2_LEARNED, FreshnessRecorder
from stream.log import (
    RETRY_FIRST_S,
    RETRY_MAX_S,
    LogReader,
    LogWriter,
    PartitionId,
    Start,
    acknowledged,
    start_when_available,
)
from stream.messages import HistoryUpdate, SnapshotPointer, encode_message
from stream.tracing import MAX_LINKS, current_headers, current_traceparent, links_to, processing_attributes

logger = logging.getLogger(__name__)
_tracer = trace.get_tracer("headrace.online_trainer")
_IDLE_POLL_MS = 50


class TrainerDaemon:
    """Learns from every interaction of the log exactly once, and publishes what it has learned."""

    def __init__(self, parts: TrainerParts) -> None:
        self._parts, self._config = parts, parts.config
        checkpoint = read_newest_checkpoint(parts.checkpoint_root, config_hash=parts.model_config.config_hash())
        self._learner = self._resume(checkpoint)
        self._metrics_file = MetricsFile(parts.metrics_root, keep_parts=parts.config.keep_metrics_parts)
        self._metrics_file.begin(self._learner.ledger.num_steps)
        self._feed = self._item_feed()
        self._given_up: dict[int, int] = {}
        self._has_looked_ahead = False
        self._publisher = Publisher(
            parts.snapshot_root,
            parts.model_name,
            parts.config,
            store=parts.store,
            clock=parts.clock,
            mode=parts.mode,
            config_hash=parts.model_config.config_hash(),
        )
        if checkpoint is not None and "unpublished" in checkpoint.state:
            self._publisher.resume(checkpoint.state["unpublished"], self._learner.ledger.num_interactions)
        self._batcher = MicroBatcher(
            max_interactions=parts.config.batch_interactions,
            max_tokens=parts.config.batch_tokens,
            max_len=parts.model_config.max_len,
            positions=self._learner.ledger.positions,
            lag=LagRule.of(parts.config),
        )
        self._labels = self._label_feed()
        self.freshness = FreshnessRecorder(F2_LEARNED, mode=parts.mode)
        self._blocked_by: str | None = "starting"
        self._waiting_since_s: float | None = None
        self._unpublished_steps: deque[trace.Link] = deque(maxlen=MAX_LINKS)
        self._background: set[asyncio.Task[None]] = set()
        self._writing_snapshot = False
        self._compute, self._files = WorkerThread("trainer"), WorkerThread("trainer-files")
        self._checkpoints = Checkpointing(parts, self._metrics_file, step=self._learner.ledger.num_steps)
        meter = metrics.get_meter("headrace.online_trainer")
        self._step_durations = meter.create_histogram("headrace.trainer.step.duration", unit="s")
        self._set_aside = meter.create_counter("headrace.trainer.set_aside", unit="{batch}")
        self._learned = meter.create_counter("headrace.trainer.interactions", unit="{interaction}")
        self._lag = LagWatch(self._batcher, parts.config, parts.clock, meter)
        observe_ranks(meter, self._learner.evaluation.measured)
        if self._learner.ranking is not None:
            observe_actions(meter, self._learner.ranking.measured, self._learner.ranking.served.measured)
        self._labels_learned = meter.create_counter("headrace.trainer.labels", unit="{label}")
        self._drift_decisions = meter.create_counter("headrace.trainer.drift", unit="{decision}")

    def _resume(self, checkpoint: Checkpoint | None) -> OnlineLearner:
        parts = self._parts
        hot = HotHistories(parts.store, parts.hot_config)
        learner = OnlineLearner(parts.learner_config(), hot, log_id=parts.log.log_id, vectors=parts.vectors())
        if checkpoint is None:
            logger.info("no checkpoint in %s: starting a new model", parts.checkpoint_root)
        else:
            learner.load_checkpoint(checkpoint)
            logger.info("continuing after step %d, %d interactions", checkpoint.step, learner.ledger.num_interactions)
        return learner

    def _item_feed(self) -> ItemFeed | None:
        """None where content is not read. ValueError for a text encoder that is not installed."""
        items = self._parts.items_config
        if not items.content_items:
            return None
        return ItemFeed(self._parts.log, self._parts.clock, text_encoder(items.text_encoder))

    def _label_feed(self) -> LabelFeed | None:
        """None where nothing learns from labels."""
        ranking, settings = self._learner.ranking, self._parts.ranking
        if ranking is None or ranking.learns_from_interactions:
            return None
        return LabelFeed(
            self._parts.log,
            ranking.account.positions,
            batch_items=settings.batch_items,
            max_pending_items=settings.max_pending_items,
            clock=self._parts.clock,
            tasks=settings.tasks,
        )

    async def run(self, stopping: asyncio.Event) -> None:
        """Train until `stopping` is set; then finish the step, publish and checkpoint. Raises LogResetError."""
        reader, writer = self._parts.log.reader(), self._parts.log.writer()
        try:
            starts: list[Callable[[], Awaitable[None]]] = [self._parts.log.create_topics, reader.start, writer.start]
            if self._labels is not None:
                starts.append(self._labels.start)
            if self._feed is not None:
                starts += [self._feed.start, partial(self._feed.begin, self._learner.items_read)]
            for start in starts:
                if not await start_when_available(
                    start, what="trainer", stopping=stopping, on_failure=self._note_problem
                ):
                    return
            await reader.assign(await self._starts(reader))
            if self._labels is not None:
                await self._labels.assign()
            self._blocked_by = None
            await self._train(reader, writer, stopping)
            await self._finish(writer)
        finally:
            self._blocked_by = "stopped"
            await reader.stop()
            await writer.stop()
            if self._labels is not None:
                await self._labels.stop()
            if self._feed is not None:
                await self._feed.stop()
            for thread in (self._compute, self._files, self._checkpoints):
                thread.end()

    def _note_problem(self, problem: str) -> None:
        self._blocked_by = problem

    async def _starts(self, reader: LogReader) -> dict[PartitionId, Start]:
        """Where the ledger stands; at the start after a reset, and behind updates that an operator has given up."""
        topic, log_id = self._parts.log.topics.history_updates, self._parts.log.log_id
        known = self._learner.ledger.of_log(log_id)
        return {
            (topic, partition): max(known[partition].update_offset, self._given_up.get(partition, 0))
            if partition in known
            else "earliest"
            for partition in await reader.partitions(topic)
        }

    async def _skip_given_up(self, reader: LogReader) -> None:
        """Go on behind updates that an operator has given up; raise the LogResetError in hand if that is not new."""
        topics, log_id = self._parts.log.topics, self._parts.log.log_id
        given_up = await self._compute.run(lambda: self._parts.store.positions(log_id, topics.history_updates))
        if given_up == self._given_up:
            raise  # noqa: PLE0704 - called where the error is handled
        self._given_up = given_up
        await reader.assign(await self._starts(reader))

    async def _train(self, reader: LogReader, writer: LogWriter, stopping: asyncio.Event) -> None:
        delay_s = RETRY_FIRST_S
        while not stopping.is_set():
            try:
                await self._read(reader)
            except LogResetError:
                await self._skip_given_up(reader)
            except LogUnavailableError as error:
                self._blocked_by = str(error)
                logger.warning("%s; trying again in %.1f s", error, delay_s)
                await asyncio.sleep(delay_s)
                delay_s = min(2 * delay_s, RETRY_MAX_S)
            else:
                self._blocked_by, delay_s = None, RETRY_FIRST_S
            self._lag.look()
            if self._batch_is_due():
                await self._step(stopping)
            await self._learn_labels(stopping)
            # The publisher's gate holds back as well; not asking it keeps the traces' links for the next snapshot.
            if self._publisher.is_due() and not self._writing_snapshot and not self._learner.drift.holds_publishing:
                await self._publish(writer)
            if self._checkpoints.is_due(self._learner.ledger.num_steps):
                await self._checkpoint()

    async def _read(self, reader: LogReader) -> None:
        if not self._has_looked_ahead:
            for ahead in await forgotten_ahead(self._parts.log, await self._starts(reader)):
                self._batcher.forget(ahead.partition, ahead.user_ids, ahead.offset)
                if self._labels is not None:
                    self._labels.forget(ahead.user_ids, ahead.timestamp_ms)
            self._has_looked_ahead = True
        if self._batcher.num_pending >= self._config.max_pending_interactions:
            return
        timeout_ms = 0 if self._batch_is_due() or self._labels_are_due() else _IDLE_POLL_MS
        for record in await reader.poll(timeout_ms=timeout_ms, max_records=self._config.poll_records):
            update = HistoryUpdate.decode(record.value)
            if update.forgotten:
                self._batcher.forget(record.partition, update.forgotten, record.offset)
                if self._labels is not None:
                    self._labels.forget(update.forgotten, record.timestamp_ms)
                await self._compute.run(partial(self._learner.forget, update.forgotten))
                await self._compute.run(partial(forget_users, self._parts.quarantine_root, update.forgotten))
            self._batcher.read_up_to(record.partition, record.offset)
            self._batcher.add(update, record.offset, record.headers)
        if self._feed is not None:
            await self._feed.read()
        if self._batcher.num_pending and self._waiting_since_s is None:
            self._waiting_since_s = self._parts.clock.monotonic_s()
        if self._labels is not None:
            up_to_ms = await reader.read_up_to_ms()
            await self._labels.read(updates_up_to_ms=up_to_ms, num_read=self._batcher.num_read)

    @property
    def _num_taken(self) -> int:
        """Interactions taken by steps, since this daemon was made."""
        return self._batcher.num_read - self._batcher.num_pending

    def _labels_are_due(self) -> bool:
        return self._labels is not None and self._labels.is_due(self._num_taken)

    def _batch_is_due(self) -> bool:
        if self._batcher.is_full():
            return True
        if self._waiting_since_s is None:
            return False
        return (self._parts.clock.monotonic_s() - self._waiting_since_s) * 1000 >= self._config.batch_wait_ms

    async def _step(self, stopping: asyncio.Event) -> None:
        batch = self._batcher.take()
        now_s = self._parts.clock.monotonic_s()
        self._waiting_since_s = now_s if self._batcher.num_pending else None
        if batch is None:
            return
        if self._feed is not None and (news := self._feed.due(batch.log_time_ms())):
            await self._compute.run(lambda: self._learner.tell(news))
        with _tracer.start_as_current_span(
            "headrace.trainer.step",
            kind=trace.SpanKind.CONSUMER,
            links=links_to(batch.headers),
            attributes=processing_attributes(self._parts.log.topics.history_updates)
            | {"messaging.batch.message_count": len(batch.headers)},
        ) as span:
            if not await self._until_store_answers(lambda: self._learner.step(batch), stopping):
                return
            span.set_attribute("headrace.batch.interactions", len(batch.interactions))
            self._report_drift(span)
        if span.get_span_context().is_valid:
            self._unpublished_steps.append(trace.Link(span.get_span_context()))
        is_set_aside = any(not why.is_of_ranking for why, _ in self._learner.set_aside)
        await self._write_set_aside()
        fail_point("trainer.trained")
        self._step_durations.record(self._parts.clock.monotonic_s() - now_s, None, trace.set_span_in_context(span))
        self._learned.add(len(batch.interactions))
        self._lag.took(batch)
        event_time_ms, done_ms = batch.interactions.event_time_ms, self._parts.clock.now_ms()
        self.freshness.record(event_time_ms, batch.append_ms, done_ms, span)
        if self._learner.ledger.num_steps % self._config.metrics_every_steps == 0:
            await self._compute.run(self._note_metrics)
        ledger, num_dropped = self._learner.ledger, len(batch.dropped) + len(batch.thinned)
        step = LearnedSteps.of_batch(batch, ledger, at_ms=done_ms, is_set_aside=is_set_aside)
        self._publisher.learned(event_time_ms, batch.append_ms, ledger.num_interactions, num_dropped, step)

    async def _learn_labels(self, stopping: asyncio.Event) -> None:
        """One step of the ranking head, if labels are there whose histories have been learned from."""
        batch = None if self._labels is None else self._labels.take(self._num_taken)
        if batch is None:
            return
        with _tracer.start_as_current_span("headrace.trainer.label_step") as span:
            if not await self._until_store_answers(lambda: self._learner.learn_labels(batch), stopping):
                return
            span.set_attribute("headrace.batch.labels", len(batch.items))
        await self._write_set_aside()
        fail_point("trainer.labels_learned")
        self._labels_learned.add(len(batch.items))
        self._publisher.learned_labels(len(batch.items))

    async def _write_set_aside(self) -> None:
        """Before the step counts: a crash then repeats it, and writes the same again."""
        while self._learner.set_aside:
            why, interactions = self._learner.set_aside.pop(0)
            self._set_aside.add(1, {"headrace.reason": why.reason})
            try:
                await self._compute.run(
                    partial(
                        write_set_aside,
                        self._parts.quarantine_root,
                        why,
                        interactions,
                        keep=self._config.keep_set_aside,
                    )
                )
            except (OSError, PolarsError) as error:
                logger.error("the batch of step %d is set aside, but could not be written: %s", why.step, error)  # noqa: TRY400

    def _note_metrics(self) -> None:
        ledger = self._learner.ledger
        self._metrics_file.add(
            step=ledger.num_steps,
            interactions=ledger.num_interactions,
            watermark_ms=ledger.watermark_ms,
            values=self._learner.detailed_metrics(),
        )

    async def _until_store_answers(self, step: Callable[[], None], stopping: asyncio.Event) -> bool:
        """Run a step; histories are read before anything changes, so a step can be tried again.

        False when told to stop first: the batch is not in the account, so the next start reads it again.
        """
        delay_s = RETRY_FIRST_S
        while True:
            try:
                await self._compute.run(step)
            except StoreUnavailableError as error:
                self._blocked_by = str(error)
                if stopping.is_set():
                    return False
                logger.warning("%s; trying again in %.1f s", error, delay_s)
                await asyncio.sleep(delay_s)
                delay_s = min(2 * delay_s, RETRY_MAX_S)
            else:
                self._blocked_by = None
                return True

    def _report_drift(self, span: trace.Span) -> None:
        for decision in self._learner.take_drift_decisions():
            logger.warning("%s", decision.sentence())
            self._drift_decisions.add(1, decision.what())
            span.add_event("headrace.drift", decision.what() | decision.evidence())

    async def _publish(self, writer: LogWriter) -> None:
        links = list(self._unpublished_steps)
        self._unpublished_steps.clear()
        span = _tracer.start_span("headrace.snapshot.publish", links=links)

        async def write() -> None:
            try:
                if captured is None:
                    await self._files.run(self._publisher.record_held)
                    return
                published = await self._files.run(partial(self._publisher.write, captured))
                await self._announce(published.manifest, writer)
            except (SnapshotError, OSError, StoreUnavailableError, LogUnavailableError) as error:
                # Workers also poll the pointer; what was not announced is found there.
                logger.warning("publishing: %s", error)
            finally:
                span.end()
                self._writing_snapshot = False

        with trace.use_span(span):
            traceparent = current_traceparent()  # here: the active span does not follow into another thread
            captured = await self._compute.run(lambda: self._publisher.capture(self._learner, traceparent=traceparent))
            self._writing_snapshot = True
            self._in_background(write())

    async def _announce(self, manifest: Manifest, writer: LogWriter) -> None:
        pointer = SnapshotPointer(
            model=manifest.model,
            version=manifest.version,
            kind=manifest.kind,
            parent=manifest.parent,
            created_at_ms=manifest.created_at_ms,
        )
        topic = self._parts.log.topics.snapshots
        sent = await writer.send(topic, encode_message(pointer), key=manifest.model.encode(), headers=current_headers())
        await acknowledged([sent])
        fail_point("trainer.snapshot_announced")

    async def _checkpoint(self) -> None:
        checkpoint = await self._compute.run(self._learner.capture_checkpoint)
        # It depends on when snapshots were published, and no later step depends on it.
        checkpoint.state["unpublished"] = self._publisher.unpublished()
        self._in_background(self._checkpoints.begin(checkpoint))

    async def _finish(self, writer: LogWriter) -> None:
        await self._background_done()
        if self._publisher.has_unpublished():
            await self._publish(writer)
        if self._checkpoints.is_behind(self._learner.ledger.num_steps):
            await self._checkpoint()
        await self._background_done()

    def _in_background(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work)
        self._background.add(task)
        task.add_done_callback(self._background.discard)

    async def _background_done(self) -> None:
        if self._background:
            await asyncio.gather(*self._background)

    def ready(self) -> tuple[bool, str]:
        """Whether the trainer is learning (or waiting for events), and if not, why."""
        return self._blocked_by is None, self._blocked_by or "learning"

    def status(self) -> dict[str, object]:
        """Counts, metrics, snapshot and freshness, JSON-ready."""
        return trainer_status(
            self._learner,
            self._publisher,
            self._batcher,
            self._lag,
            self._labels,
            (self.freshness, self._publisher.freshness),
            now_ms=self._parts.clock.now_ms(),
        )
