"""The inference worker: what it is made of, and its life cycle."""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import Coroutine
from contextlib import suppress
from typing import Any, Final

from model.file_cache import FileCache
from serving.access import Access
from serving.answering import Answering, AnswerParts
from serving.batcher import MicroBatcher, ModelThread
from serving.broker_watch import BrokerWatch
from serving.event_intake import EventIntake
from serving.first_answers import FirstAnswers
from serving.forgetting import UserRemoval
from serving.guardian import SwapGuardian
from serving.history_reader import HistoryReader
from serving.impressions import ImpressionLog
from serving.instruments import ServingInstruments
from serving.item_categories import CategoryRows, ItemCategories
from serving.item_names import ItemNames, WithheldItems
from serving.item_search import ExactSearch
from serving.lease import SnapshotLease
from serving.log_writer import SharedWriter
from serving.parts import ServingParts
from serving.popularity import LivePopularity
from serving.queries import Query, Ranking
from serving.ranker import Ranker, RankerParts
from serving.ranking_head import RankingHead
from serving.recommending import ItemChooser, blocking_mask
from serving.shadow import Shadowing, ShadowParts
from serving.snapshot_admin import SnapshotAdmin
from serving.store_watch import StoreWatch
from serving.swap import HotSwapper, SnapshotReader, SwapDone, SwapHooks
from serving.updates import UncoveredUpdates, UpdateFollower, UpdateTargets
from serving.user_states import UserEncoder
from serving.version_choice import VersionChoice
from serving.weights import PreparedSwap, ServedWeights
from stream.clock import WatermarkClock

logger = logging.getLogger(__name__)

FLUSH_S: Final = 1.0
"""Time for each of the things that happen behind the answers to come to an end, when the worker stops."""


