"""Arrays as large as they may ever become, whose memory is only taken as they are filled.

A table that doubles stops its process for as long as copying takes, and holds both copies meanwhile. Address space
costs nothing: the kernel gives a page, all zeros, to whoever touches it first.
"""

from __future__ import annotations

import math
import mmap
from contextlib import suppress

import numpy as np
import torch
from torch import Tensor


def reserved_zeros(*shape: int, dtype: torch.dtype = torch.float32, in_huge_pages: bool = False) -> Tensor:
    """Zeros of this shape on the CPU, none of them in memory yet.

    in_huge_pages: what is in use is taken 2 MiB at a time, where the system has such pages: a table that is read from
    end to end is read a tenth to a fifth faster.

    Read and write only the part in use: what reads or fills the whole (``clone``, ``zero_``) takes all of it.
    MemoryError where the system does not promise memory it may not have (``vm.overcommit_memory=2``, ``ulimit -v``).
    """
    size = math.prod(shape) * dtype.itemsize
    try:
        # Not torch.zeros, which writes every page; nor calloc, which does where it is given memory freed before.
        memory = mmap.mmap(-1, max(size, 1), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    except OSError as error:
        raise MemoryError(
            f"{size / 2**30:.1f} GiB of address space for {shape[0]:,} rows is refused ({error}): lower"
            " model.max_items, or let the system promise more than it has (vm.overcommit_memory)"
        ) from error
    if in_huge_pages and hasattr(mmap, "MADV_HUGEPAGE"):
        with suppress(OSError):  # a kernel built without them
            memory.madvise(mmap.MADV_HUGEPAGE)
    flat = torch.from_numpy(np.frombuffer(memory, np.uint8, count=size))
    return flat.view(dtype).view(shape)
