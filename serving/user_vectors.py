"""Users' vectors from upstream, as the ranker is handed them for an answer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from model.upstream_input import UpstreamVectors


@dataclass(frozen=True, slots=True)
class UserVector:
    """float32[W], and the event time of the newest interaction that it knows."""

    vector: NDArray[np.float32]
    as_of_ms: int

    def age_s(self, asked_at_ms: int) -> float:
        """Seconds from what it knows to a request; 0 where a producer's clock runs ahead of ours."""
        return max(asked_at_ms - self.as_of_ms, 0) / 1000


class VectorReader(Protocol):
    """Where vectors come from; for the model thread."""

    def read(self, user_ids: Sequence[int]) -> Mapping[int, UserVector]:
        """Of those users who have one that can be read now; never raises for a store that is away."""
        ...


def vectors_of(
    held: Sequence[UserVector | None], asked_at_ms: Sequence[int], width: int
) -> tuple[UpstreamVectors, list[float | None]]:
    """What the ranker reads, and the ages in seconds of what it can read; a vector of another width counts as missing.

    held, asked_at_ms: of each request.
    """
    vectors = np.zeros((len(held), width), np.float32)
    ages: list[float | None] = [None] * len(held)
    for row, (one, at_ms) in enumerate(zip(held, asked_at_ms, strict=True)):
        if one is not None and one.vector.shape == (width,) and np.isfinite(one.vector).all():
            vectors[row], ages[row] = one.vector, one.age_s(at_ms)
    age_s = torch.tensor([np.nan if age is None else age for age in ages], dtype=torch.float32)
    return UpstreamVectors(vector_BW=torch.from_numpy(vectors), age_s_B=age_s), ages
