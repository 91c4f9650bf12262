"""Scoring many candidates of a user: the history is run once, candidates behind it in micro-batches (M-FALCON, HSTU).

Equal to scoring the candidates one at a time, up to rounding: a candidate sees the history and itself, never another.

Shapes: B users, T tokens of their histories, C candidates in all, M candidates of one micro-batch, K tasks, W numbers
kept of a token and layer.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from kernels.hstu_attention import AttentionMask
from kernels.implementations import KernelName
from kernels.jagged import position_index, row_index
from model.key_values import KeyValues
from model.ranking_network import Engagements, RankingNetwork
from model.sequence import Candidates


@dataclass(frozen=True, kw_only=True, slots=True)
class ReadHistories:
    """What the layers keep of B histories.

    layers: float[layers, T, W]. timestamps_ms_T: int64[T]. offsets: int64[B + 1], in tokens.
    """

    layers: Tensor
    timestamps_ms_T: Tensor
    offsets: Tensor


@torch.no_grad()
def score_candidates(
    network: RankingNetwork, engagements: Engagements, candidates: Candidates, *, kernel: KernelName = "auto"
) -> Tensor:
    """float[C, K]: logits of bce tasks, values of mse tasks, as ``RankingNetwork.forward`` gives them.

    Any number of candidates of a user: they go through the layers max_candidates at a time. ValueError for a history
    longer than max_len.
    """
    network.check_lengths(engagements, None)
    history = None
    if not network.encoder.config.time_embedding:  # with it, tokens of a history depend on when it is asked about
        history = _read(network, engagements, kernel)
    parts = micro_batches(candidates.offsets, network.config.max_candidates)
    found = [
        _predict_behind(network, history, candidates_of(candidates, part), kernel)
        if history is not None
        else network(engagements, candidates_of(candidates, part), kernel=kernel).candidates_CK
        for part in parts
    ]
    if len(found) == 1:
        return found[0]
    scores_CK = torch.empty(candidates.item_CD.shape[0], len(network.config.tasks), dtype=candidates.item_CD.dtype)
    for part, one in zip(parts, found, strict=True):
        scores_CK[part.places_M] = one
    return scores_CK


@dataclass(frozen=True, slots=True)
class CandidatePart:
    """places_M: int64[M], which of the C candidates. offsets: int64[B + 1], how these fall to the users."""

    places_M: Tensor
    offsets: Tensor


def micro_batches(offsets: Tensor, size: int) -> list[CandidatePart]:
    """Every candidate once, at most ``size`` of each user at a time, in order; at least one micro-batch."""
    lengths_B = offsets.diff()
    place_C = position_index(offsets, int(offsets[-1]))
    parts = []
    for start in range(0, max(_most(lengths_B), 1), size):
        inside_C = (place_C >= start) & (place_C < start + size)
        counts_B = (lengths_B - start).clamp(0, size)
        parts.append(CandidatePart(inside_C.nonzero().flatten(), torch.cat([offsets[:1], counts_B.cumsum(0)])))
    return parts


def _most(lengths_B: Tensor) -> int:
    return int(lengths_B.max()) if lengths_B.numel() else 0


def candidates_of(candidates: Candidates, part: CandidatePart) -> Candidates:
    """The candidates of one micro-batch."""
    return Candidates(
        item_CD=candidates.item_CD[part.places_M],
        request_times_ms_B=candidates.request_times_ms_B,
        offsets=part.offsets,
    )


def _read(network: RankingNetwork, engagements: Engagements, kernel: KernelName) -> ReadHistories:
    sequence, config = network.tokens(engagements, None), network.encoder.config
    kept = KeyValues(
        layers=sequence.x_TD.new_empty(config.num_layers, sequence.num_tokens, KeyValues.width(config)),
        offsets=sequence.offsets,
        query_offsets=None,
        new_M=torch.arange(sequence.num_tokens, device=sequence.offsets.device),
        places_M=sequence.places(),
    )
    times_ms_T = sequence.timestamps_ms_T
    network.encoder.extended_states(sequence.x_TD, None, (times_ms_T, times_ms_T), kept, kernel=kernel)
    return ReadHistories(layers=kept.layers, timestamps_ms_T=times_ms_T, offsets=sequence.offsets)


def _predict_behind(
    network: RankingNetwork, history: ReadHistories, candidates: Candidates, kernel: KernelName
) -> Tensor:
    """float[M, K] of one micro-batch."""
    num_tokens, num_candidates = history.timestamps_ms_T.shape[0], candidates.item_CD.shape[0]
    row_T, row_M = row_index(history.offsets, num_tokens), row_index(candidates.offsets, num_candidates)
    # Candidates stand behind their own history, which moves each row back by those of the rows before.
    moved_T = torch.arange(num_tokens, device=row_T.device) + candidates.offsets[row_T]
    moved_M = torch.arange(num_candidates, device=row_M.device) + history.offsets[row_M + 1]
    layers = history.layers.new_empty(history.layers.shape[0], num_tokens + num_candidates, history.layers.shape[2])
    layers[:, moved_T] = history.layers
    asked_at_ms_M = candidates.request_times_ms_B[row_M]
    times_ms = asked_at_ms_M.new_empty(num_tokens + num_candidates)
    times_ms[moved_T], times_ms[moved_M] = history.timestamps_ms_T, asked_at_ms_M
    offsets = history.offsets + candidates.offsets
    x_MD = network.encoder.extended_states(
        network.candidate_tokens(candidates.item_CD),
        None,
        (times_ms, asked_at_ms_M),
        KeyValues(
            layers=layers,
            offsets=offsets,
            query_offsets=candidates.offsets,
            new_M=moved_M,
            places_M=history.offsets.diff()[row_M],
        ),
        mask=AttentionMask(num_targets_B=candidates.offsets.diff()),
        kernel=kernel,
    )
    return network.predict(x_MD)
