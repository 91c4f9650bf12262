"""The device side of a collision-free dynamic embedding table: id to row by a hash, and row-wise optimisers."""

from __future__ import annotations

from kernels.dynamic_embedding.hash_index import HashIndex
from kernels.dynamic_embedding.ops import accumulate_rows, rowwise_adagrad_, rowwise_adamw_

__all__ = ["HashIndex", "accumulate_rows", "rowwise_adagrad_", "rowwise_adamw_"]
