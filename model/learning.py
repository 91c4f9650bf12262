"""One supervised pass over a batch of histories: shorten them if asked to, encode once, score, form the loss.

Shapes: L packed positions, P supervised positions, V rows of the live catalogue.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from kernels.softmax_loss import LogitSummary, OnLogits, form_catalogue_softmax, sampled_softmax_loss
from model.batch import HistoryBatch, Targets
from model.config import LossConfig
from model.initial import NORM_EPS
from model.item_table import ActiveRows
from model.losses import attach_gradients, candidate_log_q, draw_distribution, draw_negatives
from model.recommender import Recommender
from model.stochastic_length import DrawsLengths, StochasticLength, shortened


@dataclass(frozen=True, kw_only=True, slots=True)
class SupervisedPass:
    """A loss that has not been learned from yet: check that it is finite, call ``backward``, step the optimiser.

    loss: float32 scalar, mean over the targets, weighted where they have weights. active: the rows to hand to the
    optimiser. summary: of the logits that ``on_logits`` saw; None where nobody asked for them and the loss did not need
    them. read: rows that the encoder read as leaves of their own, all of them in active.
    """

    loss: Tensor
    active: ActiveRows
    summary: LogitSummary | None
    read: ActiveRows | None = None

    def backward(self) -> None:
        """Form the gradients of the dense parameters and of ``active``; once."""
        self.loss.backward()  # type: ignore[no-untyped-call]
        if self.read is None or self.read.weight_RD.grad is None:
            return
        assert self.active.weight_RD.grad is not None
        self.active.weight_RD.grad.index_add_(0, self.active.index_of(self.read.rows_R), self.read.weight_RD.grad)


def supervised_pass(
    recommender: Recommender,
    batch: HistoryBatch,
    targets: Targets,
    loss_config: LossConfig,
    *,
    generator: torch.Generator,
    on_logits: OnLogits | None = None,
    lengths: DrawsLengths | None = None,
) -> SupervisedPass:
    """Run the model once and form the loss at the targets.

    generator: stochastic length, dropout and negatives; part of a trainer's checkpoint. on_logits: sees the logits of
    the very same pass over the whole live catalogue, for metrics taken before the update (test, then train). lengths:
    how stochastic length draws, None: each history by itself.
    """
    if loss_config.stochastic_length_alpha:
        rule = StochasticLength(
            alpha=loss_config.stochastic_length_alpha,
            max_len=recommender.config.max_len,
            selection=loss_config.stochastic_length_selection,
        )
        batch, targets = shortened(batch, targets, rule, generator=generator, lengths=lengths)
    if loss_config.kind == "full":
        return _full_pass(recommender, batch, targets, loss_config, generator, on_logits)
    return _sampled_pass(recommender, batch, targets, loss_config, generator, on_logits)


def _full_pass(
    recommender: Recommender,
    batch: HistoryBatch,
    targets: Targets,
    loss_config: LossConfig,
    generator: torch.Generator,
    on_logits: OnLogits | None,
) -> SupervisedPass:
    items, send = recommender.items, recommender.compute.send
    read = items.activate(batch.rows_L)
    u_PD = recommender.encode(batch, read, dropout=generator)[send(targets.positions_P)]
    catalogue, shares_P = recommender.catalogue(), targets.shares()
    formed = form_catalogue_softmax(
        u_PD.detach(),
        catalogue.unit_VD,
        send(targets.rows_P),
        scale=recommender.scale.detach(),
        offset_V=catalogue.offset_V,
        weights_P=None if shares_P is None else send(shares_P),
        positions_per_chunk=loss_config.positions_per_chunk,
        on_logits=on_logits,
    )
    # Only the rows that will be stepped take part in the backward pass; all the rest is exact over the catalogue.
    hardest = recommender.compute.bring(_hardest(formed.offset_V, loss_config.num_hard_negatives))
    active = items.activate(torch.cat([batch.rows_L, targets.rows_P, hardest]))
    stepped_R = send(active.rows_R)
    loss = attach_gradients(
        formed.loss,
        (u_PD, formed.u_PD),
        (recommender.scale, formed.scale),
        (recommender.trend_coefficient, formed.offset_V @ send(items.log_popularity())),
        (functional.normalize(recommender.sent_active(active), dim=1, eps=NORM_EPS), formed.item_gradient(stepped_R)),
        (send(active.bias_R), formed.offset_V[stepped_R]),
    )
    return SupervisedPass(loss=loss, active=active, summary=formed.summary, read=read)


def _hardest(offset_grad_V: Tensor, num_hard_negatives: int) -> Tensor:
    """int64: the rows with the largest total probability, which is the gradient of an item's offset off the targets."""
    return offset_grad_V.abs().topk(min(num_hard_negatives, offset_grad_V.shape[0])).indices


def _sampled_pass(
    recommender: Recommender,
    batch: HistoryBatch,
    targets: Targets,
    loss_config: LossConfig,
    generator: torch.Generator,
    on_logits: OnLogits | None,
) -> SupervisedPass:
    items, send = recommender.items, recommender.compute.send
    log_popularity_V = items.log_popularity()
    chance_V = draw_distribution(log_popularity_V, loss_config)
    negatives = draw_negatives(chance_V, loss_config.num_negatives, generator)
    candidates_C = torch.unique(torch.cat([targets.rows_P, negatives]))
    active = items.activate(torch.cat([batch.rows_L, candidates_C]))
    u_PD = recommender.encode(batch, active, dropout=generator)[send(targets.positions_P)]
    summary = None
    if on_logits is not None:
        summary = _show_logits(
            recommender, u_PD.detach(), send(targets.rows_P), loss_config.positions_per_chunk, on_logits
        )
    catalogue = recommender.active_catalogue(active)
    # Rows that are active only as inputs are no candidates: they were not drawn for this loss.
    index_C = send(active.index_of(candidates_C))
    log_q_C = candidate_log_q(
        torch.softmax(log_popularity_V, 0)[candidates_C],
        chance_V[candidates_C],
        num_negatives=loss_config.num_negatives,
        num_targets=targets.rows_P.shape[0],
    )
    target_index_P, shares_P = torch.searchsorted(candidates_C, targets.rows_P), targets.shares()
    found = sampled_softmax_loss(
        u_PD,
        catalogue.unit_VD[index_C],
        send(target_index_P),
        send(torch.arange(candidates_C.shape[0])),
        scale=recommender.scale,
        offset_V=catalogue.offset_V[index_C],
        weights_P=None if shares_P is None else send(shares_P),
        log_q_C=send(log_q_C),
        log_q_target_P=send(log_q_C[target_index_P]),
    )
    return SupervisedPass(loss=found.loss, active=active, summary=summary)


@torch.no_grad()
def _show_logits(
    recommender: Recommender, u_PD: Tensor, target_rows_P: Tensor, positions_per_chunk: int, on_logits: OnLogits
) -> LogitSummary | None:
    """Call on_logits with the logits of u_PD over the live catalogue, a chunk of positions at a time."""
    catalogue, summaries = recommender.catalogue(), []
    for start in range(0, u_PD.shape[0], positions_per_chunk):
        part = slice(start, min(start + positions_per_chunk, u_PD.shape[0]))
        logits_pV = recommender.scores(u_PD[part], catalogue=catalogue)
        on_logits(part, logits_pV)
        summaries.append(LogitSummary.of(logits_pV, target_rows_P[part]))
    return LogitSummary.joined(summaries) if summaries else None
