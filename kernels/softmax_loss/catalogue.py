"""The full softmax as an online trainer needs it: exact over the catalogue, item gradients for a few rows only.

A step corrects the items of its batch and some hard negatives, a fiftieth of the catalogue. Which those are is known
once all probabilities are, so the gradients of their rows are formed afterwards, from logits of those rows alone.

Shapes: P supervised positions, p of them in a chunk, V catalogue rows, S rows to correct, D width.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from kernels.softmax_loss.cpu import parts, softmax_
from kernels.softmax_loss.formed import LogitSummary

OnLogits = Callable[[slice, Tensor], None]
"""Called with a slice of the P positions and their logits, float[p, V]; must not keep or change them."""


@dataclass(frozen=True, kw_only=True, slots=True)
class CatalogueSoftmax:
    """Weighted sum of ``-log softmax(scale * u . item + offset)`` at the targets, and its gradients.

    loss: scalar. summary: of each position's logits. u_PD, scale, offset_V: gradients of ``loss`` with respect to the
    inputs of the same names; away from the targets, offset_V is each item's weighted sum of
    probabilities.
    """

    loss: Tensor
    summary: LogitSummary
    u_PD: Tensor
    scale: Tensor
    offset_V: Tensor
    _query_PD: Tensor
    _item_VD: Tensor
    _input_offset_V: Tensor
    _target_rows_P: Tensor
    _weights_P: Tensor

    @torch.no_grad()
    def item_gradient(self, rows_S: Tensor) -> Tensor:
        """[S, D]: gradient of ``loss`` with respect to item_VD[rows_S]. rows_S: int64[S], ascending, every target's
        row among them.
        """
        logits_PS = torch.addmm(self._input_offset_V[rows_S], self._query_PD, self._item_VD[rows_S].T)
        grad_PS = logits_PS.sub_(self.summary.log_sum_P[:, None]).exp_()
        places_P1 = torch.searchsorted(rows_S, self._target_rows_P)[:, None]
        grad_PS.scatter_add_(1, places_P1, grad_PS.new_full(places_P1.shape, -1.0))
        return grad_PS.T @ (self._query_PD * self._weights_P[:, None])


@torch.no_grad()
def form_catalogue_softmax(
    u_PD: Tensor,
    item_VD: Tensor,
    target_rows_P: Tensor,
    *,
    scale: Tensor,
    offset_V: Tensor,
    weights_P: Tensor | None = None,
    positions_per_chunk: int,
    on_logits: OnLogits | None = None,
) -> CatalogueSoftmax:
    """Never more than ``positions_per_chunk`` x V logits at once; any device.

    u_PD, item_VD: float[P, D] and float[V, D]. target_rows_P: int64[P]. scale: scalar. offset_V: float[V]. weights_P:
    float[P], 1 / P (the mean) unless given. on_logits: sees every chunk of logits before it is overwritten, for
    metrics over the whole catalogue.
    """
    num_positions = u_PD.shape[0]
    if weights_P is None:
        weights_P = u_PD.new_full((num_positions,), 1 / max(num_positions, 1))
    query_PD, by_item_PD = u_PD * scale, torch.empty_like(u_PD)
    summaries, offset_grad_V = [], torch.zeros_like(offset_V)
    for part in parts(num_positions, positions_per_chunk):
        logits_pV = torch.addmm(offset_V, query_PD[part], item_VD.T)
        if on_logits is not None:
            on_logits(part, logits_pV)
        probability_pV, summary = softmax_(logits_pV, target_rows_P[part])
        summaries.append(summary)
        torch.sub(probability_pV @ item_VD, item_VD[target_rows_P[part]], out=by_item_PD[part])
        offset_grad_V.addmv_(probability_pV.T, weights_P[part])
    offset_grad_V.index_add_(0, target_rows_P, -weights_P)
    by_item_PD *= weights_P[:, None]
    empty_P = u_PD.new_empty(0)
    summary = LogitSummary.joined(summaries or [LogitSummary(log_sum_P=empty_P, target_P=empty_P, top_P=empty_P)])
    return CatalogueSoftmax(
        loss=(summary.loss_P * weights_P).sum(),
        summary=summary,
        u_PD=by_item_PD * scale,
        scale=(by_item_PD * u_PD).sum(),
        offset_V=offset_grad_V,
        _query_PD=query_PD,
        _item_VD=item_VD,
        _input_offset_V=offset_V,
        _target_rows_P=target_rows_P,
        _weights_P=weights_P,
    )
