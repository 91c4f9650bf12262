"""What is known about items besides their interactions, and where it says that a newcomer's embedding should start.

Shapes: N items of one call, R items with interactions and content, C content width, D embedding width.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from feature_store.ids import stable_id
from model.id_index import IdIndex, mix64
from model.item_table import CONTENT_DIM, ItemTable

Int64s = NDArray[np.int64]
Float32s = NDArray[np.float32]

_TEXT_BESIDE_CATEGORIES: Final = 0.25
"""Titles of films beside their genres, as much as these: HR@10 on ml-1m .0583 instead of .0606; a quarter: .0601."""
_RIDGE: Final = 1.0
"""Weight of the penalty on the projection, in items: more of them outweigh the prior, which is the mean of all."""
_ITEMS_PER_CALL: Final = 1_000
"""A fit over R items serves R / so many calls with newcomers, at least one: that keeps its cost per call the same, and
early on, when most items come and every interaction changes much, it is always the newest."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ItemNews:
    """What one message on `items` says about an item."""

    item_id: int
    content: Float32s | None
    """See `content_vector`; None: nothing that helps."""
    is_available: bool
    partition: int
    offset: int
    append_ms: int


def content_vector(
    embedding: Float32s | None, categories: Sequence[str], text: Float32s | None = None
) -> Float32s | None:
    """float32[C] of unit length: embeddings of any length and categories, projected; None without any.

    A function of its arguments alone: the signs of the projection are a hash of the places, and a category is a row of
    signs that its name's hash says, which changes cosines by about 1/8. Embedding and categories weigh the same where
    an item has both. text: what an encoder makes of title and text; not looked at beside an embedding, and a quarter
    beside categories.
    """
    total, embedded = np.zeros(CONTENT_DIM), text if embedding is None else embedding
    if embedded is not None and np.isfinite(embedded).all():
        projected = _unit(_signs(np.arange(len(embedded), dtype=np.uint64)).T @ embedded.astype(np.float64))
        total += projected * (_TEXT_BESIDE_CATEGORIES if embedding is None and categories else 1.0)
    if categories:
        total += _unit(_signs(np.array([stable_id(name) for name in sorted(set(categories))], np.uint64)).sum(0))
    vector = _unit(total).astype(np.float32)
    return vector if vector.any() else None


def _unit(vector: NDArray[np.float64]) -> NDArray[np.float64]:
    norm = float(np.linalg.norm(vector))
    return vector / norm if norm > 0 else vector


def _signs(keys_N: NDArray[np.uint64]) -> NDArray[np.float64]:
    """float64[N, C] of -1 and 1, one pseudo-random row a key."""
    bits = mix64(mix64(keys_N)[:, None] ^ np.arange(CONTENT_DIM, dtype=np.uint64)[None, :])
    return np.where(bits >> np.uint64(63), 1.0, -1.0)


