"""Jagged tensors: rows of different lengths packed one after the other, without padding.

Shapes: L packed values, B rows, N longest length allowed. Row b is ``values[offsets[b] : offsets[b + 1]]``.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True, slots=True)
class JaggedTensor:
    """B rows of at most ``max_len`` values each, packed into ``values``.

    values: [L, ...] any dtype. offsets: int64[B + 1], ascending from 0 to L, same device. max_len: in values.
    Construction checks shapes and dtypes only, which needs no device synchronisation; ``checked`` also reads
    the offsets.

    >>> jagged = JaggedTensor.of([torch.tensor([1, 2]), torch.tensor([], dtype=torch.int64)], max_len=4)
    >>> jagged.to_padded(fill=0).tolist()
    [[1, 2, 0, 0], [0, 0, 0, 0]]
    """

    values: Tensor
    offsets: Tensor
    max_len: int

    def __post_init__(self) -> None:
        check_offsets_shape(self.offsets, self.values)
        if self.max_len < 0:
            raise ValueError(f"max_len is {self.max_len}; it must be 0 or more values")

    @staticmethod
    def of(rows: list[Tensor], *, max_len: int | None = None) -> JaggedTensor:
        """Pack a non-empty list of rows, each [n, ...] with the same trailing shape."""
        if not rows:
            raise ValueError("rows is empty; pass at least one (possibly empty) row")
        lengths = [row.shape[0] for row in rows]
        offsets = torch.zeros(len(rows) + 1, dtype=torch.int64, device=rows[0].device)
        offsets[1:] = torch.tensor(lengths, dtype=torch.int64).cumsum(0)
        return JaggedTensor(
            values=torch.cat(rows), offsets=offsets, max_len=max(lengths) if max_len is None else max_len
        ).checked()

    @property
    def num_rows(self) -> int:
        """B."""
        return self.offsets.shape[0] - 1

    @property
    def num_values(self) -> int:
        """L."""
        return self.values.shape[0]

    def lengths(self) -> Tensor:
        """int64[B]: values in each row."""
        return self.offsets.diff()

    def checked(self) -> JaggedTensor:
        """Return self after reading offsets and values (synchronises the device).

        ValueError if the offsets are inconsistent, or a value is not a number.
        """
        check_offsets(self.offsets, num_values=self.num_values, max_len=self.max_len)
        check_numbers(self.values, name="values")
        return self

    def row_index(self) -> Tensor:
        """int64[L]: the row each value belongs to."""
        return row_index(self.offsets, self.num_values)

    def position_index(self) -> Tensor:
        """int64[L]: the place of each value inside its row, from 0."""
        return position_index(self.offsets, self.num_values)

    def with_values(self, values: Tensor) -> JaggedTensor:
        """The same rows holding other values, [L, ...]."""
        return JaggedTensor(values=values, offsets=self.offsets, max_len=self.max_len)

    def to_padded(self, *, fill: float = 0) -> Tensor:
        """[B, max_len, ...] with ``fill`` behind the end of each row."""
        padded = self.values.new_full((self.num_rows, self.max_len, *self.values.shape[1:]), fill)
        padded[self.row_index(), self.position_index()] = self.values
        return padded

    @staticmethod
    def from_padded(padded: Tensor, lengths: Tensor) -> JaggedTensor:
        """Pack the first ``lengths[b]`` values of each row of ``padded`` [B, N, ...]; lengths int64[B]."""
        if lengths.shape != padded.shape[:1]:
            raise ValueError(f"lengths has shape {tuple(lengths.shape)}; padded has {padded.shape[0]} rows")
        offsets = torch.zeros(lengths.shape[0] + 1, dtype=torch.int64, device=padded.device)
        torch.cumsum(lengths, 0, out=offsets[1:])
        inside = torch.arange(padded.shape[1], device=padded.device) < lengths[:, None]
        return JaggedTensor(values=padded[inside], offsets=offsets, max_len=padded.shape[1]).checked()


def row_index(offsets: Tensor, num_values: int) -> Tensor:
    """int64[L]: the row of each packed value. ``num_values`` (L) is passed so that no device is synchronised."""
    rows = torch.arange(offsets.shape[0] - 1, device=offsets.device)
    return torch.repeat_interleave(rows, offsets.diff(), output_size=num_values)


def position_index(offsets: Tensor, num_values: int) -> Tensor:
    """int64[L]: the place of each packed value inside its row."""
    starts = torch.repeat_interleave(offsets[:-1], offsets.diff(), output_size=num_values)
    return torch.arange(num_values, device=offsets.device) - starts


def check_numbers(values: Tensor, *, name: str) -> None:
    """ValueError if floating values [L, ...] hold one that is not a number; reads them. name: as the caller's."""
    if values.is_floating_point() and bool(values.isnan().any()):
        place = int(values.isnan().nonzero()[0, 0])
        raise ValueError(f"{name}[{place}] is not a number")


def check_offsets_shape(offsets: Tensor, values: Tensor, *, name: str = "offsets") -> None:
    """ValueError unless offsets is int64[B + 1] on the device of values; reads no element. name: as the caller's."""
    if offsets.dtype != torch.int64 or offsets.dim() != 1 or offsets.shape[0] < 1:
        raise ValueError(f"{name} must be int64[B + 1], got {offsets.dtype} of shape {tuple(offsets.shape)}")
    if values.dim() < 1:
        raise ValueError("values must have at least one dimension, the packed one")
    if values.device != offsets.device:
        raise ValueError(f"values are on {values.device} and {name} on {offsets.device}; move them together")


def check_offsets(offsets: Tensor, *, num_values: int, max_len: int, name: str = "offsets") -> None:
    """ValueError unless offsets ascend from 0 to num_values in steps of at most max_len; reads them."""
    first, last = int(offsets[0]), int(offsets[-1])
    if first != 0 or last != num_values:
        raise ValueError(f"{name} run from {first} to {last}; they must run from 0 to the {num_values} values")
    lengths = offsets.diff()
    if lengths.numel() and int(lengths.min()) < 0:
        raise ValueError(f"{name} descend; each must be at least the one before it")
    if lengths.numel() and int(lengths.max()) > max_len:
        raise ValueError(f"the longest row has {int(lengths.max())} values; max_len is {max_len}: truncate the rows")
