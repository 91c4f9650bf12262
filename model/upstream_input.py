"""Users' vectors from upstream, as the ranker is handed them: some are missing, all are of some age.

Shapes: B users or rows, W width.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True, slots=True)
class UpstreamVectors:
    """vector_BW: float32[B, W]. age_s_B: float32[B], seconds from the newest event that a vector knows to the moment
    somebody asks; NaN or infinite where there is no vector.
    """

    vector_BW: Tensor
    age_s_B: Tensor

    def __post_init__(self) -> None:
        if self.vector_BW.dim() != 2 or self.age_s_B.shape != self.vector_BW.shape[:1]:
            raise ValueError(
                f"vector_BW must be [B, W] and age_s_B [B], got {tuple(self.vector_BW.shape)} and"
                f" {tuple(self.age_s_B.shape)}"
            )

    @classmethod
    def missing(cls, num_rows: int, width: int) -> UpstreamVectors:
        """Nobody has one."""
        return cls(vector_BW=torch.zeros(num_rows, width), age_s_B=torch.full((num_rows,), torch.nan))

    def is_there(self) -> Tensor:
        """bool[B]: a vector that can be read, all of it numbers."""
        return self.age_s_B.isfinite() & self.vector_BW.isfinite().all(1)

    def withheld(self, share: float, generator: torch.Generator) -> UpstreamVectors:
        """Without a random share of them."""
        is_withheld_B = torch.rand(self.age_s_B.shape, generator=generator) < share
        return UpstreamVectors(vector_BW=self.vector_BW, age_s_B=self.age_s_B.masked_fill(is_withheld_B, torch.nan))
