"""The weights being served: which version, how it got there, and what is derived from it once per version.

Owned by the model thread; `prepare_swap` and `ServedWeights.ready` run aside, beside its reading. Deltas are applied
in place: what they need is worked out aside, so that only rows and pointers are left to be written in the pause. An
anchor replaces everything, so it is built aside and takes the place of the old model in one assignment.

Shapes: V rows of the catalogue, D embedding width, P states to score.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from model.batch import HistoryBatch
from model.config import ModelConfig
from model.errors import ModelError
from model.initial import NORM_EPS
from model.item_table import ItemTable, write_rows
from model.manifest import Manifest
from model.ranker import rank_nothing
from model.recommender import Catalogue, Recommender
from model.reserved_memory import reserved_zeros
from model.snapshot import Snapshot
from model.swap import (
    PlannedSnapshot,
    apply_snapshot,
    carry_out,
    merge_deltas,
    plan_snapshot,
    planned_offsets,
)
from serving.errors import SnapshotRefusedError
from serving.item_names import WithheldItems
from serving.popularity import PopularItems

Int64s = NDArray[np.int64]


@dataclass(frozen=True, kw_only=True, slots=True)
class WeightsInfo:
    """What answers say about the weights they were computed with."""

    version: int
    kind: str
    watermark_ms: int
    """Event time learned up to."""
    created_at_ms: int
    num_labels: int = 0
    """What the ranking head has learned from."""

    @classmethod
    def of(cls, manifest: Manifest) -> WeightsInfo:
        """From the manifest of the newest snapshot applied."""
        return cls(
            version=manifest.version,
            kind=manifest.kind,
            watermark_ms=manifest.watermark_ms,
            created_at_ms=manifest.created_at_ms,
            num_labels=manifest.lineage.num_labels,
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class PreparedSwap:
    """Snapshots read and verified aside, ready for the model thread."""

    base: _Base | None
    """A whole model, when the chain starts with an anchor."""
    delta: Snapshot | None
    """Otherwise: what to apply to the model in service, merged from the chain's deltas."""
    manifests: Sequence[Manifest]
    """Of the whole chain, oldest first."""
    change: _Change | None = None
    """What the delta does to the model in service; None until `ServedWeights.ready` has worked it out."""
    replaced: tuple[object, ...] = ()
    """What the swap may replace: freed with this object, not in the pause."""

    @property
    def newest(self) -> Manifest:
        """The version that this swap leads to."""
        return self.manifests[-1]

    def item_ids(self) -> Int64s:
        """Distinct ids of the items whose rows it brings, -1 among them for removed ones of a whole model."""
        if self.base is not None:
            return self.base.recommender.items.ids()
        assert self.delta is not None
        return self.delta.rows.ids.numpy()


@dataclass(frozen=True, kw_only=True, slots=True)
class _Base:
    recommender: Recommender
    catalogue: _CatalogueBuffer


class _CatalogueBuffer:
    """The catalogue of a model, kept current row by row, with room for items to come."""

    def __init__(self, recommender: Recommender) -> None:
        config, whole = recommender.config, recommender.catalogue()
        self._unit = reserved_zeros(config.max_items, config.embedding_dim, in_huge_pages=True)
        num_items = len(whole.unit_VD)
        self._unit[:num_items] = whole.unit_VD
        self.catalogue = Catalogue(unit_VD=self._unit[:num_items], offset_V=whole.offset_V)

    @torch.no_grad()
    def plan(self, planned: PlannedSnapshot) -> _Change:
        """Work out what a delta changes, without changing what is served."""
        assert planned.change is not None, "an anchor has a catalogue of its own"
        # Nobody reads beyond the items there are: the system gives memory for new ones now, not in the pause.
        self._unit[planned.change.first : planned.change.end] = 0
        return _Change(
            planned=planned,
            rows=planned.change.rows,
            unit_RD=functional.normalize(planned.snapshot.rows.weight, dim=1, eps=NORM_EPS),
            catalogue=Catalogue(unit_VD=self._unit[: planned.change.end], offset_V=planned_offsets(planned)),
        )

    def carry_out(self, change: _Change) -> None:
        """Follow a delta that has been applied."""
        write_rows(self._unit, change.rows, change.unit_RD)
        self.catalogue = change.catalogue


@dataclass(frozen=True, kw_only=True, slots=True)
class _Change:
    """A delta worked out for the model in service.

    rows: int64[R], rows it writes. unit_RD: their unit vectors. catalogue: what scoring needs once the rows are
    written.
    """

    planned: PlannedSnapshot
    rows: Int64s
    unit_RD: Tensor
    catalogue: Catalogue


