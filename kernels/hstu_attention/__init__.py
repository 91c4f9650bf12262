"""Pointwise SiLU attention with relative position and time bias over jagged rows (HSTU, arXiv 2402.17152)."""

from __future__ import annotations

from kernels.hstu_attention.bias import RelativeBias, time_bucket
from kernels.hstu_attention.mask import CAUSAL, AttentionMask
from kernels.hstu_attention.ops import hstu_attention

__all__ = [
    "CAUSAL",
    "AttentionMask",
    "RelativeBias",
    "hstu_attention",
    "time_bucket",
]
