"""Intervals of metrics and of their differences between arms, by resampling blocks of the stream.

All arms answered the same queries, so a resample takes the same blocks for all of them: differences are *paired*, and
what makes a day easy or hard for everyone cancels.

Blocks are spans of *time* by default. What varies in a stream is the state that all users share at a moment: the
weights, the catalogue, what is popular. Errors of one hour are errors of all its users, so resampling users would take
an hour's luck for thousands of independent observations and give intervals that are too narrow. `user` blocks are for
streams without drift and for questions about users.

Shapes: S statistics, B blocks, R resamples.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, Literal

import numpy as np
from numpy.typing import NDArray

Float64s = NDArray[np.float64]
Int64s = NDArray[np.int64]

_WEIGHTS_MAX: Final = 20_000_000
"""Weights drawn at a time: 160 MB."""


@dataclass(frozen=True, kw_only=True, slots=True)
class BootstrapConfig:
    """How intervals are made."""

    resample: Literal["time", "user"] = "time"
    """What a block is."""
    num_blocks: int = 100
    """Blocks of equal time, for `time`; longer ones keep more of what hangs together within them."""
    num_resamples: int = 2_000
    """More give steadier interval ends."""
    level: float = 0.95
    """Coverage that an interval aims at."""
    seed: int = 0
    """The same seed gives the same intervals."""

    def __post_init__(self) -> None:
        if self.resample not in {"time", "user"}:
            raise ValueError(f"resample = {self.resample}: time or user")
        if not 10 <= self.num_blocks <= 10_000:
            raise ValueError(f"num_blocks = {self.num_blocks}: must lie in 10..10,000")
        if not 100 <= self.num_resamples <= 100_000:
            raise ValueError(f"num_resamples = {self.num_resamples}: must lie in 100..100,000")
        if not 0.5 <= self.level < 1:
            raise ValueError(f"level = {self.level}: must lie in 0.5..1")


@dataclass(frozen=True, slots=True)
class Estimate:
    """A mean and its interval; None where there was nothing to measure."""

    mean: float | None
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True, slots=True)
class Resampled:
    """Means of S statistics, and of their resamples with the same blocks for all."""

    mean_S: Float64s
    mean_RS: Float64s
    level: float

    def estimate(self, statistic: int) -> Estimate:
        """Of one statistic."""
        return self._estimate(self.mean_S[statistic], self.mean_RS[:, statistic])

    def difference(self, statistic: int, other: int) -> Estimate:
        """Of one statistic minus another, paired."""
        return self.minus(statistic, self, other)

    def minus(self, statistic: int, others: Resampled, other: int) -> Estimate:
        """Of one statistic minus one of `others`: paired if the same seed drew the same blocks for both."""
        return self._estimate(
            self.mean_S[statistic] - others.mean_S[other], self.mean_RS[:, statistic] - others.mean_RS[:, other]
        )

    def _estimate(self, mean: float, mean_R: Float64s) -> Estimate:
        if not np.isfinite(mean):
            return Estimate(None)
        known_R = mean_R[np.isfinite(mean_R)]
        tail = (1 - self.level) / 2
        low, high = np.quantile(known_R, [tail, 1 - tail]) if len(known_R) else (np.nan, np.nan)
        return Estimate(float(mean), float(low), float(high))


def resample(sum_SB: Float64s, count_SB: Float64s, config: BootstrapConfig) -> Resampled:
    """Means sum/count over all blocks, and over blocks drawn with replacement.

    sum_SB: of a statistic's values in each block; count_SB: how many there were.
    """
    num_blocks = sum_SB.shape[1]
    rng = np.random.default_rng(config.seed)
    step = max(_WEIGHTS_MAX // max(num_blocks, 1), 1)
    means = []
    with np.errstate(invalid="ignore", divide="ignore"):
        for first in range(0, config.num_resamples, step):
            size = min(step, config.num_resamples - first)
            # How often each block is drawn: what drawing their indices and counting them would give.
            weight_RB = rng.multinomial(num_blocks, np.full(num_blocks, 1 / num_blocks), size).astype(np.float64)
            means.append((weight_RB @ sum_SB.T) / (weight_RB @ count_SB.T))
        return Resampled(sum_SB.sum(1) / count_SB.sum(1), np.concatenate(means), config.level)


def time_blocks(time_ms_N: Int64s, num_blocks: int) -> Int64s:
    """i64[N]: number of the block of equal time that each query lies in. Blocks without queries have no number."""
    if not len(time_ms_N):
        return time_ms_N
    first = int(time_ms_N.min())
    span = max(int(time_ms_N.max()) - first + 1, 1)
    return np.unique((time_ms_N - first) * num_blocks // span, return_inverse=True)[1].astype(np.int64)
