"""What the topic `items` has said so far, as far as one learner and its item table have use for it."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from model.item_table import ItemTable
from online_trainer.config import ItemsConfig
from online_trainer.item_content import ItemContent, ItemNews

logger = logging.getLogger(__name__)


class ToldItems:
    """Content of items, how far the topic was heard, and what the table is told of it."""

    def __init__(self, items: ItemTable, config: ItemsConfig) -> None:
        self._items, self._config = items, config
        self._content = ItemContent(config.content_items, items.config.embedding_dim)
        self.positions: dict[int, int] = {}
        """Partition of `items` → next offset to be told of."""

    def hear(self, news: Sequence[ItemNews]) -> None:
        """Keep what was said."""
        for one in news:
            if one.content is not None:
                self._content.put(one.item_id, one.content)
            self.positions[one.partition] = one.offset + 1

    def describe(self, item_ids: Iterable[int]) -> None:
        """Tell the table what is known about those of these items that have a row."""
        ids = np.unique(np.fromiter(item_ids, np.int64))
        if self._items.content_dim == 0 or len(ids) == 0:
            return
        rows = self._items.lookup(ids)
        is_known, content = self._content.of(ids)
        has_row = rows[is_known] >= 0
        self._items.describe(rows[is_known][has_row], content[has_row])

    def centre_of(self, new_ids: NDArray[np.int64], otherwise_D: Tensor) -> Tensor:
        """float32[N, D]: where the embeddings of new items start."""
        return self._content.centres(self._items, new_ids, otherwise_D)

    def tensors(self) -> dict[str, Tensor]:
        """Copies, for a checkpoint, beside `state()`."""
        return self._content.state()

    def state(self) -> dict[str, Any]:
        """JSON-ready."""
        if self._config.content_items == 0:
            return {}  # once content is read, from the start: what has been said until then is not known
        return {
            "items_read": {str(partition): offset for partition, offset in sorted(self.positions.items())},
            "text_encoder": self._config.text_encoder,
        }

    def load(self, tensors: Mapping[str, Tensor], state: Mapping[str, Any], *, is_same_log: bool) -> None:
        """Continue from `tensors()` and `state()`; in another log, and by another encoder, items are heard anew."""
        if self._config.content_items == 0:
            return
        if (encoder := state.get("text_encoder", "none")) != self._config.text_encoder:
            logger.warning(
                "items.text_encoder is %s and was %s, or content was not read before: "
                "what is said about items is read from its start", self._config.text_encoder, encoder,
            )  # fmt: skip
            return
        if is_same_log:
            read = state.get("items_read", {})
            self.positions = {int(partition): offset for partition, offset in read.items()}
        self._content.load_state(tensors)
