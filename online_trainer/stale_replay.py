"""Learning again from older interactions of a step's own histories: what has not come for long is not forgotten.

The histories that a step reads hold them anyway, as of its place in the stream: nothing later can leak in, nothing more
is read or stored, and no user's id gets into a checkpoint. Replayed positions are neither tested nor counted as
supervised.

Shapes: P positions that could be learned from again.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from model.batch import Targets
from model.item_table import RowMoves


class StaleReplay:
    """Chooses what is replayed: the longer an item has not been learned, the likelier an interaction with it.

    Keeps for each row of the item table the event time as of which it was last a target, new or replayed.
    """

    def __init__(self) -> None:
        self._learned_ms = torch.zeros(0, dtype=torch.int64)

    def choose(self, older: Targets, count: int, *, now_ms: int, generator: torch.Generator) -> Targets:
        """``count`` of the positions that a step could learn from again, or all of them where there are no more.

        A weighted draw without replacement, the weight being the time since a position's item was last learned, up to
        now_ms.
        """
        rows_P = older.rows_P
        if count >= rows_P.shape[0]:
            return older
        self._reserve(int(rows_P.max()) + 1)
        stale_ms_P = (now_ms - self._learned_ms[rows_P]).clamp(min=1).double()
        # The smallest of exponential(1) draws over their weights (Efraimidis & Spirakis 2006).
        drawn_P = torch.empty_like(stale_ms_P).exponential_(generator=generator) / stale_ms_P
        return older.take(drawn_P.topk(count, largest=False).indices.sort().values)

    def learned(self, rows_P: Tensor, now_ms: int) -> None:
        """Note what was learned as of an event time."""
        if rows_P.shape[0]:
            self._reserve(int(rows_P.max()) + 1)
            self._learned_ms[rows_P] = now_ms

    def follow(self, moves: RowMoves) -> None:
        """Move what is kept by row as ``ItemTable.remove`` moved the rows."""
        self._reserve(moves.num_before)
        moves.follow(self._learned_ms)

    def _reserve(self, num_rows: int) -> None:
        if num_rows > (size := self._learned_ms.shape[0]):
            self._learned_ms = torch.cat([self._learned_ms, self._learned_ms.new_zeros(max(num_rows - size, size))])

    def state(self) -> dict[str, Tensor]:
        """Copies, for a checkpoint."""
        return {"learned_ms": self._learned_ms.clone()}

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Continue from ``state()``; begins afresh without one (a checkpoint from before there was replay)."""
        self._learned_ms = state["learned_ms"].clone() if "learned_ms" in state else self._learned_ms[:0]
