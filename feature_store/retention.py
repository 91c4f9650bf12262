"""What of a history is kept: the rule. Pure; what it removes is in `feature_store.removing`.

The retained history of a user is a function of the set of events ever applied: those at or after the horizon (the
watermark of the store minus `max_age_ms`), and of these the newest `max_history` by place. Both bounds only ever move
up, so an interaction that has left the retained history never comes back, and may be removed or refused at any time
after that: when it is does not show in what is read.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from feature_store.config import FeatureStoreConfig


@dataclass(frozen=True, kw_only=True, slots=True)
class Retention:
    """How much of each history is kept, and how long what is no longer part of it stays stored."""

    chunk_len: int
    """Interactions per chunk: whole chunks are removed."""
    max_history: int
    """Newest interactions of a user that are kept; 0: all."""
    max_age_ms: int
    """Age against the store's watermark up to which interactions are kept (ms); 0: any."""
    removal_delay_ms: int
    """How much further the watermark must be before interactions past the horizon are removed (ms)."""

    @staticmethod
    def of(config: FeatureStoreConfig) -> Retention:
        """The rule that a store's settings ask for."""
        return Retention(
            chunk_len=config.chunk_len,
            max_history=config.max_history,
            max_age_ms=config.max_age_ms,
            removal_delay_ms=config.removal_delay_ms,
        )

    @property
    def is_on(self) -> bool:
        """Whether anything ever expires."""
        return self.max_history > 0 or self.max_age_ms > 0

    def horizon_ms(self, watermark_ms: int) -> int | None:
        """Interactions before this event time are not part of a history; None: those of any age are."""
        return watermark_ms - self.max_age_ms if self.max_age_ms else None

    def removal_ms(self, watermark_ms: int) -> int | None:
        """Chunks that end before this event time may be removed; None: not for their age."""
        return watermark_ms - self.max_age_ms - self.removal_delay_ms if self.max_age_ms else None

    def first_number(self, ends: NDArray[np.int64]) -> NDArray[np.int64]:
        """Of histories of interactions numbered up to `ends` (exclusive), the number of the first that is kept: i64."""
        return np.maximum(ends - self.max_history, 0) if self.max_history else np.zeros_like(ends)

    def first_chunk(self, ends: NDArray[np.int64]) -> NDArray[np.int64]:
        """Of the same histories, the number of the first chunk of which count retention keeps anything: i64."""
        return self.first_number(ends) // self.chunk_len
