"""Whether a version answers as the one before did: failures, scores, time. Bounded in memory and in work for an answer.

Versions can come faster than answers. So what came after the last version that passed is judged together, once it has
given enough answers, and passes or is turned away together: the newest contains the others.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

from serving.guard_config import GuardConfig
from serving.queries import NOT_FINITE, Query, Ranking, RankQuery

Floats = NDArray[np.float64]

FAILURES: Final = "failures"
SCORES: Final = "scores"
LATENCY: Final = "latency"

_OUTCOMES: Final = 4_096
_BATCHES: Final = 1_024
_SCORES: Final = 4_096
_SCORES_OF_AN_ANSWER: Final = 10
"""The first so many: longer answers must not weigh more."""
_SCORES_COMPARED: Final = 100
_ORDINARY: Final = 8
_ORDINARY_MIN: Final = 3
_LEFT: Final = 100


class Ring:
    """The newest values."""

    def __init__(self, size: int) -> None:
        self._values, self._count = np.zeros(size), 0

    def add(self, values: Sequence[float] | NDArray[np.float32] | Floats) -> None:
        """Add values, in the place of the oldest; at most as many as the ring holds."""
        places = (self._count + np.arange(len(values))) % len(self._values)
        self._values[places] = values
        self._count += len(values)

    def values(self) -> Floats:
        """A copy of them."""
        return self._values[: min(self._count, len(self._values))].copy()


@dataclass(frozen=True, slots=True)
class Sample:
    """What some versions answered, newest values only."""

    outcomes: Floats
    """1 for a request that the model failed to answer, 0 for one that it answered."""
    batch_ms: Floats
    """The model's time for each micro-batch."""
    scores: Mapping[str, Floats]
    """By kind of request: the best scores of its answers."""


class _Watched:
    """A sample that grows."""

    def __init__(self) -> None:
        self._outcomes, self._batch_ms = Ring(_OUTCOMES), Ring(_BATCHES)
        self._scores = {"recommend": Ring(_SCORES), "rank": Ring(_SCORES)}
        self.num_requests = 0
        self.num_failures = 0

    def add(self, queries: Sequence[Query], rankings: Sequence[Ranking], batch_ms: float) -> None:
        """A micro-batch was answered."""
        num_failed = sum(ranking.fallback_reason == NOT_FINITE for ranking in rankings)
        self._count(len(queries) - num_failed, failed=False)
        self._count(num_failed, failed=True)
        self._batch_ms.add([batch_ms])
        for query, ranking in zip(queries, rankings, strict=True):
            if ranking.fallback_reason is None:
                best = ranking.scores[:_SCORES_OF_AN_ANSWER]
                self._scores["rank" if isinstance(query, RankQuery) else "recommend"].add(best[np.isfinite(best)])

    def add_failed(self, num_requests: int) -> None:
        """A micro-batch could not be answered."""
        self._count(num_requests, failed=True)

    def add_sample(self, sample: Sample) -> None:
        """Everything of another sample, as newer than what is here."""
        self._outcomes.add(sample.outcomes)
        self._batch_ms.add(sample.batch_ms)
        for kind, scores in sample.scores.items():
            self._scores[kind].add(scores)
        self.num_requests += len(sample.outcomes)

    def sample(self) -> Sample:
        """A copy of what is here."""
        scores = {kind: ring.values() for kind, ring in self._scores.items()}
        return Sample(self._outcomes.values(), self._batch_ms.values(), scores)

    def _count(self, num_requests: int, *, failed: bool) -> None:
        self._outcomes.add(np.full(num_requests, float(failed)))
        self.num_requests += num_requests
        self.num_failures += num_requests * failed


