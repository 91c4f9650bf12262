"""Taking snapshots of a recommender, and applying them in place with a way back.

Shapes: R rows carried, D width.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from model.errors import ItemTableFullError, SnapshotConfigError, SnapshotParentError, StateMismatchError
from model.item_table import Int64s, ItemTable
from model.manifest import SnapshotKind
from model.recommender import Recommender
from model.snapshot import RowBlock, Snapshot


@dataclass(frozen=True, kw_only=True, slots=True)
class UndoDelta:
    """What ``undo_snapshot`` needs: everything a snapshot replaced, once.

    version: the one to go back to, None if there was none. applied: the one to undo. rows: int64[R], the rows that
    existed before and were exchanged; ids, weight, bias, trend: their content. num_items, trend_as_of_ms: of the
    table. table: all of what an anchor replaced, None after a delta.
    """

    version: int | None
    applied: int
    dense: dict[str, Tensor]
    rows: Tensor
    ids: Int64s
    weight: Tensor
    bias: Tensor
    trend: Tensor
    num_items: int
    trend_as_of_ms: int
    table: ItemTable | None


def take_rows(recommender: Recommender, kind: SnapshotKind) -> RowBlock:
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
    )


def apply_snapshot(recommender: Recommender, snapshot: Snapshot) -> UndoDelta:
    """Make the recommender's weights those of the snapshot, in place; returns the way back.

    Dense tensors change by pointer, rows are exchanged. Refused before anything is touched: SnapshotConfigError for
    a model of another configuration, SnapshotParentError for a delta on another version than the one loaded,
    StateMismatchError for tensors of another shape.
    """
    manifest = snapshot.manifest
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
    if snapshot.rows.weight.shape[1] != recommender.config.embedding_dim:
        raise StateMismatchError(
            f"rows are {snapshot.rows.weight.shape[1]} wide, not {recommender.config.embedding_dim}"
        )
    _refuse_overflow(recommender, snapshot.rows)
    undo_rows = _put_anchor if manifest.kind == "anchor" else _put_delta
    replaced = recommender.load_dense_state(snapshot.dense)
    undo = undo_rows(recommender, snapshot, replaced)
    recommender.items.trend_as_of_ms = snapshot.rows.trend_as_of_ms
    recommender.items.clear_dirty()
    recommender.snapshot_version = manifest.version
    return undo


def undo_snapshot(recommender: Recommender, undo: UndoDelta) -> None:
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
        items.put_back(undo.num_items, undo.rows, undo.ids, (undo.weight, undo.bias, undo.trend))
        items.trend_as_of_ms = undo.trend_as_of_ms
    recommender.snapshot_version = undo.version


def _put_anchor(recommender: Recommender, snapshot: Snapshot, replaced: dict[str, Tensor]) -> UndoDelta:
    """Exchange the whole table for a new one; the old one is the way back."""
    block = snapshot.rows
    table = ItemTable(recommender.config)
    table.restore(block.ids.numpy(), block.weight, block.bias, block.trend)
    recommender.items.exchange(table)
    none = torch.empty(0, dtype=torch.int64)
    return _undo(recommender, table, snapshot.manifest.version, replaced, rows=none, whole=table)


def _put_delta(recommender: Recommender, snapshot: Snapshot, replaced: dict[str, Tensor]) -> UndoDelta:
    """Exchange the rows carried, keeping the replaced ones."""
    items, block = recommender.items, snapshot.rows
    removed, ids = block.removed_ids.numpy(), block.ids.numpy()
    known = items.lookup(np.concatenate([removed, ids]))
    rows = torch.from_numpy(np.unique(known[known >= 0]))
    undo = _undo(recommender, items, snapshot.manifest.version, replaced, rows=rows, whole=None)
    items.remove(removed)
    items.put(ids, block.weight, block.bias, block.trend)
    return undo


def _undo(
    recommender: Recommender,
    before: ItemTable,
    applied: int,
    replaced: dict[str, Tensor],
    *,
    rows: Tensor,
    whole: ItemTable | None,
) -> UndoDelta:
    return UndoDelta(
        version=recommender.snapshot_version,
        applied=applied,
        dense=replaced,
        rows=rows,
        ids=before.ids_of(rows.numpy()).copy(),
        weight=before.weight[rows],
        bias=before.bias[rows],
        trend=before.trend[rows],
        num_items=before.num_items,
        trend_as_of_ms=before.trend_as_of_ms,
        table=whole,
    )


def _refuse_overflow(recommender: Recommender, block: RowBlock) -> None:
    items = recommender.items
    num_new = int((items.lookup(block.ids.numpy()) < 0).sum())
    if items.num_items + num_new > recommender.config.max_items:
        raise ItemTableFullError(f"{num_new} new items exceed max_items ({recommender.config.max_items})")


def _differences(recommender: Recommender, other: dict[str, int | float]) -> str:
    own = recommender.config.as_dict()
    differing = sorted(name for name in own.keys() | other.keys() if own.get(name) != other.get(name))
    return ", ".join(f"{name} {other.get(name)} instead of {own.get(name)}" for name in differing)
