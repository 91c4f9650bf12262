"""The user model upstream of the ranker (LLaTTE, arXiv 2601.20083, section 4): a long history to one vector.

It reads the user's side alone, so that its vectors can be worked out when something happens and kept until somebody
asks. It learns through the vector alone: the tasks of the ranker on labelled items, and which item came next. It has an
item table, snapshots and an optimiser of its own (``ItemModel``).

Shapes: B users, L interactions, C items, K tasks, W width of the vector, D width of items and tokens, R rows.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from kernels.jagged import check_offsets, row_index
from kernels.softmax_loss import sampled_softmax_loss
from model.action_encoder import ActionEncoderConfig
from model.action_heads import ActionHeads, ActionLabels
from model.initial import NORM_EPS, xavier
from model.item_model import ItemModel
from model.item_table import CONTENT_DIM, ActiveRows, ItemTable
from model.llatte import LlatteEncoder, LowRankReadout, RMSNorm, joined_rows, learned_queries
from model.llatte_tokens import ActionTokens, at_rows
from model.losses import candidate_log_q, draw_negatives
from model.ranking_learning import RankingPass, ShownBatch
from model.recommender import take_items
from model.upstream_config import UpstreamConfig, UpstreamModelConfig

__all__ = ["UpstreamConfig", "UpstreamExamples", "UpstreamModel", "UpstreamModelConfig", "UserBatch"]


@dataclass(frozen=True, kw_only=True, slots=True)
class UserBatch:
    """The newest interactions of B users in event-time order, at most UpstreamConfig.max_len each.

    rows_L: int64[L], item table row, -1 for an item the table does not hold. actions_L: int64[L], a bit for each kind.
    values_L: float32[L], NaN where unknown. timestamps_ms_L: int64[L], epoch milliseconds. offsets: int64[B + 1]; a
    user without interactions is an empty row, and has a vector as well. as_of_ms_B: int64[B], the event time that each
    vector is worked out for: ages of interactions count from it.
    """

    rows_L: Tensor
    actions_L: Tensor
    values_L: Tensor
    timestamps_ms_L: Tensor
    offsets: Tensor
    as_of_ms_B: Tensor


@dataclass(frozen=True, kw_only=True, slots=True)
class UpstreamExamples:
    """Users, and C items that each met after its history.

    item_rows_C: int64[C], all >= 0. item_offsets: int64[B + 1]. labels: of the C items. is_taken_C: bool[C], items that
    the user did something with: what came next.
    """

    users: UserBatch
    item_rows_C: Tensor
    item_offsets: Tensor
    labels: ActionLabels
    is_taken_C: Tensor

    @classmethod
    def of_shown(cls, shown: ShownBatch, labels: ActionLabels, is_taken_C: Tensor) -> UpstreamExamples:
        """From what the ranker learns from, in rows of the upstream model's own table.

        Vectors are learned as of the newest interaction, though items were shown later: when somebody reads a vector is
        not known when it is worked out.
        """
        has_any_B = shown.offsets.diff() > 0
        as_of_ms_B = shown.shown_at_ms_R.clone()
        as_of_ms_B[has_any_B] = shown.timestamps_ms_L[shown.offsets[1:][has_any_B] - 1]
        return cls(
            users=UserBatch(
                rows_L=shown.rows_L,
                actions_L=shown.actions_L,
                values_L=shown.values_L,
                timestamps_ms_L=shown.timestamps_ms_L,
                offsets=shown.offsets,
                as_of_ms_B=as_of_ms_B,
            ),
            item_rows_C=shown.shown_rows_C,
            item_offsets=shown.shown_offsets,
            labels=labels,
            is_taken_C=is_taken_C,
        )


class UpstreamModel(ItemModel):
    """Histories to vectors, and the heads that the vectors are learned through; ``items`` is a table of its own."""

    config: UpstreamModelConfig

    def __init__(self, config: UpstreamModelConfig) -> None:
        super().__init__()
        self.config = config
        upstream, network = config.upstream, config.upstream.network()
        generator = torch.Generator().manual_seed(upstream.seed)
        content_dim = CONTENT_DIM if upstream.content else 0
        self.items = ItemTable(upstream.items(), content_dim=content_dim)
        self.tokens = ActionTokens(
            ActionEncoderConfig(
                num_actions=config.num_actions,
                embedding_dim=network.width,
                value_thresholds=config.value_thresholds,
                has_surfaces=config.surfaces,
            ),
            item_dim=upstream.embedding_dim,
            content_dim=content_dim,
            generator=generator,
        )
        self.queries = learned_queries(network, generator)
        self.encoder = LlatteEncoder(network, generator)
        self.readout = LowRankReadout(
            network.num_queries * network.width, upstream.readout_rank, upstream.width, generator
        )
        self.readout_norm = RMSNorm(upstream.width)
        self.to_item = nn.Parameter(xavier(generator, upstream.width, upstream.embedding_dim))
        self.log_scale = nn.Parameter(torch.tensor(-math.log(upstream.temperature)))
        self.pair = nn.Parameter(xavier(generator, 2 * upstream.embedding_dim, upstream.task_hidden_dim))
        self.from_vector = nn.Parameter(xavier(generator, upstream.width, upstream.task_hidden_dim))
        self.heads = ActionHeads(
            config.tasks,
            embedding_dim=upstream.task_hidden_dim,
            hidden_dim=upstream.task_hidden_dim,
            generator=generator,
        )

    @torch.no_grad()
    def user_vectors(self, batch: UserBatch) -> Tensor:
        """float32[B, W]: one vector a user, of any history, empty ones too; root mean square about 1.

        ValueError for a history longer than max_len, and offsets that do not fit.
        """
        return self._vectors(batch, None)

    def learning_pass(self, examples: UpstreamExamples, *, generator: torch.Generator) -> RankingPass:
        """One supervised pass; its predictions are the test before the update. generator: negatives.

        Then ``loss.backward()``, and an optimiser of this model steps ``active``.
        """
        drawn = self._draw(generator) if self._is_told_next else examples.item_rows_C[:0]
        active = self.items.activate(torch.cat([examples.users.rows_L, examples.item_rows_C, drawn]))
        vector_BW = self._vectors(examples.users, active)
        row_C = row_index(examples.item_offsets, examples.item_rows_C.shape[0])
        item_CD = self._embeddings(examples.item_rows_C, active)
        predictions_CK = self._predictions(vector_BW.index_select(0, row_C), item_CD)
        loss = self.heads.loss(predictions_CK, examples.labels)
        if self._is_told_next and bool(examples.is_taken_C.any()):
            taken = examples.is_taken_C
            told = self._next_item_loss(vector_BW[row_C[taken]], examples.item_rows_C[taken], drawn, active)
            loss = loss + self.config.upstream.next_item_weight * told
        return RankingPass(loss=loss, predictions_CK=predictions_CK.detach(), active=active)

    def loss(self, batch: UpstreamExamples, *, generator: torch.Generator | None = None) -> Tensor:
        """Scalar: the loss of a ``learning_pass``. generator: None for one of the configuration's seed."""
        if generator is None:
            generator = torch.Generator().manual_seed(self.config.upstream.seed)
        return self.learning_pass(batch, generator=generator).loss

    @property
    def _is_told_next(self) -> bool:
        return self.config.upstream.next_item_weight > 0

    def _vectors(self, batch: UserBatch, active: ActiveRows | None) -> Tensor:
        num_users, num_queries = batch.offsets.shape[0] - 1, self.queries.shape[0]
        num_positions = batch.rows_L.shape[0]
        check_offsets(batch.offsets, num_values=num_positions, max_len=self.config.upstream.max_len)
        asked_at_ms_L = at_rows(batch.as_of_ms_B, batch.offsets, num_positions)
        x_LD = self.tokens(
            self._embeddings(batch.rows_L, active),
            self.items.content_of(batch.rows_L),
            batch.actions_L,
            batch.values_L,
            (batch.timestamps_ms_L, asked_at_ms_L),
        )
        # The weekday and hour that the vector is for reach it with the queries; their age is none.
        query_BQD = self._queries(batch.as_of_ms_B)
        query_offsets = num_queries * torch.arange(num_users + 1, device=batch.offsets.device)
        x_TD, offsets = joined_rows(x_LD, batch.offsets, query_BQD.flatten(0, 1), query_offsets)
        read = self.encoder.read(x_TD, offsets, num_queries=num_queries)
        vectors_BW: Tensor = self.readout_norm(self.readout(read.queries_BQD.flatten(1)))
        return vectors_BW

    def _queries(self, as_of_ms_B: Tensor) -> Tensor:
        time_BD = self.tokens.time(as_of_ms_B, as_of_ms_B)
        time_BD = functional.pad(time_BD, (0, self.queries.shape[1] - time_BD.shape[1]))
        return self.queries + time_BD[:, None]

    def _predictions(self, vector_CW: Tensor, item_CD: Tensor) -> Tensor:
        """float[C, K]: of a user's vector and an item, and how the two go together."""
        item_CD = item_CD * self.config.upstream.embedding_dim**0.5
        both_CD = (vector_CW @ self.to_item) * item_CD
        state_CF = torch.cat([item_CD, both_CD], 1) @ self.pair + vector_CW @ self.from_vector
        predictions_CK: Tensor = self.heads(functional.silu(state_CF))
        return predictions_CK

    def _next_item_loss(self, vector_PW: Tensor, rows_P: Tensor, drawn: Tensor, active: ActiveRows) -> Tensor:
        """Sampled softmax: each item against those of the others and what was drawn, corrected by their chances."""
        candidates_N = torch.unique(torch.cat([rows_P, drawn]))
        popularity_V = torch.softmax(self.items.log_popularity(), 0)
        chance_V = torch.full_like(popularity_V, 1 / max(self.items.num_items, 1), dtype=torch.float64)
        log_q_N = candidate_log_q(
            popularity_V[candidates_N],
            chance_V[candidates_N],
            num_negatives=drawn.shape[0],
            num_targets=rows_P.shape[0],
        )
        index_N, target_P = active.index_of(candidates_N), torch.searchsorted(candidates_N, rows_P)
        return sampled_softmax_loss(
            functional.normalize(vector_PW @ self.to_item, dim=1, eps=NORM_EPS),
            functional.normalize(active.weight_RD[index_N], dim=1, eps=NORM_EPS),
            target_P,
            torch.arange(candidates_N.shape[0]),
            scale=self.log_scale.exp(),
            offset_V=active.bias_R[index_N],
            log_q_C=log_q_N,
            log_q_target_P=log_q_N[target_P],
        ).loss

    def _draw(self, generator: torch.Generator) -> Tensor:
        num_items = self.items.num_items
        chance_V = torch.full((num_items,), 1 / max(num_items, 1), dtype=torch.float64)
        return draw_negatives(chance_V, self.config.upstream.num_negatives, generator)

    def _embeddings(self, rows: Tensor, active: ActiveRows | None) -> Tensor:
        """float[N, D], zeros for row -1; of the leaves of a step, or of the table."""
        known = rows >= 0
        if active is None:
            return self.items.weight[rows.clamp(min=0)] * known[:, None]
        index = active.index_of(rows.clamp(min=0)).clamp(max=max(active.rows_R.shape[0] - 1, 0))
        return take_items(active.weight_RD, index) * known[:, None]
