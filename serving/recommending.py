"""From user states to recommended items: what is left out, the search, and how different the items are to be.

Shapes: U queries, D embedding width, P items of a pool, K items of an answer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kernels.top_k import TopK
from serving.config import ServingConfig
from serving.diversity import diversified
from serving.item_categories import CategoryRows
from serving.item_search import ItemSearch, best_of
from serving.queries import RecommendQuery
from serving.weights import ServedWeights
from stream.events import EventRules

Int64s = NDArray[np.int64]


def blocking_mask(config: ServingConfig, rules: EventRules) -> int:
    """Bitmask of `blocking_actions`. ValueError for one that is not declared."""
    undeclared = sorted(set(config.blocking_actions) - set(rules.actions))
    if undeclared:
        raise ValueError(
            f"serving.blocking_actions names {', '.join(undeclared)}; declared in events.actions are"
            f" {', '.join(rules.actions)}: add it there (at the end), or take it out here"
        )
    return sum(rules.action_bit(action) for action in set(config.blocking_actions))


@dataclass(frozen=True, kw_only=True, slots=True)
class Recommending:
    """One query, and the table rows it is about (-1: unknown items)."""

    query: RecommendQuery
    named_rows: Int64s
    """Of `exclude`."""
    session_rows: Int64s
    seen_rows: Int64s
    """Of the user's history."""
    blocked_rows: Int64s
    """Of what the user does not want to see again."""

    def left_out(self) -> Int64s:
        """Rows that must not be in the answer, categories aside."""
        always = (self.named_rows, self.blocked_rows)
        return np.concatenate([*always, self.seen_rows, self.session_rows] if self.query.exclude_seen else always)


@dataclass(frozen=True, slots=True)
class BestItems:
    """The answer to one query."""

    rows: Int64s
    """int64[K], in the order of the answer."""
    scores: NDArray[np.float32]


class ItemChooser:
    """Chooses items for states of users under the weights in service; for the model thread."""

    def __init__(
        self, config: ServingConfig, weights: ServedWeights, search: ItemSearch, categories: CategoryRows
    ) -> None:
        self._config, self._weights, self._search, self._categories = config, weights, search, categories

    def choose(self, asked: Sequence[Recommending], u_UD: Tensor) -> list[BestItems]:
        """The best items of each."""
        found: dict[int, BestItems] = {}
        of_all = [place for place, one in enumerate(asked) if not one.query.categories]
        if of_all:
            left_out = [self._left_out(asked[place]) for place in of_all]
            pool = max(self._pool(asked[place].query) for place in of_all)
            best = self._search.best(u_UD[of_all], pool, left_out=left_out)
            for place, number in zip(of_all, range(len(of_all)), strict=True):
                found[place] = self._chosen(asked[place].query, best, number)
        for place, one in enumerate(asked):
            if place not in found:
                rows = np.setdiff1d(self._categories.of(one.query.categories), self._left_out(one))
                best = best_of(self._weights, rows, u_UD[place : place + 1], self._pool(one.query))
                found[place] = self._chosen(one.query, best, 0)
        return [found[place] for place in range(len(asked))]

    def _left_out(self, one: Recommending) -> Int64s:
        if not one.query.exclude_categories:
            return one.left_out()
        return np.concatenate([one.left_out(), self._categories.of(one.query.exclude_categories)])

    def _pool(self, query: RecommendQuery) -> int:
        return max(query.k, self._config.diversity_pool) if query.diversity else query.k

    def _chosen(self, query: RecommendQuery, best: TopK, number: int) -> BestItems:
        pool = self._pool(query)
        scores_P, rows_P = best.scores_BK[number, :pool].numpy(), best.rows_BK[number, :pool].numpy()
        is_item_P = np.isfinite(scores_P)  # nothing else is left
        scores_P, rows_P = scores_P[is_item_P], rows_P[is_item_P]
        if query.diversity and len(rows_P):
            unit_PD = self._weights.catalogue().unit_VD[torch.from_numpy(rows_P)]
            chosen_K = diversified(torch.from_numpy(scores_P), unit_PD, query.k, diversity=query.diversity).numpy()
            scores_P, rows_P = scores_P[chosen_K], rows_P[chosen_K]
        return BestItems(rows_P, scores_P)
