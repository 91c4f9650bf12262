"""Item embeddings on their way to a device: a quarter or an eighth of the bytes, rounded as in snapshots.

The table stays float32 in host memory and is what learns. Beside it lie the codes and scales of every row
(`model.row_precision`); before some are sent, those that changed since are rounded anew. The device gets codes and
makes embeddings of them, so it computes with what workers answer by (ULTRA-HSTU, arXiv 2602.16986, sends four bits).
Gradients come back in float32, to the row as it was before rounding.

Shapes: V rows in use, R rows of one call, D width, C bytes of a row's codes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from model.config import RowPrecision
from model.item_table import ItemTable
from model.reserved_memory import reserved_zeros
from model.row_precision import RoundedRows, rounded_rows

Send = Callable[[Tensor], Tensor]


class DeviceRows:
    """The codes of a table's rows, in host memory, never older than the table when they are read."""

    def __init__(self, items: ItemTable, precision: RowPrecision) -> None:
        """precision: int8 or int4."""
        self._items, self._precision = items, precision
        few = rounded_rows(torch.zeros(1, items.config.embedding_dim), precision)
        self._codes = reserved_zeros(items.config.max_items, few.codes.shape[1], dtype=few.codes.dtype)
        self._scale = reserved_zeros(items.config.max_items)
        items.all_unsent = True

    def refresh(self) -> int:
        """Round what changed; how many rows that were."""
        items = self._items
        if items.all_unsent:
            rows = torch.arange(items.num_items)
        else:
            rows = items.unsent[: items.num_items].nonzero().flatten()
        if len(rows):
            found = rounded_rows(items.weight[rows], self._precision)
            self._codes[rows], self._scale[rows] = found.codes, found.scale
            items.unsent[rows] = False
        items.all_unsent = False
        return len(rows)

    def weight(self, rows: Tensor | slice, send: Send) -> Tensor:
        """float32[R, D] where ``send`` brings them, of rows int64[R] or a part of the table."""
        self.refresh()
        found = self.codes(rows)
        return replace(found, codes=send(found.codes), scale=send(found.scale)).weight()

    def codes(self, rows: Tensor | slice) -> RoundedRows:
        """As of the last ``refresh``."""
        return RoundedRows(
            precision=self._precision,
            codes=self._codes[rows],
            scale=self._scale[rows],
            width=self._items.config.embedding_dim,
        )

    def active_weight(self, rows_R: Tensor, weight_RD: Tensor, send: Send) -> Tensor:
        """``weight`` of a step's rows, whose gradients go to the leaf weight_RD."""
        passed: Tensor = _PassedOn.apply(weight_RD, self.weight(rows_R, send))  # type: ignore[no-untyped-call]
        return passed


class _PassedOn(torch.autograd.Function):
    """The rounded rows; their gradient is taken as that of the rows themselves."""

    @staticmethod
    def forward(ctx: Any, weight_RD: Tensor, rounded_RD: Tensor) -> Tensor:
        ctx.device = weight_RD.device
        return rounded_RD.view_as(rounded_RD)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0].to(ctx.device), None