class ServingWorker:
    """Answers requests with weights and histories that follow the stream.

    `start` returns at once: broker and store may be away, and `/readyz` says what is missing.
    """

    def __init__(self, parts: ServingParts) -> None:
        config = parts.config
        self.config, self.clock, self.metrics_text = config, parts.clock, parts.metrics_text
        self._parts = parts
        self.access = Access(parts.access, parts.clock)
        self._replay_clock = WatermarkClock() if parts.mode == "replay" else None
        self.instruments = ServingInstruments()
        self._model_thread = ModelThread()
        self._names = ItemNames(lambda ids: parts.store.names("item", ids))
        withheld = WithheldItems(self._names)
        self._weights = ServedWeights(parts.model_config, withheld)
        self._histories = HistoryReader(parts.store.config, parts.hot_config, parts.clock)
        self._vectors = parts.vector_cache(self._model_thread)
        live_popularity = LivePopularity(
            half_life_s=parts.model_config.trend_half_life_s,
            floor=parts.model_config.trend_floor,
            items_max=parts.model_config.max_items,
        )
        self._encoder = UserEncoder(config, self._weights)
        self._choice = VersionChoice(parts.snapshot_root, parts.model_name, parts.guards, parts.clock)
        self._guardian = SwapGuardian(
            parts.guards,
            self._choice,
            self._model_thread,
            replica=parts.replica,
            clock=parts.clock,
            instruments=self.instruments,
        )
        self._categories = ItemCategories(parts.store, config.categories_refresh_ms)
        ranker_parts = self._ranker_parts(live_popularity)
        ranker = Ranker(ranker_parts)
        self.shadowing = Shadowing(
            ShadowParts(
                config=config,
                model_config=parts.model_config,
                live=ranker_parts,
                reader=self._snapshot_reader(None),
                names=self._names,
                model_thread=self._model_thread,
                query_now_ms=self._query_now_ms,
                clock=parts.clock,
                random=random.Random(),
            )
        )
        watched = self.shadowing.watched(lambda queries: ranker.answer(queries, self._query_now_ms()))
        self._batcher: MicroBatcher[Query, Ranking] = MicroBatcher(
            config,
            self._model_thread,
            self._guardian.watched(watched, self._weights),
            self.instruments,
        )
        self._store_watch = StoreWatch(parts.store, self._names, withheld, self._weights, self._model_thread)
        self._broker_watch = BrokerWatch(parts.log)
        self._first_answers = FirstAnswers(parts.store, parts.model_name, parts.replica, parts.mode)
        self._uncovered = UncoveredUpdates()
        self._lease = SnapshotLease(
            parts.snapshot_root,
            parts.model_name,
            parts.replica,
            parts.clock,
            held=lambda: self.snapshot_version,
            back_to=lambda: self._guardian.good,
        )
        self._swapper = self._build_swapper()
        self._updates = self._update_follower(live_popularity)
        self._writer = SharedWriter(parts.log.writer())
        self._impressions = (
            ImpressionLog(self._writer, parts.log.topics.impressions, config.impressions_queue_max, self.instruments)
            if config.log_impressions
            else None
        )
        self.intake = EventIntake(config, parts.rules, self._writer, parts.log.topics.interactions, parts.clock)
        self.removal = UserRemoval(config, self._writer, parts.log.topics.commands)
        self.admin = SnapshotAdmin(
            parts.snapshot_root, parts.model_name, self._writer, parts.log.topics.snapshots, self._swapper.announce
        )
        self.answering = Answering(config, self._answer_parts())
        self.is_leaving = False
        self._stopping = asyncio.Event()
        self._running: asyncio.Task[None] | None = None
        self._answering_task: asyncio.Task[None] | None = None
        self._background: list[asyncio.Task[None]] = []
        self.failure: str | None = None
        """Why only a restart can help; None while all is well."""
        self._observe()

    def _ranker_parts(self, live_popularity: LivePopularity) -> RankerParts:
        search, rows = ExactSearch(self._weights), CategoryRows(self._weights, self._categories)
        return RankerParts(
            weights=self._weights,
            histories=self._histories,
            live_popularity=live_popularity,
            encoder=self._encoder,
            chooser=ItemChooser(self.config, self._weights, search, rows),
            categories=self._categories,
            head=RankingHead(self._weights, self._parts.ranking),
            blocking_actions=blocking_mask(self.config, self._parts.rules),
            vectors=self._vectors,
        )

    def _update_follower(self, live_popularity: LivePopularity) -> UpdateFollower:
        targets = UpdateTargets(
            histories=self._histories,
            user_states=self._encoder.cache,
            live_popularity=live_popularity,
            weights=self._weights,
            names=self._names,
            uncovered=self._uncovered,
            replay_clock=self._replay_clock,
            snapshot_announced=self._swapper.announce,
            vectors=self._vectors,
        )
        parts = self._parts
        return UpdateFollower(self.config, parts.log, parts.model_name, self._model_thread, targets, parts.clock)

    def _answer_parts(self) -> AnswerParts:
        return AnswerParts(
            batcher=self._batcher,
            names=self._names,
            categories=self._categories,
            first_answers=self._first_answers,
            impressions=self._impressions,
            clock=self.clock,
            task_names=self._parts.ranking.tasks,
            rules=self._parts.rules,
            query_now_ms=self._query_now_ms,
        )

    def _snapshot_reader(self, lease: SnapshotLease | None) -> SnapshotReader:
        parts = self._parts
        folder, bytes_max = parts.snapshot_cache, parts.config.snapshot_cache_bytes
        return SnapshotReader(
            parts.snapshot_root,
            parts.model_name,
            parts.model_config,
            self.instruments,
            lease=lease,
            cache=None if folder is None else FileCache(folder, bytes_max=bytes_max),
            channel=parts.config.channel,
        )

    def _build_swapper(self) -> HotSwapper:
        parts = self._parts
        return HotSwapper(
            parts.config,
            self._snapshot_reader(self._lease),
            self._weights,
            self._model_thread,
            clock=parts.clock,
            instruments=self.instruments,
            choice=self._choice,
            hooks=SwapHooks(
                before=self._before_swap,
                after=self._after_swap,
                answered_up_to=self._first_answers.answered_up_to,
            ),
        )

    def _before_swap(self, prepared: PreparedSwap) -> None:
        """New items can be named from their first answer on."""
        self._names.resolve(prepared.item_ids())

    def _after_swap(self, done: SwapDone) -> None:
        self._first_answers.expect(done.passed, self.clock.now_ms())
        self._uncovered.covered(done.newest.lineage)
        if self._replay_clock is not None:
            self._replay_clock.observe(done.newest.watermark_ms)

    def _query_now_ms(self) -> int:
        return self.clock.now_ms() if self._replay_clock is None else self._replay_clock.now_ms()

    def _observe(self) -> None:
        observe = self.instruments.observe
        observe("headrace.serving.snapshot.version", "1", "Version served", lambda: self.snapshot_version)
        observe("headrace.serving.weights.age", "s", "Request time minus the weights' watermark", self._weights_age_s)
        observe(
            "headrace.serving.weights.behind",
            "s",
            "How long interactions have waited to be learned by the weights served",
            lambda: self._uncovered.behind_ms(self.clock.now_ms()) / 1000,
        )
        observe("headrace.serving.queue.length", "{request}", "Waiting requests", lambda: self._batcher.num_waiting)
        states = self._encoder.cache
        observe("headrace.serving.user_states.bytes", "By", "Memory of user states", lambda: states.num_bytes)
        observe("headrace.serving.user_states.hits", "{history}", "Histories reused", lambda: states.num_hits)
        observe("headrace.serving.user_states.misses", "{history}", "Histories read anew", lambda: states.num_misses)
        if (vectors := self._vectors) is not None:
            observe("headrace.serving.user_vectors.hits", "{user}", "Vectors in memory", lambda: vectors.num_hits)
            observe("headrace.serving.user_vectors.misses", "{user}", "Vectors looked up", lambda: vectors.num_misses)

    def _weights_age_s(self) -> float | None:
        held = self._swapper.held
        return None if held is None else max(0, self._query_now_ms() - held.watermark_ms) / 1000

    @property
    def snapshot_version(self) -> int | None:
        """The version served."""
        held = self._swapper.held
        return None if held is None else held.version

    async def start(self) -> None:
        """Begin to answer, and to follow snapshots, updates and the store."""
        assert self._running is None, "a worker is started once"
        started = asyncio.Event()
        self._running = asyncio.create_task(self._run(started))
        self._running.add_done_callback(self._note_failure)
        await started.wait()

    async def _run(self, started: asyncio.Event) -> None:
        async with asyncio.TaskGroup() as group:
            self._answering_task = group.create_task(self._batcher.run())
            work: list[Coroutine[Any, Any, None]] = [
                self._swapper.run(),
                self._guardian.run(self._swapper.announce),
                self.shadowing.run(),
                self._lease.run(self.config.lease_interval_ms),
                self._broker_watch.run(self.config.broker_check_ms, self._stopping),
                self._follow_updates(),
                self._store_watch.run(self.config.store_check_ms),
                self._categories.run(),
                self._first_answers.run(),
                self._open_writer(),
            ]
            if self._impressions is not None:
                work.append(self._impressions.run())
            if self._vectors is not None:
                work.append(self._vectors.run())
            self._background = [group.create_task(one) for one in work]
            started.set()

    async def _follow_updates(self) -> None:
        await self._broker_watch.seen()
        await self._updates.run(self._stopping)

    async def _open_writer(self) -> None:
        await self._broker_watch.seen()
        await self._writer.open(self._stopping)

    def _note_failure(self, running: asyncio.Task[None]) -> None:
        error = None if running.cancelled() else running.exception()
        if error is not None:
            self.failure = "; ".join(repr(one) for one in getattr(error, "exceptions", [error]))
            logger.critical("this worker can only be restarted: %s", self.failure, exc_info=error)

    def leave(self) -> None:
        """Go on answering, but be ready no more: this worker stops soon."""
        self.is_leaving = True

    async def stop(self, *, drain_s: float | None = None) -> None:
        """Answer what is queued for at most `drain_s` (default: `drain_timeout_ms`), write what is pending, end."""
        self._batcher.close()
        if self._answering_task is not None:
            allowed_s = self.config.drain_timeout_ms / 1000 if drain_s is None else drain_s
            await asyncio.wait([self._answering_task], timeout=allowed_s)
        self._stopping.set()
        for task in reversed(self._background):
            task.cancel()
        if self._answering_task is not None:
            self._answering_task.cancel()
        if self._running is not None:
            await asyncio.wait([self._running], timeout=FLUSH_S)
        flushes = [self._first_answers.flush(), self._writer.close()]
        if self._impressions is not None:
            flushes.insert(0, self._impressions.flush())
        for flush in flushes:
            with suppress(TimeoutError):
                await asyncio.wait_for(flush, FLUSH_S)
        self._swapper.close()
        with suppress(TimeoutError):
            await asyncio.wait_for(asyncio.to_thread(self._lease.end), FLUSH_S)
        self._model_thread.close()
        self._histories.close()
        if self._vectors is not None:
            self._vectors.close()

    async def wait_until_failed(self) -> None:
        """Return when the worker has ended, by itself or because it was stopped."""
        if self._running is not None:
            await asyncio.wait([self._running])

    def reasons_not_ready(self) -> list[str]:
        """Why this worker should get no requests now; empty when it should."""
        reasons = []
        if self.is_leaving or self._stopping.is_set() or self._batcher.is_closed:
            reasons.append("stopping")
        if self.failure is not None:
            reasons.append(self.failure)
        if self.snapshot_version is None:
            status = self._swapper.status()
            detail = status["pointer_problem"] or status["last_refusal"] or "nothing has been published"
            reasons.append(f"no weights are loaded: {detail}")
        return reasons if self.config.fail_open else reasons + self.impairments()

    def impairments(self) -> list[str]:
        """What makes answers worse, and with `fail_open` does not end readiness."""
        reasons = []
        if self._store_watch.problem is not None:
            reasons.append(f"store: {self._store_watch.problem}")
        behind_ms, limit_ms = self._uncovered.behind_ms(self.clock.now_ms()), self.config.weights_behind_max_ms
        if limit_ms and behind_ms > limit_ms:
            reasons.append(
                f"interactions have waited {behind_ms} ms to be learned; serving.weights_behind_max_ms is {limit_ms}"
            )
        return reasons

    def status(self) -> dict[str, object]:
        """Figures of this worker, JSON-ready."""
        snapshot = self._swapper.status()
        hot = self._histories.hot.stats
        return {
            "replica": self._parts.replica,
            "mode": self._parts.mode,
            "ready": not self.reasons_not_ready(),
            "reasons": self.reasons_not_ready(),
            "impairments": self.impairments(),
            "snapshot": snapshot | {"lease_problem": self._lease.problem},
            "guards": self._guardian.status(),
            "shadow": self.shadowing.report(),
            **self.instruments.status(),
            "waiting": self._batcher.num_waiting,
            "weights_age_ms": None if (age_s := self._weights_age_s()) is None else age_s * 1000,
            "weights_behind_ms": self._uncovered.behind_ms(self.clock.now_ms()),
            "events_accepted": self.intake.num_accepted,
            "user_states": self._encoder.cache.status(),
            "user_vectors": None if self._vectors is None else self._vectors.status(),
            "hot": {name: getattr(hot, name) for name in hot.__dataclass_fields__},
            "updates": self._updates.status(),
            "broker": {
                "reachable": self._broker_watch.problem is None,
                "problem": self._broker_watch.problem,
                "reading": self._updates.problem is None,
                "writing": self._writer.is_open,
            },
            "store": {"reachable": self._store_watch.problem is None, "problem": self._store_watch.problem},
            "impressions": None
            if self._impressions is None
            else {"sent": self._impressions.num_sent, "dropped": self._impressions.num_dropped},
            "freshness": {"F4": self._first_answers.summary(self.clock.now_ms())},
        }
