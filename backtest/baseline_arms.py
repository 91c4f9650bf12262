"""Baselines that learn from every interaction at once and need no training: items alike, and river's factorisation.

Each is asked about a step's queries before it learns from them. Both rank the whole catalogue that they have seen, with
the tie rule and the filter of everybody else.

Shapes: P queries, V items, L packed positions, F factors.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from river import optim, reco
from torch import Tensor

from backtest.queries import Queries, Ranked, joined_lists
from feature_store.jagged import concat_ranges
from model.id_index import IdIndex
from model.ranking import MISS_RANK, ranks, seen_before
from online_trainer.followers import Followers

Int64s = NDArray[np.int64]
Float64s = NDArray[np.float64]

LEARNING: Final = ("item_knn", "river_mf")
"""Baselines of this module; the trainer's own test ranks for the others."""

_SCORES_MAX: Final = 1 << 23
_ALIKE_KEPT: Final = 64
"""Items alike that are kept of each item."""
_RECENT: Final = 20
"""Newest interactions of a history that count."""
_FACTORS: Final = 16
_NEGATIVES: Final = 2
"""Items that did not come, learned from beside each that did."""


class BaselineArm(Protocol):
    """Answers, then learns."""

    def ask(self, queries: Queries, user_ids_P: Int64s) -> Ranked:
        """Rank what came next; queries on the histories of a training step."""
        ...

    def learn(self, queries: Queries, user_ids_P: Int64s, item_ids_N: Int64s) -> None:
        """The answers to a step's queries, of these users, and all items of the step."""
        ...

    def state(self) -> dict[str, Tensor]:
        """For ``load_state``."""
        ...

    def load_state(self, state: dict[str, Tensor]) -> None:
        """Continue from a ``state``."""
        ...


class _Items:
    """Rows of the items seen so far, in order of appearance, with their counts."""

    def __init__(self) -> None:
        self._index = IdIndex()
        self.counts_V = np.zeros(0)
        self._ids: list[Int64s] = []

    def __len__(self) -> int:
        return len(self.counts_V)

    def rows(self, ids: Int64s) -> Int64s:
        return self._index.find(ids)

    def count(self, ids: Int64s) -> None:
        unknown = ids[self._index.find(ids) < 0]
        distinct, first = np.unique(unknown, return_index=True)
        new = distinct[np.argsort(first)]
        self._index.put(new, np.arange(len(self), len(self) + len(new)))
        self._ids.append(new)
        self.counts_V = np.concatenate([self.counts_V, np.zeros(len(new))])
        np.add.at(self.counts_V, self._index.find(ids), 1)

    def ids_from(self, first: int) -> Int64s:
        """Of the rows from one on."""
        ids = np.concatenate([np.zeros(0, np.int64), *self._ids])
        return ids[first:]

    def state(self) -> dict[str, Tensor]:
        return {"ids": torch.from_numpy(self.ids_from(0).copy()), "counts": torch.from_numpy(self.counts_V.copy())}

    def load_state(self, state: dict[str, Tensor]) -> None:
        ids = state["ids"].numpy()
        self._index = IdIndex()
        self._index.put(ids, np.arange(len(ids)))
        self._ids, self.counts_V = [ids.copy()], state["counts"].numpy().copy()


class ItemKnn:
    """Items alike: a candidate's score is the sum, over the user's recent items, of the cosine of who had both.

    Who had both is counted among each user's `_RECENT` newest interactions; items of equal score are told apart by how
    often they were taken.
    """

    def __init__(self) -> None:
        self._items = _Items()
        self._alike = Followers(max_items=1 << 22, per_item=_ALIKE_KEPT)

    def ask(self, queries: Queries, user_ids_P: Int64s) -> Ranked:  # noqa: ARG002 - by items alone
        """See BaselineArm."""
        counts_V = self._items.counts_V
        place_S, rows_S = _recent(queries, self._items)
        alike = self._alike.of(rows_S)
        place_A = place_S[alike.place_S]
        cosine_A = np.exp(alike.log_weight_S) / np.sqrt(counts_V[rows_S[alike.place_S]] * counts_V[alike.rows_S])

        def scores(part: slice) -> Float64s:
            # Below the least cosine there is: it only breaks ties.
            scores_pV = np.tile(1e-12 * counts_V, (part.stop - part.start, 1))
            is_here_A = (place_A >= part.start) & (place_A < part.stop)
            np.add.at(scores_pV, (place_A[is_here_A] - part.start, alike.rows_S[is_here_A]), cosine_A[is_here_A])
            return scores_pV

        return _ranked(queries, self._items, scores)

    def learn(self, queries: Queries, user_ids_P: Int64s, item_ids_N: Int64s) -> None:  # noqa: ARG002 - by items alone
        """See BaselineArm."""
        self._items.count(item_ids_N)
        place_S, rows_S = _recent(queries, self._items)
        target_S = self._items.rows(queries.target_item_id_P)[place_S]
        once = np.zeros(len(rows_S))
        self._alike.add(rows_S, target_S, once)
        self._alike.add(target_S, rows_S, once)

    def state(self) -> dict[str, Tensor]:
        """See BaselineArm."""
        alike = {f"alike.{name}": torch.from_numpy(array) for name, array in self._alike.state().items()}
        return {**alike, **self._items.state()}

    def load_state(self, state: dict[str, Tensor]) -> None:
        """See BaselineArm."""
        prefix = "alike."
        self._alike.load_state({n.removeprefix(prefix): t.numpy() for n, t in state.items() if n.startswith(prefix)})
        self._items.load_state(state)


