"""What can go wrong in kernels.

    KernelError
    └── KernelUnavailableError   the implementation asked for does not exist for these tensors

A wrong shape, dtype or length is the caller's mistake and raises ValueError.
"""

from __future__ import annotations


class KernelError(Exception):
    """Root of the errors this room raises."""


class KernelUnavailableError(KernelError):
    """The kernel asked for by name is not built, or cannot run on the device of the tensors."""
