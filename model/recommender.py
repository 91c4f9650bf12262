"""The recommender: HSTU over histories, an item table, and the score that joins them.

    score(u, item) = scale * cosine(u, item) + bias[item] + coefficient * log(decayed popularity[item] + floor)

Shapes: L packed positions, P states to score, V rows of the live catalogue, R rows asked for, D width.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor, nn
from torch.nn import functional

from kernels.implementations import KernelName
from model.batch import HistoryBatch
from model.compute import HOST, Compute, check_fp8_model
from model.config import ModelConfig
from model.device_rows import DeviceRows
from model.encoder import build_encoder
from model.hstu import HSTULayer
from model.initial import NORM_EPS
from model.item_model import ItemModel
from model.item_table import ActiveRows, ItemTable
from model.ranker import content_dim_of, ranker_of
from model.ranking_network import RankingModelConfig
from model.token_hstu import Acts

_RANKING: Final = "ranking."


@dataclass(frozen=True, kw_only=True, slots=True)
class Catalogue:
    """What scoring needs of the item table, computed once per change of weights.

    unit_VD: float32[V, D], item embeddings of unit length. offset_V: float32[V], bias and weighted trend.
    """

    unit_VD: Tensor
    offset_V: Tensor


class Recommender(ItemModel):
    """Dense parameters (``encoder``, scale, trend coefficient, ``ranking``) and ``items``, the table of all per item.

    ranking: the ranking head of a RankingModelConfig, else None; it reads the embeddings of ``items``. compute: where
    encoder and scores compute; the table and the ranking head are on the host.
    """

    config: ModelConfig

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.compute = HOST
        self.device_rows: DeviceRows | None = None
        generator = torch.Generator().manual_seed(config.seed)
        self.encoder = build_encoder(config, generator)
        # The logarithm of the scale is learned: steps are relative, and it stays positive.
        self.log_scale = nn.Parameter(torch.tensor(-math.log(config.temperature)))
        self.trend_coefficient = nn.Parameter(torch.tensor(config.trend_coefficient))
        self.items = ItemTable(config, content_dim=content_dim_of(config))
        # Last: the other weights start out the same with it and without.
        self.ranking = ranker_of(config, generator) if isinstance(config, RankingModelConfig) else None

    def use(self, compute: Compute) -> None:
        """Compute there from now on. Before an optimiser is made: its state lies where the parameters are."""
        if compute.product == "fp8":
            check_fp8_model(self.config)
        self.compute = compute
        rounds = compute.row_precision != "float32"
        self.device_rows = DeviceRows(self.items, compute.row_precision) if rounds else None
        self.encoder.to(compute.device)
        for layer in self.encoder.modules():
            if isinstance(layer, HSTULayer):
                layer.product = compute.product
        for parameter in (self.log_scale, self.trend_coefficient):
            parameter.data = compute.send(parameter.data)

    @property
    def scale(self) -> Tensor:
        """float32 scalar: what cosine similarities are multiplied by."""
        return self.log_scale.exp()

    def encode(
        self,
        batch: HistoryBatch,
        active: ActiveRows | None = None,
        *,
        dropout: torch.Generator | None = None,
        kernel: KernelName = "auto",
    ) -> Tensor:
        """u_LD: the state after each position, of unit length.

        active: the leaves of a training step, holding at least every known row of the batch; None reads the table
        (inference). dropout: generator of a training pass, None for inference.
        """
        send = self.compute.send
        known_L = batch.rows_L >= 0
        rows_L = batch.rows_L.clamp(min=0)
        if active is not None:
            index_L = active.index_of(rows_L).clamp(max=max(active.rows_R.shape[0] - 1, 0))
            item_LD = take_items(self.sent_active(active), send(index_L))
        elif self.device_rows is not None:
            item_LD = self.device_rows.weight(rows_L, send)
        else:
            item_LD = send(take_items(self.items.weight, rows_L))
        times_ms = (send(batch.timestamps_ms_L), send(batch.query_times_ms_L))
        read = (send(known_L), send(batch.offsets), times_ms)
        acts = {"acts": self.acts_of(batch)} if self.config.reads_actions else {}
        return self.compute.call(self.encoder, item_LD, *read, **acts, dropout=dropout, kernel=kernel)

    def acts_of(self, batch: HistoryBatch) -> Acts:
        """What an encoder that reads actions is told of them. ValueError if the batch does not hold them."""
        if batch.actions_L is None or batch.values_L is None:
            raise ValueError(
                "this encoder reads actions (model.tokens, model.transducers): the batch needs actions_L and values_L"
            )
        return Acts(actions_L=self.compute.send(batch.actions_L), values_L=self.compute.send(batch.values_L))

    def scores(self, u_PD: Tensor, rows: Tensor | None = None, *, catalogue: Catalogue | None = None) -> Tensor:
        """float32[P, V] over the live catalogue, or [P, R] over ``rows`` (int64[R], all >= 0).

        u of zeros scores by bias and trend only: the answer for a user without a history. catalogue: a
        ``catalogue()`` of the current weights, to normalise the items once instead of per call. For inference.
        """
        known = self.catalogue(rows) if catalogue is None else catalogue
        if catalogue is not None and rows is not None:
            known = Catalogue(unit_VD=catalogue.unit_VD[rows], offset_V=catalogue.offset_V[rows])
        return torch.addmm(known.offset_V, u_PD * self.scale.detach(), known.unit_VD.T)

    @torch.no_grad()
    def catalogue(self, rows: Tensor | None = None) -> Catalogue:
        """The live catalogue (or only ``rows``) ready for scoring."""
        part, send = slice(0, self.items.num_items) if rows is None else rows, self.compute.send
        return Catalogue(
            unit_VD=functional.normalize(self._sent_rows(part), dim=1, eps=NORM_EPS),
            offset_V=send(self.items.bias[part]) + self.trend_coefficient * send(self.items.log_popularity(rows)),
        )

    def active_catalogue(self, active: ActiveRows) -> Catalogue:
        """The active rows ready for scoring, differentiable in them and in the trend coefficient."""
        send = self.compute.send
        return Catalogue(
            unit_VD=functional.normalize(self.sent_active(active), dim=1, eps=NORM_EPS),
            offset_V=send(active.bias_R) + self.trend_coefficient * send(self.items.log_popularity(active.rows_R)),
        )

    def sent_active(self, active: ActiveRows) -> Tensor:
        """float32[R, D] on the device: a step's rows, differentiable in ``active.weight_RD``."""
        if self.device_rows is None:
            return self.compute.send(active.weight_RD)
        return self.device_rows.active_weight(active.rows_R, active.weight_RD, self.compute.send)

    def _sent_rows(self, rows: Tensor | slice) -> Tensor:
        if self.device_rows is None:
            return self.compute.send(self.items.weight[rows])
        return self.device_rows.weight(rows, self.compute.send)

    def retrieval_parameters(self) -> dict[str, nn.Parameter]:
        """The dense parameters without those of the ranking head."""
        return {name: one for name, one in self.named_parameters() if not name.startswith(_RANKING)}

    def ranking_parameters(self) -> dict[str, nn.Parameter]:
        """Those of the ranking head; empty without one."""
        return {name: one for name, one in self.named_parameters() if name.startswith(_RANKING)}


def take_items(weight_RD: Tensor, index_L: Tensor) -> Tensor:
    """float[L, D]: rows of a table, zeros if it has none."""
    if weight_RD.shape[0] == 0:  # no item is known yet: every input reads as zeros
        return weight_RD.new_zeros(index_L.shape[0], weight_RD.shape[1])
    return functional.embedding(index_L, weight_RD)
