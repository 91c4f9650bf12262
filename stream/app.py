"""The Faust application of the stream worker: life cycle, agents for the low-rate topics, and the ingest service.

Two facts about Faust shape the agents: an event whose agent raises counts as done and is lost, and events are
marked done in the background. So agents take events without automatic acknowledgement, catch what can go wrong
with one message (it becomes a dead letter), and acknowledge only what is durable.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import faust
import numpy as np
from faust.types import EventT
from mode import Service
from opentelemetry import metrics

from feature_store.errors import ConcurrentAppendError, IdCollisionError, StoreUnavailableError
from feature_store.ids import stable_id
from feature_store.records import Item
from feature_store.store import FeatureStore
from stream.clock import Clock
from stream.commit import Committer
from stream.dead_letters import MESSAGE_REASON, DeadLetterWriter
from stream.errors import LogResetError, LogUnavailableError, MessageFormatError
from stream.events import EventDecoder, EventRules, Refusal
from stream.ingest import IngestConfig, IngestWorker
from stream.kafka import KafkaConfig, KafkaLog
from stream.label_rules import Awaited, ImpressionRules, LabelConfig
from stream.label_service import LabelService
from stream.labels import LabelJoiner
from stream.log import RETRY_FIRST_S, RETRY_MAX_S, LogWriter, Record, acknowledged, reading, start_when_available
from stream.messages import Command, HistoryUpdate, decode_message, read_item
from stream.pruning import Sweeper

logger = logging.getLogger(__name__)

_ITEMS_PER_TRANSACTION = 1_000
_ITEMS_WAIT_S = 0.25
_COMMANDS_AT_ONCE = 1_000
_COMMANDS_WAIT_S = 1.0

_Refused = tuple[EventT[bytes], str]
"""A record of a low-rate topic, and what is wrong with it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class StreamParts:
    """What the stream worker is made of."""

    kafka: KafkaConfig
    rules: EventRules
    ingest: IngestConfig
    store: FeatureStore
    clock: Clock
    data_dir: Path
    """Folder that Faust makes for its tables, although we have none."""
    mode: str = "live"
    labels: LabelConfig = field(default_factory=LabelConfig)
    awaited: Awaited = field(default_factory=Awaited)
    """What the label of an item waits for."""


class IngestService(Service):
    """The hot path as a Faust service: whole batches through aiokafka, beside Faust's own consumer."""

    def __init__(self, parts: StreamParts, **options: Any) -> None:
        super().__init__(**options)
        self._parts = parts
        self._log = KafkaLog(parts.kafka)
        self.decoder = EventDecoder(parts.rules)
        self.writer: LogWriter = self._log.writer()
        self.committer = Committer(
            store=parts.store,
            writer=self.writer,
            topics=self._log.topics,
            log_id=parts.kafka.log_id,
            decoder=self.decoder,
            clock=parts.clock,
            mode=parts.mode,
        )
        self.worker = IngestWorker(parts.ingest, parts.kafka, self._log.topics, self.committer)
        # One worker sweeps: whoever has the first partition.
        self.sweeper = Sweeper(
            parts.store, interval_ms=parts.ingest.prune_interval_ms, is_ours=lambda: 0 in self.worker.positions()
        )
        self.labels = self._label_service() if parts.labels.enabled else None
        self._stopping = asyncio.Event()
        self._finished = asyncio.Event()
        self._finished.set()
        self.fatal: LogResetError | None = None
        metrics.get_meter("headrace.stream").create_observable_counter(
            "headrace.ingest.events.newer_schema",
            [lambda _options: [metrics.Observation(self.decoder.num_of_newer_schema)]],
            unit="{event}",
            description="Accepted events whose schema_version is newer than this program",
        )

    def _label_service(self) -> LabelService:
        parts = self._parts
        rules = ImpressionRules(
            config=parts.labels,
            mode=parts.mode,
            awaited=parts.awaited,
            max_future_skew_ms=parts.rules.max_future_skew_ms,
        )
        return LabelService(
            LabelJoiner(log=self._log, store=parts.store, clock=parts.clock, rules=rules),
            # The group gives partition 0 to one of the workers, and to another when that one dies.
            is_mine=lambda: 0 in self.worker.positions(),
            batch_wait_ms=parts.labels.batch_wait_ms,
            drain_timeout_ms=parts.ingest.drain_timeout_ms,
        )

    def on_init_dependencies(self) -> Iterable[Service]:
        """The label join starts after this service and stops with it."""
        return [] if self.labels is None else [self.labels]

    async def on_start(self) -> None:
        """Have the topics and a writer before anything else starts."""
        for start in (self._log.create_topics, self.writer.start):
            await start_when_available(start, what="ingest", stopping=self._stopping, on_failure=self._note_problem)

    def _note_problem(self, problem: str) -> None:
        self.worker.blocked_by = problem

    @Service.task
    async def _ingest(self) -> None:
        self._finished.clear()
        try:
            delay_s = RETRY_FIRST_S
            while not self._stopping.is_set():
                try:
                    await self.worker.run(self._stopping)
                except LogUnavailableError as error:
                    self.worker.blocked_by = str(error)
                    logger.warning("%s; trying again in %.1f s", error, delay_s)
                    await asyncio.sleep(delay_s)
                    delay_s = min(2 * delay_s, RETRY_MAX_S)
        except LogResetError as error:
            self.fatal = error
            await self.crash(error)
        finally:
            self._finished.set()

    @Service.task
    async def _sweep(self) -> None:
        await self.sweeper.run(self._stopping)

    async def on_stop(self) -> None:
        """Finish the batch in hand, then close."""
        self._stopping.set()
        try:
            await asyncio.wait_for(self._finished.wait(), self._parts.ingest.drain_timeout_ms / 1000)
        except TimeoutError:
            logger.warning("the batch in hand did not finish in time; it will be applied after the restart")
        await self.writer.stop()
        self.committer.close()

    def ready(self) -> tuple[bool, str]:
        """Whether this worker applies events, and if not, why."""
        problem = self.worker.problem()
        return problem is None, problem or "applying events"

    def status(self) -> dict[str, object]:
        """Counts, positions, lag and freshness, JSON-ready."""
        counts = self.committer.counts
        return {
            "accepted": counts.num_accepted,
            "duplicate": counts.num_duplicate,
            "expired": counts.num_expired,
            "late": counts.num_late,
            "skipped": counts.num_skipped,
            "refused": dict(counts.num_refused),
            "with_unknown_fields": self.decoder.num_with_unknown_fields,
            "of_newer_schema": self.decoder.num_of_newer_schema,
            "of_other_surfaces": self.decoder.num_of_other_surfaces,
            "batches": counts.num_batches,
            "watermark_ms": counts.watermark_ms,
            "pruned": self.sweeper.num_interactions,
            "positions": self.worker.positions(),
            "lag": sum(self.worker.lag().values()),
            "freshness": {"F1": self.committer.freshness.summary(self._parts.clock.now_ms())},
            "labels": None if self.labels is None else self.labels.status(),
        }


