"""What a user was about to take, as a question to a recommender, and where one ranked it.

Shapes: L packed positions of histories, B rows, P queries, V catalogue rows, S sampled queries, K list length.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from feature_store.interactions import JaggedHistories
from feature_store.jagged import copy_ranges, offsets_of
from model.batch import HistoryBatch
from model.ranking import MISS_RANK, SeenPairs, ranks, seen_before
from model.recommender import Catalogue, Recommender
from online_trainer.examples import Examples

Int64s = NDArray[np.int64]
Bools = NDArray[np.bool_]

LIST_LEN: Final = 10
SAMPLED_TOGETHER: Final = 64
"""Consecutive events whose lists are wanted: many at once cost little more than one."""
_LOGITS_MAX: Final = 1 << 23
"""Scores that exist at once; bounds memory."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Queries:
    """P queries on the packed histories that they may use.

    positions_P: the newest interaction each may use, -1 for none. next_ms_L: when the next interaction happened, or the
    query was asked, at each position. acts_L, value_L: what was done and where, and its value, NaN without one.
    event_P: number of the event that came next, in the log. asked_ms_P: when. history_ms_P: event time of the newest
    interaction used, -1 for none. is_repeat_P: the user had the item before: a miss, whatever history is used.
    is_sampled_P: the list shown is wanted as well.
    """

    item_id_L: Int64s
    event_time_ms_L: Int64s
    next_ms_L: Int64s
    acts_L: Int64s
    value_L: NDArray[np.float32]
    offsets: Int64s
    positions_P: Int64s
    target_item_id_P: Int64s
    event_P: Int64s
    asked_ms_P: Int64s
    history_ms_P: Int64s
    is_repeat_P: Bools
    is_sampled_P: Bools

    def __len__(self) -> int:
        return len(self.positions_P)

    @staticmethod
    def of_examples(examples: Examples, event_P: Int64s, *, is_repeat_P: Bools, sample_every: int) -> Queries:
        """The queries that a training step tests, on the histories that it tests them with."""
        positions_P = examples.positions
        return Queries(
            item_id_L=examples.item_id,
            event_time_ms_L=examples.event_time_ms,
            next_ms_L=examples.query_time_ms,
            acts_L=examples.acts,
            value_L=examples.value,
            offsets=examples.offsets,
            positions_P=positions_P,
            target_item_id_P=examples.target_item_id,
            event_P=event_P,
            asked_ms_P=examples.query_time_ms[positions_P],
            history_ms_P=examples.event_time_ms[positions_P],
            is_repeat_P=is_repeat_P,
            is_sampled_P=event_P // SAMPLED_TOGETHER % sample_every == 0,
        )

    @staticmethod
    def without_history(count: int) -> Queries:
        """So many queries of which nothing is known; their lists are wanted."""
        unknown, nothing = np.full(count, -1), np.zeros(0, np.int64)
        return Queries(
            item_id_L=nothing,
            event_time_ms_L=nothing,
            next_ms_L=nothing,
            acts_L=nothing,
            value_L=nothing.astype(np.float32),
            offsets=np.zeros(1, np.int64),
            positions_P=unknown,
            target_item_id_P=unknown,
            event_P=unknown,
            asked_ms_P=unknown,
            history_ms_P=unknown,
            is_repeat_P=np.zeros(count, np.bool_),
            is_sampled_P=np.ones(count, np.bool_),
        )

    @staticmethod
    def of_moment(history: JaggedHistories, moment_ms: int, *, max_len: int) -> Queries:
        """What one user would be shown at a moment, by the newest `max_len` of a history; what follows is not known."""
        blank = Queries.without_history(1)
        columns = {name: column[-max_len:] for name, column in history.columns.items()}
        offsets = np.array([0, min(max_len, history.num_interactions)])
        newest = JaggedHistories(user_ids=history.user_ids, offsets=offsets, **columns)
        return blank.on(newest, np.array([moment_ms]))

    def on(self, histories: JaggedHistories, asked_ms_P: Int64s) -> Queries:
        """The same queries, each on a history of its own (B = P), asked at these times."""
        lengths_P = histories.lengths()
        last_P = np.where(lengths_P > 0, histories.offsets[1:] - 1, -1)
        next_ms_L = np.append(histories.event_time_ms[1:], 0)
        known = last_P[last_P >= 0]
        newest_ms = histories.event_time_ms[known]
        # A producer's clock may run ahead: the query still comes after everything it knows of.
        next_ms_L[known] = np.maximum(asked_ms_P[last_P >= 0], newest_ms)
        history_ms_P = np.full(len(self), -1)
        history_ms_P[last_P >= 0] = newest_ms
        return replace(
            self,
            item_id_L=histories.item_id,
            event_time_ms_L=histories.event_time_ms,
            next_ms_L=next_ms_L[: histories.num_interactions],
            acts_L=histories.acts,
            value_L=histories.value,
            offsets=histories.offsets,
            positions_P=last_P,
            asked_ms_P=asked_ms_P,
            history_ms_P=history_ms_P,
        )

    def part(self, which: Bools) -> Queries:
        """Some of the queries, on the histories that they use."""
        kept = {name: getattr(self, name)[which] for name in _OF_QUERY}
        positions_P = kept["positions_P"]
        has_history_P = positions_P >= 0
        row_P = np.searchsorted(self.offsets, positions_P[has_history_P], side="right") - 1
        rows = np.unique(row_P)
        lengths = np.diff(self.offsets)[rows]
        offsets = offsets_of(lengths)
        columns = [getattr(self, name) for name in _OF_HISTORY]
        copied = copy_ranges(columns, self.offsets[rows], lengths)
        # Each position moves with its row.
        moved = np.searchsorted(rows, row_P)
        kept["positions_P"] = np.full(len(positions_P), -1)
        kept["positions_P"][has_history_P] = positions_P[has_history_P] - self.offsets[row_P] + offsets[moved]
        return Queries(**dict(zip(_OF_HISTORY, copied, strict=True)), offsets=offsets, **kept)

    @staticmethod
    def concat(parts: Sequence[Queries]) -> Queries:
        """All queries of all parts (at least one), in order."""
        if len(parts) == 1:
            return parts[0]
        shifts = np.cumsum([0, *(len(part.item_id_L) for part in parts)])
        shifted = list(zip(parts, shifts, strict=False))
        joined = {
            name: np.concatenate([getattr(part, name) for part in parts])
            for name in (*_OF_HISTORY, *_OF_QUERY)
            if name != "positions_P"
        }
        return Queries(
            **joined,
            offsets=np.concatenate([[0], *(part.offsets[1:] + shift for part, shift in shifted)]),
            positions_P=np.concatenate(
                [np.where(part.positions_P >= 0, part.positions_P + shift, -1) for part, shift in shifted]
            ),
        )


