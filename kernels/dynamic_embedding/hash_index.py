"""From 63-bit ids to rows on any device: an open-addressing hash held in two tensors, which grows as ids arrive.

Shapes: S slots (a power of two), N ids of one call.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kernels.dynamic_embedding.ops import find_rows, insert_rows_, remove_rows_
from kernels.dynamic_embedding.reference import EMPTY
from kernels.implementations import KernelName

NUM_SLOTS_MIN = 1024


class HashIndex:
    """A map from id (int64 >= 0) to row (int64 >= 0), collision-free: distinct ids never share a row unasked.

    keys_S: int64[S], the id of each slot, negative where there is none. rows_S: int64[S]. At most half of the slots
    are used, removed ones included, so that probes are short and always end. ``find`` never waits for the device and
    may be compiled; ``insert`` reads its arguments once.

    >>> index = HashIndex()
    >>> index.insert(torch.tensor([70, 30]), torch.tensor([0, 1]))
    >>> index.find(torch.tensor([30, 5])).tolist()
    [1, -1]
    """

    def __init__(
        self, *, num_slots: int = NUM_SLOTS_MIN, device: torch.device | str = "cpu", kernel: KernelName = "auto"
    ) -> None:
        if num_slots < 2 or num_slots & (num_slots - 1):
            raise ValueError(f"num_slots is {num_slots}; it must be a power of two of at least 2")
        self._kernel = kernel
        self._allocate(num_slots, torch.device(device))

    def _allocate(self, num_slots: int, device: torch.device) -> None:
        self.keys_S = torch.full((num_slots,), EMPTY, dtype=torch.int64, device=device)
        self.rows_S = torch.full((num_slots,), -1, dtype=torch.int64, device=device)
        # Slots that are no longer empty, at most: an id that was held already is counted again until the next growth.
        self._num_used_max = 0

    def __len__(self) -> int:
        """How many ids are held; reads the device."""
        return int((self.keys_S >= 0).sum())

    @property
    def num_slots(self) -> int:
        """S."""
        return self.keys_S.shape[0]

    def find(self, ids_N: Tensor) -> Tensor:
        """int64[N]: the row of each id, -1 where it is unknown."""
        return find_rows(self.keys_S, self.rows_S, ids_N, kernel=self._kernel)

    def insert(self, ids_N: Tensor, rows_N: Tensor) -> None:
        """Set the row of distinct ids; grows where needed. ValueError (nothing set) for negative or repeated ids.

        An id that is held gets the new row.
        """
        _check_new(ids_N, rows_N)
        self._reserve(ids_N.shape[0])
        insert_rows_(self.keys_S, self.rows_S, ids_N, rows_N, kernel=self._kernel)
        self._num_used_max += ids_N.shape[0]

    def remove(self, ids_N: Tensor) -> None:
        """Forget ids; unknown ones are ignored. The slots become free at the next growth."""
        remove_rows_(self.keys_S, ids_N, kernel=self._kernel)

    def entries(self) -> tuple[Tensor, Tensor]:
        """(ids, rows) of everything held, in the order of the slots, which means nothing."""
        held = (self.keys_S >= 0).nonzero().flatten()
        return self.keys_S[held], self.rows_S[held]

    def _reserve(self, num_more: int) -> None:
        if 2 * (self._num_used_max + num_more) <= self.num_slots:
            return
        ids, rows = self.entries()
        num_slots = self.num_slots
        while num_slots < 4 * (ids.shape[0] + num_more):
            num_slots *= 2
        self._allocate(num_slots, self.keys_S.device)
        insert_rows_(self.keys_S, self.rows_S, ids, rows, kernel=self._kernel)
        self._num_used_max = ids.shape[0]


def _check_new(ids_N: Tensor, rows_N: Tensor) -> None:
    """ValueError unless ids are distinct and neither they nor rows are negative; reads them."""
    for name, tensor in (("ids", ids_N), ("rows", rows_N)):
        if tensor.dtype != torch.int64 or tensor.dim() != 1 or tensor.shape != ids_N.shape:
            raise ValueError(f"{name} must be int64[N], as many as ids; got {tensor.dtype} {tuple(tensor.shape)}")
    if ids_N.shape[0] == 0:
        return
    sorted_N = ids_N.sort().values
    repeated = (sorted_N[1:] == sorted_N[:-1]).any()
    smallest_id, smallest_row, repeats = torch.stack([sorted_N[0], rows_N.min(), repeated.to(sorted_N.dtype)]).tolist()
    if smallest_id < 0:
        raise ValueError(f"id {int(smallest_id)} is negative; ids are 63-bit")
    if smallest_row < 0:
        raise ValueError(f"row {int(smallest_row)} is negative; -1 is what an unknown id is found as")
    if repeats:
        raise ValueError("ids holds an id twice; insert distinct ids")


__all__ = ["HashIndex"]
