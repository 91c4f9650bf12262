"""What a model has to beat, on the same interactions: decayed popularity, and what followed the user's last item.

*Popularity*: items by their decayed number of interactions n(j). *Co-occurrence*: after last item i, items by

    c(i, j) + PRIOR * n(j) / n

with c(i, j) the decayed number of times that j came next after i in a user's history, and n the decayed number of all
interactions: the mean of a Dirichlet posterior whose prior is popularity. An item that never followed i keeps its
place by popularity, so every item has a rank, and a last item that is not known gives popularity itself.

Scores are compared in the log domain (see model.trend), multiplied by n / PRIOR: an item that never followed scores
its log popularity, so one sorted copy serves all targets, and only followers are looked at one by one.

Shapes: P targets, S pairs of a target and an item its user had seen, V items known, F followers kept per item.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

import numpy as np
import torch
from numpy.typing import NDArray

from model.item_table import RowMoves
from model.ranking import MISS_RANK
from model.trend import add_interactions, decay_rate_per_ms
from online_trainer.followers import Followers

Int64s = NDArray[np.int64]
Float64s = NDArray[np.float64]

BASELINES: Final = ("popularity", "cooccurrence")

PRIOR: Final = 100.0
"""What popularity counts for after a known item, in interactions. Measured: docs/performance.md."""


@dataclass(frozen=True, kw_only=True, slots=True)
class EvaluatedTargets:
    """P interactions to be predicted from what was known before their batch.

    last_rows_P: int64[P], the user's last item, target_rows_P: int64[P]; -1 or >= num_known for an item that was not
    known. seen_place_S, seen_rows_S: int64[S], distinct pairs of a target and an item (>= 0) its user had seen,
    ascending. num_known: V.
    """

    last_rows_P: Int64s
    target_rows_P: Int64s
    seen_place_S: Int64s
    seen_rows_S: Int64s
    num_known: int


class Baselines:
    """Decayed popularity and last-item co-occurrence: counted from the stream, in float64 on the CPU."""

    def __init__(self, *, half_life_s: float, followers: Followers) -> None:
        self._rate_per_ms = decay_rate_per_ms(half_life_s)
        self._followers = followers
        self._popularity = np.full(0, -np.inf)
        self._log_total = -np.inf
        self._as_of_ms = 0

    def ranks(self, tested: EvaluatedTargets) -> dict[str, Int64s]:
        """Baseline -> int64[P]: 1-based ranks, seen items left out, ties counted as worse; MISS_RANK for a miss."""
        self._reserve(tested.num_known)
        popularity_V = self._popularity[: tested.num_known]
        is_seen_P = np.zeros(len(tested.target_rows_P), bool)
        is_seen_P[tested.seen_place_S[tested.seen_rows_S == tested.target_rows_P[tested.seen_place_S]]] = True
        hit_P = (tested.target_rows_P >= 0) & (tested.target_rows_P < tested.num_known) & ~is_seen_P
        if not hit_P.any():
            return dict.fromkeys(BASELINES, np.full(len(hit_P), MISS_RANK, np.int64))
        own_P = popularity_V[np.where(hit_P, tested.target_rows_P, 0)]
        ascending_V = np.sort(popularity_V)
        by_popularity_P = self._num_as_good(ascending_V, own_P, tested)
        by_cooccurrence_P = self._cooccurrence_ranks(ascending_V, own_P, tested)
        return {
            "popularity": np.where(hit_P, by_popularity_P, MISS_RANK),
            "cooccurrence": np.where(hit_P, by_cooccurrence_P, MISS_RANK),
        }

    def _num_as_good(self, ascending_V: Float64s, score_P: Float64s, tested: EvaluatedTargets) -> Int64s:
        """int64[P]: unseen items at least so popular."""
        num_P = len(ascending_V) - np.searchsorted(ascending_V, score_P)
        place_S, rows_S = tested.seen_place_S, tested.seen_rows_S
        is_known_S = rows_S < len(ascending_V)
        place_S, rows_S = place_S[is_known_S], rows_S[is_known_S]
        counted_S = place_S[self._popularity[rows_S] >= score_P[place_S]]
        return num_P - np.bincount(counted_S, minlength=len(score_P))

    def _cooccurrence_ranks(self, ascending_V: Float64s, own_P: Float64s, tested: EvaluatedTargets) -> Int64s:
        """int64[P], meaningless where the target is a miss."""
        followers = self._followers.of(np.where(tested.last_rows_P < tested.num_known, tested.last_rows_P, -1))
        is_known_S = followers.rows_S < tested.num_known
        place_F, rows_F = followers.place_S[is_known_S], followers.rows_S[is_known_S]
        # c(i, j) * n / PRIOR, all three as of the newest interaction.
        shift = self._log_total - self._rate_per_ms * self._as_of_ms - math.log(PRIOR)
        popularity_F = self._popularity[rows_F]
        score_F = np.logaddexp(followers.log_weight_S[is_known_S] + shift, popularity_F)
        is_target_F = rows_F == tested.target_rows_P[place_F]
        score_P = own_P.copy()
        score_P[place_F[is_target_F]] = score_F[is_target_F]
        # Among the popular, followers are counted by popularity alone; these are the ones that following lifts past.
        lifted_F = (popularity_F < score_P[place_F]) & (score_F >= score_P[place_F])
        place_F, rows_F = place_F[lifted_F], rows_F[lifted_F]
        lifted_F = ~_contains(tested, place_F, rows_F)
        # The target counts itself once: by popularity, or as lifted.
        num_lifted_P = np.bincount(place_F[lifted_F], minlength=len(own_P))
        return self._num_as_good(ascending_V, score_P, tested) + num_lifted_P

    def observe(self, rows: Int64s, times_ms: Int64s) -> None:
        """Count interactions, in any order; rows: int64[N], -1 is left out."""
        known = rows >= 0
        rows, times_ms = rows[known], times_ms[known]
        if len(rows) == 0:
            return
        self._reserve(int(rows.max()) + 1)
        add_interactions(torch.from_numpy(self._popularity), rows, times_ms, rate_per_ms=self._rate_per_ms)
        added = np.logaddexp.reduce(np.sort(times_ms) * self._rate_per_ms)
        self._log_total = float(np.logaddexp(self._log_total, added))
        self._as_of_ms = max(self._as_of_ms, int(times_ms.max()))

    def observe_transitions(self, last_rows: Int64s, next_rows: Int64s, times_ms: Int64s) -> None:
        """Count what came next after what; int64[N] each, pairs with a row of -1 are left out."""
        self._followers.add(last_rows, next_rows, times_ms.astype(np.float64) * self._rate_per_ms)

    def follow(self, moves: RowMoves) -> None:
        """Forget removed items, and move the others as ``ItemTable.remove`` moved the rows."""
        self._reserve(moves.num_before)
        moves.follow(torch.from_numpy(self._popularity))
        self._popularity[moves.num_after :] = -np.inf
        self._followers.follow(moves)

    def _reserve(self, num_rows: int) -> None:
        if num_rows > len(self._popularity):
            grown = np.full(max(num_rows, 2 * len(self._popularity)), -np.inf)
            grown[: len(self._popularity)] = self._popularity
            self._popularity = grown

    def state(self) -> dict[str, NDArray[np.generic]]:
        """Copies of everything a later rank depends on."""
        return {
            "popularity": self._popularity.copy(),
            "log_total": np.array([self._log_total]),
            "as_of_ms": np.array([self._as_of_ms]),
            **{f"followers.{name}": array for name, array in self._followers.state().items()},
        }

    def load_state(self, state: Mapping[str, NDArray[np.generic]]) -> None:
        """Continue from a ``state``."""
        self._popularity = state["popularity"].astype(np.float64)
        self._log_total, self._as_of_ms = float(state["log_total"][0]), int(state["as_of_ms"][0])
        prefix = "followers."
        self._followers.load_state({n.removeprefix(prefix): a for n, a in state.items() if n.startswith(prefix)})


def _contains(tested: EvaluatedTargets, place_N: Int64s, rows_N: Int64s) -> NDArray[np.bool_]:
    """bool[N]: whether a pair of a target and an item is among those seen."""
    if len(tested.seen_rows_S) == 0:
        return np.zeros(len(rows_N), bool)
    num_rows = max(tested.num_known, int(tested.seen_rows_S.max()) + 1)
    keys_S, keys_N = tested.seen_place_S * num_rows + tested.seen_rows_S, place_N * num_rows + rows_N
    found_N = np.minimum(np.searchsorted(keys_S, keys_N), len(keys_S) - 1)
    is_there_N: NDArray[np.bool_] = keys_S[found_N] == keys_N
    return is_there_N
