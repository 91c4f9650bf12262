"""Two runs side by side: the arms that both have, what differs in how they were made, and whether it shows.

Runs that asked the same queries (the same events, users and items, in the same order) are compared query by query:
differences are paired. Others are compared as independent samples, whose intervals are wider.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final

import numpy as np
import polars as pl
from numpy.typing import NDArray

from backtest.bootstrap import BootstrapConfig, Estimate, Resampled, resample, time_blocks
from backtest.errors import RunFolderError
from backtest.evaluation import METRICS, arm_values
from backtest.run_files import RunFolder

Float64s = NDArray[np.float64]

_ASKED: Final = ("event", "user_id", "item_id")
"""What makes two queries the same."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ArmComparison:
    """One arm of both runs; metric → estimate."""

    arm: str
    first: dict[str, Estimate]
    second: dict[str, Estimate]
    difference: dict[str, Estimate]
    """Of the second minus the first."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Setting:
    """A setting or a fact of lineage that differs; None where a run does not have it."""

    name: str
    first: Any
    second: Any


@dataclass(frozen=True, kw_only=True, slots=True)
class Comparison:
    """Two runs."""

    is_paired: bool
    num_queries: tuple[int, int]
    arms: list[ArmComparison]
    only_first: list[str]
    """Arms that the second run does not have."""
    only_second: list[str]
    settings: list[Setting]


def compare(first: RunFolder, second: RunFolder, config: BootstrapConfig) -> Comparison:
    """Raises RunFolderError for runs without a common arm, or without queries."""
    names = [arm.name for arm in first.manifest.arms], [arm.name for arm in second.manifest.arms]
    common = [name for name in names[0] if name in names[1]]
    if not common:
        raise RunFolderError(
            f"{first.root} and {second.root} have no arm in common: {', '.join(names[0])} against {', '.join(names[1])}"
        )
    queries = [run.queries().collect() for run in (first, second)]
    for run, asked in zip((first, second), queries, strict=True):
        if not asked.height:
            raise RunFolderError(f"{run.root}: nothing was evaluated yet; let the run go on")
    is_paired = queries[0].select(_ASKED).equals(queries[1].select(_ASKED))
    # The same seed draws the same blocks for both; independent samples must not share their draws.
    seeds = (config.seed, config.seed if is_paired else config.seed + 1)
    found = [
        _resampled(run, asked, common, replace(config, seed=seed))
        for run, asked, seed in zip((first, second), queries, seeds, strict=True)
    ]
    return Comparison(
        is_paired=is_paired,
        num_queries=(queries[0].height, queries[1].height),
        arms=[_arm(name, place, found) for place, name in enumerate(common)],
        only_first=[name for name in names[0] if name not in common],
        only_second=[name for name in names[1] if name not in common],
        settings=list(_different_settings(first, second)),
    )


def _resampled(run: RunFolder, queries: pl.DataFrame, arms: Sequence[str], config: BootstrapConfig) -> Resampled:
    """Statistics in the order arm, metric."""
    if config.resample == "user":
        block_N = np.unique(queries["user_id"].to_numpy(), return_inverse=True)[1]
    else:
        block_N = time_blocks(queries["event_time_ms"].to_numpy(), config.num_blocks)
    num_blocks = int(block_N.max()) + 1
    sums = [
        np.bincount(block_N, value_N, minlength=num_blocks)
        for name in arms
        for value_N in arm_values(run, name, queries["event"].to_numpy())
    ]
    counts = np.bincount(block_N, minlength=num_blocks).astype(np.float64)
    return resample(np.stack(sums), np.broadcast_to(counts, (len(sums), num_blocks)), config)


def _arm(name: str, place: int, found: Sequence[Resampled]) -> ArmComparison:
    at = {metric: place * len(METRICS) + number for number, metric in enumerate(METRICS)}
    return ArmComparison(
        arm=name,
        first={metric: found[0].estimate(one) for metric, one in at.items()},
        second={metric: found[1].estimate(one) for metric, one in at.items()},
        difference={metric: found[1].minus(one, found[0], one) for metric, one in at.items()},
    )


def _different_settings(first: RunFolder, second: RunFolder) -> Iterator[Setting]:
    ours, theirs = (
        {
            **_flat(run.manifest.config, ""),
            **_flat(run.manifest.lineage, "lineage"),
            "seed": run.manifest.seed,
            "is_complete": run.manifest.is_complete,
        }
        for run in (first, second)
    )
    for name in sorted(ours.keys() | theirs.keys()):
        if ours.get(name) != theirs.get(name):
            yield Setting(name=name, first=ours.get(name), second=theirs.get(name))


def _flat(values: Mapping[str, Any], prefix: str) -> dict[str, Any]:
    """Nested tables → dotted keys."""
    flat: dict[str, Any] = {}
    for name, value in values.items():
        key = f"{prefix}.{name}" if prefix else name
        flat |= _flat(value, key) if isinstance(value, Mapping) else {key: value}
    return flat
