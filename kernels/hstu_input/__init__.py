"""The input half of an HSTU layer: norm, u-v-q-k projection and SiLU, recomputed in the backward pass."""

from __future__ import annotations

from kernels.hstu_input.ops import hstu_input
from kernels.hstu_input.reference import Activated, HSTUInput, hstu_input_reference

__all__ = ["Activated", "HSTUInput", "hstu_input", "hstu_input_reference"]
