"""How what is measured grows with the length of a row, and how many pairs a mask leaves of it."""

from __future__ import annotations

import math
from collections.abc import Sequence

from kernels.hstu_attention import AttentionMask


def exponent(points: Sequence[tuple[float, float]]) -> float:
    """p of cost ~ length^p, by least squares on (length, cost): 1 is linear, 2 is quadratic. At least two lengths."""
    logs = [(math.log(length), math.log(cost)) for length, cost in points]
    x_mean, y_mean = (sum(values) / len(logs) for values in zip(*logs, strict=True))
    slope: float = sum((x - x_mean) * (y - y_mean) for x, y in logs) / sum((x - x_mean) ** 2 for x, _ in logs)
    return slope


def visible_pairs(mask: AttentionMask, length: int) -> int:
    """Pairs of a query and a key that it sees, in a row without targets or contextual positions."""
    window = length if mask.max_attn_len is None else mask.max_attn_len
    pairs = 0
    for i in range(length):
        if i <= window or i >= length - mask.min_full_attn_len:
            pairs += i + 1
        else:  # itself, the window before it, and the oldest that are not in the window
            pairs += 1 + window + min(mask.num_oldest_keys, i - window)
    return pairs
