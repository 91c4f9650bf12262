"""Item embeddings in a quarter or an eighth of their bytes: what snapshots carry when they are not float32.

A row is rounded by itself: its scale and whole numbers times it, -127 … 127 (int8) or -7 … 7 (int4, two to a byte).
The scale of int8 is the largest magnitude over 127. With four bits it pays to cut off what is far out: the scale is the
one, of a few fractions of the largest magnitude over 7, that loses least (squared error). Equal rows give equal bytes,
so a row that did not change is the same in every snapshot.

Biases and trends stay as they are: 4 and 8 bytes a row, and errors in them move a score directly.

Shapes: R rows, D width, C = D (int8) or ceil(D / 2) (int4) bytes of a row.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

from model.config import RowPrecision

_LARGEST: Final = {"int8": 127, "int4": 7}
_INT4_FRACTIONS: Final = (1.0, 0.92, 0.84, 0.76, 0.68)
"""Of the largest magnitude, tried for the end of the scale."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RoundedRows:
    """codes: int8[R, D], or uint8[R, C] with the even columns in the low four bits, plus 8. scale: float32[R]."""

    precision: RowPrecision
    codes: Tensor
    scale: Tensor
    width: int

    def weight(self) -> Tensor:
        """float32[R, D]: what the codes stand for."""
        if self.precision == "int8":
            return self.codes.float() * self.scale[:, None]
        pairs = torch.stack([self.codes & 0x0F, self.codes >> 4], dim=2).flatten(1)[:, : self.width]
        return (pairs.float() - 8) * self.scale[:, None]


def rounded_rows(weight_RD: Tensor, precision: RowPrecision) -> RoundedRows:
    """The codes of finite float32[R, D]; precision int8 or int4."""
    largest = _LARGEST[precision]
    magnitude_R = weight_RD.abs().amax(dim=1) if weight_RD.shape[1] else weight_RD.new_zeros(weight_RD.shape[0])
    scale_R, levels_RD = _levels(weight_RD, magnitude_R / largest, largest)
    if precision == "int8":
        return RoundedRows(precision="int8", codes=levels_RD.to(torch.int8), scale=scale_R, width=weight_RD.shape[1])
    error_R = _error(weight_RD, scale_R, levels_RD)
    for fraction in _INT4_FRACTIONS[1:]:
        tried_R, tried_RD = _levels(weight_RD, magnitude_R * (fraction / largest), largest)
        tried_error_R = _error(weight_RD, tried_R, tried_RD)
        better_R = tried_error_R < error_R
        scale_R = torch.where(better_R, tried_R, scale_R)
        levels_RD = torch.where(better_R[:, None], tried_RD, levels_RD)
        error_R = torch.where(better_R, tried_error_R, error_R)
    codes_RD = (levels_RD + 8).to(torch.uint8)
    if weight_RD.shape[1] % 2:
        codes_RD = torch.cat([codes_RD, codes_RD.new_full((len(codes_RD), 1), 8)], dim=1)
    packed_RC = codes_RD[:, 0::2] | (codes_RD[:, 1::2] << 4)
    return RoundedRows(precision="int4", codes=packed_RC, scale=scale_R, width=weight_RD.shape[1])


def as_published(weight_RD: Tensor, precision: RowPrecision) -> Tensor:
    """float32[R, D]: what a worker has of these rows."""
    return weight_RD if precision == "float32" else rounded_rows(weight_RD, precision).weight()


def bytes_of_row(width: int, precision: RowPrecision) -> int:
    """Bytes of one embedding in a snapshot, its scale included."""
    return {"float32": 4 * width, "int8": width + 4, "int4": (width + 1) // 2 + 4}[precision]


def _levels(weight_RD: Tensor, scale_R: Tensor, largest: int) -> tuple[Tensor, Tensor]:
    """The scale, 1 for rows of zeros or next to it, and the nearest whole numbers, float32."""
    scale_R = torch.where(scale_R > torch.finfo(torch.float32).tiny, scale_R, 1.0)
    return scale_R, (weight_RD / scale_R[:, None]).round().clamp(-largest, largest)


def _error(weight_RD: Tensor, scale_R: Tensor, levels_RD: Tensor) -> Tensor:
    return (weight_RD - levels_RD * scale_R[:, None]).square().sum(dim=1)