def build_app(parts: StreamParts, service: IngestService) -> faust.App:
    """The Faust app with the agents for `items` and `commands`."""
    log, session_s = KafkaLog(parts.kafka), parts.ingest.session_timeout_ms / 1000
    app = faust.App(
        parts.ingest.group_id + "-agents",
        broker=[f"kafka://{server}" for server in parts.kafka.bootstrap_servers.split(",")],
        broker_credentials=faust_credentials(parts.kafka),
        store="memory://",
        datadir=str(parts.data_dir),
        autodiscover=False,
        web_enabled=False,
        # The same liveness as the hot path's group; the local broker also holds a join for half a session timeout.
        broker_session_timeout=session_s,
        broker_rebalance_timeout=session_s,
        broker_heartbeat_interval=session_s / 3,
        topic_disable_leader=True,
        topic_allow_declare=False,
        stream_wait_empty=False,
        key_serializer="raw",
        value_serializer="raw",
    )
    agents = LowRateAgents(parts.store, service.writer, log, parts.clock)
    for topic, handler in ((log.topics.items, agents.items), (log.topics.commands, agents.commands)):
        channel = app.topic(topic, key_type=bytes, value_type=bytes)
        app.agent(channel, name=f"headrace.{topic}")(handler)
    return app


def faust_credentials(kafka: KafkaConfig) -> Any:
    """The same credentials that `KafkaConfig.client_options` gives to aiokafka, as Faust wants them; None for plain."""
    context = kafka.ssl_context()
    if kafka.security_protocol.startswith("SASL"):
        return faust.SASLCredentials(
            username=kafka.sasl_username,
            password=kafka.sasl_password,
            mechanism=kafka.sasl_mechanism,
            ssl_context=context,
        )
    return faust.SSLCredentials(context) if context is not None else None


