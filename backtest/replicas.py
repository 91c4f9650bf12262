"""Copies of a trainer's weights as they were published, moved on by the live swap code.

Shapes: V rows of the catalogue, R rows carried, D width.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from model.config import ModelConfig, RowPrecision
from model.manifest import Manifest
from model.recommender import Catalogue, Recommender
from model.row_precision import as_published, bytes_of_row
from model.snapshot import RowBlock, Snapshot
from model.swap import apply_snapshot, take_rows

Int64s = NDArray[np.int64]


class ChangedRows:
    """When each row of a trainer's item table last changed, in steps: what a delta since any of them carries.

    It takes over the table's own marks, which know one reader only; `lend` puts them back for the publisher.
    """

    def __init__(self) -> None:
        self._step_V = np.zeros(0, np.int64)
        self._num_retired = 0
        self._moved_step = 0
        self._lent_step = 0

    def after_step(self, model: Recommender, step: int, num_retired: int) -> None:
        """Note what a step changed. Where items were retired, rows moved: all count as changed."""
        num_rows = model.items.num_items
        if num_rows > len(self._step_V):
            self._step_V = np.pad(self._step_V, (0, max(num_rows - len(self._step_V), len(self._step_V))))
        dirty_V = model.items.dirty[:num_rows]
        self._step_V[:num_rows][dirty_V.numpy()] = step
        dirty_V.zero_()
        if num_retired != self._num_retired:
            self._step_V[:num_rows], self._num_retired, self._moved_step = step, num_retired, step

    def since(self, step: int, model: Recommender) -> Int64s:
        """int64[R], ascending: rows that changed after a step."""
        return np.flatnonzero(self._step_V[: model.items.num_items] > step)

    def have_moved_since(self, step: int) -> bool:
        """Whether rows moved after a step: only a whole copy is right then."""
        return self._moved_step > step

    def lend(self, model: Recommender, step: int) -> None:
        """Mark in the table what changed since the last call, for whoever takes a delta after `step`."""
        model.items.dirty[torch.from_numpy(self.since(self._lent_step, model))] = True
        self._lent_step = step

    def state(self) -> dict[str, Tensor]:
        """For ``load_state``."""
        numbers = [self._num_retired, self._moved_step, self._lent_step]
        return {"steps": torch.from_numpy(self._step_V.copy()), "numbers": torch.tensor(numbers)}

    def load_state(self, state: dict[str, Tensor]) -> None:
        """Continue from a ``state``."""
        self._step_V = state["steps"].numpy().copy()
        self._num_retired, self._moved_step, self._lent_step = state["numbers"].tolist()


def taken_snapshot(
    model: Recommender,
    changed: ChangedRows,
    *,
    step: int,
    since: int | None,
    row_precision: RowPrecision = "float32",
) -> Snapshot:
    """The weights after a step as a snapshot in memory: a delta on those after step `since`, whole for None.

    Embeddings are what they are once written with this precision and read again.
    """
    if since is None or changed.have_moved_since(since):
        rows = take_rows(model, "anchor")
        since = None
    else:
        rows = _rows_of(model, changed.since(since, model))
    rows = replace(rows, weight=as_published(rows.weight, row_precision))
    return snapshot_in_memory(model, step=step, since=since, dense=model.dense_state(), rows=rows)


def snapshot_in_memory(
    model: Recommender, *, step: int, since: int | None, dense: dict[str, Tensor], rows: RowBlock
) -> Snapshot:
    """A snapshot that no storage has seen; versions are steps."""
    manifest = Manifest(
        model="backtest",
        version=step,
        kind="anchor" if since is None else "delta",
        parent=since,
        config_hash=model.config.config_hash(),
        model_config=model.config.as_dict(),
        num_items=len(rows.ids),
        created_at_ms=0,
        watermark_ms=0,
    )
    return Snapshot(manifest=manifest, dense=dense, rows=rows)


def _rows_of(model: Recommender, rows: Int64s) -> RowBlock:
    items, rows_R = model.items, torch.from_numpy(rows)
    return RowBlock(
        ids=torch.from_numpy(items.ids_of(rows).copy()),
        weight=items.weight[rows_R],
        bias=items.bias[rows_R],
        trend=items.trend[rows_R],
        removed_ids=torch.zeros(0, dtype=torch.int64),
        trend_as_of_ms=items.trend_as_of_ms,
        content=items.content[rows_R] if items.content_dim else None,
    )


def num_bytes_of(snapshot_rows: int, model: Recommender, row_precision: RowPrecision = "float32") -> int:
    """Bytes that a snapshot of so many rows carries: all dense parameters; embedding, bias, trend and id of a row."""
    dense = sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
    return dense + snapshot_rows * (bytes_of_row(model.config.embedding_dim, row_precision) + 4 + 8 + 8)


class Replica:
    """One copy of the weights, as after a step; None before the first."""

    def __init__(self, config: ModelConfig) -> None:
        self.model = Recommender(config)
        self.model.eval()
        self._catalogue: Catalogue | None = None

    @property
    def step(self) -> int | None:
        """The trainer's step whose weights these are."""
        return self.model.snapshot_version

    @property
    def catalogue(self) -> Catalogue:
        """Ready for scoring; worked out once per version."""
        if self._catalogue is None:
            self._catalogue = self.model.catalogue()
        return self._catalogue

    def apply(self, snapshot: Snapshot) -> None:
        """Swap to a snapshot that is whole or changes the present version."""
        apply_snapshot(self.model, snapshot)
        self._catalogue = None

    def state(self) -> dict[str, Tensor]:
        """For ``load_state``; only of a replica that has a version."""
        items = {f"items.{name}": tensor for name, tensor in self.model.items.state_dict().items()}
        dense = {f"dense.{name}": tensor for name, tensor in self.model.dense_state().items()}
        return {**items, **dense, "step": torch.tensor([self.step or 0])}

    def load_state(self, state: dict[str, Tensor]) -> None:
        """Continue from a ``state``."""
        parts: dict[str, dict[str, Tensor]] = {"items": {}, "dense": {}}
        for name, tensor in state.items():
            kind, _, rest = name.partition(".")
            if rest:
                parts[kind][rest] = tensor
        self.model.items.load_state_dict(parts["items"])
        self.model.load_dense_state(parts["dense"])
        self.model.snapshot_version, self.model.snapshot_hash = int(state["step"]), None
        self._catalogue = None
