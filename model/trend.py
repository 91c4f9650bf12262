"""Decayed popularity in the log domain.

An item's weight at time t is ``sum over its interactions i of 2 ** (-(t - t_i) / half_life)``. Kept as
``L = log sum exp(rate * t_i)`` with ``rate = ln 2 / half_life``, it does not change while nothing happens to the
item: the weight at t is ``exp(L - rate * t)``, and the order of items is the order of L at any time.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor


def decay_rate_per_ms(half_life_s: float) -> float:
    """Rate of the exponential decay, per millisecond."""
    return math.log(2) / (half_life_s * 1000)


def add_interactions(
    log_weight_V: Tensor, rows: NDArray[np.int64], times_ms: NDArray[np.int64], *, rate_per_ms: float
) -> NDArray[np.int64]:
    """Add interactions to log_weight_V (float64[V], in place) in any order; returns the distinct rows touched.

    rows, times_ms: int64[N], epoch milliseconds. Float64 holds ``rate * epoch`` to about 1e-12, far below one
    interaction's effect.
    """
    if len(rows) == 0:
        return rows
    order = np.lexsort((times_ms, rows))
    touched, starts = np.unique(rows[order], return_index=True)
    added = np.logaddexp.reduceat(times_ms[order] * rate_per_ms, starts)
    index = torch.from_numpy(touched)
    log_weight_V[index] = torch.logaddexp(log_weight_V[index], torch.from_numpy(added))
    return touched


def log_popularity(log_weight_V: Tensor, *, as_of_ms: int, rate_per_ms: float, floor: float) -> Tensor:
    """float32[V]: ``log(weight at as_of_ms + floor)``; exactly ``log(floor)`` for an item without interactions."""
    weight_V = torch.exp(log_weight_V - as_of_ms * rate_per_ms)
    return torch.log(weight_V + floor).to(torch.float32)
