"""Decayed popularity: what an answer falls back to when the model cannot speak for a user."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from model.id_index import IdIndex
from model.item_table import ItemTable
from model.trend import add_interactions, decay_rate_per_ms, log_popularity

Int64s = NDArray[np.int64]


@dataclass(frozen=True, kw_only=True, slots=True)
class PopularItems:
    """Items that anybody has interacted with, most popular first; equally popular ones by ascending id."""

    item_ids: Int64s
    """int64[V]"""
    scores: NDArray[np.float32]
    """float32[V], log of the decayed number of interactions (plus the model's floor)."""
    known_ids: Int64s
    """int64[W], ascending: these and the items that nobody has interacted with."""
    known_scores: NDArray[np.float32]
    """float32[W]"""

    @classmethod
    def ranked(cls, item_ids: Int64s, log_weights: NDArray[np.float64], scores: NDArray[np.float32]) -> PopularItems:
        """Order items (any order, -1 for removed ones) by their log weight; -inf is left out."""
        known = np.flatnonzero(item_ids >= 0)
        known = known[np.argsort(item_ids[known])]
        kept = known[np.isfinite(log_weights[known])]
        order = kept[np.argsort(-log_weights[kept], kind="stable")]
        return cls(
            item_ids=item_ids[order],
            scores=scores[order],
            known_ids=item_ids[known],
            known_scores=scores[known],
        )

    @classmethod
    def of_table(cls, items: ItemTable) -> PopularItems:
        """The trend of loaded weights."""
        return cls.ranked(items.ids(), items.trend[: items.num_items].numpy(), items.log_popularity().numpy())

    def first(self, k: int, *, without: Int64s, only: Int64s | None = None) -> tuple[Int64s, NDArray[np.float32]]:
        """Ids and scores of the k best that are not in `without`, and in `only` if it is given."""
        # At most len(without) of the head can fall away.
        head = slice(0, k + len(without)) if only is None else slice(None)
        is_kept = ~np.isin(self.item_ids[head], without)
        if only is not None:
            is_kept &= np.isin(self.item_ids, only)
        kept = np.flatnonzero(is_kept)[:k]
        return self.item_ids[head][kept], self.scores[head][kept]

    def scores_of(self, item_ids: Int64s) -> NDArray[np.float32]:
        """float32[N]: the score of each item, NaN for unknown ones."""
        if len(self.known_ids) == 0:
            return np.full(len(item_ids), np.nan, np.float32)
        places = np.minimum(np.searchsorted(self.known_ids, item_ids), len(self.known_ids) - 1)
        return np.where(self.known_ids[places] == item_ids, self.known_scores[places], np.float32(np.nan))


class LivePopularity:
    """Decayed popularity counted from history updates, for as long as there are no weights to take it from."""

    def __init__(self, *, half_life_s: float, floor: float, items_max: int) -> None:
        self._rate_per_ms = decay_rate_per_ms(half_life_s)
        self._floor = floor
        self._items_max = items_max
        self._index = IdIndex()
        self._ids = np.full(1024, -1, np.int64)
        self._log_weights = torch.full((1024,), -torch.inf, dtype=torch.float64)
        self._num_items = 0
        self._as_of_ms = 0
        self._ranked: PopularItems | None = None

    def add(self, item_ids: Int64s, times_ms: Int64s) -> None:
        """Count interactions; beyond `items_max` different items, further ones are not counted."""
        if len(item_ids) == 0:
            return
        distinct = np.unique(item_ids)
        self._admit(distinct[self._index.find(distinct) < 0][: self._items_max - self._num_items])
        rows = self._index.find(item_ids)
        add_interactions(self._log_weights, rows[rows >= 0], times_ms[rows >= 0], rate_per_ms=self._rate_per_ms)
        self._as_of_ms = max(self._as_of_ms, int(times_ms.max()))
        self._ranked = None

    def _admit(self, new_ids: Int64s) -> None:
        end = self._num_items + len(new_ids)
        while end > len(self._ids):
            self._ids = np.concatenate([self._ids, np.full(len(self._ids), -1, np.int64)])
            self._log_weights = torch.cat([self._log_weights, torch.full_like(self._log_weights, -torch.inf)])
        self._index.put(new_ids, np.arange(self._num_items, end))
        self._ids[self._num_items : end] = new_ids
        self._num_items = end

    def items(self) -> PopularItems:
        """What is popular now."""
        if self._ranked is None:
            scores = log_popularity(
                self._log_weights, as_of_ms=self._as_of_ms, rate_per_ms=self._rate_per_ms, floor=self._floor
            )
            self._ranked = PopularItems.ranked(self._ids, self._log_weights.numpy(), scores.numpy())
        return self._ranked
