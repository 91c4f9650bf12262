"""The engine: a recorded log through the live code of stream, store, trainer and swap, with every arm asked on the way.

One process, one partition, one thread that computes, clocks that stand still until events move them: everything a run
leaves is a function of source, configuration and seed.

A run goes on where its newest checkpoint is. The store is not part of that: it is a function of the events, so it is
built again from the start, at several hundred thousand events a second, and the batches that the checkpoint holds
already are passed over by their positions, as a restarted trainer does.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from backtest.answers import Answerer, Answers
from backtest.arrivals import ArrivalConfig, in_order_of_arrival
from backtest.baseline_arms import LEARNING, build_baseline
from backtest.batch_feed import BatchFeed, ClosedBatch
from backtest.durations import duration_ms
from backtest.event_columns import EventColumns, EventSource
from backtest.fingerprints import histories_fingerprint, learner_fingerprints
from backtest.ingest_stage import IngestStage
from backtest.kept_weights import KeptWeights
from backtest.online_arms import OwnHistories
from backtest.queries import Queries, repeats
from backtest.run_config import BacktestConfig
from backtest.run_files import ArmCosts, RunWriter
from backtest.run_setup import build_batch_trained, build_trainings
from backtest.run_state import PolledEvents, Progress, RunOutcome, SoFar
from backtest.timeline import Timeline
from backtest.training import Training
from backtest.upstream_replay import UpstreamConfigs, UpstreamReplay
from backtest.vector_gains import VectorGains
from feature_store.config import FeatureStoreConfig, HotHistoriesConfig
from feature_store.hot import HotHistories
from feature_store.schema import migrate
from feature_store.store import FeatureStore
from online_trainer.batching import LagRule, MicroBatcher
from online_trainer.checkpoint import Checkpoint, read_newest_checkpoint, write_checkpoint
from online_trainer.learner import MeasuredStep
from online_trainer.learner_config import LearnerConfig
from online_trainer.prequential import USER_KINDS
from stream.events import EventRules

Int64s = NDArray[np.int64]

STORE_FILE: Final = "store.db"
CHECKPOINTS: Final = "checkpoints"
_REPORT_STEPS: Final = 20
_USERS_UNJOINED: Final = 1_000_000


@dataclass(frozen=True, kw_only=True, slots=True)
class EngineParts:
    """What one run is made of."""

    source: EventSource
    config: BacktestConfig
    arrivals: ArrivalConfig
    rules: EventRules
    store: FeatureStoreConfig
    """Its `url` is not used: a run has a store of its own."""
    hot: HotHistoriesConfig
    learner: LearnerConfig
    root: Path
    upstream: UpstreamConfigs | None = None
    """None: no users' vectors."""
    stopping: Callable[[], bool] = lambda: False
    on_progress: Callable[[Progress], None] = lambda _: None


@dataclass(frozen=True, slots=True)
class _AskedStep:
    queries: Queries
    user_ids_P: Int64s
    own_histories: OwnHistories


