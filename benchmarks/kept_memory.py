"""What a forward pass keeps for its backward pass, in bytes of storages that are held only for it or anyway."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from model import recomputation


@contextmanager
def kept_storages() -> Iterator[dict[int, int]]:
    """Bytes of every storage saved for a backward pass meanwhile, by address; what is left out does not count."""
    kept: dict[int, int] = {}

    class Counting(saved_tensors_hooks):
        def __init__(self, pack: Callable[[Tensor], Any], unpack: Callable[[Any], Tensor]) -> None:
            def counted(tensor: Tensor) -> Any:
                packed = pack(tensor)
                if isinstance(packed, Tensor):
                    kept[packed.untyped_storage().data_ptr()] = packed.untyped_storage().nbytes()
                return packed

            super().__init__(counted, unpack)

    names = vars(recomputation)  # whose own hooks would hide what is left out from those below
    names["saved_tensors_hooks"] = Counting
    try:
        with Counting(lambda tensor: tensor, lambda tensor: tensor):
            yield kept
    finally:
        names["saved_tensors_hooks"] = saved_tensors_hooks
