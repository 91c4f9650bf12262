"""Records whose categories get richer as they are chosen: the synthetic stream of the HSTU paper, appendix C.

Shapes: R records (users), C categories at most of one record, T = record_len.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from backtest.ideal import CUTOFF_HR, DISCOUNTS, DISCOUNTS_SUM

Int64s = NDArray[np.int64]
Float64s = NDArray[np.float64]


@dataclass(frozen=True, kw_only=True, slots=True)
class DirichletConfig:
    """The generator. Concentrations follow the authors' later streaming generator: uniform from 1 to 500."""

    num_records: int
    num_items: int
    record_len: int = 128
    num_categories: int = 100
    categories_per_record: int = 5
    concentration_max: float = 500.0
    first_share: float = 0.4
    """Share of every category's items that exists when the stream begins; the others arrive evenly."""
    seed: int = 0

    def __post_init__(self) -> None:
        if self.num_categories <= self.categories_per_record:
            raise ValueError(
                f"num_categories = {self.num_categories}: more than a record's {self.categories_per_record}"
            )
        if self.num_items < self.num_categories:
            raise ValueError(f"num_items = {self.num_items}: at least one per category ({self.num_categories})")


@dataclass(frozen=True, kw_only=True, slots=True)
class DirichletRecords:
    """items_RT: int64, of category ``item % num_categories``, in the order they were chosen; records in stream order.

    ideal_hr_at_10_RT, ideal_ndcg_at_20_RT: float64, what knowing the next item's exact distribution would score, when
    items that the record holds already cannot be recommended.
    """

    items_RT: Int64s
    ideal_hr_at_10_RT: Float64s
    ideal_ndcg_at_20_RT: Float64s


def dirichlet_records(config: DirichletConfig) -> DirichletRecords:
    """P(category) is proportional to its prior weight plus how often it was chosen; items within are equally likely."""
    rng = np.random.default_rng(config.seed)
    R, C = config.num_records, config.categories_per_record
    own_RC = rng.random((R, config.num_categories)).argpartition(C, axis=1)[:, :C]
    num_own_R = rng.integers(1, C + 1, size=R)
    weight_RC = rng.dirichlet(np.ones(C), size=R) * (np.arange(C) < num_own_R[:, None])
    weight_RC *= rng.uniform(1, config.concentration_max, size=(R, 1)) / weight_RC.sum(1, keepdims=True)
    per_category = config.num_items // config.num_categories
    share_R = config.first_share + (1 - config.first_share) * np.arange(R) / R
    available_R = np.maximum((per_category * share_R).astype(np.int64), 1)
    items_RT = np.empty((R, config.record_len), np.int64)
    hr_RT, ndcg_RT = np.empty((2, R, config.record_len))
    num_seen_RC = np.zeros((R, C), np.int64)
    everyone = np.arange(R)
    for step in range(config.record_len):
        hr_RT[:, step], ndcg_RT[:, step] = _ideal(weight_RC, available_R, num_seen_RC)
        bound_RC = weight_RC.cumsum(1)
        chosen_R = (rng.random(R)[:, None] * bound_RC[:, -1:] >= bound_RC).sum(1)
        weight_RC[everyone, chosen_R] += 1
        within_R = (rng.random(R) * available_R).astype(np.int64)
        items_RT[:, step] = within_R * config.num_categories + own_RC[everyone, chosen_R]
        is_new_R = ~(items_RT[:, :step] == items_RT[:, step, None]).any(1)
        num_seen_RC[everyone, chosen_R] += is_new_R
    return DirichletRecords(items_RT=items_RT, ideal_hr_at_10_RT=hr_RT, ideal_ndcg_at_20_RT=ndcg_RT)


def _ideal(weight_RC: Float64s, available_R: Int64s, num_seen_RC: Int64s) -> tuple[Float64s, Float64s]:
    """Expected HR@10 and NDCG@20 of ranking unseen items by their probability: category after category."""
    order_RC = np.argsort(-weight_RC, axis=1, kind="stable")
    weight_RC = np.take_along_axis(weight_RC, order_RC, 1)
    probability_RC = weight_RC / weight_RC.sum(1, keepdims=True) / available_R[:, None]
    ends_RC = (available_R[:, None] - np.take_along_axis(num_seen_RC, order_RC, 1)).cumsum(1)
    starts_RC = np.concatenate([np.zeros((len(ends_RC), 1), np.int64), ends_RC[:, :-1]], 1)
    hits_RC = np.minimum(ends_RC, CUTOFF_HR) - np.minimum(starts_RC, CUTOFF_HR)
    last = len(DISCOUNTS)
    gains_RC = DISCOUNTS_SUM[np.minimum(ends_RC, last)] - DISCOUNTS_SUM[np.minimum(starts_RC, last)]
    return (probability_RC * hits_RC).sum(1), (probability_RC * gains_RC).sum(1)
