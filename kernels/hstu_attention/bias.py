"""The relative attention bias: one learned number per distance in places, one per bucket of the gap in time.

Shapes: L packed keys, M packed queries (M = L unless the history is cached), N longest row, K time buckets.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from kernels.jagged import check_numbers

BUCKET_WIDTH = 0.301
"""Width of a time bucket in natural-log seconds: each is 1.35 times as long as the one before."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RelativeBias:
    """What is added to the score of query i and key j of one row, before the activation; shared by all heads.

    ``position_weight[place(j) - place(i) + N - 1] + time_weight[time_bucket(query_timestamps_s[i] - timestamps_s[j])]``

    position_weight: float[2N - 1]. time_weight: float[K + 1]. timestamps_s_L: int64[L], seconds, when the
    interaction at each key happened. query_timestamps_s_M: int64[M], seconds, when the *next* interaction after each
    query (the one to predict) happened. Places: see mask.py. Source: the HSTU research code, see README.md.
    """

    position_weight: Tensor
    time_weight: Tensor
    timestamps_s_L: Tensor
    query_timestamps_s_M: Tensor

    def __post_init__(self) -> None:
        for name in ("timestamps_s_L", "query_timestamps_s_M"):
            times: Tensor = getattr(self, name)
            if times.dtype != torch.int64 or times.dim() != 1:
                raise ValueError(f"{name} must be flat int64 seconds, got {times.dtype} of shape {tuple(times.shape)}")
        for name in ("position_weight", "time_weight"):
            table: Tensor = getattr(self, name)
            if table.dim() != 1 or table.shape[0] == 0 or not table.is_floating_point():
                raise ValueError(f"{name} must be a flat float table, got {table.dtype} of shape {tuple(table.shape)}")

    def checked(self) -> RelativeBias:
        """Return self after reading both tables (synchronises the device); ValueError if one holds a NaN."""
        check_numbers(self.position_weight, name="position_weight")
        check_numbers(self.time_weight, name="time_weight")
        return self

    @property
    def num_buckets(self) -> int:
        """K: the highest bucket; gaps longer than it covers fall into it."""
        return self.time_weight.shape[0] - 1


def time_bucket(gap_s: Tensor, num_buckets: int) -> Tensor:
    """int32, shape of gap_s: ``clamp(int(log(max(|gap|, 1)) / 0.301), 0, num_buckets)`` of int64 seconds.

    The logarithm is taken in float64, where no whole number of seconds lies within rounding of a border, so every
    implementation and device that does the same (or compares with integer thresholds) agrees on the bucket.

    >>> time_bucket(torch.tensor([0, 1, 2, -60, 86_400]), 128).tolist()
    [0, 0, 2, 13, 37]
    """
    return bucket_steps_(gap_s.to(torch.float64), num_buckets).to(torch.int32)


def bucket_steps_(gap_s: Tensor, num_buckets: int) -> Tensor:
    """float64 gaps in seconds turned, in place, into numbers whose whole part is the bucket."""
    longest_s = math.exp(BUCKET_WIDTH * (num_buckets + 0.5))  # anything in the highest bucket: no clamp after the log
    return gap_s.abs_().clamp_(min=1.0, max=longest_s).log_().mul_(1 / BUCKET_WIDTH)
