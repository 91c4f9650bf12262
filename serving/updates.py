"""Following the log: new interactions into the hot histories, and announcements of snapshots to the swapper."""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

import numpy as np

from model.manifest import Lineage
from serving.batcher import ModelThread
from serving.config import ServingConfig
from serving.history_reader import HistoryReader
from serving.item_names import ItemNames
from serving.popularity import LivePopularity
from serving.user_states import UserStateCache
from serving.vector_cache import UserVectorCache
from serving.weights import ServedWeights
from stream.clock import Clock, WatermarkClock
from stream.errors import LogResetError, LogUnavailableError, MessageFormatError
from stream.log import RETRY_FIRST_S, RETRY_MAX_S, EventLog, LogReader, PartitionId, Record, Start, start_when_available
from stream.messages import HistoryUpdate, SnapshotPointer, decode_message

logger = logging.getLogger(__name__)

_POLL_MS: Final = 100
_SETTLE_S: Final = 2.0
"""Updates are sent just before their interactions are committed: a history read from the store around the moment we
start to listen may lack interactions whose update we did not hear. So everything is read once more after this time."""
_UNCOVERED_MAX: Final = 4_096


class UncoveredUpdates:
    """How long interactions have been waiting to be part of the weights served.

    Not the age of the weights: on a quiet stream nothing waits, however old they are. Followed by one thread;
    `behind_ms` may be asked from any.
    """

    def __init__(self) -> None:
        self._log_id = ""
        self._waiting: dict[int, deque[tuple[int, int]]] = {}
        self._in_service = Lineage()
        self._oldest_ms: int | None = None

    def add(self, log_id: str, partition: int, last_offset: int, at_ms: int) -> None:
        """Interactions up to `last_offset` of a source partition became known at `at_ms`."""
        if log_id != self._log_id:
            # The log was made anew: no weights will state positions of the one before any more.
            self._log_id, self._waiting = log_id, {}
        if log_id == self._in_service.log_id and last_offset < self._in_service.positions.get(partition, 0):
            # Weights came before the update that tells of what they contain: nobody would say so a second time.
            return
        waiting = self._waiting.setdefault(partition, deque())
        if len(waiting) >= _UNCOVERED_MAX:
            # Join the newest two: the older time stands for both, so the figure never flatters.
            _, at_ms = waiting.pop()
        waiting.append((last_offset, at_ms))
        self._note_oldest()

    def covered(self, lineage: Lineage) -> None:
        """Weights that contain everything below these positions are in service."""
        self._in_service = lineage
        if lineage.log_id != self._log_id:
            return
        for partition, position in lineage.positions.items():
            waiting = self._waiting.get(partition, deque())
            while waiting and waiting[0][0] < position:
                waiting.popleft()
        self._note_oldest()

    def _note_oldest(self) -> None:
        self._oldest_ms = min((waiting[0][1] for waiting in self._waiting.values() if waiting), default=None)

    def behind_ms(self, now_ms: int) -> int:
        """How long the longest waiting interactions have waited; 0 when none do."""
        oldest_ms = self._oldest_ms
        return 0 if oldest_ms is None else max(0, now_ms - oldest_ms)


@dataclass(frozen=True, kw_only=True, slots=True)
class UpdateTargets:
    """What updates change; the first four, and `vectors`, belong to the model thread."""

    histories: HistoryReader
    user_states: UserStateCache
    live_popularity: LivePopularity
    weights: ServedWeights
    names: ItemNames
    uncovered: UncoveredUpdates
    replay_clock: WatermarkClock | None
    """Follows the event time of a replayed stream; None when live."""
    snapshot_announced: Callable[[], None]
    vectors: UserVectorCache | None = None
    """None: this worker reads no users' vectors."""

    def forget(self, user_ids: tuple[int, ...]) -> None:
        """Drop users whose histories were removed; in the model thread."""
        ids = np.array(user_ids, np.int64)
        self.histories.forget(ids)
        self.user_states.forget(user_ids)
        if self.vectors is not None:
            self.vectors.forget(ids)

    def clear(self) -> None:
        """Drop what the log should have kept up: updates may have been missed; in the model thread."""
        self.histories.clear()
        if self.vectors is not None:
            self.vectors.clear()


