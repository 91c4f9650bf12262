"""The live catalogue: which items have a row of the item table, from being told of or interacted with to retiring."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from feature_store.interactions import Interactions
from model.item_table import ItemTable, RowMoves
from online_trainer.config import ItemsConfig
from online_trainer.item_content import ItemNews
from online_trainer.item_lifetimes import Admission, least_popular, too_old
from online_trainer.told_items import ToldItems


class Catalogue:
    """Gives rows to items and takes them back; a function of the sequence of calls and the settings."""

    def __init__(self, items: ItemTable, config: ItemsConfig, *, on_moved: Callable[[RowMoves], None]) -> None:
        """on_moved: hears which rows went where, each time that some are taken back."""
        self._items, self._config, self._on_moved = items, config, on_moved
        self._told = ToldItems(items, config)
        self._admission = Admission(config)

    @property
    def items_read(self) -> dict[int, int]:
        """Partition of `items` → next offset to be told of."""
        return self._told.positions

    def tell(self, news: Sequence[ItemNews], *, watermark_ms: int) -> int:
        """What has been said about items; returns how many got a row by it, without an interaction."""
        self._told.hear(news)
        num_cold = self._admit_cold(
            [one.item_id for one in news if one.content is not None and one.is_available], watermark_ms
        )
        self._told.describe(one.item_id for one in news if one.content is not None)
        return num_cold

    def _admit_cold(self, ids: Sequence[int], watermark_ms: int) -> int:
        cold = np.unique(np.array(ids, np.int64))
        cold = cold[self._items.lookup(cold) < 0]
        if len(cold) == 0:
            return 0
        num_cold = int((self._items.trend[: self._items.num_items] == -torch.inf).sum())
        # Half of the table at most, so that nobody who is interacted with has to make room for them.
        room = min(self._config.cold_items - num_cold, self._items.config.max_items // 2 - self._items.num_items)
        cold = cold[: max(room, 0)]
        self._items.admit(cold, centre_of=self._told.centre_of, as_of_ms=watermark_ms)
        return len(cold)

    def admit(self, new: Interactions) -> None:
        """Rows for the items of a step that have none, as far as the settings admit them."""
        is_unknown = self._items.lookup(new.item_id) < 0
        ids = new.item_id[is_unknown]
        admitted = ids[self._admission.admitted(ids, new.event_key[is_unknown])]
        self._items.admit(admitted, centre_of=self._told.centre_of)
        self._told.describe(admitted.tolist())

    def retire(self, new: Interactions, *, before_ms: int) -> int:
        """Take rows from items that are too old or in the way of the step's new ones; returns from how many.

        before_ms: the watermark before the step.
        """
        watermark_ms = max(before_ms, int(new.event_time_ms.max()))
        num_old = self._remove(too_old(self._items, self._config, watermark_ms=watermark_ms, before_ms=before_ms))
        num_new = len(np.unique(new.item_id[self._items.lookup(new.item_id) < 0]))
        return num_old + self._remove(least_popular(self._items, self._config, num_new=num_new, kept_ids=new.item_id))

    def _remove(self, ids: NDArray[np.int64]) -> int:
        if len(ids):
            self._on_moved(self._items.remove(ids))
        return len(ids)

    def tensors(self) -> dict[str, Tensor]:
        """Copies, for a checkpoint, beside `state()` and the table's own."""
        tensors = {f"admission.{name}": torch.from_numpy(array) for name, array in self._admission.state().items()}
        return tensors | {f"content.{name}": tensor for name, tensor in self._told.tensors().items()}

    def state(self) -> dict[str, Any]:
        """JSON-ready."""
        return self._told.state()

    def load(self, tensors: Mapping[str, Tensor], state: Mapping[str, Any], *, is_same_log: bool) -> None:
        """Continue from `tensors()` and `state()`; in another log, and by another encoder, items are heard anew."""

        def part(prefix: str) -> dict[str, Tensor]:
            return {n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)}

        self._admission.load_state({name: tensor.numpy() for name, tensor in part("admission.").items()})
        self._told.load(part("content."), state, is_same_log=is_same_log)
