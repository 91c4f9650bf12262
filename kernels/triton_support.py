"""What every Triton kernel of this room shares. Importing it imports triton, which is an optional package."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import triton

INTERPRETED: bool = triton.knobs.runtime.interpret
"""True if TRITON_INTERPRET=1 was set when triton was imported: kernels then run on the CPU, slowly."""


def autotuned(
    configs: Sequence[triton.Config],
    key: Sequence[str],
    *,
    interpreted: Mapping[str, Any] | None = None,
    **options: Any,
) -> Callable[[Any], Any]:
    """``triton.autotune`` whose choices are kept on disk, in Triton's cache folder (TRITON_CACHE_DIR).

    Interpreted there is no device to time on: the constants ``interpreted`` are taken, or those of the first config,
    which should then be the smallest.
    """
    if INTERPRETED:
        constants = configs[0].kwargs if interpreted is None else interpreted
        return triton.heuristics({name: _constant(value) for name, value in constants.items()})  # type: ignore[no-any-return]
    return triton.autotune(configs=list(configs), key=list(key), cache_results=True, **options)  # type: ignore[no-any-return]


def _constant(value: Any) -> Callable[[Any], Any]:
    return lambda _arguments: value


def dot_precision(dtype: torch.dtype) -> str:
    """``input_precision`` of ``tl.dot``: TF32 for float32 only where the user allowed it for matrix products."""
    return "tf32" if dtype == torch.float32 and torch.backends.cuda.matmul.allow_tf32 else "ieee"


def block_size(width: int, *, smallest: int = 16) -> int:
    """The power of two that covers ``width``, at least what ``tl.dot`` can multiply."""
    return max(smallest, int(triton.next_power_of_2(width)))
