"""Prequential metrics: every interaction is predicted before it is learned from (test, then train).

The candidate pool is the whole live catalogue as known at the start of the micro-batch, without the items already
in the user's history. An item that is not in the catalogue yet, or was already in the history, cannot be
recommended: a miss for every arm. Ties count as worse.

Groups. Every interaction belongs to one kind of item and one kind of user, as they were at the start of the
micro-batch: *unknown_item* is not in the catalogue yet (its count says what nobody could have hit), *new_item* has
had fewer than `new_below` interactions, *known_item* as many or more; *new_user* has fewer than `new_below`
interactions in the history that the prediction is made from, *known_user* as many or more.

Windows hold the newest interactions of all groups together, so the groups of a window add up to it.

Shapes: A arms, P interactions, C cells (a kind of item and one of user), R ranks told apart, W window.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

Int64s = NDArray[np.int64]

ITEM_KINDS: Final = ("unknown_item", "new_item", "known_item")
USER_KINDS: Final = ("new_user", "known_user")
ALL: Final = "all"
SPANS: Final = ("lifetime", "window")

_DEEPEST: Final = 50
"""Ranks 1 to 50 are told apart, deeper ones are all the same to every metric but MRR."""
_GAINS: Final = 1 / np.log2(np.arange(1, _DEEPEST + 1) + 1)
_NUM_CELLS: Final = len(ITEM_KINDS) * len(USER_KINDS)


@dataclass(frozen=True, slots=True)
class RankMetrics:
    """Means over `count` evaluated interactions; None when there are none."""

    count: int
    hr_at_1: float | None = None
    hr_at_10: float | None = None
    hr_at_20: float | None = None
    hr_at_50: float | None = None
    ndcg_at_10: float | None = None
    ndcg_at_20: float | None = None
    mrr: float | None = None

    @classmethod
    def of_ranks(cls, ranks: Int64s) -> RankMetrics:
        """Metrics of 1-based ranks, any number of them."""
        return cls.of_counts(np.bincount(np.minimum(ranks, _DEEPEST + 1), minlength=_DEEPEST + 2), (1 / ranks).sum())

    @classmethod
    def of_counts(cls, counts_R: Int64s, reciprocal_sum: float) -> RankMetrics:
        """Metrics from how often each rank came (int64[52]: rank 0 never, 51 for deeper ones) and the sum of 1/rank."""
        count = int(counts_R.sum())
        if count == 0:
            return cls(0)
        gains = counts_R[1 : _DEEPEST + 1] * _GAINS
        return cls(
            count,
            **{f"hr_at_{k}": float(counts_R[: k + 1].sum() / count) for k in (1, 10, 20, 50)},
            **{f"ndcg_at_{k}": float(gains[:k].sum() / count) for k in (10, 20)},
            mrr=float(reciprocal_sum / count),
        )


@dataclass(frozen=True, slots=True)
class MeasuredRanks:
    """Metrics of one arm over a span (`lifetime` or `window`) and a group (`all`, a kind of item or of user)."""

    arm: str
    span: str
    group: str
    metrics: RankMetrics

    def named(self) -> dict[str, float]:
        """`arm.span.metric`, or `arm.span.group.metric` for a group that is not everything; absent before the first."""
        prefix = f"{self.arm}.{self.span}." + ("" if self.group == ALL else f"{self.group}.")
        return {f"{prefix}{name}": value for name, value in asdict(self.metrics).items() if value is not None}


def cells(item_kind_P: Int64s, user_kind_P: Int64s) -> Int64s:
    """int64[P] from indexes into ITEM_KINDS and USER_KINDS."""
    return item_kind_P * len(USER_KINDS) + user_kind_P


@dataclass(frozen=True, slots=True)
class _Counted:
    """How often each rank came, int64[A, C, R], and the sums of 1/rank, float64[A, C]."""

    counts: Int64s
    reciprocal: NDArray[np.float64]

    @classmethod
    def of(cls, ranks_AP: Int64s, cells_P: Int64s) -> _Counted:
        num_ranks = _DEEPEST + 2
        keys_AP = cells_P * num_ranks + np.minimum(ranks_AP, _DEEPEST + 1)
        counts = [np.bincount(keys_P, minlength=_NUM_CELLS * num_ranks) for keys_P in keys_AP]
        reciprocal = [np.bincount(cells_P, 1 / ranks_P, minlength=_NUM_CELLS) for ranks_P in ranks_AP]
        return cls(np.stack(counts).reshape(-1, _NUM_CELLS, num_ranks), np.stack(reciprocal))

    def groups(self, arm: int) -> Iterator[tuple[str, RankMetrics]]:
        counts = self.counts[arm].reshape(len(ITEM_KINDS), len(USER_KINDS), -1)
        reciprocal = self.reciprocal[arm].reshape(len(ITEM_KINDS), len(USER_KINDS))
        yield ALL, RankMetrics.of_counts(counts.sum((0, 1)), reciprocal.sum())
        for kind, name in enumerate(ITEM_KINDS):
            yield name, RankMetrics.of_counts(counts[kind].sum(0), reciprocal[kind].sum())
        for kind, name in enumerate(USER_KINDS):
            yield name, RankMetrics.of_counts(counts[:, kind].sum(0), reciprocal[:, kind].sum())


class PrequentialMeter:
    """Ranks of several arms on the same interactions: totals of the whole run, and the newest ones themselves.

    What it costs does not grow with the run. May be read from another thread than the one that adds.
    """

    def __init__(self, arms: tuple[str, ...], window: int) -> None:
        self._arms = arms
        self._lock = threading.Lock()
        self._ranks = np.zeros((len(arms), window), np.int64)
        self._cells = np.full(window, -1, np.int64)
        """Of the ring's places; -1: nothing is there yet."""
        self._num_seen = 0
        self._total = _Counted.of(self._ranks[:, :0], self._cells[:0])

    def add(self, ranks: Mapping[str, Int64s], cells_P: Int64s) -> None:
        """Add the 1-based ranks int64[P] of every arm, in stream order, with their ``cells``."""
        if len(cells_P) == 0:
            return
        ranks_AP = np.stack([ranks[arm] for arm in self._arms])
        added = _Counted.of(ranks_AP, cells_P)
        with self._lock:
            self._total = _Counted(self._total.counts + added.counts, self._total.reciprocal + added.reciprocal)
            self._num_seen += len(cells_P)
            self._write(ranks_AP, cells_P)

    def _write(self, ranks_AP: Int64s, cells_P: Int64s) -> None:
        """Put the newest at the ring's end, which `_num_seen` is already past."""
        size = len(self._cells)
        num_kept = min(len(cells_P), size)
        slots = (self._num_seen - num_kept + np.arange(num_kept)) % size
        self._ranks[:, slots], self._cells[slots] = ranks_AP[:, -num_kept:], cells_P[-num_kept:]

    def measured(self) -> list[MeasuredRanks]:
        """Every arm, span and group, those without interactions as well."""
        with self._lock:
            is_there = self._cells >= 0
            total, window = self._total, (self._ranks[:, is_there], self._cells[is_there])
        of_span = dict(zip(SPANS, (total, _Counted.of(*window)), strict=True))
        return [
            MeasuredRanks(arm, span, group, metrics)
            for number, arm in enumerate(self._arms)
            for span, counted in of_span.items()
            for group, metrics in counted.groups(number)
        ]

    def state(self) -> dict[str, NDArray[np.generic]]:
        """Copies that ``load_state`` reads back."""
        return {
            "ranks": self._ranks.copy(),
            "cells": self._cells.copy(),
            "num_seen": np.array([self._num_seen]),
            "counts": self._total.counts.copy(),
            "reciprocal": self._total.reciprocal.copy(),
        }

    def load_state(self, state: Mapping[str, NDArray[np.generic]]) -> None:
        """Continue from a ``state`` of the same arms; of another window, with as many of the newest as there are."""
        assert len(state["ranks"]) == len(self._arms)
        ranks, cells_W = state["ranks"].astype(np.int64), state["cells"].astype(np.int64)
        self._num_seen = int(state["num_seen"][0])
        by_age = (self._num_seen + np.arange(len(cells_W))) % len(cells_W)
        by_age = by_age[cells_W[by_age] >= 0]
        self._cells[:] = -1
        self._write(ranks[:, by_age], cells_W[by_age])
        self._total = _Counted(state["counts"].astype(np.int64), state["reciprocal"].astype(np.float64))