_OF_HISTORY: Final = ("item_id_L", "event_time_ms_L", "next_ms_L", "acts_L", "value_L")
_OF_QUERY: Final = (
    "positions_P",
    "target_item_id_P",
    "event_P",
    "asked_ms_P",
    "history_ms_P",
    "is_repeat_P",
    "is_sampled_P",
)


@dataclass(frozen=True, kw_only=True, slots=True)
class ShownLists:
    """What S of the queries would have been shown, K items each, best first. event_S: which. item_ids_SK: -1 where
    there is no more. target_probability_S: of the item that came, 0 for a miss.
    """

    event_S: Int64s
    item_ids_SK: Int64s
    probabilities_SK: NDArray[np.float32]
    target_probability_S: NDArray[np.float32]


@dataclass(frozen=True, kw_only=True, slots=True)
class Ranked:
    """Where P queries' items were ranked among num_candidates items, and S lists."""

    rank_P: Int64s
    num_candidates: int
    lists: ShownLists


@torch.inference_mode()
def rank_queries(
    model: Recommender,
    catalogue: Catalogue,
    queries: Queries,
    *,
    num_known: int | None = None,
    only_lists: bool = False,
) -> Ranked:
    """Rank by a model's weights; of its rows only the first `num_known` count. only_lists: no ranks, which come out as
    misses.
    """
    num_known = model.items.num_items if num_known is None else num_known
    rows_L = torch.from_numpy(model.items.lookup(queries.item_id_L))
    targets_P = torch.from_numpy(model.items.lookup(queries.target_item_id_P))
    offsets = torch.from_numpy(queries.offsets)
    batch = HistoryBatch(
        rows_L=torch.where(rows_L < num_known, rows_L, -1),
        timestamps_ms_L=torch.from_numpy(queries.event_time_ms_L),
        query_times_ms_L=torch.from_numpy(queries.next_ms_L),
        offsets=offsets,
        actions_L=torch.from_numpy(queries.acts_L),
        values_L=torch.from_numpy(queries.value_L),
    )
    positions_P = torch.from_numpy(queries.positions_P)
    u_PD = _states(model, batch, positions_P)
    seen = _seen(rows_L, offsets, positions_P)
    rank_P = np.full(len(queries), MISS_RANK)
    lists = []
    step = max(1, _LOGITS_MAX // max(num_known, 1))
    for start in range(0, len(queries), step):
        part = slice(start, min(start + step, len(queries)))
        is_listed_p = queries.is_sampled_P[part]
        if only_lists and not is_listed_p.any():
            continue
        logits_pV = model.scores(u_PD[part], catalogue=catalogue)[:, :num_known]
        of_part = seen.of_targets(part, device=logits_pV.device)
        if not only_lists:
            rank_P[part] = ranks(logits_pV, targets_P[part], of_part, num_known=num_known).numpy()
        if is_listed_p.any():
            lists.append(_shown(model, queries, part, logits_pV, targets_P[part], of_part))
    rank_P[queries.is_repeat_P] = MISS_RANK
    return Ranked(rank_P=rank_P, num_candidates=num_known, lists=joined_lists(lists))


def _states(model: Recommender, batch: HistoryBatch, positions_P: Tensor) -> Tensor:
    """float32[P, D]; zeros without a history: bias and trend alone then decide."""
    u_PD = torch.zeros(len(positions_P), model.config.embedding_dim)
    known_P = positions_P >= 0
    if known_P.any():
        u_PD[known_P] = model.encode(batch)[positions_P[known_P]]
    return u_PD


def _seen(rows_L: Tensor, offsets: Tensor, positions_P: Tensor) -> SeenPairs:
    known = (positions_P >= 0).nonzero().flatten()
    found = seen_before(rows_L, offsets, positions_P[known]).distinct()
    return SeenPairs(place_S=known[found.place_S], rows_S=found.rows_S)


def _shown(
    model: Recommender, queries: Queries, part: slice, logits_pV: Tensor, targets_p: Tensor, seen: SeenPairs
) -> ShownLists:
    allowed_pV = logits_pV.clone()
    is_known_S = seen.rows_S < logits_pV.shape[1]
    allowed_pV[seen.place_S[is_known_S], seen.rows_S[is_known_S]] = -torch.inf
    sampled = torch.from_numpy(np.flatnonzero(queries.is_sampled_P[part]))
    probability_SV = torch.softmax(allowed_pV[sampled], 1)
    best = probability_SV.topk(min(LIST_LEN, probability_SV.shape[1]), 1)
    ids_SK = np.full((len(sampled), LIST_LEN), -1)
    probabilities_SK = np.zeros((len(sampled), LIST_LEN), np.float32)
    is_there_SK = (best.values > 0).numpy()
    num_best = is_there_SK.shape[1]
    ids_SK[:, :num_best] = np.where(is_there_SK, model.items.ids_of(best.indices.numpy()), -1)
    probabilities_SK[:, :num_best] = best.values.numpy()
    rows_S = targets_p[sampled]
    is_candidate_S = (rows_S >= 0) & (rows_S < probability_SV.shape[1])
    at_S = probability_SV.gather(1, torch.where(is_candidate_S, rows_S, 0)[:, None])[:, 0]
    of_target_S = torch.where(is_candidate_S, at_S, 0.0).numpy()
    of_target_S[queries.is_repeat_P[part][sampled.numpy()]] = 0.0
    return ShownLists(
        event_S=queries.event_P[part][sampled.numpy()],
        item_ids_SK=ids_SK,
        probabilities_SK=probabilities_SK,
        target_probability_S=of_target_S,
    )


def joined_lists(lists: Sequence[ShownLists]) -> ShownLists:
    """All of them, in order."""
    if not lists:
        none = np.zeros((0, LIST_LEN))
        return ShownLists(
            event_S=np.zeros(0, np.int64),
            item_ids_SK=none.astype(np.int64),
            probabilities_SK=none.astype(np.float32),
            target_probability_S=np.zeros(0, np.float32),
        )
    names = ShownLists.__dataclass_fields__
    return ShownLists(**{name: np.concatenate([getattr(one, name) for one in lists]) for name in names})


def repeats(examples: Examples) -> Bools:
    """bool[P]: whether the user had had the item within the history that the trainer reads."""
    starts_P = examples.offsets[np.searchsorted(examples.offsets, examples.positions, side="right") - 1]
    lengths_P = examples.positions + 1 - starts_P
    place_S = np.repeat(np.arange(len(starts_P)), lengths_P)
    first_S = np.repeat(np.cumsum(lengths_P) - lengths_P, lengths_P)
    items_S = examples.item_id[np.repeat(starts_P, lengths_P) + np.arange(len(place_S)) - first_S]
    is_same_S = items_S == examples.target_item_id[place_S]
    return np.bincount(place_S[is_same_S], minlength=len(starts_P)) > 0
