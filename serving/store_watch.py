"""Whether the store answers, and what it says about items, looked at regularly and off the answers' path."""

from __future__ import annotations

import asyncio
import logging

import numpy as np

from feature_store.errors import FeatureStoreError
from feature_store.store import FeatureStore
from serving.batcher import ModelThread
from serving.item_names import ItemNames, WithheldItems
from serving.weights import ServedWeights

logger = logging.getLogger(__name__)


class StoreWatch:
    """Keeps readiness, availability of items and their names current."""

    def __init__(
        self,
        store: FeatureStore,
        names: ItemNames,
        withheld: WithheldItems,
        weights: ServedWeights,
        model_thread: ModelThread,
    ) -> None:
        self._store, self._names, self._withheld = store, names, withheld
        self._weights, self._model_thread = weights, model_thread
        self._schema_is_current = False
        self.problem: str | None = "not looked at yet"

    async def run(self, interval_ms: int) -> None:
        """Look every `interval_ms` until cancelled."""
        while True:
            await self.look()
            await asyncio.sleep(interval_ms / 1000)

    async def look(self) -> None:
        """Look once."""
        problem = await asyncio.to_thread(self._read)
        if problem is not None and problem != self.problem:
            logger.warning("serving goes on with what is in memory: %s", problem)
        self.problem = problem
        # Whatever this look has found: a swap meanwhile may have left out what could be named a moment later.
        await self._model_thread.run(self._weights.follow_withheld)

    def _read(self) -> str | None:
        try:
            if not self._schema_is_current:
                self._store.require_current_schema()
                self._schema_is_current = True
            self._withheld.unavailable = self._store.unavailable_items()
        except FeatureStoreError as error:
            return str(error)
        if not self._names.resolve(np.empty(0, np.int64)) or not self._names.recheck():
            return "the names of new items could not be read from the store"
        return None
