"""What the encoder reads to predict actions on candidates (ranking): histories as tokens, candidates behind them.

Two designs. *Interleaved* (HSTU, arXiv 2402.17152): item, action, item, action, …; two tokens an interaction, and every
item's token predicts the action that follows it. *Merged* (ULTRA-HSTU, arXiv 2602.16986): item + action in one token, a
quarter of the attention; such a token knows its own action, so only candidates predict.

A candidate is one token without an action. The candidates of a row, its *targets* to the attention, see the history and
themselves, not each other.

Shapes: B users, L interactions, C candidates, T tokens, D width.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from kernels.jagged import check_offsets_shape, position_index, row_index


@dataclass(frozen=True, kw_only=True, slots=True)
class Interactions:
    """Histories of B users in event-time order.

    item_LD, action_LD: float[L, D], embeddings of each item and of what the user did with it. timestamps_ms_L:
    int64[L], epoch milliseconds. offsets: int64[B + 1].
    """

    item_LD: Tensor
    action_LD: Tensor
    timestamps_ms_L: Tensor
    offsets: Tensor

    def __post_init__(self) -> None:
        _check_rows("item_LD", self.item_LD, self.offsets)
        if self.action_LD.shape != self.item_LD.shape or self.action_LD.dtype != self.item_LD.dtype:
            raise ValueError(
                f"action_LD must be {self.item_LD.dtype}{list(self.item_LD.shape)} like item_LD, got"
                f" {self.action_LD.dtype}{list(self.action_LD.shape)}"
            )
        _check_times("timestamps_ms_L", self.timestamps_ms_L, self.item_LD.shape[0])


@dataclass(frozen=True, kw_only=True, slots=True)
class Candidates:
    """Items shown, or to be shown, to each of B users after their history.

    item_CD: float[C, D]. request_times_ms_B: int64[B], when they are asked for, epoch milliseconds. offsets:
    int64[B + 1] into C. content_CF: float[C, F], what is known about them besides, for a ranker that reads it.
    request_surfaces_B: int64[B], where they are asked for, 0: not told; likewise.
    """

    item_CD: Tensor
    request_times_ms_B: Tensor
    offsets: Tensor
    content_CF: Tensor | None = None
    request_surfaces_B: Tensor | None = None

    def __post_init__(self) -> None:
        _check_rows("item_CD", self.item_CD, self.offsets)
        _check_times("request_times_ms_B", self.request_times_ms_B, self.offsets.shape[0] - 1)


@dataclass(frozen=True, kw_only=True, slots=True)
class TokenSequence:
    """Jagged rows of tokens for an encoder.

    x_TD: float[T, D]. timestamps_ms_T: int64[T]; it is also the time of each token's query, since what a token
    predicts happens at its own time. offsets: int64[B + 1]. num_targets_B: int64[B], how many of a row's last tokens
    are candidates. content_T: bool[T], tokens from whose output an action may be predicted: they name an item and know
    nothing of the action on it. item_positions_L, candidate_positions_C: int64, the token of each interaction's item
    and of each candidate.
    """

    x_TD: Tensor
    timestamps_ms_T: Tensor
    offsets: Tensor
    num_targets_B: Tensor
    content_T: Tensor
    item_positions_L: Tensor
    candidate_positions_C: Tensor

    @property
    def num_tokens(self) -> int:
        """T."""
        return self.x_TD.shape[0]

    def places(self) -> Tensor:
        """int64[T]: the place of each token in its row; all targets of a row share the one after the history."""
        after_history_B = self.offsets.diff() - self.num_targets_B
        place_T = position_index(self.offsets, self.num_tokens)
        return torch.minimum(place_T, after_history_B[row_index(self.offsets, self.num_tokens)])


def interleaved(history: Interactions, candidates: Candidates | None = None) -> TokenSequence:
    """Item, action, item, action, … and then the candidates: 2 n + m tokens for n interactions and m candidates.

    The output at an item's token predicts the action on it, from the interactions before: p(a_i | Φ_0, a_0, …, Φ_i).
    """
    num_interactions, width = history.item_LD.shape
    tokens_TD = torch.stack([history.item_LD, history.action_LD], dim=1).reshape(2 * num_interactions, width)
    return _with_candidates(
        tokens_TD,
        history.timestamps_ms_L.repeat_interleave(2),
        2 * history.offsets,
        candidates,
        item_places_L=2 * torch.arange(num_interactions, device=tokens_TD.device),
        items_predict=True,
    )


def merged(history: Interactions, candidates: Candidates | None, no_action_D: Tensor) -> TokenSequence:
    """Item + action in one token, and then each candidate + ``no_action_D``: n + m tokens.

    no_action_D: float[D], what a candidate carries instead of an action: zeros, or a learned dummy
    (``ActionEncoder.no_action``). Only candidates predict: to learn from an interaction, pass it as a candidate.
    """
    num_interactions, width = history.item_LD.shape
    if no_action_D.shape != (width,):
        raise ValueError(f"no_action_D must be float[{width}], got shape {tuple(no_action_D.shape)}")
    if candidates is not None:
        candidates = Candidates(
            item_CD=candidates.item_CD + no_action_D,
            request_times_ms_B=candidates.request_times_ms_B,
            offsets=candidates.offsets,
        )
    return _with_candidates(
        history.item_LD + history.action_LD,
        history.timestamps_ms_L,
        history.offsets,
        candidates,
        item_places_L=torch.arange(num_interactions, device=history.item_LD.device),
        items_predict=False,
    )


def _with_candidates(
    tokens_TD: Tensor,
    timestamps_ms_T: Tensor,
    offsets: Tensor,
    candidates: Candidates | None,
    *,
    item_places_L: Tensor,
    items_predict: bool,
) -> TokenSequence:
    """Each row's candidates behind its tokens. item_places_L: where among tokens_TD the items are."""
    if candidates is None:
        candidates = Candidates(
            item_CD=tokens_TD[:0],
            request_times_ms_B=timestamps_ms_T.new_zeros(offsets.shape[0] - 1),
            offsets=torch.zeros_like(offsets),
        )
    _check_together(tokens_TD, offsets, candidates)
    row_C = row_index(candidates.offsets, candidates.item_CD.shape[0])
    # A token moves back by the candidates of the rows before its own, a candidate by the tokens up to its own row.
    moved_T = _counted(tokens_TD) + candidates.offsets[row_index(offsets, tokens_TD.shape[0])]
    moved_C = _counted(candidates.item_CD) + offsets[row_C + 1]
    moved = torch.cat([moved_T, moved_C])
    values_TD = torch.cat([tokens_TD, candidates.item_CD])
    times_T = torch.cat([timestamps_ms_T, candidates.request_times_ms_B[row_C]])
    item_positions_L = moved_T[item_places_L]
    content_T = torch.zeros_like(moved, dtype=torch.bool)
    content_T[moved_C] = True
    if items_predict:
        content_T[item_positions_L] = True
    return TokenSequence(
        x_TD=torch.zeros_like(values_TD).index_copy(0, moved, values_TD),
        timestamps_ms_T=torch.zeros_like(times_T).index_copy(0, moved, times_T),
        offsets=offsets + candidates.offsets,
        num_targets_B=candidates.offsets.diff(),
        content_T=content_T,
        item_positions_L=item_positions_L,
        candidate_positions_C=moved_C,
    )


