"""The online ranker of LLaTTE (arXiv 2601.20083): a short fresh history, candidates and request behind it, the user's
vector from upstream, and a backbone that joins what the sequence says with what is known without it.

Rows are ``history, query tokens of the request, the vector's token, candidates``. Only candidates differ between the
candidates of a request, so all else is computed once (M-FALCON), and each scores as if it were alone.

The backbone is a small one of DHEN's kind: in each layer a network that mixes everything and one that multiplies with
the input (a cross layer) are added and normalised.

Shapes: B users, L interactions, C candidates, D token width, Q shared query tokens, K tasks, H backbone width.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional

from kernels.implementations import KernelName
from kernels.jagged import row_index
from model.action_encoder import ActionEncoderConfig
from model.action_heads import ActionHeads, ActionLabels
from model.config import ModelConfig
from model.initial import normal, xavier
from model.item_table import CONTENT_DIM
from model.llatte import LlatteEncoder, ReadRows, RMSNorm, joined_rows, learned_queries
from model.llatte_ranking_config import LlatteRankingConfig
from model.llatte_tokens import AGE_BUCKETS, ActionTokens, age_bucket, at_rows
from model.ranking_network import ActionPredictions, Engagements, check_longest
from model.sequence import Candidates
from model.upstream_input import UpstreamVectors

_DENSE = 4
"""Is there a vector, how old it is, how long the history is, how long ago it ended."""
_DAY_S = 86_400.0


class UpstreamToken(nn.Module):
    """``RMSNorm(vector W + age)``, or one learned token where there is no vector that can be read."""

    def __init__(self, upstream_width: int, width: int, generator: torch.Generator) -> None:
        super().__init__()
        self.weight = nn.Parameter(xavier(generator, upstream_width, width))
        self.age = nn.Parameter(normal(generator, AGE_BUCKETS, width) * 10)
        self.none = nn.Parameter(normal(generator, width) * 10)
        self.norm = RMSNorm(width)

    def forward(self, upstream: UpstreamVectors) -> Tensor:
        """float[B, D]."""
        is_there_B = upstream.is_there()
        # Selected, not multiplied: what cannot be read may hold anything, and NaN times 0 would still be NaN.
        vector_BW = torch.where(is_there_B[:, None], upstream.vector_BW.to(self.weight.dtype), 0.0)
        age_ms_B = (torch.where(is_there_B, upstream.age_s_B, 0.0).clamp(0, 1e10) * 1000).long()
        known_BD = vector_BW @ self.weight + self.age.index_select(0, age_bucket(age_ms_B))
        token_BD: Tensor = self.norm(torch.where(is_there_B[:, None], known_BD, self.none))
        return token_BD


class BackboneLayer(nn.Module):
    """``RMSNorm(h + MLP(h) + h0 * (h W))``."""

    def __init__(self, width: int, generator: torch.Generator) -> None:
        super().__init__()
        self.inner = nn.Parameter(xavier(generator, width, width))
        self.inner_bias = nn.Parameter(torch.zeros(width))
        self.out = nn.Parameter(xavier(generator, width, width))
        self.cross = nn.Parameter(xavier(generator, width, width))
        self.norm = RMSNorm(width)

    def forward(self, h_CH: Tensor, first_CH: Tensor) -> Tensor:
        """float[C, H]."""
        mixed_CH = functional.silu(torch.addmm(self.inner_bias, h_CH, self.inner)) @ self.out
        out_CH: Tensor = self.norm(h_CH + mixed_CH + first_CH * (h_CH @ self.cross))
        return out_CH


class LlatteRanker(nn.Module):
    """Histories, candidates and vectors to predictions of every task; the item embeddings are the caller's.

    model: the recommender that it is part of, for widths and lengths.
    """

    def __init__(self, model: ModelConfig, config: LlatteRankingConfig, generator: torch.Generator) -> None:
        super().__init__()
        self.config, self.max_len = config, model.max_len
        settings, width = config.llatte, model.embedding_dim
        network = settings.network(width=width, max_len=model.max_len)
        self.tokens = ActionTokens(
            ActionEncoderConfig(
                num_actions=config.num_actions,
                embedding_dim=width,
                value_thresholds=config.value_thresholds,
                has_surfaces=config.surfaces,
            ),
            item_dim=width,
            content_dim=CONTENT_DIM if settings.content else 0,
            generator=generator,
        )
        self.queries = learned_queries(network, generator)
        self.upstream = UpstreamToken(config.upstream_width, width, generator)
        self.encoder = LlatteEncoder(network, generator)
        # The read-out's first matrix in two: of tokens that all candidates share, and of a candidate's own.
        self.readout_shared = nn.Parameter(xavier(generator, (settings.num_queries + 1) * width, settings.readout_rank))
        self.readout_own = nn.Parameter(xavier(generator, width, settings.readout_rank))
        self.readout_out = nn.Parameter(xavier(generator, settings.readout_rank, settings.sequence_dim))
        backbone_dim, time_dim = settings.backbone_dim, self.tokens.time.width
        self.join_candidate = nn.Parameter(xavier(generator, settings.sequence_dim + width, backbone_dim))
        self.join_user = nn.Parameter(xavier(generator, time_dim + _DENSE + width, backbone_dim))
        self.join_bias = nn.Parameter(torch.zeros(backbone_dim))
        self.backbone = nn.ModuleList(BackboneLayer(backbone_dim, generator) for _ in range(settings.backbone_layers))
        self.heads = ActionHeads(
            config.tasks, embedding_dim=backbone_dim, hidden_dim=config.task_hidden_dim, generator=generator
        )

    def forward(
        self,
        engagements: Engagements,
        candidates: Candidates,
        upstream: UpstreamVectors | None = None,
        *,
        dropout: torch.Generator | None = None,
        kernel: KernelName = "auto",  # noqa: ARG002 - torch's attention chooses by itself
    ) -> ActionPredictions:
        """Every candidate as if it were alone. upstream: of the B users; None: nobody has a vector.

        dropout: generator of a training pass, which withholds a share of the vectors; None for inference. ValueError
        for a history longer than max_len or more candidates of a user than max_candidates.
        """
        check_longest("candidates", candidates.offsets, "max_candidates", self.config.max_candidates)
        if upstream is None:
            upstream = UpstreamVectors.missing(engagements.offsets.shape[0] - 1, self.config.upstream_width)
        if dropout is not None and self.config.llatte.upstream_dropout:
            upstream = upstream.withheld(self.config.llatte.upstream_dropout, dropout)
        rows, user_BH = self.read(
            engagements, candidates.request_times_ms_B, upstream, asked_on_B=candidates.request_surfaces_B
        )
        return ActionPredictions(candidates_CK=self.behind(rows, user_BH, candidates), interactions_LK=None)

    def loss(self, predictions: ActionPredictions, *, candidates: ActionLabels) -> Tensor:
        """Scalar: each task's mean loss over all that is labelled, weighted and summed (``ActionHeads.loss``)."""
        return self.heads.loss(predictions.candidates_CK, candidates)

    def read(
        self,
        engagements: Engagements,
        asked_at_ms_B: Tensor,
        upstream: UpstreamVectors,
        *,
        asked_on_B: Tensor | None = None,
    ) -> tuple[ReadRows, Tensor]:
        """All that no candidate changes: rows for ``behind``, and float[B, H], the user's part of the backbone.

        asked_on_B: int64[B], the surface that each request comes from, 0: not told; None: of none.
        """
        check_longest("interactions", engagements.offsets, "max_len", self.max_len)
        num_positions = engagements.item_LD.shape[0]
        x_LD = self.tokens(
            engagements.item_LD,
            engagements.content_LF,
            engagements.actions_L,
            engagements.values_L,
            (engagements.timestamps_ms_L, at_rows(asked_at_ms_B, engagements.offsets, num_positions)),
        )
        time_BD = self.tokens.time(asked_at_ms_B, asked_at_ms_B)
        request_BQD = self.queries + functional.pad(time_BD, (0, x_LD.shape[1] - time_BD.shape[1]))[:, None]
        if self.config.surfaces:
            asked_on_B = torch.zeros_like(asked_at_ms_B) if asked_on_B is None else asked_on_B
            request_BQD = request_BQD + self.tokens.actions.surface(asked_on_B)[:, None]
        upstream_BD = self.upstream(upstream)
        query_BQD = torch.cat([request_BQD, upstream_BD[:, None]], 1)
        num_users, num_queries = query_BQD.shape[:2]
        query_offsets = num_queries * torch.arange(num_users + 1, device=asked_at_ms_B.device)
        x_TD, offsets = joined_rows(x_LD, engagements.offsets, query_BQD.flatten(0, 1), query_offsets)
        rows = self.encoder.read(x_TD, offsets, num_queries=num_queries)
        dense_B4 = self._dense(engagements, asked_at_ms_B, upstream).to(x_LD.dtype)
        return rows, torch.cat([time_BD, dense_B4, upstream_BD], 1) @ self.join_user

    def behind(self, rows: ReadRows, user_BH: Tensor, candidates: Candidates) -> Tensor:
        """float[C, K]: predictions of candidates behind rows that were read."""
        row_C = row_index(candidates.offsets, candidates.item_CD.shape[0])
        asked_at_ms_C = candidates.request_times_ms_B.index_select(0, row_C)
        token_CD = self.tokens.candidates(candidates.item_CD, candidates.content_CF, asked_at_ms_C)
        own_CD = self.encoder.behind(rows, token_CD, candidates.offsets)
        shared_BR = rows.queries_BQD.flatten(1) @ self.readout_shared
        read_CR = functional.silu(shared_BR.index_select(0, row_C) + own_CD @ self.readout_own)
        known_CX = torch.cat([read_CR @ self.readout_out, token_CD], 1)
        first_CH = torch.addmm(self.join_bias, known_CX, self.join_candidate) + user_BH.index_select(0, row_C)
        h_CH = first_CH
        for layer in self.backbone:
            h_CH = layer(h_CH, first_CH)
        predictions_CK: Tensor = self.heads(h_CH)
        return predictions_CK

    def _dense(self, engagements: Engagements, asked_at_ms_B: Tensor, upstream: UpstreamVectors) -> Tensor:
        """float32[B, 4], each within a few of 0."""
        is_there_B, lengths_B = upstream.is_there(), engagements.offsets.diff()
        age_s_B = torch.where(is_there_B, upstream.age_s_B, 0.0).clamp(min=0)
        last_B = (engagements.offsets[1:] - 1).clamp(min=0)
        times_ms_L = engagements.timestamps_ms_L
        last_ms_B = times_ms_L[last_B] if times_ms_L.shape[0] else torch.zeros_like(asked_at_ms_B)
        quiet_s_B = torch.where(lengths_B > 0, (asked_at_ms_B - last_ms_B).clamp(min=0) / 1000, 0.0)
        return torch.stack(
            [
                is_there_B.float(),
                torch.log1p(age_s_B) / math.log(_DAY_S),
                torch.log1p(lengths_B.float()) / math.log1p(self.max_len),
                torch.log1p(quiet_s_B.float()) / math.log(_DAY_S),
            ],
            1,
        )
