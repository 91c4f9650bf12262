"""Taking snapshots of a recommender, and applying them in place with a way back.

Shapes: R rows carried, D width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from model.config import ModelConfig, RowPrecision
from model.errors import ItemTableFullError, SnapshotConfigError, SnapshotParentError, StateMismatchError
from model.item_model import ItemModel
from model.item_table import Int64s, ItemTable, RowChange
from model.manifest import SnapshotKind
from model.snapshot import RowBlock, Snapshot


@dataclass(frozen=True, kw_only=True, slots=True)
class UndoDelta:
    """What ``undo_snapshot`` needs: everything a snapshot replaced, once.

    version, content_hash, row_precision: the one to go back to, None if there was none. applied: the one to undo.
    rows: int64[R], the rows that existed before and were exchanged; ids, weight, bias, trend, content: what was in
    them. num_items, trend_as_of_ms: of the table. table: all of what an anchor replaced, None after a delta.
    """

    version: int | None
    content_hash: str | None
    row_precision: RowPrecision | None
    applied: int
    dense: dict[str, Tensor]
    rows: Tensor
    ids: Int64s
    weight: Tensor
    bias: Tensor
    trend: Tensor
    content: Tensor
    num_items: int
    trend_as_of_ms: int
    table: ItemTable | None


def take_rows(recommender: ItemModel, kind: SnapshotKind) -> RowBlock:
    """Copies of the rows a snapshot of this kind carries: every live row, or those changed since ``clear_dirty``.

    The dense part is ``recommender.dense_state()``. Call ``items.clear_dirty()`` once the copies are taken.
    """
    items = recommender.items
    if kind == "anchor":
        rows = torch.from_numpy(np.flatnonzero(items.ids() >= 0))
        removed = np.empty(0, dtype=np.int64)
    else:
        rows, removed = items.dirty_rows(), items.removed_ids()
    return RowBlock(
        ids=torch.from_numpy(items.ids_of(rows.numpy()).copy()),
        weight=items.weight[rows],
        bias=items.bias[rows],
        trend=items.trend[rows],
        removed_ids=torch.from_numpy(removed),
        trend_as_of_ms=items.trend_as_of_ms,
        content=items.content[rows] if items.content_dim else None,
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class PlannedSnapshot:
    """A snapshot with everything worked out that can be without changing the recommender it is for."""

    recommender: ItemModel
    snapshot: Snapshot
    dense: dict[str, tuple[nn.Parameter, Tensor]]
    change: RowChange | None
    """What a delta does to the item table; None for an anchor, whose table is ``undo.table`` until it is exchanged."""
    undo: UndoDelta

    def fits(self, recommender: ItemModel) -> bool:
        """Whether it was planned for this recommender as it is now; then nothing can go wrong in applying it."""
        is_same = recommender.snapshot_version == self.undo.version
        return recommender is self.recommender and is_same and recommender.snapshot_hash == self.undo.content_hash


def apply_snapshot(recommender: ItemModel, snapshot: Snapshot) -> UndoDelta:
    """Make the recommender's weights those of the snapshot, in place; returns the way back.

    Dense tensors change by pointer, rows are exchanged. Refused before anything is touched: SnapshotConfigError for
    a model of another configuration, SnapshotParentError for a delta on another version, or another content of it,
    than is loaded, StateMismatchError for tensors of another shape, ItemTableFullError for more items than max_items.
    """
    return carry_out(plan_snapshot(recommender, snapshot))


def plan_snapshot(recommender: ItemModel, snapshot: Snapshot) -> PlannedSnapshot:
    """The part of ``apply_snapshot`` that only reads the recommender, with all that can be refused.

    May run beside threads that read the recommender. What it returns is valid until somebody changes the weights.
    """
    manifest, block, items = snapshot.manifest, snapshot.rows, recommender.items
    if manifest.config_hash != recommender.config.config_hash():
        raise SnapshotConfigError(
            f"version {manifest.version} was made with configuration {manifest.config_hash[:12]}; this model has"
            f" {recommender.config.config_hash()[:12]}: {_differences(recommender, manifest.model_config)}"
        )
    if manifest.kind == "delta" and manifest.parent != recommender.snapshot_version:
        raise SnapshotParentError(
            f"version {manifest.version} changes version {manifest.parent}, but version"
            f" {recommender.snapshot_version} is loaded: apply the chain from an anchor"
        )
    if manifest.kind == "delta" and not manifest.builds_on(recommender.snapshot_version, recommender.snapshot_hash):
        raise SnapshotParentError(
            f"version {manifest.version} builds on another version {manifest.parent} than the one that is loaded: apply"
            " the chain from an anchor"
        )
    if manifest.kind == "delta" and recommender.snapshot_row_precision not in (None, manifest.row_precision):
        raise SnapshotParentError(
            f"version {manifest.version} has {manifest.row_precision} rows, the version that is loaded has"
            f" {recommender.snapshot_row_precision}: a change of precision needs an anchor"
        )
    if block.weight.shape[1] != items.config.embedding_dim:
        raise StateMismatchError(f"rows are {block.weight.shape[1]} wide, not {items.config.embedding_dim}")
    content_dim = 0 if block.content is None else block.content.shape[1]
    if content_dim != items.content_dim:
        raise StateMismatchError(f"content of rows is {content_dim} wide, not {items.content_dim}")
    change, table = None, None
    if manifest.kind == "delta":
        change = items.plan(block.removed_ids.numpy(), block.ids.numpy())
        touched = np.concatenate([change.removed_rows, change.rows])
        rows = torch.from_numpy(np.unique(touched[touched < items.num_items]))
    else:
        if len(block.ids) > items.config.max_items:
            raise ItemTableFullError(f"{len(block.ids)} items exceed max_items ({items.config.max_items})")
        table = items.alike()
        table.restore(block.ids.numpy(), block.weight, block.bias, block.trend, block.content)
        table.trend_as_of_ms = block.trend_as_of_ms
        rows = torch.empty(0, dtype=torch.int64)
    dense = recommender.match_dense_state(snapshot.dense)
    undo = UndoDelta(
        version=recommender.snapshot_version,
        content_hash=recommender.snapshot_hash,
        row_precision=recommender.snapshot_row_precision,
        applied=manifest.version,
        dense={name: parameter.data for name, (parameter, _) in dense.items()},
        rows=rows,
        ids=items.ids_of(rows.numpy()).copy(),
        weight=items.weight[rows],
        bias=items.bias[rows],
        trend=items.trend[rows],
        content=items.content[rows],
        num_items=items.num_items,
        trend_as_of_ms=items.trend_as_of_ms,
        table=table,
    )
    return PlannedSnapshot(recommender=recommender, snapshot=snapshot, dense=dense, change=change, undo=undo)


def carry_out(planned: PlannedSnapshot) -> UndoDelta:
    """Apply what was planned; returns the way back."""
    recommender, block = planned.recommender, planned.snapshot.rows
    assert planned.fits(recommender), "the recommender has changed since this was planned"
    for parameter, tensor in planned.dense.values():
        parameter.data = tensor
    if planned.change is None:
        assert planned.undo.table is not None
        recommender.items.exchange(planned.undo.table)
    else:
        recommender.items.carry_out(planned.change, block.weight, block.bias, block.trend, block.content)
        recommender.items.trend_as_of_ms = block.trend_as_of_ms
    recommender.snapshot_version = planned.undo.applied
    recommender.snapshot_hash = planned.snapshot.content_hash
    recommender.snapshot_row_precision = planned.snapshot.manifest.row_precision
    return planned.undo


@torch.no_grad()
def planned_offsets(planned: PlannedSnapshot) -> Tensor:
    """float32[V]: ``Catalogue.offset_V`` as it will be once a planned delta is carried out."""
    items, block, change = planned.recommender.items, planned.snapshot.rows, planned.change
    assert change is not None, "an anchor's catalogue is computed from its own table"
    bias_V, trend_V = torch.zeros(change.end), torch.full((change.end,), -torch.inf, dtype=torch.float64)
    rows, removed = torch.from_numpy(change.rows), torch.from_numpy(change.removed_rows)
    for column_V, old_V, new_R in ((bias_V, items.bias, block.bias), (trend_V, items.trend, block.trend)):
        column_V[: change.first] = old_V[: change.first]
        column_V[removed] = -torch.inf
        column_V[rows] = new_R
    popularity_V = items.log_popularity_of(trend_V, as_of_ms=block.trend_as_of_ms)
    return bias_V + planned.snapshot.dense["trend_coefficient"] * popularity_V


def merge_deltas(deltas: Sequence[Snapshot]) -> Snapshot:
    """One delta that does what these do one after the other, but for rows of items that come and go on the way.

    SnapshotParentError if one does not change the version before it, StateMismatchError if they do not carry tensors
    of the same names, shapes and dtypes.
    """
    merged = deltas[0]
    for delta in deltas[1:]:
        manifest, before = delta.manifest, merged.manifest.version
        if manifest.kind != "delta" or not manifest.builds_on(before, merged.content_hash):
            raise SnapshotParentError(
                f"version {manifest.version} changes version {manifest.parent}, but"
                f" {'another version' if manifest.parent == before else 'version'} {before} comes before it"
            )
        if manifest.row_precision != merged.manifest.row_precision:
            raise SnapshotParentError(
                f"version {manifest.version} has {manifest.row_precision} rows, version {before}"
                f" {merged.manifest.row_precision}: a change of precision needs an anchor"
            )
        if _form(delta) != _form(merged):
            raise StateMismatchError(f"version {manifest.version} carries other tensors than version {before}")
        merged = Snapshot(
            manifest=replace(manifest, parent=merged.manifest.parent, parent_hash=merged.manifest.parent_hash),
            dense=delta.dense,
            rows=_merge_rows(merged.rows, delta.rows),
            merged_hash=delta.content_hash,
        )
    return merged


def _merge_rows(first: RowBlock, then: RowBlock) -> RowBlock:
    """New items in the order of admission: where the first block has a row for an item, its place stays."""
    kept = torch.from_numpy(~np.isin(first.ids.numpy(), then.removed_ids.numpy()))
    first_ids = first.ids[kept]
    added = torch.from_numpy(~np.isin(then.ids.numpy(), first_ids.numpy()))
    ids = torch.cat([first_ids, then.ids[added]])
    # Where each row of `then` goes.
    order = np.argsort(ids.numpy())
    rows = torch.from_numpy(order[np.searchsorted(ids.numpy(), then.ids.numpy(), sorter=order)])

    def column(one: Tensor, other: Tensor) -> Tensor:
        joined = torch.cat([one[kept], other[added]])
        joined[rows] = other
        return joined

    return RowBlock(
        ids=ids,
        weight=column(first.weight, then.weight),
        bias=column(first.bias, then.bias),
        trend=column(first.trend, then.trend),
        content=None if first.content is None or then.content is None else column(first.content, then.content),
        removed_ids=torch.cat([first.removed_ids, then.removed_ids]),
        trend_as_of_ms=then.trend_as_of_ms,
    )


def _form(delta: Snapshot) -> tuple[str, int, dict[str, tuple[torch.Size, torch.dtype]]]:
    dense = {name: (tensor.shape, tensor.dtype) for name, tensor in delta.dense.items()}
    return delta.manifest.config_hash, delta.rows.weight.shape[1], dense


def undo_snapshot(recommender: ItemModel, undo: UndoDelta) -> None:
    """Go back to exactly the weights before ``apply_snapshot`` returned ``undo``.

    SnapshotParentError if another snapshot was applied since (undo the newest first).
    """
    if recommender.snapshot_version != undo.applied:
        raise SnapshotParentError(
            f"version {recommender.snapshot_version} is loaded; this undoes version {undo.applied}"
        )
    recommender.load_dense_state(undo.dense)
    items = recommender.items
    if undo.table is not None:
        items.exchange(undo.table)
    else:
        items.put_back(undo.num_items, undo.rows, undo.ids, (undo.weight, undo.bias, undo.trend, undo.content))
        items.trend_as_of_ms = undo.trend_as_of_ms
    recommender.snapshot_version, recommender.snapshot_hash = undo.version, undo.content_hash
    recommender.snapshot_row_precision = undo.row_precision


def _differences(recommender: ItemModel, other: dict[str, Any]) -> str:
    own = recommender.config.as_dict()
    if isinstance(recommender.config, ModelConfig):
        other = ModelConfig().as_dict() | other  # made before there was a setting: at its default
    differing = sorted(name for name in own.keys() | other.keys() if own.get(name) != other.get(name))
    return ", ".join(f"{name} {other.get(name)} instead of {own.get(name)}" for name in differing)
