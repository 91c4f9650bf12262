"""Finding the best items of the catalogue for a state: the seam where an approximate index can take the place of the
exact search.

Shapes: U states, V rows of the catalogue, R rows to choose from, D embedding width, K items wanted.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kernels.jagged import JaggedTensor
from kernels.top_k import TopK, top_k
from serving.weights import ServedWeights

Int64s = NDArray[np.int64]


class ItemSearch(Protocol):
    """Searches the catalogue of the weights in service; used by the model thread only."""

    def best(self, u_UD: Tensor, k: int, *, left_out: Sequence[Int64s]) -> TopK:
        """The k best items that may be recommended, for each state, without its rows left out (any order, repeats and
        -1 allowed). Scores are exactly those of the model; an approximate search may miss items.
        """


class ExactSearch:
    """Scores every item, a chunk of the catalogue at a time."""

    def __init__(self, weights: ServedWeights) -> None:
        self._weights = weights

    def best(self, u_UD: Tensor, k: int, *, left_out: Sequence[Int64s]) -> TopK:
        """See ItemSearch."""
        offsets = np.concatenate([[0], np.cumsum([len(rows) for rows in left_out])])
        excluded = JaggedTensor(
            values=torch.from_numpy(np.concatenate(left_out)),
            offsets=torch.from_numpy(offsets),
            max_len=int(offsets[-1]),
        )
        recommendable = self._weights.recommendable()
        return top_k(
            u_UD,
            recommendable.unit_VD,
            k,
            scale=self._weights.recommender.scale,
            offset_V=recommendable.offset_V,
            excluded=excluded,
        )


def best_of(weights: ServedWeights, rows: Int64s, u_UD: Tensor, k: int) -> TopK:
    """The k best of these rows (int64[R], ascending) that may be recommended, exactly."""
    chosen_R, recommendable = torch.from_numpy(rows), weights.recommendable()
    found = top_k(
        u_UD,
        recommendable.unit_VD[chosen_R],
        k,
        scale=weights.recommender.scale,
        offset_V=recommendable.offset_V[chosen_R],
    )
    # A place of -1 says that no row is left: the last row stands there, with a score of -inf.
    return found if len(rows) == 0 else TopK(scores_BK=found.scores_BK, rows_BK=chosen_R[found.rows_BK])