class LowRateAgents:
    """What happens to records of `items` and `commands`."""

    def __init__(self, store: FeatureStore, writer: LogWriter, log: KafkaLog, clock: Clock) -> None:
        self._store, self._writer, self._log = store, writer, log
        self._dead_letters = DeadLetterWriter(writer, log.topics.dead_letters, clock)
        self._must_erase = False

    async def items(self, stream: Any) -> AsyncIterator[None]:
        """Keep item metadata current; a record without value retires the item."""
        async for events in stream.noack_take(_ITEMS_PER_TRANSACTION, within=_ITEMS_WAIT_S):
            await self._until_durable(self._apply_items, events)
            for event in events:
                await stream.ack(event)
            yield None

    async def commands(self, stream: Any) -> AsyncIterator[None]:
        """Carry out operator commands: what came within a moment shares what is slow about forgetting."""
        async for events in stream.noack_take(_COMMANDS_AT_ONCE, within=_COMMANDS_WAIT_S):
            await self._until_durable(self._apply_commands, events)
            await self._until_durable(self._erase, events)
            for event in events:
                await stream.ack(event)
            yield None

    async def _until_durable(self, apply: Any, events: Sequence[EventT[bytes]]) -> None:
        delay_s = RETRY_FIRST_S
        while True:
            try:
                await apply(events)
            except (StoreUnavailableError, ConcurrentAppendError, LogUnavailableError) as error:
                logger.warning("%s; trying again in %.1f s", error, delay_s)
                await asyncio.sleep(delay_s)
                delay_s = min(2 * delay_s, RETRY_MAX_S)
            else:
                return

    async def _apply_items(self, events: Sequence[EventT[bytes]]) -> None:
        colliding: set[str] = set()
        while True:
            changes, names, refused = _read_items(events, colliding)
            try:
                await asyncio.to_thread(self._store_items, changes, names)
                break
            except IdCollisionError as error:
                # Never merge two items: the newcomer is refused, the others are stored.
                colliding.add(error.new)
        # What can be tried again comes first: each try would write the letters again.
        await self._refuse(refused)

    def _store_items(self, changes: dict[int, Item | None], names: dict[int, str]) -> None:
        with self._store.transaction() as transaction:
            if names:
                transaction.register_names("item", names)
            transaction.upsert_items([item for item in changes.values() if item is not None])
            retired = [item_id for item_id, item in changes.items() if item is None]
            if retired:
                transaction.retire_items(np.array(retired, np.int64))

    async def _apply_commands(self, events: Sequence[EventT[bytes]]) -> None:
        forgotten: set[int] = set()
        refused: list[_Refused] = []
        for event in events:
            try:
                command = decode_message(Command, event.message.value)
            except MessageFormatError as error:
                refused.append((event, str(error)))
                continue
            forgotten.add(stable_id(command.user_id) if isinstance(command.user_id, str) else command.user_id)
        if forgotten:
            await self._forget_and_announce(tuple(sorted(forgotten)))
        await self._refuse(refused)

    async def _forget_and_announce(self, user_ids: tuple[int, ...]) -> None:
        # Durable first, announced second: commands are acknowledged after both, and doing them twice is harmless.
        await asyncio.to_thread(self._forget, user_ids)
        # On every partition, behind all that was announced of these users before: each tells what it ends.
        topic = self._log.topics.history_updates
        async with reading(self._log) as reader:
            partitions = await reader.partitions(topic)
        updates = [HistoryUpdate.forgetting(self._log.log_id, partition, user_ids) for partition in partitions]
        sends = [await self._writer.send(topic, one.encode(), partition=one.partition) for one in updates]
        await acknowledged(sends)

    def _forget(self, user_ids: tuple[int, ...]) -> None:
        with self._store.transaction() as transaction:
            num_forgotten = transaction.forget_users(np.array(user_ids, np.int64))
        self._must_erase = True
        # Not who: logs are kept, too.
        logger.info("forgot %d users, of whom %d had a history", len(user_ids), num_forgotten)

    async def _erase(self, _events: Sequence[EventT[bytes]]) -> None:
        if self._must_erase:
            await asyncio.to_thread(self._store.erase_deleted)
            self._must_erase = False

    async def _refuse(self, refused: Sequence[_Refused]) -> None:
        await self._dead_letters.write(
            [(_record(event), Refusal(MESSAGE_REASON, None, problem)) for event, problem in refused]
        )


def _read_items(
    events: Sequence[EventT[bytes]], colliding: Collection[str]
) -> tuple[dict[int, Item | None], dict[int, str], list[_Refused]]:
    """The last word on each item (None: retired), the texts of ids, and what is refused, `colliding` texts among it."""
    changes: dict[int, Item | None] = {}
    names: dict[int, str] = {}
    refused: list[_Refused] = []
    for event in events:
        try:
            item_id, name, item = read_item(event.message.key, event.message.value)
        except MessageFormatError as error:
            refused.append((event, str(error)))
            continue
        if name is not None and (name in colliding or names.setdefault(item_id, name) != name):
            refused.append((event, f"item {name!r}: another text has the same 63-bit hash; nothing is merged"))
            continue
        # The last message of an item wins; dict order keeps first sight, which does not matter here.
        changes[item_id] = item
    return changes, names, refused


def _record(event: EventT[bytes]) -> Record:
    message = event.message
    headers = message.headers or ()
    return Record(
        message.topic,
        message.partition,
        message.offset,
        int(message.timestamp * 1000),
        message.key,
        message.value,
        tuple(headers.items() if isinstance(headers, Mapping) else headers),
    )


def run_worker(app: faust.App, service: IngestService, *, log_level: str) -> int:
    """Run the Faust worker until SIGTERM or SIGINT; returns the exit code.

    Raises LogResetError when the log contradicts the stored positions.
    """
    loop = asyncio.new_event_loop()
    asyncio.set_event_loop(loop)
    worker = faust.Worker(
        app,
        service,
        loop=loop,
        loglevel=log_level,
        quiet=True,
        override_logging=False,
        redirect_stdouts=False,
    )
    worker.spinner = None  # its cursor codes do not belong into logs
    try:
        worker.execute_from_commandline()
    except SystemExit as finished:
        if service.fatal is not None:
            raise service.fatal from None
        return finished.code if isinstance(finished.code, int) else 0
