"""From histories that end at the newest interaction to what a step predicts: each new interaction once.

Position j of a history predicts interaction j + 1. Only positions whose next interaction is new carry loss, so an
interaction is supervised in exactly one step, however often its user comes back.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from feature_store.interactions import Interactions, JaggedHistories


@dataclass(frozen=True, kw_only=True, slots=True)
class Examples:
    """Inputs of B users and their supervised positions. L input positions, P of them supervised."""

    item_id: NDArray[np.int64]
    """[L] interactions that serve as input: each history without its last one."""
    event_time_ms: NDArray[np.int64]
    """[L]"""
    query_time_ms: NDArray[np.int64]
    """[L] time of the next interaction: when the prediction would have been asked for."""
    acts: NDArray[np.int64]
    """[L] what was done, a bit each, and above them where (JaggedHistories.acts)."""
    value: NDArray[np.float32]
    """[L] NaN where there is none."""
    next_action: NDArray[np.uint32]
    """[L] actions of the next interaction, a bit each."""
    offsets: NDArray[np.int64]
    """[B + 1] row boundaries of the inputs."""
    positions: NDArray[np.int64]
    """[P] supervised input positions, ascending."""
    is_in_order: NDArray[np.bool_]
    """[L] whether all that comes before the next interaction in its history arrived before it."""
    target_item_id: NDArray[np.int64]
    """[P] item of the new interaction that each supervised position predicts."""
    target_rows: NDArray[np.int64]
    """[P] which row of the new interactions that is."""
    num_first: int
    """New interactions without an earlier one: they enter the history, nothing predicts them."""
    num_out_of_reach: int
    """New interactions older than the newest `max_len`: they arrived too late to be predicted. Or one of the same step
    that arrived after them happened before them: it is in their history by now, and was not when they happened."""


def build_examples(histories: JaggedHistories, new: Interactions, *, max_len: int) -> Examples:
    """Examples for the `new` interactions, which `histories` (the newest max_len + 1 of each user) already contain."""
    lengths = histories.lengths()
    row_of = np.repeat(np.arange(histories.num_users), lengths)
    is_overtaken = _overtaken(histories, row_of)
    new_row = _rows_of_new(histories, row_of, new)
    is_target = (new_row >= 0) & ~is_overtaken
    is_first_of_row = np.zeros(histories.num_interactions, bool)
    is_first_of_row[histories.offsets[:-1][lengths > 0]] = True
    # Inputs are all interactions but each row's last; the next interaction is the one after in the same row.
    is_input = np.ones(histories.num_interactions, bool)
    is_input[histories.offsets[1:][lengths > 0] - 1] = False
    inputs = np.flatnonzero(is_input)
    input_offsets = np.concatenate([[0], np.cumsum(np.maximum(lengths - 1, 0))]).astype(np.int64)
    positions = np.flatnonzero(is_target[inputs + 1])
    # The head of a full row has predecessors outside the window, so it counts as out of reach.
    num_first = int((is_target & is_first_of_row & (lengths[row_of] <= max_len)).sum())
    return Examples(
        item_id=histories.item_id[inputs],
        event_time_ms=histories.event_time_ms[inputs],
        query_time_ms=histories.event_time_ms[inputs + 1],
        acts=histories.acts[inputs],
        value=histories.value[inputs],
        next_action=histories.action[inputs + 1],
        offsets=input_offsets,
        positions=positions,
        is_in_order=~is_overtaken[inputs + 1],
        target_item_id=histories.item_id[inputs[positions] + 1],
        target_rows=new_row[inputs[positions] + 1],
        num_first=num_first,
        num_out_of_reach=len(new) - len(positions) - num_first,
    )


def _rows_of_new(histories: JaggedHistories, row_of: NDArray[np.int64], new: Interactions) -> NDArray[np.int64]:
    """[T] which of `new` each history interaction is, by user and arrival number; -1: none."""
    if len(new) == 0:
        return np.full(histories.num_interactions, -1)
    order = np.argsort(histories.user_ids)
    row_of_new = order[np.searchsorted(histories.user_ids, new.user_id, sorter=order)]
    keys = row_of.astype(np.uint64) << np.uint64(32) | histories.seq.astype(np.uint64)
    new_keys = row_of_new.astype(np.uint64) << np.uint64(32) | new.seq.astype(np.uint64)
    by_key = np.argsort(new_keys)
    place = by_key[np.minimum(np.searchsorted(new_keys, keys, sorter=by_key), len(new) - 1)]
    return np.where(new_keys[place] == keys, place, -1)


def _overtaken(histories: JaggedHistories, row_of: NDArray[np.int64]) -> NDArray[np.bool_]:
    """[T] whether something before an interaction in its history arrived after it: nobody could have known it then."""
    numbers = row_of.astype(np.int64) << np.int64(32) | histories.seq.astype(np.int64)
    return numbers < np.maximum.accumulate(numbers)
