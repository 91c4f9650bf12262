"""Going back to the weights of some time ago, with positions, metrics and everything else as they are.

Shapes: V rows of the live catalogue, D width.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from model.recommender import Recommender

_DENSE = "dense."


@dataclass(frozen=True, kw_only=True, slots=True)
class WeightsCopy:
    """dense: parameters by name. ids: int64[V]. weight_VD, bias_V: float32, of the items with these ids."""

    dense: dict[str, Tensor]
    ids: Tensor
    weight_VD: Tensor
    bias_V: Tensor

    @classmethod
    def of(cls, model: Recommender) -> WeightsCopy:
        """Copies of everything that is learned by gradient."""
        ids = torch.from_numpy(model.items.ids())
        rows = (ids >= 0).nonzero()[:, 0]
        return cls(
            dense=model.dense_state(),
            ids=ids[rows],
            weight_VD=model.items.weight[rows].clone(),
            bias_V=model.items.bias[rows].clone(),
        )

    @torch.no_grad()
    def restore(self, model: Recommender) -> None:
        """Items that came later keep their weights, items that went since stay away; the optimiser goes on as it is."""
        model.load_dense_state({name: tensor.clone() for name, tensor in self.dense.items()})
        rows = torch.from_numpy(model.items.lookup(self.ids.numpy()))
        known = rows >= 0
        model.items.weight[rows[known]] = self.weight_VD[known]
        model.items.bias[rows[known]] = self.bias_V[known]
        model.items.mark_changed(rows[known])

    def tensors(self) -> dict[str, Tensor]:
        """By name; `from_tensors` reads them back."""
        items = {"ids": self.ids, "weight": self.weight_VD, "bias": self.bias_V}
        return {f"{_DENSE}{name}": tensor for name, tensor in self.dense.items()} | items

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor]) -> WeightsCopy:
        """Read `tensors`' form."""
        dense = {name.removeprefix(_DENSE): one for name, one in tensors.items() if name.startswith(_DENSE)}
        return cls(dense=dense, ids=tensors["ids"], weight_VD=tensors["weight"], bias_V=tensors["bias"])


class LastGoodWeights:
    """The two newest of the copies that are taken every `interval` interactions: the last may be bad already."""

    def __init__(self, interval: int) -> None:
        self._interval = interval
        self._copies: list[WeightsCopy] = []
        self._num_taken = 0

    def take_if_due(self, model: Recommender, num_tested: int) -> None:
        """Copy the weights if an interval is over since the last copy. num_tested: interactions tested so far."""
        if num_tested >= (self._num_taken + 1) * self._interval:
            self._copies = [*self._copies[-1:], WeightsCopy.of(model)]
            self._num_taken = num_tested // self._interval

    def restore(self, model: Recommender) -> bool:
        """Back to the last but one copy; False, and nothing changed, while there are not two."""
        if len(self._copies) < 2:
            return False
        self._copies[0].restore(model)
        self._copies = self._copies[:1]
        return True

    def tensors(self) -> dict[str, Tensor]:
        """By name; `load_tensors` reads them back."""
        held = {f"{at}.{name}": one for at, copy in enumerate(self._copies) for name, one in copy.tensors().items()}
        return held | {"num_taken": torch.tensor(self._num_taken), "interval": torch.tensor(self._interval)}

    def load_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        """Continue from `tensors()`; without them (it was off then) begin with no copy."""
        parts = [
            {name.removeprefix(f"{at}."): one for name, one in tensors.items() if name.startswith(f"{at}.")}
            for at in range(2)
        ]
        self._copies = [WeightsCopy.from_tensors(part) for part in parts if part]
        self._num_taken = int(tensors["num_taken"]) if "num_taken" in tensors else 0
        if "interval" in tensors:  # not in checkpoints of earlier versions
            # Under a longer one the next copy would else come after many times as long.
            self._num_taken = self._num_taken * int(tensors["interval"]) // self._interval
