"""How rows move when items are removed, without a table."""

from __future__ import annotations

import numpy as np
import torch

from model.item_table import RowMoves


def moves_without(gone: list[int], *, num_before: int) -> RowMoves:
    """The last rows that stay move into the places of those that go."""
    num_after = num_before - len(gone)
    sources = np.setdiff1d(np.arange(num_after, num_before), gone)
    return RowMoves(
        sources=torch.from_numpy(sources),
        targets=torch.tensor([row for row in sorted(gone) if row < num_after], dtype=torch.int64),
        num_before=num_before,
        num_after=num_after,
    )
