"""What a run shows: every arm on the same queries, in the order of the stream, with paired intervals.

Global time: nothing of a query's own moment or later was known to any arm, and all arms answered the same queries.
One pass over the files of each arm; memory for the columns of one arm and the sums of its blocks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Final

import numpy as np
import polars as pl
from numpy.typing import NDArray

from backtest.bootstrap import BootstrapConfig, Estimate, Resampled, resample, time_blocks
from backtest.errors import RunFolderError
from backtest.list_evaluation import ListMetrics, list_metrics
from backtest.metrics import RANK_METRICS, catalogue_aucs
from backtest.run_files import ArmCosts, ArmInfo, RunFolder
from model.ranking import MISS_RANK
from online_trainer.prequential import ALL, ITEM_KINDS, USER_KINDS

Float64s = NDArray[np.float64]
Int64s = NDArray[np.int64]

METRICS: Final = (*RANK_METRICS, "auc")
GROUPS: Final = (ALL, *ITEM_KINDS, *USER_KINDS)


@dataclass(frozen=True, kw_only=True, slots=True)
class EvaluationConfig:
    """How a run is evaluated."""

    bootstrap: BootstrapConfig = field(default_factory=BootstrapConfig)
    reference: str | None = None
    """Arm that the others are compared with; None: the freshest online arm, of those the run's own model, or the
    first."""
    num_points: int = 60
    """Points of a curve: spans of equal time."""

    def __post_init__(self) -> None:
        if not 10 <= self.num_points <= 2_000:
            raise ValueError(f"num_points = {self.num_points}: must lie in 10..2,000")


@dataclass(frozen=True, kw_only=True, slots=True)
class ArmEvaluation:
    """One arm."""

    info: ArmInfo
    metrics: dict[str, dict[str, Estimate]]
    """group → metric → mean and interval."""
    num_queries: dict[str, int]
    """By group."""
    against_reference: dict[str, Estimate]
    """metric → difference to the reference arm over all queries, paired; empty for the reference itself."""
    share_unanswered: float
    """Queries before the arm's first publication: misses."""
    weights_age_p50_ms: float | None
    weights_age_p95_ms: float | None
    lists: ListMetrics | None
    costs: ArmCosts


