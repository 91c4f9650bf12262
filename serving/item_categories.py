"""Which items are in which category, as the store says: read regularly and off the answers' path."""

from __future__ import annotations

import asyncio
import logging
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Final

import numpy as np
from numpy.typing import NDArray

from feature_store.errors import FeatureStoreError
from feature_store.store import FeatureStore
from serving.errors import CategoriesUnavailableError
from serving.weights import ServedWeights

logger = logging.getLogger(__name__)

Int64s = NDArray[np.int64]

_ITEMS_PER_READ: Final = 10_000
_RETRY_S: Final = 1.0


class ItemCategories:
    """Item ids by category. `by_category` is replaced as a whole, so any thread may read it."""

    def __init__(self, store: FeatureStore, refresh_ms: int) -> None:
        self._store, self._refresh_ms = store, refresh_ms
        self.by_category: Mapping[str, Int64s] | None = None
        """Ids of each, ascending; None until the store has been read."""
        self.problem: str | None = None

    async def run(self) -> None:
        """Read every `refresh_ms` until cancelled; never, if that is 0."""
        while self._refresh_ms:
            await asyncio.to_thread(self.read)
            await asyncio.sleep(_RETRY_S if self.problem is not None else self._refresh_ms / 1000)

    def read(self) -> None:
        """Read all items' categories; what was read before stays if the store is away."""
        found: dict[str, list[int]] = defaultdict(list)
        after = -1
        try:
            while part := self._store.item_categories(after=after, limit=_ITEMS_PER_READ):
                for item_id, categories in part.items():
                    for category in set(categories):
                        found[category].append(item_id)
                after = max(part)
        except FeatureStoreError as error:
            if self.problem is None:
                logger.warning("categories of items stay as they were: %s", error)
            self.problem = str(error)
            return
        self.by_category = {category: np.array(ids, np.int64) for category, ids in found.items()}
        self.problem = None

    def require_known(self) -> None:
        """Raises CategoriesUnavailableError while a filter by category would be a guess."""
        if not self._refresh_ms:
            raise CategoriesUnavailableError("categories are not read here: serving.categories_refresh_ms is 0")
        if self.by_category is None:
            raise CategoriesUnavailableError(f"categories have not been read yet: {self.problem or 'just started'}")

    def ids_of(self, categories: Sequence[str]) -> Int64s:
        """Ids, ascending, of all items that are in at least one of the categories."""
        held = self.by_category or {}
        found = [held[category] for category in categories if category in held]
        return np.unique(np.concatenate(found)) if found else np.empty(0, np.int64)


class CategoryRows:
    """Rows of the item table by category, looked up once per version and category; for the model thread."""

    def __init__(self, weights: ServedWeights, categories: ItemCategories) -> None:
        self._weights, self._categories = weights, categories
        self._looked_up_for: tuple[object, object] = None, None
        self._rows: dict[str, Int64s] = {}

    def of(self, categories: Sequence[str]) -> Int64s:
        """Rows, ascending, of all items that are in at least one of the categories and that the weights know."""
        now = self._weights.info, self._categories.by_category
        if self._looked_up_for[0] is not now[0] or self._looked_up_for[1] is not now[1]:
            self._looked_up_for, self._rows = now, {}
        for category in categories:
            if category not in self._rows:
                rows = self._weights.items.lookup(self._categories.ids_of([category]))
                self._rows[category] = rows[rows >= 0]
        return np.unique(np.concatenate([np.empty(0, np.int64), *(self._rows[category] for category in categories)]))
