"""The relative attention bias: one learned number per distance in places, one per bucket of the gap in time.

Shapes: L packed positions, N longest row, K = number of time buckets.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

BUCKET_WIDTH = 0.301
"""Width of a time bucket in natural-log seconds: each is 1.35 times as long as the one before."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RelativeBias:
    """What is added to the score of query i and key j of one row, before the activation; shared by all heads.

    ``position_weight[j - i + N - 1] + time_weight[time_bucket(query_timestamps_s[i] - timestamps_s[j])]``

    position_weight: float[2N - 1]. time_weight: float[K + 1]. timestamps_s_L: int64[L], seconds, when the
    interaction at each position happened. query_timestamps_s_L: int64[L], seconds, when the *next* interaction
    (the one to predict) happened. Source: the HSTU research code, see README.md.
    """

    position_weight: Tensor
    time_weight: Tensor
    timestamps_s_L: Tensor
    query_timestamps_s_L: Tensor

    def __post_init__(self) -> None:
        for name in ("timestamps_s_L", "query_timestamps_s_L"):
            times: Tensor = getattr(self, name)
            if times.dtype != torch.int64 or times.dim() != 1:
                raise ValueError(f"{name} must be int64[L] seconds, got {times.dtype} of shape {tuple(times.shape)}")
        if self.timestamps_s_L.shape != self.query_timestamps_s_L.shape:
            raise ValueError("timestamps_s_L and query_timestamps_s_L must have the same length")

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
    steps = gap_s.abs().clamp_(min=1).to(torch.float64).log_().mul_(1 / BUCKET_WIDTH)
    return steps.clamp_(max=num_buckets).to(torch.int32)
