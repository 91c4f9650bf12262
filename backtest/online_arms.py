"""Arms that answer with what one trainer has published: one training, a publication every Δ for each arm.

What is shared. Arms that published last after the same step show the same weights, so their queries are ranked once.
An arm whose newest publication is the trainer's present state is answered by the trainer's own test. A copy of the
weights is made only when the trainer moves on while an arm does not: an arm that publishes after every batch needs
none. Queries on a copy wait until it is given up, and are ranked together.

What is published when. A trainer's weights after a batch are published at the moment the batch closed, if Δ has passed
since the arm published last; `weights_lag_ms` later replicas have them. Events that are older than what replicas show
when they arrive were asked about before: with late events, answers wait `late_ms` until most of those are known.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from torch import Tensor

from backtest.answers import Answerer, Answers
from backtest.queries import Queries, rank_queries
from backtest.replicas import ChangedRows, Replica, num_bytes_of, snapshot_in_memory, taken_snapshot
from backtest.waiting import WAITING_MAX, WaitingQueries
from model.snapshot import RowBlock, Snapshot
from online_trainer.learner import MeasuredStep, OnlineLearner

OwnHistories = Callable[[int], Queries]
"""The queries of the present step on histories that are so many milliseconds behind."""


@dataclass(kw_only=True, slots=True)
class OnlineArm:
    """How one arm publishes, and what it has published."""

    name: str
    interval_ms: int | None
    """Δ; None: once, when publishing begins."""
    weights_lag_ms: int = 0
    histories_lag_ms: int = 0
    starts_ms: int | None = None
    """First publication is at the end of the first batch that closes at or after it; None: when evaluation begins."""
    number: int = -1
    """Of the newest publication."""
    published_ms: int = 0
    published_step: int = 0

    def is_due(self, at_ms: int, *, is_evaluating: bool) -> bool:
        """Whether a batch that closes now is published."""
        if self.number < 0:
            return is_evaluating if self.starts_ms is None else at_ms >= self.starts_ms
        return self.interval_ms is not None and at_ms - self.published_ms >= self.interval_ms

    def state(self) -> dict[str, int]:
        """JSON-ready."""
        return {"number": self.number, "published_ms": self.published_ms, "published_step": self.published_step}

    def load_state(self, state: dict[str, int]) -> None:
        """Continue from a ``state``."""
        self.number, self.published_ms = state["number"], state["published_ms"]
        self.published_step = state["published_step"]


@dataclass(kw_only=True, slots=True)
class _Published:
    """Weights after one step, which some arms show now."""

    step: int
    watermark_ms: int
    replica: Replica | None = None
    """None: the trainer still has these weights."""
    waiting: list[tuple[Queries, tuple[Answerer, ...]]] = field(default_factory=list)


class OnlineArms:
    """The arms of one trainer without delay: what they show is what they published last."""

    def __init__(self, learner: OnlineLearner, arms: list[OnlineArm], changed: ChangedRows, answers: Answers) -> None:
        self._learner, self.arms, self._changed, self._answers = learner, arms, changed, answers
        self._shown: dict[str, _Published] = {}
        self._free: list[Replica] = []

    def before_step(self, at_ms: int, *, is_evaluating: bool) -> None:
        """The trainer is about to move on, in a batch that closes at `at_ms`: keep what some arm goes on to show."""
        for published in self._distinct():
            keepers = [
                arm.name
                for arm in self.arms
                if self._shown.get(arm.name) is published and not arm.is_due(at_ms, is_evaluating=is_evaluating)
            ]
            if published.replica is None and keepers:
                with self._answers.spending(keepers):
                    published.replica = self._copied(published.step)

    def _copied(self, step: int) -> Replica:
        model = self._learner.model
        replica = max(self._free, key=lambda one: one.step or 0, default=None)
        if replica is None:
            replica = Replica(model.config)
        else:
            self._free.remove(replica)
        replica.apply(taken_snapshot(model, self._changed, step=step, since=replica.step))
        return replica

    def ask(self, measured: MeasuredStep, queries: Queries, own_histories: OwnHistories) -> None:
        """Answer a step's queries, before it trains."""
        groups: dict[tuple[int, int], list[OnlineArm]] = {}
        for arm in self.arms:
            shown = self._shown.get(arm.name)
            groups.setdefault((-1 if shown is None else shown.step, arm.histories_lag_ms), []).append(arm)
        for (step, lag_ms), arms in groups.items():
            names = [arm.name for arm in arms]
            with self._answers.spending(names):
                asked = own_histories(lag_ms) if lag_ms else queries
                if step < 0:
                    for name in names:
                        self._answers.nothing(name, asked)
                elif step == self._learner.ledger.num_steps:
                    self._answer_now(measured, asked, arms)
                else:
                    shown = self._shown[names[0]]
                    shown.waiting.append((asked, tuple(self._answerer(arm) for arm in arms)))
                    if sum(len(waiting) for waiting, _ in shown.waiting) >= WAITING_MAX:
                        self._settle(shown)

    def _answerer(self, arm: OnlineArm) -> Answerer:
        return Answerer(arm=arm.name, number=arm.number, watermark_ms=self._shown[arm.name].watermark_ms)

    def _answer_now(self, measured: MeasuredStep, asked: Queries, arms: list[OnlineArm]) -> None:
        """By the trainer's present weights; its own test has ranked what is asked on its own histories."""
        model, has_own = self._learner.model, arms[0].histories_lag_ms > 0
        if has_own or asked.is_sampled_P.any():
            part = asked if has_own else asked.part(asked.is_sampled_P)
            ranked = rank_queries(model, model.catalogue(), part, num_known=measured.num_known, only_lists=not has_own)
            for arm in arms:
                self._answers.lists(arm.name, ranked.lists)
        rank_P = ranked.rank_P if has_own else measured.ranks["model"]
        for arm in arms:
            self._answers.ranks(self._answerer(arm), asked, rank_P, measured.num_known)

    def after_step(self, at_ms: int, *, is_evaluating: bool) -> None:
        """The trainer has moved on: publish where that is due."""
        ledger, now = self._learner.ledger, None
        for arm in self.arms:
            if not arm.is_due(at_ms, is_evaluating=is_evaluating):
                continue
            now = now or _Published(step=ledger.num_steps, watermark_ms=ledger.watermark_ms)
            note_publication(arm, at_ms, self._learner, self._changed, self._answers)
            before = self._shown.get(arm.name)
            self._shown[arm.name] = now
            if before is not None and all(shown is not before for shown in self._shown.values()):
                self._settle(before)
                if before.replica is not None:
                    self._free.append(before.replica)

    def _settle(self, published: _Published) -> None:
        """Rank what waits for these weights, together."""
        if not published.waiting:
            return
        assert published.replica is not None, "queries wait only for weights that the trainer has left"
        names = [who.arm for _, answerers in published.waiting for who in answerers]
        with self._answers.spending(names):
            asked = Queries.concat([queries for queries, _ in published.waiting])
            ranked = rank_queries(published.replica.model, published.replica.catalogue, asked)
            start = 0
            for queries, answerers in published.waiting:
                part = slice(start, start + len(queries))
                start += len(queries)
                for who in answerers:
                    self._answers.ranks(who, queries, ranked.rank_P[part], ranked.num_candidates)
            of_event = np.concatenate([np.full(len(q), at) for at, (q, _) in enumerate(published.waiting)])
            self._share_lists(published, ranked.lists, of_event[asked.is_sampled_P])
        published.waiting.clear()

    def _share_lists(self, published: _Published, lists: Any, group_S: Any) -> None:
        for at, (_, answerers) in enumerate(published.waiting):
            own = group_S == at
            part = type(lists)(**{name: getattr(lists, name)[own] for name in lists.__dataclass_fields__})
            for who in answerers:
                self._answers.lists(who.arm, part)

    def _distinct(self) -> list[_Published]:
        return list({id(shown): shown for shown in self._shown.values()}.values())

    def settle_all(self) -> None:
        """Rank everything that waits."""
        for published in self._distinct():
            self._settle(published)

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Tensors and JSON; nothing waits."""
        tensors: dict[str, Tensor] = {}
        shown = {name: [published.step, published.watermark_ms] for name, published in self._shown.items()}
        for published in self._distinct():
            replica = published.replica
            if replica is None:
                # The trainer's present weights; they are copied when it moves on.
                continue
            tensors |= {f"{published.step}.{name}": tensor for name, tensor in replica.state().items()}
        return tensors, {"shown": shown, "arms": {arm.name: arm.state() for arm in self.arms}}

    def load_state(self, tensors: dict[str, Tensor], state: dict[str, Any]) -> None:
        """Continue from a ``state``."""
        by_step: dict[int, _Published] = {}
        for name, (step, watermark_ms) in state["shown"].items():
            if step not in by_step:
                prefix = f"{step}."
                own = {n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)}
                replica = None
                if own:
                    replica = Replica(self._learner.model.config)
                    replica.load_state(own)
                by_step[step] = _Published(step=step, watermark_ms=watermark_ms, replica=replica)
            self._shown[name] = by_step[step]
        for arm in self.arms:
            arm.load_state(state["arms"][arm.name])


def note_publication(
    arm: OnlineArm, at_ms: int, learner: OnlineLearner, changed: ChangedRows, answers: Answers
) -> None:
    """Write down that an arm publishes the trainer's present weights."""
    ledger, model = learner.ledger, learner.model
    num_rows = model.items.num_items if arm.number < 0 else len(changed.since(arm.published_step, model))
    num_bytes = num_bytes_of(num_rows, model, learner.row_precision)
    arm.number += 1
    arm.published_ms, arm.published_step = at_ms, ledger.num_steps
    answers.published(arm.name, num_bytes)
    answers.writer.add_publication(
        arm=arm.name,
        version=arm.number,
        time_ms=at_ms,
        num_interactions=ledger.num_interactions,
        watermark_ms=ledger.watermark_ms,
        num_rows=num_rows,
        num_bytes=num_bytes,
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class _OnItsWay:
    visible_ms: int
    snapshot: Snapshot
    who: Answerer


class DelayedArm:
    """One arm whose replica has weights some time after they were published, or whose events come late."""

    def __init__(
        self, learner: OnlineLearner, arm: OnlineArm, changed: ChangedRows, answers: Answers, *, late_ms: int
    ) -> None:
        self._learner, self.arm, self._changed, self._answers = learner, arm, changed, answers
        self._late_ms = late_ms
        self._replica = Replica(learner.model.config)
        self._who = Answerer(arm=arm.name)
        self._on_its_way: deque[_OnItsWay] = deque()
        self._waiting = WaitingQueries()

    def ask(self, queries: Queries, own_histories: OwnHistories, at_ms: int) -> None:
        """Take in a step's queries and answer those that nothing can come before any more."""
        lag_ms = self.arm.histories_lag_ms
        with self._answers.spending([self.arm.name]):
            self._waiting.add(own_histories(lag_ms) if lag_ms or self._late_ms else queries)
            self._settle(at_ms - self._late_ms)

    def after_step(self, at_ms: int, *, is_evaluating: bool) -> None:
        """Publish where that is due."""
        if not self.arm.is_due(at_ms, is_evaluating=is_evaluating):
            return
        with self._answers.spending([self.arm.name]):
            since = self.arm.published_step if self.arm.number >= 0 else None
            ledger = self._learner.ledger
            snapshot = taken_snapshot(
                self._learner.model,
                self._changed,
                step=ledger.num_steps,
                since=since,
                row_precision=self._learner.row_precision,
            )
            note_publication(self.arm, at_ms, self._learner, self._changed, self._answers)
            who = Answerer(arm=self.arm.name, number=self.arm.number, watermark_ms=ledger.watermark_ms)
            visible_ms = at_ms + self.arm.weights_lag_ms
            self._on_its_way.append(_OnItsWay(visible_ms=visible_ms, snapshot=snapshot, who=who))

    def _settle(self, horizon_ms: float) -> None:
        while self._on_its_way and self._on_its_way[0].visible_ms <= horizon_ms:
            first = self._on_its_way.popleft()
            # The last event of a batch was asked about when the batch closed: by the weights of before.
            self._answer_before(first.visible_ms + 1)
            self._replica.apply(first.snapshot)
            self._who = first.who
        if self._waiting.are_many:
            self._answer_before(horizon_ms + 1)

    def _answer_before(self, time_ms: float) -> None:
        asked = self._waiting.take_before(time_ms)
        if asked is None:
            return
        if self._replica.step is None:
            self._answers.nothing(self.arm.name, asked)
        else:
            self._answers.ranked(self._who, asked, rank_queries(self._replica.model, self._replica.catalogue, asked))

    def settle_all(self) -> None:
        """Rank everything that waits, each by what was visible when it was asked.

        A query that comes later still and was asked before is answered by the newest weights of these.
        """
        with self._answers.spending([self.arm.name]):
            self._settle(self._waiting.newest_ms)
            self._answer_before(math.inf)

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Tensors and JSON; nothing waits."""
        tensors = {}
        if self._replica.step is not None:
            tensors = {f"replica.{name}": tensor for name, tensor in self._replica.state().items()}
        on_its_way = []
        for place, one in enumerate(self._on_its_way):
            parts = {"dense": one.snapshot.dense, "rows": one.snapshot.rows.tensors()}
            tensors |= {f"{place}.{part}.{n}": t for part, own in parts.items() for n, t in own.items()}
            manifest = one.snapshot.manifest
            on_its_way.append([one.visible_ms, one.who.number, one.who.watermark_ms, manifest.version, manifest.parent])
        who = [self._who.number, self._who.watermark_ms]
        return tensors, {"arm": self.arm.state(), "who": who, "on_its_way": on_its_way}

    def load_state(self, tensors: dict[str, Tensor], state: dict[str, Any]) -> None:
        """Continue from a ``state``."""

        def part(prefix: str) -> dict[str, Tensor]:
            return {n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)}

        if replica := part("replica."):
            self._replica.load_state(replica)
        self.arm.load_state(state["arm"])
        self._who = Answerer(arm=self.arm.name, number=state["who"][0], watermark_ms=state["who"][1])
        for place, (visible_ms, number, watermark_ms, step, since) in enumerate(state["on_its_way"]):
            snapshot = snapshot_in_memory(
                self._learner.model,
                step=step,
                since=since,
                dense=part(f"{place}.dense."),
                rows=RowBlock.of_tensors(part(f"{place}.rows.")),
            )
            who = Answerer(arm=self.arm.name, number=number, watermark_ms=watermark_ms)
            self._on_its_way.append(_OnItsWay(visible_ms=visible_ms, snapshot=snapshot, who=who))