@dataclass(frozen=True, kw_only=True, slots=True)
class Case:
    """What is to be judged."""

    versions: tuple[int, ...]
    """Oldest first."""
    against: int | None
    """The last version that passed; None at first, and then nothing can be compared."""
    before: Sample
    after: Sample
    ordinary: tuple[float, ...]
    """Distances of the scores of the last versions that passed."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Judgement:
    """What came of a case."""

    case: Case
    guard: str | None
    """The guard that tripped; None: passed."""
    sentence: str
    evidence: dict[str, float]

    @property
    def distance(self) -> float | None:
        """How far the scores moved, if that could be compared."""
        return self.evidence.get("score_distance")


def judge(config: GuardConfig, case: Case) -> Judgement:
    """Compare what the versions answered with what was answered before."""
    if case.against is None or len(case.before.outcomes) < config.answers_min:
        return Judgement(case=case, guard=None, sentence="there is nothing to compare with", evidence={})
    evidence = {"answers": float(len(case.after.outcomes)), "answers_before": float(len(case.before.outcomes))}
    tripped = [
        found
        for found in (
            _failures(config, case, evidence),
            _scores(config, case, evidence),
            _latency(config, case, evidence),
        )
        if found is not None
    ]
    guard, sentence = tripped[0] if tripped else (None, "as before")
    return Judgement(case=case, guard=guard, sentence=sentence, evidence=evidence)


def _failures(config: GuardConfig, case: Case, evidence: dict[str, float]) -> tuple[str, str] | None:
    before, after = float(case.before.outcomes.mean()), float(case.after.outcomes.mean())
    evidence |= {"failure_share": after, "failure_share_before": before}
    if after - before <= config.failure_share_max:
        return None
    return FAILURES, f"{after:.1%} of requests failed, {before:.1%} before (guards.failure_share_max)"


def _scores(config: GuardConfig, case: Case, evidence: dict[str, float]) -> tuple[str, str] | None:
    distances = {
        kind: ks_distance(case.before.scores[kind], case.after.scores[kind])
        for kind in case.after.scores
        if min(len(case.before.scores[kind]), len(case.after.scores[kind])) >= _SCORES_COMPARED
    }
    if not distances:
        return None
    kind = max(distances, key=lambda one: distances[one])
    evidence |= {
        "score_distance": distances[kind],
        "score_mean": float(case.after.scores[kind].mean()),
        "score_mean_before": float(case.before.scores[kind].mean()),
    }
    if len(case.ordinary) < _ORDINARY_MIN:
        return None
    limit = max(config.score_distance_max, 2 * max(case.ordinary))
    evidence["score_distance_max"] = limit
    if distances[kind] <= limit:
        return None
    return SCORES, f"scores of {kind} moved by {distances[kind]:.2f}, at most {limit:.2f} is ordinary"


def _latency(config: GuardConfig, case: Case, evidence: dict[str, float]) -> tuple[str, str] | None:
    if not len(case.before.batch_ms) or not len(case.after.batch_ms):
        return None
    before, after = (float(np.quantile(one.batch_ms, 0.9)) for one in (case.before, case.after))
    evidence |= {"batch_ms_p90": after, "batch_ms_p90_before": before}
    if after <= config.latency_ms_min or after <= config.latency_ratio_max * before:
        return None
    return LATENCY, f"a micro-batch takes {after:.0f} ms (p90), {before:.0f} ms before (guards.latency_ratio_max)"


def ks_distance(one: Floats, other: Floats) -> float:
    """Largest distance between the cumulative distributions of two samples (Kolmogorov-Smirnov statistic)."""
    one, other = np.sort(one), np.sort(other)
    at = np.concatenate([one, other])
    shares = [np.searchsorted(sample, at, side="right") / len(sample) for sample in (one, other)]
    return float(np.abs(shares[0] - shares[1]).max())


class SwapGuards:
    """What the guards have seen. For the model thread alone."""

    def __init__(self, config: GuardConfig) -> None:
        self._config = config
        self._before, self._after = _Watched(), _Watched()
        self._suspects: list[int] = []
        self._left: deque[int] = deque(maxlen=_LEFT)
        self._ordinary: deque[float] = deque(maxlen=_ORDINARY)
        self.good: int | None = None
        """The last version that passed."""

    @property
    def suspects(self) -> tuple[int, ...]:
        """Versions that have answered and not passed yet, in order of their first answer."""
        return tuple(self._suspects)

    def answered(self, version: int, queries: Sequence[Query], rankings: Sequence[Ranking], batch_ms: float) -> None:
        """A version answered a micro-batch."""
        if version not in self._left:
            self._watched(version).add(queries, rankings, batch_ms)

    def failed(self, version: int, num_requests: int) -> None:
        """A version could not answer a micro-batch."""
        if version not in self._left:
            self._watched(version).add_failed(num_requests)

    def due(self) -> Case | None:
        """What can be judged now. A version that has failed more often than all its answers may is judged at once."""
        enough = self._config.answers_min
        failed_enough = self._after.num_failures > self._config.failure_share_max * enough
        if not self._suspects or (self._after.num_requests < enough and not failed_enough):
            return None
        return Case(
            versions=self.suspects,
            against=self.good,
            before=self._before.sample(),
            after=self._after.sample(),
            ordinary=tuple(self._ordinary),
        )

    def passed(self, judgement: Judgement) -> None:
        """What was judged is what later versions are compared with, beside what came before it."""
        case = judgement.case
        if judgement.distance is not None:
            self._ordinary.append(judgement.distance)
        self.good = case.versions[-1]
        self._before.add_sample(case.after)
        self._start_anew([version for version in self._suspects if version not in case.versions])

    def turned_away(self) -> None:
        """The worker goes back to the version that passed; what the others answer until then tells nothing new."""
        self._left.extend(self._suspects)
        self._start_anew([])

    def _start_anew(self, suspects: list[int]) -> None:
        self._suspects, self._after = suspects, _Watched()

    def _watched(self, version: int) -> _Watched:
        if version == self.good:
            return self._before
        if version not in self._suspects:
            self._suspects.append(version)
        return self._after