class RiverFactorisation:
    """river's ``FunkMF``, made to rank: what came is 1, `_NEGATIVES` items at random are 0.

    river ranks item by item in Python; here its item vectors are mirrored in a matrix, which gives the same scores.
    First vectors are a function of seed and id, so that nothing depends on when river would have drawn them.
    """

    def __init__(self, seed: int) -> None:
        self._seed = seed
        self._items = _Items()
        self._model = reco.FunkMF(n_factors=_FACTORS, optimizer=optim.SGD(0.05), l2=0.01)
        self._item_VF = np.zeros((0, _FACTORS))
        """Of each row, as river has them."""
        self._num_learned = 0

    def ask(self, queries: Queries, user_ids_P: Int64s) -> Ranked:
        """See BaselineArm."""
        known = self._model.u_latents
        nothing = np.zeros(_FACTORS)
        user_PF = np.stack([known.get(user, nothing) for user in user_ids_P.tolist()])

        def scores(part: slice) -> Float64s:
            found: Float64s = user_PF[part] @ self._item_VF.T
            return found

        return _ranked(queries, self._items, scores)

    def learn(self, queries: Queries, user_ids_P: Int64s, item_ids_N: Int64s) -> None:
        """See BaselineArm."""
        num_known = len(self._items)
        self._items.count(item_ids_N)
        new_ids = self._items.ids_from(num_known)
        added_VF = np.stack([self._first("item", item) for item in new_ids.tolist()] or [self._item_VF[:0]])
        self._item_VF = np.concatenate([self._item_VF, added_VF.reshape(-1, _FACTORS)])
        rng = np.random.default_rng([self._seed, self._num_learned])
        self._num_learned += len(queries)
        targets_P = self._items.rows(queries.target_item_id_P)
        negatives_PN = rng.integers(0, len(self._items), (len(queries), _NEGATIVES))
        for user, target, negatives in zip(user_ids_P.tolist(), targets_P.tolist(), negatives_PN.tolist(), strict=True):
            if user not in self._model.u_latents:
                self._model.u_latents[user] = self._first("user", user)
            for row, outcome in ((target, 1.0), *((row, 0.0) for row in negatives if row != target)):
                self._model.i_latents[row] = self._item_VF[row].copy()
                self._model.learn_one(user=user, item=row, y=outcome)  # type: ignore[no-untyped-call]
                self._item_VF[row] = self._model.i_latents[row]

    def _first(self, kind: str, number: int) -> Float64s:
        return np.random.default_rng([self._seed, kind == "user", number]).normal(0.0, 0.1, _FACTORS)

    def state(self) -> dict[str, Tensor]:
        """See BaselineArm."""
        users = list(self._model.u_latents)
        vectors = np.array([self._model.u_latents[user] for user in users]).reshape(-1, _FACTORS)
        return {
            **self._items.state(),
            "users": torch.tensor(users, dtype=torch.int64),
            "user_vectors": torch.from_numpy(vectors),
            "item_vectors": torch.from_numpy(self._item_VF.copy()),
            "num_learned": torch.tensor([self._num_learned]),
        }

    def load_state(self, state: dict[str, Tensor]) -> None:
        """See BaselineArm."""
        self._items.load_state(state)
        users, vectors = state["users"].tolist(), state["user_vectors"].numpy()
        self._model.u_latents.update({user: vector.copy() for user, vector in zip(users, vectors, strict=True)})
        self._item_VF = state["item_vectors"].numpy().copy()
        self._num_learned = int(state["num_learned"])


def build_baseline(name: str, seed: int) -> BaselineArm:
    """`item_knn` or `river_mf`."""
    return ItemKnn() if name == "item_knn" else RiverFactorisation(seed)


def _ranked(queries: Queries, items: _Items, scores: Callable[[slice], Float64s]) -> Ranked:
    """Ranks by scores float64[p, V] of a part of the queries, without what each user had."""
    num_items = len(items)
    rows_L = torch.from_numpy(items.rows(queries.item_id_L))
    targets_P = torch.from_numpy(items.rows(queries.target_item_id_P))
    seen = seen_before(rows_L, torch.from_numpy(queries.offsets), torch.from_numpy(queries.positions_P)).distinct()
    rank_P = np.full(len(queries), MISS_RANK)
    step = max(1, _SCORES_MAX // max(num_items, 1))
    for start in range(0, len(queries) if num_items else 0, step):
        part = slice(start, min(start + step, len(queries)))
        of_part = seen.of_targets(part, device=targets_P.device)
        rank_P[part] = ranks(torch.from_numpy(scores(part)), targets_P[part], of_part).numpy()
    rank_P[queries.is_repeat_P] = MISS_RANK
    return Ranked(rank_P=rank_P, num_candidates=num_items, lists=joined_lists([]))


def _recent(queries: Queries, items: _Items) -> tuple[Int64s, Int64s]:
    """Number of the query and row, of each query's newest known items, each item once."""
    starts_P = queries.offsets[np.searchsorted(queries.offsets, queries.positions_P, side="right") - 1]
    first_P = np.maximum(starts_P, queries.positions_P + 1 - _RECENT)
    lengths_P = queries.positions_P + 1 - first_P
    place_S = np.repeat(np.arange(len(queries)), lengths_P)
    rows_S = items.rows(queries.item_id_L[concat_ranges(first_P, lengths_P)])
    keys = np.unique(place_S[rows_S >= 0] * max(len(items), 1) + rows_S[rows_S >= 0])
    return keys // max(len(items), 1), keys % max(len(items), 1)