@dataclass(frozen=True, kw_only=True, slots=True)
class AblationPoint:
    """One arm of a freshness curve."""

    arm: str
    age_ms: int | None
    """Δ, or the lag; None: never."""
    metrics: dict[str, Estimate]
    against_freshest: dict[str, Estimate]
    """Difference to the curve's freshest arm, paired."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Evaluation:
    """All of it."""

    reference: str
    num_queries: int
    arms: list[ArmEvaluation]
    ablations: dict[str, list[AblationPoint]]
    """`publish_every`, `weights_lag`, `histories_lag` → points, the freshest first."""
    curves: pl.DataFrame
    """arm, time_ms (start of a span of equal time), metric, count, mean: over all queries of the span."""

    def arm(self, name: str) -> ArmEvaluation:
        """By name."""
        return next(one for one in self.arms if one.info.name == name)


@dataclass(frozen=True, slots=True)
class _Queries:
    event_N: Int64s
    time_ms_N: Int64s
    user_N: Int64s
    item_N: Int64s
    in_group_GN: NDArray[np.bool_]


@dataclass(frozen=True, slots=True)
class _ArmSums:
    """Sums over blocks: sum_GMB, count_GB; over the points of curves: sum_MT; and what is no mean of a metric."""

    sum_GMB: Float64s
    count_GB: Float64s
    point_sum_MT: Float64s
    share_unanswered: float
    age_ms: tuple[float | None, float | None]


def evaluate(run: RunFolder, config: EvaluationConfig) -> Evaluation:
    """Raises RunFolderError for a run without queries, ValueError for a reference that it does not have."""
    names = [arm.name for arm in run.manifest.arms]
    reference = _reference(run.manifest.arms, config.reference)
    queries = _queries(run)
    blocks_N, num_blocks = _blocks(queries, config.bootstrap)
    points_N, starts_ms_T = _points(queries.time_ms_N, config.num_points)
    count_T = np.bincount(points_N, minlength=len(starts_ms_T))
    sums = [_arm_sums(run, name, queries, (blocks_N, num_blocks), (points_N, len(starts_ms_T))) for name in names]
    statistics = _Statistics(names, resample(*_stacked(sums), config.bootstrap))
    lists = list_metrics(run, reference, (queries.event_N, queries.user_N, queries.item_N))
    arms = [
        ArmEvaluation(
            info=info,
            metrics={group: statistics.of(info.name, group) for group in GROUPS},
            num_queries=dict(zip(GROUPS, one.count_GB.sum(1).astype(int).tolist(), strict=True)),
            against_reference=statistics.difference(info.name, reference) if info.name != reference else {},
            share_unanswered=one.share_unanswered,
            weights_age_p50_ms=one.age_ms[0],
            weights_age_p95_ms=one.age_ms[1],
            lists=lists.get(info.name),
            costs=run.manifest.costs.get(info.name, ArmCosts()),
        )
        for info, one in zip(run.manifest.arms, sums, strict=True)
    ]
    return Evaluation(
        reference=reference,
        num_queries=len(queries.event_N),
        arms=arms,
        ablations=_ablations(run.manifest.arms, statistics),
        curves=pl.concat([_curve(name, one, starts_ms_T, count_T) for name, one in zip(names, sums, strict=True)]),
    )


def _reference(arms: Sequence[ArmInfo], asked: str | None) -> str:
    names = [arm.name for arm in arms]
    if asked is not None:
        if asked not in names:
            raise ValueError(f"reference = {asked}: the run has {', '.join(names)}")
        return asked
    online = [arm for arm in arms if arm.kind == "online" and arm.publish_every_ms is not None]

    def staleness(arm: ArmInfo) -> tuple[int, int | None, bool, bool]:
        # Of equally fresh ones the run's own model, not a variant; then one that was named.
        is_variant = any(isinstance(value, dict) for value in arm.settings.values())
        lag_ms = arm.weights_lag_ms + arm.histories_lag_ms
        return lag_ms, arm.publish_every_ms, is_variant, arm.ablation is not None

    return min(online, key=staleness, default=arms[0]).name


def _queries(run: RunFolder) -> _Queries:
    frame = run.queries().collect()
    if not frame.height:
        raise RunFolderError(f"{run.root}: nothing was evaluated yet; let the run go on")
    item_kind, user_kind = frame["item_kind"].to_numpy(), frame["user_kind"].to_numpy()
    return _Queries(
        event_N=frame["event"].to_numpy(),
        time_ms_N=frame["event_time_ms"].to_numpy(),
        user_N=frame["user_id"].to_numpy(),
        item_N=frame["item_id"].to_numpy(),
        in_group_GN=np.stack(
            [
                np.ones(frame.height, bool),
                *(item_kind == kind for kind in range(len(ITEM_KINDS))),
                *(user_kind == kind for kind in range(len(USER_KINDS))),
            ]
        ),
    )


def _blocks(queries: _Queries, config: BootstrapConfig) -> tuple[Int64s, int]:
    if config.resample == "user":
        blocks_N = np.unique(queries.user_N, return_inverse=True)[1].astype(np.int64)
    else:
        blocks_N = time_blocks(queries.time_ms_N, config.num_blocks)
    return blocks_N, int(blocks_N.max()) + 1


def _points(time_ms_N: Int64s, num_points: int) -> tuple[Int64s, Int64s]:
    """Number of each query's span, and where the spans start; late queries may lie in an earlier span."""
    first, last = int(time_ms_N.min()), int(time_ms_N.max())
    width = max(-(-(last - first + 1) // num_points), 1)
    starts_ms = np.arange(first, last + 1, width)
    return (time_ms_N - first) // width, starts_ms


def _arm_sums(
    run: RunFolder, name: str, queries: _Queries, blocks: tuple[Int64s, int], points: tuple[Int64s, int]
) -> _ArmSums:
    value_MN = arm_values(run, name, queries.event_N)
    frame = run.ranks(name).select("version", "weights_age_ms").collect()
    index_N, num_blocks = blocks
    sum_GMB = np.empty((len(GROUPS), len(METRICS), num_blocks))
    count_GB = np.empty((len(GROUPS), num_blocks))
    for group, is_in_N in enumerate(queries.in_group_GN):
        inside = index_N[is_in_N]
        count_GB[group] = np.bincount(inside, minlength=num_blocks)
        for metric, value_N in enumerate(value_MN):
            sum_GMB[group, metric] = np.bincount(inside, value_N[is_in_N], minlength=num_blocks)
    point_N, num_points = points
    ages = frame["weights_age_ms"].drop_nulls()
    return _ArmSums(
        sum_GMB=sum_GMB,
        count_GB=count_GB,
        point_sum_MT=np.stack([np.bincount(point_N, value_N, minlength=num_points) for value_N in value_MN]),
        share_unanswered=float((frame["version"] < 0).mean() or 0.0),  # type: ignore[arg-type]  # of booleans
        age_ms=(ages.quantile(0.5), ages.quantile(0.95)),
    )


def arm_values(run: RunFolder, name: str, event_N: Int64s) -> Float64s:
    """float64[M, N]: each of METRICS for each query. Raises RunFolderError if the arm's ranks are of other queries."""
    frame = run.ranks(name).select("event", "rank", "num_candidates").collect()
    if frame.height != len(event_N) or not (frame["event"].to_numpy() == event_N).all():
        raise RunFolderError(
            f"{run.root}: the ranks of arm {name} are not those of the queries; run the backtest again"
        )
    rank_N = frame["rank"].to_numpy()
    auc_N = np.where(rank_N < MISS_RANK, catalogue_aucs(rank_N, frame["num_candidates"].to_numpy()), 0.0)
    return np.stack([*(of(rank_N) for of in RANK_METRICS.values()), auc_N])


def _stacked(sums: Sequence[_ArmSums]) -> tuple[Float64s, Float64s]:
    """Statistics × blocks, in the order arm, group, metric."""
    sum_AGMB = np.stack([one.sum_GMB for one in sums])
    count_AGMB = np.broadcast_to(np.stack([one.count_GB for one in sums])[:, :, None, :], sum_AGMB.shape)
    num_blocks = sum_AGMB.shape[-1]
    return sum_AGMB.reshape(-1, num_blocks), count_AGMB.reshape(-1, num_blocks)


@dataclass(frozen=True, slots=True)
class _Statistics:
    arms: Sequence[str]
    resampled: Resampled

    def _of(self, arm: str, group: str) -> Iterator[tuple[str, int]]:
        first = (self.arms.index(arm) * len(GROUPS) + GROUPS.index(group)) * len(METRICS)
        return ((metric, first + place) for place, metric in enumerate(METRICS))

    def of(self, arm: str, group: str = ALL) -> dict[str, Estimate]:
        return {metric: self.resampled.estimate(at) for metric, at in self._of(arm, group)}

    def difference(self, arm: str, other: str) -> dict[str, Estimate]:
        """Over all queries."""
        pairs = zip(self._of(arm, ALL), self._of(other, ALL), strict=True)
        return {metric: self.resampled.difference(at, at_other) for (metric, at), (_, at_other) in pairs}


def _ablations(arms: Sequence[ArmInfo], statistics: _Statistics) -> dict[str, list[AblationPoint]]:
    ages: dict[str, Callable[[ArmInfo], int | None]] = {
        "publish_every": lambda arm: arm.publish_every_ms,
        "weights_lag": lambda arm: arm.weights_lag_ms,
        "histories_lag": lambda arm: arm.histories_lag_ms,
    }
    found = {}
    for kind, age_of in ages.items():
        on_curve = [arm for arm in arms if arm.ablation == kind]
        if on_curve and kind != "publish_every":
            # What the lags are measured against: an arm like theirs without any.
            on_curve += [arm for arm in arms if _is_without_lag(arm, on_curve[0])][:1]
        if len(on_curve) > 1:  # one point is no curve
            # None: never published again, the oldest of all.
            on_curve.sort(key=lambda arm, age_of=age_of: (age_of(arm) is None, age_of(arm) or 0))  # type: ignore[misc]
            freshest = on_curve[0].name
            found[kind] = [
                AblationPoint(
                    arm=arm.name,
                    age_ms=age_of(arm),
                    metrics=statistics.of(arm.name),
                    against_freshest=statistics.difference(arm.name, freshest) if arm.name != freshest else {},
                )
                for arm in on_curve
            ]
    return found


def _is_without_lag(arm: ArmInfo, other: ArmInfo) -> bool:
    is_alike = (arm.kind, arm.publish_every_ms) == (other.kind, other.publish_every_ms)
    return is_alike and arm.weights_lag_ms == arm.histories_lag_ms == 0 and arm.ablation in {None, "publish_every"}


def _curve(name: str, sums: _ArmSums, starts_ms_T: Int64s, count_T: Int64s) -> pl.DataFrame:
    is_there_T = count_T > 0
    frames = [
        pl.DataFrame(
            {
                "arm": name,
                "time_ms": starts_ms_T[is_there_T],
                "metric": metric,
                "count": count_T[is_there_T],
                "mean": sum_T[is_there_T] / count_T[is_there_T],
            }
        )
        for metric, sum_T in zip(METRICS, sums.point_sum_MT, strict=True)
    ]
    return pl.concat(frames)
