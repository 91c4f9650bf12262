"""Pointwise SiLU attention with relative position and time bias over jagged rows (HSTU, arXiv 2402.17152)."""

from __future__ import annotations

from kernels.hstu_attention.bias import RelativeBias, time_bucket
from kernels.hstu_attention.dispatch import KernelName, hstu_attention
from kernels.hstu_attention.plan import AttentionPlan, plan_attention

__all__ = [
    "AttentionPlan",
    "KernelName",
    "RelativeBias",
    "hstu_attention",
    "plan_attention",
    "time_bucket",
]
