"""Learning once more from what happened since a change, while the histories that hold it are at hand anyway.

Shapes: L packed positions, B users, P supervised positions.
"""

from __future__ import annotations

import torch
from torch import Tensor

from model.batch import HistoryBatch, Targets


def rehearsal_targets(
    history: HistoryBatch, targets: Targets, is_in_order_L: Tensor, *, since_ms: int, weight_L: Tensor | None = None
) -> Targets:
    """Every position whose next interaction is known and happened after `since_ms`, those of `targets` included.

    `history` and `targets`: of a step, where only the new interactions are targets. Items that are unknown (row -1) are
    left out, and so is what was overtaken (bool[L], `Examples.is_in_order`): its history holds what nobody knew then.
    weight_L: float[L], how much the interaction after each position counts, 0: not at all; None: all the same.
    """
    next_rows_L = torch.cat([history.rows_L[1:], history.rows_L.new_full((1,), -1)])
    # The last position of a user is followed by someone else's first; what really follows is a target, if anything.
    next_rows_L[history.offsets[1:][history.offsets.diff() > 0] - 1] = -1
    next_rows_L[targets.positions_P] = targets.rows_P
    is_recent_L = is_in_order_L & (history.query_times_ms_L > since_ms)
    is_recent_L[targets.positions_P] = True
    is_target_L = (next_rows_L >= 0) & is_recent_L
    if weight_L is not None:
        is_target_L = is_target_L & (weight_L > 0)
    positions_P = is_target_L.nonzero()[:, 0]
    return Targets(
        positions_P=positions_P,
        rows_P=next_rows_L[positions_P],
        weights_P=None if weight_L is None else weight_L[positions_P],
    )
