"""Scoring many candidates of a user: the history is run once, candidates behind it in micro-batches (M-FALCON, HSTU).

Equal to scoring the candidates one at a time, up to rounding: a candidate sees the history and itself, never another.

Shapes: B users, T tokens of their histories, C candidates in all, M candidates of one micro-batch, K tasks, W numbers
kept of a token and layer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from kernels.implementations import KernelName
from kernels.jagged import position_index, row_index
from model.hstu import HSTU
from model.key_values import KeyValues, NewestStates, packed_places
from model.ranking_network import Engagements, RankingNetwork
from model.sequence import Candidates


@dataclass(frozen=True, kw_only=True, slots=True)
class ReadHistories:
    """What the layers keep of B histories.

    whole: of the layers that read all of the T tokens. truncated: of those that read the newest, where there are any.
    timestamps_ms_T: int64[T].
    """

    whole: ReadRows
    truncated: ReadRows | None
    timestamps_ms_T: Tensor


@dataclass(frozen=True, slots=True)
class ReadRows:
    """layers: float[layers, N, W]. offsets: int64[B + 1], of N tokens."""

    layers: Tensor
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
    readings = network.readings(engagements)
    histories = None
    if not readings[0][0].config.time_embedding:  # with it, tokens of a history depend on when it is asked about
        histories = [(encoder, _read(network, encoder, own, kernel)) for encoder, own in readings]
    parts = micro_batches(candidates.offsets, network.config.max_candidates)
    found = [
        _predict_behind(network, histories, candidates_of(candidates, part), kernel)
        if histories is not None
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
        content_CF=None if candidates.content_CF is None else candidates.content_CF[part.places_M],
    )


def _read(network: RankingNetwork, encoder: HSTU, engagements: Engagements, kernel: KernelName) -> ReadHistories:
    sequence = network.tokens(engagements, None)
    offsets, width = sequence.offsets, KeyValues.width(encoder.config)
    x_TD = sequence.x_TD

    def all_new(num_layers: int, offsets: Tensor, num_tokens: int, newest: NewestStates | None = None) -> KeyValues:
        return KeyValues(
            layers=x_TD.new_empty(num_layers, num_tokens, width),
            offsets=offsets,
            query_offsets=None,
            new_M=torch.arange(num_tokens, device=offsets.device),
            places_M=position_index(offsets, num_tokens),
            newest=newest,
        )

    newest = None
    if encoder.plan.num_truncated:
        starts_B = encoder.truncated_starts(offsets.diff())
        counts_B = offsets.diff() - starts_B
        places_W = packed_places(offsets[:-1] + starts_B, counts_B)
        newest = NewestStates(
            places_W=places_W,
            states_WD=x_TD.new_empty(places_W.shape[0], x_TD.shape[1]),
            from_M=places_W,
            to_W=torch.arange(places_W.shape[0], device=places_W.device),
            kept=all_new(encoder.plan.num_truncated, torch.cat([offsets[:1], counts_B.cumsum(0)]), places_W.shape[0]),
        )
    kept = all_new(encoder.num_whole, offsets, sequence.num_tokens, newest)
    times_ms_T = sequence.timestamps_ms_T
    encoder.extended_states(x_TD, None, (times_ms_T, times_ms_T), kept, kernel=kernel)
    return ReadHistories(
        whole=ReadRows(kept.layers, offsets),
        truncated=None if newest is None else ReadRows(newest.kept.layers, newest.kept.offsets),
        timestamps_ms_T=times_ms_T,
    )


def _predict_behind(
    network: RankingNetwork,
    histories: Sequence[tuple[HSTU, ReadHistories]],
    candidates: Candidates,
    kernel: KernelName,
) -> Tensor:
    """float[M, K] of one micro-batch, behind what each encoder has read."""
    item_MD = network.candidate_tokens(candidates.item_CD)
    states = [_states_behind(encoder, history, item_MD, candidates, kernel) for encoder, history in histories]
    return network.predict(network.fused(states))


def _states_behind(
    encoder: HSTU, history: ReadHistories, item_MD: Tensor, candidates: Candidates, kernel: KernelName
) -> Tensor:
    """float[M, D]."""
    behind = _Behind.of(history.whole, candidates.offsets)
    asked_at_ms_M = candidates.request_times_ms_B[behind.row_M]
    times_ms = asked_at_ms_M.new_empty(behind.kept.layers.shape[1])
    times_ms[behind.moved_N], times_ms[behind.kept.new_M] = history.timestamps_ms_T, asked_at_ms_M
    kept = behind.kept
    if history.truncated is not None:
        read = _Behind.of(history.truncated, candidates.offsets)
        width = candidates.item_CD.shape[1]
        num_newest = read.kept.layers.shape[1]
        starts_B = history.whole.offsets.diff() - history.truncated.offsets.diff()
        newest = NewestStates(
            places_W=packed_places(kept.offsets[:-1] + starts_B, read.kept.offsets.diff()),
            states_WD=candidates.item_CD.new_empty(num_newest, width),
            from_M=torch.arange(asked_at_ms_M.shape[0], device=asked_at_ms_M.device),
            to_W=read.kept.new_M,
            kept=read.kept,
        )
        kept = replace(kept, newest=newest)
    return encoder.extended_states(
        item_MD,
        None,
        (times_ms, times_ms),
        kept,
        num_targets_B=candidates.offsets.diff(),
        kernel=kernel,
    )


@dataclass(frozen=True, slots=True)
class _Behind:
    """Room for M candidates behind what was read of N tokens. row_M: the row of each. moved_N: where the tokens are."""

    kept: KeyValues
    row_M: Tensor
    moved_N: Tensor

    @staticmethod
    def of(read: ReadRows, candidate_offsets: Tensor) -> _Behind:
        num_tokens, num_candidates = read.layers.shape[1], int(candidate_offsets[-1])
        row_N, row_M = row_index(read.offsets, num_tokens), row_index(candidate_offsets, num_candidates)
        # Candidates stand behind their own history, which moves each row back by those of the rows before.
        moved_N = torch.arange(num_tokens, device=row_N.device) + candidate_offsets[row_N]
        moved_M = torch.arange(num_candidates, device=row_M.device) + read.offsets[row_M + 1]
        layers = read.layers.new_empty(read.layers.shape[0], num_tokens + num_candidates, read.layers.shape[2])
        layers[:, moved_N] = read.layers
        kept = KeyValues(
            layers=layers,
            offsets=read.offsets + candidate_offsets,
            query_offsets=candidate_offsets,
            new_M=moved_M,
            places_M=read.offsets.diff()[row_M],
        )
        return _Behind(kept, row_M, moved_N)
