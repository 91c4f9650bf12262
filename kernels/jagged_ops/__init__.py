"""Concatenate, split and truncate the rows of jagged tensors."""

from __future__ import annotations

from kernels.jagged_ops.ops import JaggedSplit, Keep, jagged_concat, jagged_split, jagged_truncate

__all__ = ["JaggedSplit", "Keep", "jagged_concat", "jagged_split", "jagged_truncate"]
