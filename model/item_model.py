"""What snapshots and optimisers need of a model: dense parameters by name, and a table of items."""

from __future__ import annotations

from typing import Any, Protocol

from torch import Tensor, nn

from model.config import RowPrecision
from model.errors import StateMismatchError
from model.item_table import ItemTable


class ModelDescription(Protocol):
    """What a configuration says of itself to whoever exchanges weights."""

    def as_dict(self) -> dict[str, Any]:
        """Every field, as stored in a manifest."""
        ...

    def config_hash(self) -> str:
        """Equal only for models whose weights are interchangeable."""
        ...


class ItemModel(nn.Module):
    """Dense parameters (``named_parameters``) and ``items``; a subclass sets config and items.

    snapshot_version, snapshot_hash, snapshot_row_precision: the snapshot whose weights these are, its content hash and
    the precision of its rows, None before the first one is applied.
    """

    config: ModelDescription
    items: ItemTable
    snapshot_version: int | None = None
    snapshot_hash: str | None = None
    snapshot_row_precision: RowPrecision | None = None

    def dense_state(self) -> dict[str, Tensor]:
        """Copies of the dense parameters by name, on the host."""
        return {name: parameter.detach().to("cpu", copy=True) for name, parameter in self.named_parameters()}

    def load_dense_state(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """Take these tensors as the dense parameters, without copying on the host; returns the ones replaced.

        StateMismatchError (and nothing replaced) unless names, shapes and dtypes are equal.
        """
        replaced = {}
        for name, (parameter, tensor) in self.match_dense_state(state).items():
            replaced[name] = parameter.data
            parameter.data = tensor.to(parameter.device)
        return replaced

    def match_dense_state(self, state: dict[str, Tensor]) -> dict[str, tuple[nn.Parameter, Tensor]]:
        """By name, each dense parameter and the tensor for it; StateMismatchError as ``load_dense_state``."""
        parameters = dict(self.named_parameters())
        have = {name: (tuple(p.shape), p.dtype) for name, p in parameters.items()}
        got = {name: (tuple(t.shape), t.dtype) for name, t in state.items()}
        if have != got:
            differing = sorted(name for name in have.keys() | got.keys() if have.get(name) != got.get(name))
            raise StateMismatchError(f"dense parameters differ in name, shape or dtype: {', '.join(differing)}")
        return {name: (parameter, state[name]) for name, parameter in parameters.items()}
