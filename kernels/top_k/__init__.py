"""Exact maximum inner product search over the catalogue, with rows left out per query."""

from __future__ import annotations

from kernels.top_k.ops import TopK, top_k

__all__ = ["TopK", "top_k"]
