"""Names of the precisions of item embeddings in snapshots. Without torch, for settings that every command reads."""

from __future__ import annotations

from typing import Final, Literal, get_args

RowPrecision = Literal["float32", "int8", "int4"]
ROW_PRECISIONS: Final[tuple[RowPrecision, ...]] = get_args(RowPrecision)
