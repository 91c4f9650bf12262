"""A score and a row number as one integer whose order is the order of the result.

Upper half: the score's bits, arranged so that they compare as integers do; lower half: the row number, inverted. No two
rows have the same key, so the k largest are the same set in the same order wherever and however they are found.
Shapes: B queries, R rows of a chunk, K rows wanted.
"""

from __future__ import annotations

import torch
from torch import Tensor

LEFT_OUT = -(1 << 63)
"""The key of a row that is left out, and of no row at all: less than any other."""
NOT_A_NUMBER = -0x7F80_0002
"""The upper half for NaN: one less than that of -inf."""
LAST_ROW = 0xFFFF_FFFF
"""Row numbers are inverted against this: the lower number is the larger key."""


def empty_keys(num_queries: int, k: int, num_rows: int, device: torch.device) -> Tensor:
    """int64[B, K + R]: the best so far, none, and room for a chunk's keys behind it."""
    return torch.full((num_queries, k + num_rows), LEFT_OUT, dtype=torch.int64, device=device)


def keys_of(scores: Tensor, rows: Tensor) -> Tensor:
    """int64, of the shape of float32 scores; rows int64, broadcast to them."""
    bits = (scores + 0.0).view(torch.int32)  # -0.0 equals 0.0 and must not come after it
    bits ^= (bits >> 31) & 0x7FFF_FFFF  # of negative numbers all bits but the sign turn over
    keys = bits.masked_fill_(scores.isnan(), NOT_A_NUMBER).to(torch.int64)
    keys <<= 32
    return keys.add_(LAST_ROW - rows)


def read_keys(keys_BK: Tensor) -> tuple[Tensor, Tensor]:
    """scores_BK float32 and rows_BK int64; -inf and -1 for rows left out."""
    nothing_BK = keys_BK == LEFT_OUT
    bits_BK = (keys_BK >> 32).to(torch.int32)
    scores_BK = (bits_BK ^ ((bits_BK >> 31) & 0x7FFF_FFFF)).view(torch.float32)
    rows_BK = LAST_ROW - (keys_BK & LAST_ROW)
    return scores_BK.masked_fill(nothing_BK, -torch.inf), rows_BK.masked_fill(nothing_BK, -1)
