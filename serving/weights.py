"""The weights being served: which version, how it got there, and what is derived from it once per version.

Owned by the model thread. Deltas are applied in place, row by row; an anchor replaces everything, so it is built
aside and takes the place of the old model in one assignment, which keeps the pause short in both cases.

Shapes: V rows of the catalogue, D embedding width, P states to score.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from model.batch import HistoryBatch
from model.config import ModelConfig
from model.errors import ModelError
from model.hstu import NORM_EPS
from model.item_table import ItemTable
from model.manifest import Manifest
from model.recommender import Catalogue, Recommender
from model.snapshot import Snapshot
from model.swap import UndoDelta, apply_snapshot, undo_snapshot
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

    @classmethod
    def of(cls, manifest: Manifest) -> WeightsInfo:
        """From the manifest of the newest snapshot applied."""
        return cls(
            version=manifest.version,
            kind=manifest.kind,
            watermark_ms=manifest.watermark_ms,
            created_at_ms=manifest.created_at_ms,
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class PreparedSwap:
    """Snapshots read and verified aside, ready for the model thread."""

    base: _Base | None
    """A whole model, when the chain starts with an anchor."""
    deltas: Sequence[Snapshot]
    """Otherwise: what to apply to the model in service, each on the one before."""
    manifests: Sequence[Manifest]
    """Of the whole chain, oldest first."""

    @property
    def newest(self) -> Manifest:
        """The version that this swap leads to."""
        return self.manifests[-1]


@dataclass(frozen=True, kw_only=True, slots=True)
class _Base:
    recommender: Recommender
    catalogue: _CatalogueBuffer


class _CatalogueBuffer:
    """The catalogue of a model, kept current row by row, with room for items to come."""

    def __init__(self, recommender: Recommender) -> None:
        whole = recommender.catalogue()
        self.catalogue = whole
        self._unit = whole.unit_VD.new_zeros(max(1024, 5 * len(whole.unit_VD) // 4), recommender.config.embedding_dim)
        self._unit[: len(whole.unit_VD)] = whole.unit_VD

    @torch.no_grad()
    def refresh(self, recommender: Recommender, touched_rows: Tensor) -> None:
        """Follow a change of `touched_rows` (int64, distinct) and of the trend."""
        items = recommender.items
        if items.num_items > len(self._unit):
            grown = self._unit.new_zeros(2 * items.num_items, self._unit.shape[1])
            grown[: len(self._unit)] = self._unit
            self._unit = grown
        self._unit[touched_rows] = functional.normalize(items.weight[touched_rows], dim=1, eps=NORM_EPS)
        offset_V = items.bias[: items.num_items] + recommender.trend_coefficient * items.log_popularity()
        self.catalogue = Catalogue(unit_VD=self._unit[: items.num_items], offset_V=offset_V)


def prepare_swap(config: ModelConfig, snapshots: Sequence[Snapshot]) -> PreparedSwap:
    """Do aside everything that can be done aside. Raises ModelError."""
    manifests = [snapshot.manifest for snapshot in snapshots]
    if manifests[0].kind == "delta":
        return PreparedSwap(base=None, deltas=snapshots, manifests=manifests)
    recommender = Recommender(config)
    for snapshot in snapshots:
        apply_snapshot(recommender, snapshot)
    recommender.eval()
    base = _Base(recommender=recommender, catalogue=_CatalogueBuffer(recommender))
    _warm_up(base)
    return PreparedSwap(base=base, deltas=(), manifests=manifests)


@torch.inference_mode()
def _warm_up(base: _Base) -> None:
    """Answer once aside: what the numerical library sets up at first use is not the first caller's wait."""
    batch = HistoryBatch(
        rows_L=torch.tensor([-1]),
        timestamps_ms_L=torch.tensor([0]),
        query_times_ms_L=torch.tensor([1]),
        offsets=torch.tensor([0, 1]),
    )
    base.recommender.scores(base.recommender.encode(batch), catalogue=base.catalogue.catalogue)


class ServedWeights:
    """The model in service. `info` is None until the first swap."""

    def __init__(self, config: ModelConfig, withheld: WithheldItems) -> None:
        self.config = config
        self.withheld = withheld
        self.recommender = Recommender(config)
        self.info: WeightsInfo | None = None
        self._catalogue = _CatalogueBuffer(self.recommender)
        self._popular: PopularItems | None = None
        self.mask_V: Tensor | None = None
        """float32[V]: -inf for withheld items, else 0; None when none are withheld."""

    @property
    def max_len(self) -> int:
        """Newest interactions of a history that the model reads."""
        return self.config.max_len

    @property
    def items(self) -> ItemTable:
        """The item table of the weights in service."""
        return self.recommender.items

    def swap(self, prepared: PreparedSwap) -> None:
        """Go to the prepared version. Raises SnapshotRefusedError, and then the version before is still served."""
        if prepared.base is not None:
            self.recommender, self._catalogue = prepared.base.recommender, prepared.base.catalogue
        else:
            self._apply(prepared.deltas)
            ids = [delta.rows.ids.numpy() for delta in prepared.deltas]
            changed = self.items.lookup(ids[0] if len(ids) == 1 else np.unique(np.concatenate(ids)))
            self._catalogue.refresh(self.recommender, torch.from_numpy(changed[changed >= 0]))
        self.info = WeightsInfo.of(prepared.newest)
        self._popular = None
        self.update_mask()

    def _apply(self, deltas: Sequence[Snapshot]) -> None:
        applied: list[UndoDelta] = []
        for delta in deltas:
            try:
                applied.append(apply_snapshot(self.recommender, delta))
            except ModelError as error:
                # All or nothing: the deltas before this one were not announced as a version of their own.
                for undo in reversed(applied):
                    undo_snapshot(self.recommender, undo)
                raise SnapshotRefusedError(str(error)) from error

    def score(self, u_PD: Tensor) -> Tensor:
        """float32[P, V]: every item's score for each state."""
        return self.recommender.scores(u_PD, catalogue=self._catalogue.catalogue)

    def popular(self) -> PopularItems:
        """Items by the trend of these weights; ranked once per version, when first asked for."""
        if self._popular is None:
            self._popular = PopularItems.of_table(self.items)
        return self._popular

    def update_mask(self) -> None:
        """Follow a change of `withheld`."""
        withheld = self.withheld.item_ids
        if len(withheld) == 0:
            self.mask_V = None
            return
        rows = self.items.lookup(withheld)
        self.mask_V = torch.zeros(self.items.num_items)
        self.mask_V[torch.from_numpy(rows[rows >= 0])] = -torch.inf
