"""One supervised pass of the ranking head over items that were shown, behind the histories of those who saw them.

Shapes: R rows (a user's history and what was shown together), L packed interactions, C items shown, K tasks.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from kernels.implementations import KernelName
from model.action_heads import ActionLabels
from model.item_table import ActiveRows
from model.ranker import predict
from model.ranking_network import Engagements
from model.recommender import Recommender, take_items
from model.sequence import Candidates
from model.upstream_input import UpstreamVectors


@dataclass(frozen=True, kw_only=True, slots=True)
class ShownBatch:
    """Histories of R rows, and the items shown behind each: at most max_candidates of a row.

    rows_L: int64[L], item table row, -1 for an item the table does not hold. actions_L: int64[L], a bit for each kind.
    values_L: float32[L], NaN where unknown. timestamps_ms_L: int64[L]. offsets: int64[R + 1]. shown_rows_C: int64[C],
    all >= 0. shown_at_ms_R: int64[R]. shown_offsets: int64[R + 1]. shown_on_R: int64[R], the surface that each row was
    asked for, 0: not told; None: of none. upstream: the users' vectors as they were when the
    items were shown; None: nobody has one.
    """

    rows_L: Tensor
    actions_L: Tensor
    values_L: Tensor
    timestamps_ms_L: Tensor
    offsets: Tensor
    shown_rows_C: Tensor
    shown_at_ms_R: Tensor
    shown_offsets: Tensor
    shown_on_R: Tensor | None = None
    upstream: UpstreamVectors | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class RankingPass:
    """A loss that has not been learned from yet, and what was predicted: the test before the update.

    loss: float32 scalar. predictions_CK: float32[C, K], detached. active: the rows to hand to the optimiser.
    """

    loss: Tensor
    predictions_CK: Tensor
    active: ActiveRows


def ranking_pass(
    recommender: Recommender,
    batch: ShownBatch,
    labels: ActionLabels,
    *,
    generator: torch.Generator,
    kernel: KernelName = "auto",
) -> RankingPass:
    """Run the ranking head once and form its loss; labels: of the C items shown. generator: what is dropped."""
    ranker = recommender.ranking
    assert ranker is not None, "this model has no ranking head"
    active = recommender.items.activate(torch.cat([batch.rows_L, batch.shown_rows_C]))

    def embedding(rows: Tensor) -> Tensor:
        index = active.index_of(rows.clamp(min=0)).clamp(max=max(active.rows_R.shape[0] - 1, 0))
        return take_items(active.weight_RD, index) * (rows >= 0)[:, None]

    predictions = predict(
        ranker,
        Engagements(
            item_LD=embedding(batch.rows_L),
            actions_L=batch.actions_L,
            timestamps_ms_L=batch.timestamps_ms_L,
            offsets=batch.offsets,
            values_L=batch.values_L,
            content_LF=recommender.items.content_of(batch.rows_L),
        ),
        Candidates(
            item_CD=embedding(batch.shown_rows_C),
            request_times_ms_B=batch.shown_at_ms_R,
            offsets=batch.shown_offsets,
            content_CF=recommender.items.content_of(batch.shown_rows_C),
            request_surfaces_B=batch.shown_on_R,
        ),
        batch.upstream,
        dropout=generator,
        kernel=kernel,
    )
    return RankingPass(
        loss=ranker.loss(predictions, candidates=labels),
        predictions_CK=predictions.candidates_CK.detach(),
        active=active,
    )
