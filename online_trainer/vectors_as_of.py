"""Users' vectors as they were when an item was met: what the ranker learns from is what an answer could have read."""

from __future__ import annotations

import logging
from typing import Final

import torch

from feature_store.store import FeatureStore
from feature_store.user_states import StateQuery
from model.upstream_input import UpstreamVectors
from online_trainer.labelled_items import LabelledItems

logger = logging.getLogger(__name__)

_NAMED_MAX: Final = 10


class VectorsAsOf:
    """Reads vectors for the ranker's steps. Shapes: R rows, W width."""

    def __init__(self, store: FeatureStore, *, model: str, width: int, lag_ms: int = 0) -> None:
        """lag_ms: how long after it was written a vector is read, to try out how stale they may be."""
        self._store, self._model, self._width, self._lag_ms = store, model, width, lag_ms
        self.num_found = self.num_missing = self.num_damaged = 0

    def read(self, items: LabelledItems) -> UpstreamVectors:
        """Of each row's user, the vector that was there when the item was met.

        Written before, of the version in effect then, and made of what had happened strictly before and of earlier
        arrivals. Raises StoreUnavailableError.
        """
        query = StateQuery(
            user_id=items.user_id,
            before_ms=items.shown_at_ms,
            known_before_ms=items.written_before_ms - self._lag_ms,
            below_seq=items.below_seq,
        )
        found = self._store.user_states.vectors(self._model, query, width=self._width)
        num_found = int(found.is_there.sum())
        self.num_found += num_found
        self.num_missing += len(found.user_id) - num_found
        if len(found.damaged):
            self.num_damaged += len(found.damaged)
            logger.error("vectors of users %s are damaged and count as missing", found.damaged[:_NAMED_MAX].tolist())
        return UpstreamVectors(
            vector_BW=torch.from_numpy(found.vector), age_s_B=torch.from_numpy(found.ages_s(items.shown_at_ms))
        )

    def status(self) -> dict[str, int]:
        """Counts since the start, JSON-ready."""
        return {"found": self.num_found, "missing": self.num_missing, "damaged": self.num_damaged}
