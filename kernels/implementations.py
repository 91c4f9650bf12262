"""Which implementation of a kernel runs: decided by the device of the tensors, or by name for debugging.

Every kernel folder holds `reference.py` (plain PyTorch, the truth), `triton_kernels.py` (CUDA devices; on the CPU only
under Triton's interpreter) and, where it pays, `cpu.py` and `native.py`.
"""

from __future__ import annotations

from importlib.util import find_spec
from typing import Literal, get_args

import torch

from kernels.errors import KernelUnavailableError

KernelName = Literal["auto", "reference", "cpu", "native", "triton"]
"""auto: Triton on a CUDA device; elsewhere compiled C where a kernel has it and the machine a compiler (native), else
the CPU path, or the reference of a kernel that has none."""

Implementation = Literal["reference", "cpu", "native", "triton"]


def choose(kernel: KernelName, device: torch.device, *, has_cpu_path: bool) -> Implementation:
    """The implementation that runs for tensors on ``device``.

    ValueError for a name that does not exist, KernelUnavailableError for one that cannot run on the device: no other
    one is taken in its place.
    """
    if kernel not in get_args(KernelName):
        raise ValueError(f"kernel is {kernel!r}; it must be one of {', '.join(get_args(KernelName))}")
    host: Implementation = "cpu" if has_cpu_path else "reference"
    if kernel == "reference":
        return "reference"
    if kernel == "native":
        raise KernelUnavailableError(
            "kernel='native' was asked for, but this kernel has no compiled form here, or none for these arguments:"
            " use kernel='auto'"
        )
    if kernel == "cpu" or (kernel == "auto" and device.type != "cuda"):
        return _host(kernel, device, host)
    _require_triton(device)
    return "triton"


def _host(kernel: KernelName, device: torch.device, host: Implementation) -> Implementation:
    if kernel == "cpu" and (device.type != "cpu" or host != "cpu"):
        raise KernelUnavailableError(
            f"kernel='cpu' was asked for on {device}, but this kernel has no CPU path there; use kernel='auto'"
        )
    return host if device.type == "cpu" else "reference"


def _require_triton(device: torch.device) -> None:
    if find_spec("triton") is None:
        raise KernelUnavailableError(
            f"the tensors are on {device}, whose kernels need the package triton: pip install 'headrace[gpu]', or use"
            " kernel='reference'"
        )
    from kernels.triton_support import INTERPRETED  # noqa: PLC0415 - needs triton, an optional package

    if device.type != "cuda" and not INTERPRETED:
        raise KernelUnavailableError(
            f"kernel='triton' was asked for on {device}; Triton runs there only under its interpreter: set"
            " TRITON_INTERPRET=1 before Python starts, or use kernel='auto'"
        )


__all__ = ["Implementation", "KernelName", "choose"]
