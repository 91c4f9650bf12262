"""What one attention call is about, besides q, k and v: passed as a whole to every implementation."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from kernels.hstu_attention.bias import RelativeBias
from kernels.hstu_attention.mask import AttentionMask


@dataclass(frozen=True, kw_only=True, slots=True)
class AttentionProblem:
    """Rows, mask, bias and constants of ``hstu_attention``, already checked.

    offsets, query_offsets: int64[B + 1] of the keys and of the queries; the queries of a row are its last positions.
    """

    offsets: Tensor
    query_offsets: Tensor
    max_len: int
    alpha: float
    mask: AttentionMask
    bias: RelativeBias | None

    @property
    def all_are_queries(self) -> bool:
        """Every key has a query: no history is cached."""
        return self.query_offsets is self.offsets


@dataclass(frozen=True, kw_only=True, slots=True)
class AttentionGradients:
    """Gradients of the inputs of the same names; those of the tables are empty without a bias."""

    q_MHA: Tensor
    k_LHA: Tensor
    v_LHV: Tensor
    position_weight: Tensor
    time_weight: Tensor
