"""The output half of an HSTU layer: norm, gate, dropout, projection and residual, recomputed in the backward pass."""

from __future__ import annotations

from kernels.hstu_output.dropout import dropout_multiplier
from kernels.hstu_output.ops import hstu_output
from kernels.hstu_output.reference import hstu_output_reference

__all__ = ["dropout_multiplier", "hstu_output", "hstu_output_reference"]