class UpdateFollower:
    """Reads `history-updates` and `snapshots`; serving goes on while the broker is away."""

    def __init__(
        self,
        config: ServingConfig,
        log: EventLog,
        model_name: str,
        model_thread: ModelThread,
        targets: UpdateTargets,
        clock: Clock,
    ) -> None:
        self._config = config
        self._log = log
        self._model_name = model_name
        self._model_thread = model_thread
        self._targets = targets
        self._clock = clock
        self._applied: dict[tuple[str, int], int] = {}
        self._clear_at_s: float | None = None
        self.num_updates = 0
        self.num_interactions = 0
        self.num_unreadable = 0
        self.problem: str | None = "not connected yet"

    async def run(self, stopping: asyncio.Event) -> None:
        """Follow the log until `stopping` is set. The topics exist: a reader started without them may not see them."""
        delay_s = RETRY_FIRST_S
        while not stopping.is_set():
            reader = self._log.reader()
            try:
                if not await start_when_available(reader.start, what="serving", stopping=stopping):
                    return
                await self._assign(reader)
                delay_s = RETRY_FIRST_S
                await self._follow(reader, stopping)
            except LogUnavailableError as error:
                self._note_problem(str(error))
                await _sleep(delay_s, stopping)
                delay_s = min(2 * delay_s, RETRY_MAX_S)
            except LogResetError as error:
                self._note_problem(f"{error}; continuing at its end")
            finally:
                await reader.stop()

    async def _follow(self, reader: LogReader, stopping: asyncio.Event) -> None:
        delay_s = RETRY_FIRST_S
        while not stopping.is_set():
            try:
                records = await reader.poll(timeout_ms=_POLL_MS, max_records=self._config.update_poll_records)
            except LogUnavailableError as error:
                # The reader keeps its place.
                self._note_problem(str(error))
                await _sleep(delay_s, stopping)
                delay_s = min(2 * delay_s, RETRY_MAX_S)
                continue
            self.problem, delay_s = None, RETRY_FIRST_S
            await self._clear_when_settled()
            for record in records:
                await self.take(record)

    async def _assign(self, reader: LogReader) -> None:
        """Start at the end of the log: what came before is in the store."""
        topics = self._log.topics
        starts: dict[PartitionId, Start] = {}
        for topic in (topics.history_updates, topics.snapshots):
            starts |= {(topic, partition): "latest" for partition in await reader.partitions(topic)}
        await reader.assign(starts)
        # What was read before we listened may have changed unheard since.
        await self._model_thread.run(self._targets.clear)
        self._applied.clear()
        self._clear_at_s = self._clock.monotonic_s() + _SETTLE_S
        self.problem = None

    async def _clear_when_settled(self) -> None:
        if self._clear_at_s is not None and self._clock.monotonic_s() >= self._clear_at_s:
            self._clear_at_s = None
            await self._model_thread.run(self._targets.clear)

    def _note_problem(self, problem: str) -> None:
        if problem != self.problem:
            logger.warning("serving goes on without updates from the log: %s", problem)
        self.problem = problem

    async def take(self, record: Record) -> None:
        """Apply one record of either topic; what cannot be read is counted and skipped."""
        try:
            if record.topic == self._log.topics.snapshots:
                if record.value and decode_message(SnapshotPointer, record.value).model == self._model_name:
                    self._targets.snapshot_announced()
            else:
                await self._apply(HistoryUpdate.decode(record.value))
        except MessageFormatError as error:
            self.num_unreadable += 1
            logger.warning(
                "record %d of %s, partition %d, is skipped: %s", record.offset, record.topic, record.partition, error
            )

    async def _apply(self, update: HistoryUpdate) -> None:
        source = (update.log_id, update.partition)
        last = self._applied.get(source)
        if last is not None:
            # A crash between sending and committing makes ingest send again what it sent before.
            update = update.above(last)
        interactions, targets = update.interactions, self._targets
        if len(interactions) and targets.weights.info is None:
            # Without weights, popularity is counted here, and its items need names.
            await asyncio.to_thread(targets.names.resolve, np.unique(interactions.item_id))
        await self._model_thread.run(lambda: self._apply_in_model_thread(update))
        if len(interactions):
            self._applied[source] = max(update.last_offset, -1 if last is None else last)
            targets.uncovered.add(*source, update.last_offset, self._clock.now_ms())
            self.num_updates += 1
            self.num_interactions += len(interactions)

    def _apply_in_model_thread(self, update: HistoryUpdate) -> None:
        targets, interactions = self._targets, update.interactions
        if update.forgotten:
            targets.forget(update.forgotten)
        if len(interactions):
            if targets.weights.info is None:
                targets.live_popularity.add(interactions.item_id, interactions.event_time_ms)
            if targets.replay_clock is not None:
                targets.replay_clock.observe(update.watermark_ms)
            targets.histories.apply(interactions, watermark_ms=update.watermark_ms)

    def status(self) -> dict[str, object]:
        """JSON-ready."""
        return {
            "connected": self.problem is None,
            "problem": self.problem,
            "updates": self.num_updates,
            "interactions": self.num_interactions,
            "unreadable": self.num_unreadable,
        }


async def _sleep(delay_s: float, stopping: asyncio.Event) -> None:
    try:
        await asyncio.wait_for(stopping.wait(), delay_s)
    except TimeoutError:
        return