class Backtest:
    """One run. `run` once."""

    def __init__(self, parts: EngineParts) -> None:
        self._parts, self._config = parts, parts.config
        config_hash = parts.learner.model.config_hash()
        checkpoint = read_newest_checkpoint(parts.root / CHECKPOINTS, config_hash=config_hash)
        self._sofar = SoFar(**checkpoint.state["sofar"]) if checkpoint is not None else SoFar()
        self._writer = RunWriter(parts.root, num_parts=self._sofar.num_parts)
        self._answers = Answers(self._writer)
        self._store = _empty_store(parts)
        self._ingest = IngestStage(self._store, parts.rules)
        hot = HotHistories(
            self._store, replace(parts.hot, max_len=max(parts.hot.max_len, parts.learner.model.max_len + 1))
        )
        self._upstream = self._upstream_replay()
        self._trainings: list[Training] = build_trainings(
            parts.config,
            parts.learner,
            hot,
            self._answers,
            log_id=self._ingest.log_id,
            upstream=self._upstream,
        )
        self._first = self._trainings[0]
        self._gains = self._vector_gains()
        self._batch_trained = build_batch_trained(parts.config, parts.learner, self._store, self._answers)
        seed = parts.learner.trainer.seed
        self._baselines = {name: build_baseline(name, seed) for name in parts.config.baselines if name in LEARNING}
        self._kept = KeptWeights(parts.root, parts.config, parts.learner.trainer, self._store)
        self._timeline = Timeline(self._writer, duration_ms(parts.config.timeline_every, "timeline_every"))
        self._polls = PolledEvents()
        self._queries: _AskedStep | None = None
        num_events = len(parts.source)
        self._num_events = min(num_events, parts.config.limit) if parts.config.limit else num_events
        self._warm_up = int(self._num_events * parts.config.warm_up_share)
        self._late_ms = duration_ms(parts.config.late, "late")
        if checkpoint is not None:
            self._load(checkpoint)
        self._resumed_at = self._first.learner.ledger.num_interactions
        self._num_checkpoints = self._resumed_at // parts.config.checkpoint_events
        self._started = (time.perf_counter(), time.process_time())
        self._users: list[Int64s] = []
        self._closed_ms = 0

    def _upstream_replay(self) -> UpstreamReplay | None:
        parts, log_id = self._parts, self._ingest.log_id
        if parts.upstream is None:
            return None
        return UpstreamReplay(parts.upstream, self._store, parts.hot, log_id=log_id, learner=parts.learner)

    def _vector_gains(self) -> VectorGains | None:
        """Hears of what the rankers predict that read vectors in different ways."""
        if self._parts.upstream is None:
            return None
        gains = VectorGains(self._config.vectors_lag, self._parts.upstream.model.tasks)
        for place in range(len(self._config.vectors_lag)):
            ranking = self._trainings[place].learner.ranking
            assert ranking is not None, "vectors are computed for a ranker"
            ranking.on_tested = partial(gains.hear, place)
        return gains

    async def run(self) -> RunOutcome:
        """Replay to the end, or until told to stop; what was done since the last checkpoint is done again then."""
        await self._ingest.start()
        try:
            feed = self._feed()
            is_whole = True
            for poll in self._polled():
                self._polls.first_offsets.append(self._ingest.num_committed)
                self._polls.events.append(poll)
                self._note_users(poll.user_id)
                for offset, update in await self._ingest.commit(poll):
                    for closed in feed.batches(update, offset):
                        self._step(closed)
                        if self._parts.stopping():
                            return self._outcome(is_complete=False)
                if self._parts.stopping():
                    is_whole = False
                    break
                self._report(int(poll.arrival_ms[-1]))
            if is_whole:
                for closed in feed.rest():
                    self._step(closed)
                self._kept.end(self._first)
                self._end_part()
            return self._outcome(is_complete=is_whole)
        finally:
            self._ingest.close()
            self._store.close()

    def _note_users(self, user_ids: Int64s) -> None:
        """Who has a history, each once but for a bounded number of repeats."""
        self._users.append(np.unique(user_ids))
        if sum(map(len, self._users)) > 2 * len(self._users[0]) + _USERS_UNJOINED:
            self._users = [np.unique(np.concatenate(self._users))]

    def _polled(self) -> Iterator[EventColumns]:
        batches = self._parts.source.batches(self._config.poll_events, end=self._num_events)
        return in_order_of_arrival(map(EventColumns.of, batches), self._parts.arrivals)

    def _feed(self) -> BatchFeed:
        trainer, ledger = self._parts.learner.trainer, self._first.learner.ledger
        batcher = MicroBatcher(
            max_interactions=trainer.batch_interactions,
            max_tokens=trainer.batch_tokens,
            max_len=self._parts.learner.model.max_len,
            positions=ledger.positions,
            lag=LagRule.of(trainer),
        )
        known = ledger.of_log(self._ingest.log_id)
        next_offset = max((position.source_offset for position in known.values()), default=0)
        wait = self._config.batch_wait
        wait_ms = None if wait == "never" else duration_ms(wait, "batch_wait")
        return BatchFeed(batcher, wait_ms=wait_ms, next_offset=next_offset)

    def _step(self, closed: ClosedBatch) -> None:
        events = self._polls.of(closed.offsets)
        evaluates_next = int(closed.offsets[-1]) + 1 >= self._warm_up
        for arm in self._batch_trained:
            arm.note(events)
        if self._upstream is not None:
            self._upstream.compute_due(closed)
        for training in self._trainings:
            asking = self._asking(events, is_first=training is self._first)
            # The first is everybody's: queries and baselines come from it. Others are there for their own arms only.
            with nullcontext() if training is self._first else self._answers.spending(training.arm_names):
                training.step(closed, asking, evaluates_next=evaluates_next)
        if self._upstream is not None and self._gains is not None:
            self._upstream.learn(closed)
            self._gains.settle(counts=self._sofar.is_evaluating)
        is_set_aside = bool(self._first.learner.set_aside)
        for training in self._trainings:
            training.learner.set_aside.clear()
        self._after_trainings(closed, events)
        self._note(closed, events, evaluates_next)
        self._closed_ms = closed.closed_ms
        self._kept.after_step(self._first, closed, is_set_aside=is_set_aside)
        decisions = self._first.learner.take_drift_decisions()
        self._timeline.look(closed, self._first.learner, self._ingest.counts, decisions)
        done = self._first.learner.ledger.num_interactions // self._config.checkpoint_events
        if self._first.learner.ledger.num_steps % _REPORT_STEPS == 0:
            self._report(closed.closed_ms)
        if done > self._num_checkpoints:
            self._num_checkpoints = done
            self._checkpoint()

    def _after_trainings(self, closed: ClosedBatch, events: EventColumns) -> None:
        """Ask the arms that have no training of their own here, then let them learn the answers."""
        asked, self._queries = self._queries, None
        queries = Queries.without_history(0) if asked is None else asked.queries
        users_P = np.zeros(0, np.int64) if asked is None else asked.user_ids_P
        for arm in self._batch_trained:
            if asked is not None and self._sofar.is_evaluating:
                arm.ask(queries, asked.own_histories, closed.closed_ms)
            else:
                arm.advance(closed.closed_ms)
        for name, baseline in self._baselines.items():
            with self._answers.spending([name]):
                if asked is not None and self._sofar.is_evaluating:
                    self._answers.ranked(Answerer(arm=name), queries, baseline.ask(queries, users_P))
                baseline.learn(queries, users_P, events.item_id)

    def _note(self, closed: ClosedBatch, events: EventColumns, evaluates_next: bool) -> None:
        sofar = self._sofar
        sofar.first_ms = int(events.query_time_ms[0]) if sofar.first_ms is None else sofar.first_ms
        sofar.last_ms = int(max(sofar.last_ms or 0, events.query_time_ms.max()))
        if evaluates_next and not sofar.is_evaluating:
            sofar.is_evaluating, sofar.evaluated_from_ms = True, closed.closed_ms

    def _asking(
        self, events: EventColumns, *, is_first: bool
    ) -> Callable[[MeasuredStep], tuple[Queries, OwnHistories] | None]:
        def asking(measured: MeasuredStep) -> tuple[Queries, OwnHistories] | None:
            if is_first:
                self._queries = self._asked(measured, events)
            assert self._queries is not None, "all trainings test the same interactions"
            assert len(self._queries.queries) == len(measured.examples.positions)
            if not self._sofar.is_evaluating:
                return None
            return self._queries.queries, self._queries.own_histories

        return asking

    def _asked(self, measured: MeasuredStep, events: EventColumns) -> _AskedStep:
        """The queries of a step; written, with what the first learner's test has ranked, while evaluating."""
        examples = measured.examples
        of_target = events.take(examples.target_rows)
        queries = Queries.of_examples(
            examples,
            of_target.event,
            is_repeat_P=repeats(measured.examples),
            sample_every=self._config.sample_every,
        )
        asked = _AskedStep(queries, of_target.user_id, self._own_histories(queries, of_target))
        if not self._sofar.is_evaluating:
            return asked
        self._sofar.num_evaluated += len(queries)
        self._writer.add_queries(
            event=of_target.event,
            event_time_ms=of_target.query_time_ms,
            user_id=of_target.user_id,
            item_id=of_target.item_id,
            item_kind=(measured.cells_P // len(USER_KINDS)).astype(np.int8),
            user_kind=(measured.cells_P % len(USER_KINDS)).astype(np.int8),
        )
        for name in self._config.baselines:
            if name in measured.ranks:
                self._answers.ranks(Answerer(arm=name), queries, measured.ranks[name], measured.num_known)
        return asked

    def _own_histories(self, queries: Queries, of_target: EventColumns) -> OwnHistories:
        known: dict[int, Queries] = {}

        def own(lag_ms: int) -> Queries:
            if lag_ms not in known:
                histories = self._store.read(
                    of_target.user_id,
                    max_len=self._parts.learner.model.max_len,
                    before_ms=of_target.event_time_ms,
                    known_at_ms=of_target.query_time_ms - lag_ms,
                )
                known[lag_ms] = queries.on(histories, of_target.query_time_ms)
            return known[lag_ms]

        return own

    def _report(self, time_ms: int) -> None:
        done = self._first.learner.ledger.num_interactions
        progress = Progress(
            num_done=max(done, 0),
            num_events=self._num_events,
            time_ms=time_ms,
            is_catching_up=self._ingest.num_committed < self._resumed_at,
        )
        self._parts.on_progress(progress)

    def _end_part(self) -> None:
        for training in self._trainings:
            training.settle_all()
        for arm in self._batch_trained:
            arm.settle_all()
        self._sofar.num_parts = self._writer.end_part()

    def _checkpoint(self) -> None:
        # Step 1: everything that was asked is answered and written.
        self._end_part()
        # Step 2: publishing begins with an anchor, as after a restart: so a run that goes on from here and one that
        # was not interrupted publish the same.
        self._kept.begin_again(self._first)
        if self._upstream is not None:
            self._upstream.prune(self._closed_ms)
        # Step 3: the checkpoint appears whole, or the run goes on from the one before.
        write_checkpoint(self._parts.root / CHECKPOINTS, self._captured(), keep=1)
        wall_s, cpu_s = self._spent()
        self._writer.add_speed(events=self._first.learner.ledger.num_interactions, wall_s=wall_s, cpu_s=cpu_s)

    def _captured(self) -> Checkpoint:
        tensors: dict[str, Tensor] = {}
        state: dict[str, Any] = {}
        for place, training in enumerate(self._trainings):
            own, state[str(place)] = training.state()
            tensors |= {f"training-{place}.{name}": tensor.contiguous() for name, tensor in own.items()}
        for arm in self._batch_trained:
            own, state[arm.arm.name] = arm.state()
            tensors |= {f"{arm.arm.name}.{name}": tensor.contiguous() for name, tensor in own.items()}
        for name, baseline in self._baselines.items():
            tensors |= {f"{name}.{key}": tensor.contiguous() for key, tensor in baseline.state().items()}
        if self._upstream is not None and self._gains is not None:
            own, state["upstream"] = self._upstream.state()
            tensors |= {f"upstream.{key}": tensor.contiguous() for key, tensor in own.items()}
            state["gains"] = self._gains.state()
        wall_s, cpu_s = self._spent()
        sofar = replace(self._sofar, wall_s=wall_s, cpu_s=cpu_s)
        whole: dict[str, Any] = {
            "trainings": state,
            "sofar": {name: getattr(sofar, name) for name in SoFar.__dataclass_fields__},
            "timeline": self._timeline.state(),
            "kept": self._kept.state(),
            "costs": {
                name: [c.cpu_s, c.num_publications, c.num_bytes_published] for name, c in self._answers.costs().items()
            },
        }
        step = self._first.learner.ledger.num_steps
        return Checkpoint(step, self._parts.learner.model.config_hash(), tensors, whole)

    def _load(self, checkpoint: Checkpoint) -> None:
        state = checkpoint.state

        def part(name: str) -> dict[str, Tensor]:
            prefix = f"{name}."
            return {n.removeprefix(prefix): t for n, t in checkpoint.tensors.items() if n.startswith(prefix)}

        for place, training in enumerate(self._trainings):
            own = state["trainings"][str(place)]
            training.load_state(checkpoint.step, checkpoint.config_hash, part(f"training-{place}"), own)
        for arm in self._batch_trained:
            arm.load_state(part(arm.arm.name), state["trainings"][arm.arm.name])
        for name, baseline in self._baselines.items():
            baseline.load_state(part(name))
        if self._upstream is not None and self._gains is not None:
            self._upstream.load_state(part("upstream"), state["trainings"]["upstream"])
            self._gains.load_state(state["trainings"]["gains"])
        self._timeline.load_state(state["timeline"])
        self._kept.load_state(state["kept"], self._first)
        self._answers.load_costs(
            {
                name: ArmCosts(cpu_s=c, num_publications=n, num_bytes_published=b)
                for name, (c, n, b) in state["costs"].items()
            }
        )

    def _spent(self) -> tuple[float, float]:
        """Seconds by the wall clock and of CPU, all sessions together."""
        wall_s, cpu_s = time.perf_counter() - self._started[0], time.process_time() - self._started[1]
        return round(self._sofar.wall_s + wall_s, 3), round(self._sofar.cpu_s + cpu_s, 3)

    def _outcome(self, *, is_complete: bool) -> RunOutcome:
        learner, sofar, counts = self._first.learner, self._sofar, self._ingest.counts
        wall_s, cpu_s = self._spent()
        costs = self._answers.costs()
        shared_s = cpu_s - sum(cost.cpu_s for cost in costs.values())
        fingerprints = {}
        if is_complete and self._users:
            histories = histories_fingerprint(self._store, np.concatenate(self._users))
            fingerprints = {"histories": histories, **learner_fingerprints(learner.capture_checkpoint().tensors)}
        return RunOutcome(
            is_complete=is_complete,
            num_events=self._ingest.num_committed,
            num_evaluated=sofar.num_evaluated,
            first_event_time_ms=sofar.first_ms,
            last_event_time_ms=sofar.last_ms,
            evaluated_from_ms=sofar.evaluated_from_ms,
            counts={
                "accepted": counts.num_accepted,
                "duplicate": counts.num_duplicate,
                "expired": counts.num_expired,
                "late": counts.num_late,
                "refused": sum(counts.num_refused.values()),
                "learned": learner.ledger.num_supervised,
                "first_of_user": learner.ledger.num_first,
                "out_of_reach": learner.ledger.num_out_of_reach,
                "quarantined": learner.ledger.num_quarantined,
                "steps": learner.ledger.num_steps,
            },
            metrics=learner.metrics_summary(),
            vectors=self._told_of_vectors(),
            fingerprints=fingerprints,
            wall_s=wall_s,
            cpu_s=cpu_s,
            costs={"shared": ArmCosts(cpu_s=round(shared_s, 3)), **costs},
            num_parts=sofar.num_parts,
        )

    def _told_of_vectors(self) -> dict[str, Any]:
        if self._upstream is None or self._gains is None:
            return {}
        return {"upstream": self._upstream.summary(), "gains": self._gains.summary()}


def _empty_store(parts: EngineParts) -> FeatureStore:
    parts.root.mkdir(parents=True, exist_ok=True)
    for path in parts.root.glob(f"{STORE_FILE}*"):
        path.unlink()
    url = f"sqlite:///{parts.root / STORE_FILE}"
    migrate(url)
    return FeatureStore(replace(parts.store, url=url))


def remove_run(root: Path) -> None:
    """Everything that a run wrote, so that it can begin anew."""
    for name in ("queries", "ranks", "lists", "publications", "timeline", "drift", CHECKPOINTS, "snapshots"):
        shutil.rmtree(root / name, ignore_errors=True)
    for name in ("run.json", "speed.jsonl"):
        (root / name).unlink(missing_ok=True)
