"""What a ranking by true probabilities is expected to score: the best that any model can do."""

from __future__ import annotations

from typing import Final

import numpy as np
from numpy.typing import NDArray

CUTOFF_HR: Final = 10
DISCOUNTS: Final[NDArray[np.float64]] = 1.0 / np.log2(np.arange(2, 22))
"""[20] gain of ranks 1 to 20 in NDCG@20."""
DISCOUNTS_SUM: Final[NDArray[np.float64]] = np.concatenate([[0.0], DISCOUNTS.cumsum()])
"""[21] sum of the first n gains."""


def ideal_scores(probability_V: NDArray[np.float64]) -> tuple[float, float]:
    """Expected HR@10 and NDCG@20 of ranking by ``probability_V`` when the next item is drawn from it.

    >>> ideal_scores(np.array([0.75, 0.25]))[0]
    1.0
    """
    num = min(len(DISCOUNTS), len(probability_V))
    top = -np.sort(-np.partition(probability_V, len(probability_V) - num)[-num:])
    return float(top[:CUTOFF_HR].sum()), float(top @ DISCOUNTS[:num])