def _counted(rows: Tensor) -> Tensor:
    return torch.arange(rows.shape[0], device=rows.device)


def _check_together(tokens_TD: Tensor, offsets: Tensor, candidates: Candidates) -> None:
    if candidates.offsets.shape != offsets.shape:
        raise ValueError(
            f"candidates are of {candidates.offsets.shape[0] - 1} users and histories of {offsets.shape[0] - 1};"
            " a user without candidates has an empty row of them"
        )
    if candidates.item_CD.shape[1] != tokens_TD.shape[1] or candidates.item_CD.dtype != tokens_TD.dtype:
        raise ValueError(
            f"item_CD is {candidates.item_CD.dtype}[C, {candidates.item_CD.shape[1]}]; the history's items are"
            f" {tokens_TD.dtype}[L, {tokens_TD.shape[1]}]"
        )


def _check_rows(name: str, values: Tensor, offsets: Tensor) -> None:
    if values.dim() != 2 or not values.is_floating_point():
        raise ValueError(f"{name} must be a float matrix, got {values.dtype} of shape {tuple(values.shape)}")
    check_offsets_shape(offsets, values)


def _check_times(name: str, times: Tensor, num: int) -> None:
    if times.dtype != torch.int64 or times.shape != (num,):
        raise ValueError(f"{name} must be int64[{num}], got {times.dtype} of shape {tuple(times.shape)}")


__all__ = ["Candidates", "Interactions", "TokenSequence", "interleaved", "merged"]