class ItemContent:
    """Content vectors of the items that were told of last, at most ``max_items``, and what embeddings follow from them.

    The projection from content to embeddings is a ridge regression over the items that have interactions and content,
    fitted again as they learn. A function of the calls and the tables they see; ``state`` is part of a checkpoint.
    """

    def __init__(self, max_items: int, embedding_dim: int) -> None:
        self._max_items = max_items
        self._index = IdIndex()
        self._ids: Int64s = np.zeros(0, np.int64)
        self._vectors: Float32s = np.zeros((0, CONTENT_DIM), np.float32)
        self._num_put = 0
        """Different ids so far: modulo max_items the place of the next one, and so whom it replaces."""
        self._projection_CD = torch.zeros(CONTENT_DIM, embedding_dim)
        self._mean_D = torch.zeros(embedding_dim)
        self._calls_left = 0
        """Calls with newcomers that the projection still serves before it is fitted again."""

    def __len__(self) -> int:
        return min(self._num_put, self._max_items)

    def put(self, item_id: int, vector: Float32s) -> None:
        """Keep the content of an item, in place of what was known of it; float32[C]."""
        ids = np.array([item_id], np.int64)
        place = int(self._index.find(ids)[0])
        if place < 0:
            place = self._num_put % self._max_items
            self._reserve(place + 1)
            if self._num_put >= self._max_items:
                self._index.remove(self._ids[place : place + 1])
            self._index.put(ids, np.array([place], np.int64))
            self._ids[place] = item_id
            self._num_put += 1
        self._vectors[place] = vector

    def _reserve(self, num_places: int) -> None:
        if num_places > (size := len(self._ids)):
            more = min(max(2 * size, 1024), self._max_items) - size
            self._ids = np.concatenate([self._ids, np.zeros(more, np.int64)])
            self._vectors = np.concatenate([self._vectors, np.zeros((more, CONTENT_DIM), np.float32)])

    def of(self, ids: Int64s) -> tuple[NDArray[np.bool_], Float32s]:
        """(bool[N], float32[K, C]): which of the items have content, and what that is of those."""
        places = self._index.find(ids)
        return places >= 0, self._vectors[places[places >= 0]]

    def centres(self, items: ItemTable, new_ids: Int64s, otherwise_D: Tensor) -> Tensor:
        """float32[N, D]: where the embeddings of new items start; ``otherwise_D`` where nothing is known."""
        centre_ND = otherwise_D.expand(len(new_ids), -1).clone()
        is_known_N, content_KC = self.of(new_ids)
        if not is_known_N.any():
            return centre_ND
        if self._calls_left == 0 and not self._fit(items):
            return centre_ND
        self._calls_left -= 1
        centre_ND[torch.from_numpy(is_known_N)] = self._mean_D + torch.from_numpy(content_KC) @ self._projection_CD
        return centre_ND

    def _fit(self, items: ItemTable) -> bool:
        """False while no item with content has interactions."""
        rows = np.flatnonzero(items.trend[: items.num_items].numpy() > -np.inf)
        has_content, content_RC = self.of(items.ids_of(rows))
        if len(content_RC) == 0:
            return False
        weight_RD, x_RC = items.weight[torch.from_numpy(rows[has_content])], torch.from_numpy(content_RC)
        self._mean_D = weight_RD.mean(0)
        gram_CC = x_RC.T @ x_RC + _RIDGE * torch.eye(CONTENT_DIM)
        self._projection_CD = torch.linalg.solve(gram_CC, x_RC.T @ (weight_RD - self._mean_D)).contiguous()
        self._calls_left = max(len(content_RC) // _ITEMS_PER_CALL, 1)
        return True

    def state(self) -> dict[str, Tensor]:
        """Copies, for a checkpoint."""
        n = len(self)
        return {
            "ids": torch.from_numpy(self._ids[:n].copy()),
            "vectors": torch.from_numpy(self._vectors[:n].copy()),
            "counts": torch.tensor([self._num_put, self._calls_left]),
            "projection": self._projection_CD.clone(),
            "mean": self._mean_D.clone(),
        }

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Continue from ``state()``; afresh without one, or where another number of items is kept now."""
        if "ids" not in state:
            return
        num_put, self._calls_left = state["counts"].tolist()
        ids, vectors = state["ids"].numpy(), state["vectors"].numpy()
        if len(ids) != self._max_items and num_put > len(ids):  # the limit has changed: oldest first from now on
            ids, vectors = (np.roll(column, -(num_put % len(ids)), axis=0) for column in (ids, vectors))
            num_put = len(ids)
        if len(ids) > self._max_items:
            ids, vectors, num_put = ids[-self._max_items :], vectors[-self._max_items :], self._max_items
        self._ids, self._vectors, self._num_put = ids.copy(), vectors.copy(), num_put
        self._index = IdIndex()
        self._index.put(self._ids, np.arange(len(ids)))
        self._projection_CD, self._mean_D = state["projection"].clone(), state["mean"].clone()