def prepare_swap(config: ModelConfig, snapshots: Sequence[Snapshot]) -> PreparedSwap:
    """Do aside everything that can be done aside. Raises ModelError."""
    manifests = [snapshot.manifest for snapshot in snapshots]
    if manifests[0].kind == "delta":
        return PreparedSwap(base=None, delta=merge_deltas(snapshots), manifests=manifests)
    recommender = Recommender(config)
    for snapshot in snapshots:
        apply_snapshot(recommender, snapshot)
    recommender.eval()
    base = _Base(recommender=recommender, catalogue=_CatalogueBuffer(recommender))
    _warm_up(base)
    return PreparedSwap(base=base, delta=None, manifests=manifests)


@torch.inference_mode()
def _warm_up(base: _Base) -> None:
    """Answer once aside: what the numerical library sets up at first use is not the first caller's wait."""
    batch = HistoryBatch(
        rows_L=torch.tensor([-1]),
        timestamps_ms_L=torch.tensor([0]),
        query_times_ms_L=torch.tensor([1]),
        offsets=torch.tensor([0, 1]),
        actions_L=torch.tensor([0]),
        values_L=torch.tensor([torch.nan]),
    )
    base.recommender.scores(base.recommender.encode(batch), catalogue=base.catalogue.catalogue)
    if base.recommender.ranking is not None:
        rank_nothing(base.recommender.ranking, base.recommender.config.embedding_dim)


class ServedWeights:
    """The model in service. `info` is None until the first swap."""

    def __init__(self, config: ModelConfig, withheld: WithheldItems) -> None:
        self.config = config
        self.withheld = withheld
        self.recommender = Recommender(config)
        self.info: WeightsInfo | None = None
        self._catalogue = _CatalogueBuffer(self.recommender)
        self._popular: PopularItems | None = None
        self._recommendable: Catalogue | None = None
        self._withheld_ids: Int64s = np.empty(0, np.int64)
        """What `_recommendable` leaves out."""

    @property
    def max_len(self) -> int:
        """Newest interactions of a history that the model reads."""
        return self.config.max_len

    @property
    def items(self) -> ItemTable:
        """The item table of the weights in service."""
        return self.recommender.items

    def ready(self, prepared: PreparedSwap) -> PreparedSwap:
        """The same swap, worked out for the weights in service; while nobody swaps, in any thread.

        Raises SnapshotRefusedError.
        """
        return replace(
            prepared,
            change=None if prepared.delta is None else self._plan(prepared.delta),
            replaced=(
                *(self.recommender, *self.items.storage(), self._catalogue, self._catalogue.catalogue),
                *(self._recommendable, self._popular),
            ),
        )

    def _plan(self, delta: Snapshot) -> _Change:
        try:
            return self._catalogue.plan(plan_snapshot(self.recommender, delta))
        except ModelError as error:
            raise SnapshotRefusedError(str(error)) from error

    def swap(self, prepared: PreparedSwap) -> None:
        """Go to the prepared version. Raises SnapshotRefusedError, and then the version before is still served."""
        if prepared.base is not None:
            self.recommender, self._catalogue = prepared.base.recommender, prepared.base.catalogue
        else:
            assert prepared.delta is not None
            change = prepared.change
            if change is None or not change.planned.fits(self.recommender):
                change = self._plan(prepared.delta)
            carry_out(change.planned)
            self._catalogue.carry_out(change)
        self.info = WeightsInfo.of(prepared.newest)
        self._popular = self._recommendable = None

    def score(self, u_PD: Tensor) -> Tensor:
        """float32[P, V]: every item's score for each state."""
        return self.recommender.scores(u_PD, catalogue=self._catalogue.catalogue)

    def popular(self) -> PopularItems:
        """Items by the trend of these weights; ranked once per version, when first asked for."""
        if self._popular is None:
            self._popular = PopularItems.of_table(self.items)
        return self._popular

    def catalogue(self) -> Catalogue:
        """The live catalogue ready for scoring."""
        return self._catalogue.catalogue

    def recommendable(self) -> Catalogue:
        """The same with offsets of -inf for withheld items; worked out when first asked for, not in a swap."""
        if self._recommendable is None:
            self._withheld_ids = self.withheld.item_ids
            rows = self.items.lookup(self._withheld_ids)
            offset_V = self.catalogue().offset_V.clone()
            offset_V[torch.from_numpy(rows[rows >= 0])] = -torch.inf
            self._recommendable = Catalogue(unit_VD=self.catalogue().unit_VD, offset_V=offset_V)
        return self._recommendable

    def follow_withheld(self) -> None:
        """Withhold what is to be withheld now; to be called whenever that may have changed."""
        if not np.array_equal(self._withheld_ids, self.withheld.item_ids):
            self._recommendable = None
