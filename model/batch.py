"""What the model reads: histories of several users, packed.

Shapes: B users, L positions in all, P supervised positions.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from kernels.jagged import check_offsets


@dataclass(frozen=True, kw_only=True, slots=True)
class HistoryBatch:
    """The newest interactions of B users in event-time order, at most ModelConfig.max_len each.

    rows_L: int64[L], item table row, -1 for an item the table does not hold (its position reads as zeros).
    timestamps_ms_L: int64[L], when each interaction happened, epoch milliseconds.
    query_times_ms_L: int64[L], when the next one happened, or the time of the request at a newest position.
    offsets: int64[B + 1]. A user without interactions is an empty row and has no output.
    actions_L: int64[L], a bit for each kind of action; values_L: float32[L], NaN where unknown. For encoders that read
    actions (ModelConfig.tokens); None for others.
    """

    rows_L: Tensor
    timestamps_ms_L: Tensor
    query_times_ms_L: Tensor
    offsets: Tensor
    actions_L: Tensor | None = None
    values_L: Tensor | None = None

    def __post_init__(self) -> None:
        for name in ("rows_L", "timestamps_ms_L", "query_times_ms_L", "offsets"):
            tensor: Tensor = getattr(self, name)
            if tensor.dtype != torch.int64 or tensor.dim() != 1:
                raise ValueError(f"{name} must be a flat int64 tensor, got {tensor.dtype} {tuple(tensor.shape)}")
        if not self.rows_L.shape == self.timestamps_ms_L.shape == self.query_times_ms_L.shape:
            raise ValueError("rows_L, timestamps_ms_L and query_times_ms_L must have the same length")
        for name, dtype in (("actions_L", torch.int64), ("values_L", torch.float32)):
            given: Tensor | None = getattr(self, name)
            if given is not None and (given.dtype != dtype or given.shape != self.rows_L.shape):
                raise ValueError(
                    f"{name} must be {dtype}[{self.num_positions}], got {given.dtype} {tuple(given.shape)}"
                )

    def checked(self, *, num_items: int, max_len: int) -> HistoryBatch:
        """Return self after reading the tensors (synchronises the device).

        ValueError if the offsets are inconsistent, a row is longer than max_len, or an item row is none of -1 and
        0 … num_items - 1.
        """
        check_offsets(self.offsets, num_values=self.num_positions, max_len=max_len)
        outside = ((self.rows_L < -1) | (self.rows_L >= num_items)).nonzero()
        if outside.numel():
            place = int(outside[0])
            raise ValueError(f"rows_L[{place}] is {int(self.rows_L[place])}; the table has {num_items} items")
        return self

    @property
    def num_positions(self) -> int:
        """L."""
        return self.rows_L.shape[0]

    def take(self, kept_K: Tensor) -> HistoryBatch:
        """Only these of the L positions, int64[K] ascending."""
        return HistoryBatch(
            rows_L=self.rows_L[kept_K],
            timestamps_ms_L=self.timestamps_ms_L[kept_K],
            query_times_ms_L=self.query_times_ms_L[kept_K],
            offsets=torch.searchsorted(kept_K, self.offsets),
            actions_L=None if self.actions_L is None else self.actions_L[kept_K],
            values_L=None if self.values_L is None else self.values_L[kept_K],
        )

    def last_positions(self) -> Tensor:
        """int64[B]: the newest position of each user, -1 for an empty history."""
        return torch.where(self.offsets.diff() > 0, self.offsets[1:] - 1, -1)


@dataclass(frozen=True, kw_only=True, slots=True)
class Targets:
    """The supervised positions of a batch and the item that came next at each.

    positions_P: int64[P], index into the L packed positions. rows_P: int64[P], row of the next item, all >= 0.
    weights_P: float[P], all > 0, how much each counts in the mean loss; None: all the same.
    """

    positions_P: Tensor
    rows_P: Tensor
    weights_P: Tensor | None = None

    def __post_init__(self) -> None:
        if self.positions_P.shape != self.rows_P.shape or self.positions_P.dim() != 1:
            raise ValueError("positions_P and rows_P must be flat and of the same length")
        if self.weights_P is not None and self.weights_P.shape != self.positions_P.shape:
            raise ValueError("weights_P must be as long as positions_P")

    def take(self, index: Tensor) -> Targets:
        """Those of an index or a mask."""
        weights_P = None if self.weights_P is None else self.weights_P[index]
        return Targets(positions_P=self.positions_P[index], rows_P=self.rows_P[index], weights_P=weights_P)

    def without(self, others: Targets) -> Targets:
        """Those whose positions are none of the others'."""
        return self.take(~torch.isin(self.positions_P, others.positions_P))

    def followed_by(self, others: Targets) -> Targets:
        """These and then the others, both with weights or both without."""
        assert (self.weights_P is None) == (others.weights_P is None)
        return Targets(
            positions_P=torch.cat([self.positions_P, others.positions_P]),
            rows_P=torch.cat([self.rows_P, others.rows_P]),
            weights_P=None
            if self.weights_P is None or others.weights_P is None
            else torch.cat([self.weights_P, others.weights_P]),
        )

    def shares(self) -> Tensor | None:
        """float[P] that sum to 1: the weights as factors of each position's loss. None: all the same."""
        return None if self.weights_P is None else self.weights_P / self.weights_P.sum()
