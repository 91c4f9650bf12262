"""Which items get a row of the item table, and which lose theirs: a function of the stream and the settings alone."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from model.id_index import mix64
from model.item_table import ItemTable
from online_trainer.config import ItemsConfig

_NUM_SKETCH_ROWS = 4
_SKETCH_WIDTH = 1 << 20
_HALVED_AFTER = _SKETCH_WIDTH // 2
"""Interactions of items without a row. So a count exceeds the truth by two with a chance of about e^-4."""
_MS_PER_DAY = 86_400_000
_SWEEPS_PER_AGE = 50
"""How often per max_age_d old items are looked for: they go at most a fiftieth late."""


class Admission:
    """Decides which items without a row get one.

    From a count-min sketch of their interactions (Cormode & Muthukrishnan 2005), and a coin per interaction that is a
    hash of its key.
    """

    def __init__(self, config: ItemsConfig) -> None:
        self._config = config
        self._counts = np.zeros((_NUM_SKETCH_ROWS, _SKETCH_WIDTH if config.min_interactions > 1 else 0), np.uint8)
        self._num_counted = 0

    def admitted(self, item_id: NDArray[np.int64], event_key: NDArray[np.uint64]) -> NDArray[np.bool_]:
        """bool[N]: whether each interaction of an item without a row, in stream order, gets it one.

        item_id: int64[N], items without a row. event_key: uint64[N]. Counts them.
        """
        passed = np.ones(len(item_id), bool)
        if self._config.admission_probability < 1:
            coin = (mix64(event_key) >> np.uint64(11)).astype(np.float64) * 2.0**-53
            passed = coin < self._config.admission_probability
        if self._config.min_interactions > 1 and len(item_id):
            passed &= self._count(item_id) >= self._config.min_interactions
        return passed

    def _count(self, item_id: NDArray[np.int64]) -> NDArray[np.int64]:
        """int64[N]: interactions of each one's item so far, with it; at least the truth since counts were halved."""
        order = np.argsort(item_id, kind="stable")
        _, first, group = np.unique(item_id[order], return_index=True, return_inverse=True)
        nth = np.empty(len(item_id), np.int64)
        nth[order] = np.arange(len(item_id)) - first[group] + 1
        places = [
            (mix64(item_id.astype(np.uint64) + np.uint64(row << 32)) % np.uint64(_SKETCH_WIDTH)).astype(np.int64)
            for row in range(_NUM_SKETCH_ROWS)
        ]
        before = np.min([counts[at] for counts, at in zip(self._counts, places, strict=True)], axis=0)
        for counts, at in zip(self._counts, places, strict=True):
            distinct, times = np.unique(at, return_counts=True)
            counts[distinct] = np.minimum(counts[distinct].astype(np.int64) + times, 255)
        self._num_counted += len(item_id)
        if self._num_counted >= _HALVED_AFTER:
            self._counts >>= 1
            self._num_counted //= 2
        found: NDArray[np.int64] = before.astype(np.int64) + nth
        return found

    def state(self) -> dict[str, NDArray[np.generic]]:
        """Arrays that `load_state` reads back."""
        return {"counts": self._counts.copy(), "num_counted": np.array([self._num_counted])}

    def load_state(self, state: dict[str, NDArray[np.generic]]) -> None:
        """Continue from `state()`; begins to count afresh where min_interactions was 1 and is not, or the reverse."""
        if state["counts"].shape == self._counts.shape:
            self._counts = state["counts"].astype(np.uint8)
            self._num_counted = int(state["num_counted"][0])


def too_old(items: ItemTable, config: ItemsConfig, *, watermark_ms: int, before_ms: int) -> NDArray[np.int64]:
    """Ids of the items whose newest interaction is older than max_age_d.

    watermark_ms: newest event time so far; before_ms: the same a step ago. Looks only in some steps: where event time
    enters another fiftieth of max_age_d.
    """
    max_age_ms = int(config.max_age_d * _MS_PER_DAY)
    every_ms = max(max_age_ms // _SWEEPS_PER_AGE, 1)
    if max_age_ms == 0 or watermark_ms // every_ms == before_ms // every_ms:
        return np.empty(0, np.int64)
    seen_ms = items.seen_ms[: items.num_items].numpy()
    return items.ids_of(np.flatnonzero(seen_ms < watermark_ms - max_age_ms))


def least_popular(
    items: ItemTable, config: ItemsConfig, *, num_new: int, kept_ids: NDArray[np.int64]
) -> NDArray[np.int64]:
    """Ids of the items that make room for so many new ones, none of kept_ids; none where there is room.

    Of equal popularity, the rows in front go first.
    """
    max_items = items.config.max_items
    if items.num_items + num_new <= max_items:
        return np.empty(0, np.int64)
    trend = items.trend[: items.num_items].numpy().copy()
    kept = items.lookup(kept_ids)
    trend[kept[kept >= 0]] = np.inf
    count = min(max(int(config.retired_share * max_items), items.num_items + num_new - max_items), items.num_items)
    rows = np.sort(np.argsort(trend, kind="stable")[:count])
    return items.ids_of(rows[trend[rows] < np.inf])
