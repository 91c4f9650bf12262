"""How the C library keeps the memory that tensors give back."""

from __future__ import annotations

import ctypes

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
"""Parameters of glibc's mallopt(3)."""
_MAPPED_BYTES_MIN = (1 << 30, 32 << 20)
"""Blocks from this size on are mapped one by one; some versions of glibc accept no more than 32 MiB."""
_KEPT_BYTES_MAX = (1 << 31) - 1


def keep_freed_memory() -> bool:
    """Let freed blocks be reused instead of handed back to the system; False if the C library is not glibc.

    A training step makes the same large temporaries again and again. By default they are mapped, faulted in page by
    page and unmapped each time, which is most of an eager step on ML-1M. For a process's own start-up: the whole
    process keeps its peak from then on.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return False
    mapped = any(mallopt(_M_MMAP_THRESHOLD, size) for size in _MAPPED_BYTES_MIN)
    return bool(mallopt(_M_TRIM_THRESHOLD, _KEPT_BYTES_MAX)) and mapped
