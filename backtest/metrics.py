"""Metrics of answers that are known in full: where each arm ranked what came next, and what it would have shown.

Pure functions over arrays. One relevant item a query, the whole catalogue as candidates, no sampled negatives; a rank
of ``model.ranking.MISS_RANK`` is a miss. HR, NDCG and MRR are those of LensKit and of RecTools (NDCG divided by what is
achievable), novelty and overlap those of RecTools: the tests compare them to 1e-9.

Shapes: N queries, K items shown, E earlier interactions.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Final

import numpy as np
from numpy.typing import NDArray

from online_trainer.action_metrics import ActionMeter, ActionMetrics

Float64s = NDArray[np.float64]
Int64s = NDArray[np.int64]

_PROBABILITY_MIN: Final = 1e-12
"""Probabilities nearer to 0 or 1 count as this far from them: a logit is finite."""


def hits(rank_N: Int64s, *, k: int) -> Float64s:
    """1 where the item is among the first k."""
    return (rank_N <= k).astype(np.float64)


def gains(rank_N: Int64s, *, k: int) -> Float64s:
    """NDCG@k: 1 / log2(rank + 1) within the first k, 0 beyond; one relevant item, so the ideal is 1."""
    return np.where(rank_N <= k, 1 / np.log2(rank_N + 1.0), 0.0)


def reciprocal_ranks(rank_N: Int64s) -> Float64s:
    """1 / rank, whatever the depth."""
    return 1 / rank_N.astype(np.float64)


RANK_METRICS: Final[Mapping[str, Callable[[Int64s], Float64s]]] = {
    "hr_at_1": partial(hits, k=1),
    "hr_at_10": partial(hits, k=10),
    "hr_at_20": partial(hits, k=20),
    "hr_at_50": partial(hits, k=50),
    "ndcg_at_10": partial(gains, k=10),
    "ndcg_at_20": partial(gains, k=20),
    "mrr": reciprocal_ranks,
}
"""Name → value of each query; their mean is the metric. The names are those of ``prequential.RankMetrics``."""


def catalogue_aucs(rank_N: Int64s, num_candidates_N: Int64s) -> Float64s:
    """Share of the other candidates that rank below the item: AUC of one query. 0 for a miss."""
    others_N = np.maximum(num_candidates_N - 1, 1)
    return np.clip(1 - (rank_N - 1) / others_N, 0.0, 1.0)


def overlaps(first_NK: Int64s, second_NK: Int64s) -> Float64s:
    """Share of the second list that is in the first, query by query; churn is 1 - overlap. -1 pads; NaN if empty."""
    is_shown_NK = second_NK >= 0
    is_common_NK = (second_NK[:, :, None] == first_NK[:, None, :]).any(2) & is_shown_NK
    with np.errstate(invalid="ignore"):
        share_N: Float64s = is_common_NK.sum(1) / is_shown_NK.sum(1)
    return share_N


def coverage(shown: Int64s, num_items: int) -> float:
    """Share of the catalogue that was shown at least once. shown: ids, any shape, -1 pads."""
    return len(np.unique(shown[shown >= 0])) / num_items if num_items else 0.0


@dataclass(frozen=True, kw_only=True, slots=True)
class FirstMeetings:
    """When each user met each item first, and how many users there were: what novelty is counted from."""

    event_E: Int64s
    """Number of the event, sorted within an item."""
    item_E: Int64s
    """Ascending."""
    user_event_U: Int64s
    """Event of each user's first interaction, ascending."""

    @staticmethod
    def of(event_E: Int64s, user_E: Int64s, item_E: Int64s) -> FirstMeetings:
        """From interactions in any order."""
        order = np.lexsort((event_E, user_E, item_E))
        event, user, item = event_E[order], user_E[order], item_E[order]
        is_first = np.ones(len(order), bool)
        is_first[1:] = (item[1:] != item[:-1]) | (user[1:] != user[:-1])
        event, item = event[is_first], item[is_first]
        by_item = np.lexsort((event, item))
        _, first_of_user = np.unique(user_E[np.argsort(event_E, kind="stable")], return_index=True)
        return FirstMeetings(
            event_E=event[by_item], item_E=item[by_item], user_event_U=np.sort(np.sort(event_E)[first_of_user])
        )

    def num_users_of(self, item: Int64s, before_event: Int64s) -> Int64s:
        """Users who had met each item before an event; same shapes, any."""
        items, starts = np.unique(self.item_E, return_index=True)
        ends = np.append(starts[1:], len(self.item_E))
        place = np.minimum(np.searchsorted(items, item), max(len(items) - 1, 0))
        if not len(items):
            return np.zeros(item.shape, np.int64)
        # Ascending over all items: (number of the item, event).
        span = int(max(self.event_E.max(), before_event.max(initial=0))) + 1
        keys_E = np.repeat(np.arange(len(items)), ends - starts) * span + self.event_E
        counted = np.searchsorted(keys_E, place * span + before_event) - starts[place]
        return np.where(items[place] == item, counted, 0).astype(np.int64)

    def num_users(self, before_event: Int64s) -> Int64s:
        """Users there were before an event."""
        return np.searchsorted(self.user_event_U, before_event).astype(np.int64)


def novelties(shown_NK: Int64s, event_N: Int64s, met: FirstMeetings) -> Float64s:
    """Mean over a list of -log2(share of users who had met the item before the query), in bits; NaN for an empty list.

    An item that nobody had met counts as met by one user.
    """
    before_NK = np.broadcast_to(event_N[:, None], shown_NK.shape)
    users_NK = np.maximum(met.num_users_of(shown_NK, before_NK), 1)
    bits_NK = -np.log2(users_NK / np.maximum(met.num_users(event_N), 1)[:, None])
    is_shown_NK = shown_NK >= 0
    with np.errstate(invalid="ignore"):
        mean_N: Float64s = np.where(is_shown_NK, bits_NK, 0.0).sum(1) / is_shown_NK.sum(1)
    return mean_N


def shown_action_metrics(probability: Float64s, label: Int64s) -> ActionMetrics:
    """NE, AUC and calibration of probabilities against what came true; both [M], labels 0 or 1."""
    kept = np.clip(probability, _PROBABILITY_MIN, 1 - _PROBABILITY_MIN)
    meter = ActionMeter(max(len(kept), 1))
    meter.add(np.log(kept) - np.log1p(-kept), label)
    return meter.windowed()
