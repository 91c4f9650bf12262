"""What LensKit and RecTools say of the same lists as our tests: prints their values as JSON.

    python tests/backtest/yardsticks.py lenskit|rectools

Run by an interpreter that has the library, not by ours: RecTools wants numpy below 2 on Python 3.11, and both bring
pandas. `make test-yardsticks` does that, and compares with the values in yardsticks.json that the suite uses.
"""

from __future__ import annotations

import json
import sys
from typing import Any

NUM_QUERIES, NUM_ITEMS, DEPTH = 60, 40, 20


def lists() -> tuple[list[list[int]], list[list[int]], list[int], list[tuple[int, int]]]:
    """Two rankings of `DEPTH` items a query, the item that came, and (user, item) of before. By arithmetic alone."""
    first, second, came, before = [], [], [], []
    for query in range(NUM_QUERIES):
        order = sorted(range(NUM_ITEMS), key=lambda item: ((item + 3) * (query + 7) * 7919) % 1009)
        other = sorted(range(NUM_ITEMS), key=lambda item: ((item + 5) * (query + 11) * 104729) % 997)
        first.append(order[:DEPTH])
        second.append(other[:DEPTH])
        came.append(order[(query * query) % NUM_ITEMS])
        before += [(query, item) for item in range(NUM_ITEMS - 3) if (query * 31 + item * item * 17) % 11 < 3]
    return first, second, came, before


def lenskit_values() -> dict[str, float]:
    from lenskit.data import ItemList, ItemListCollection, UserIDKey
    from lenskit.metrics import NDCG, Hit, LogRankWeight, RecipRank, RunAnalysis

    first, _, came, _ = lists()
    shown = ItemListCollection(UserIDKey)
    truth = ItemListCollection(UserIDKey)
    for query in range(NUM_QUERIES):
        shown.add(ItemList(item_ids=first[query], ordered=True), user_id=query)
        truth.add(ItemList(item_ids=[came[query]]), user_id=query)
    analysis = RunAnalysis()
    metrics = {f"hr_at_{k}": Hit(k) for k in (1, 10, 20)} | {
        # Its default divides by log2(rank), at least 1; with offset 1 it is the usual log2(rank + 1).
        f"ndcg_at_{k}": NDCG(k, weight=LogRankWeight(offset=1))
        for k in (10, 20)
    }
    for metric in (*metrics.values(), RecipRank(DEPTH)):
        analysis.add_metric(metric)
    found = analysis.measure(shown, truth).list_summary()["mean"]
    labels = {name: f"{'Hit' if name.startswith('hr') else 'NDCG'}@{metric.n}" for name, metric in metrics.items()}
    return {name: float(found[label]) for name, label in labels.items()} | {
        "mrr_at_20": float(found[f"RecipRank@{DEPTH}"])
    }


def rectools_values() -> dict[str, float]:
    import pandas as pd
    from rectools import Columns
    from rectools.metrics import MRR, NDCG, CatalogCoverage, HitRate, Intersection, MeanInvUserFreq

    first, second, came, before = lists()

    def table(rankings: list[list[int]]) -> Any:
        rows = [(query, item, rank) for query, items in enumerate(rankings) for rank, item in enumerate(items, 1)]
        return pd.DataFrame(rows, columns=[Columns.User, Columns.Item, Columns.Rank])

    shown, other = table(first), table(second)
    truth = pd.DataFrame(enumerate(came), columns=[Columns.User, Columns.Item])
    previous = pd.DataFrame(before, columns=[Columns.User, Columns.Item])
    found = {f"hr_at_{k}": HitRate(k).calc(shown, truth) for k in (1, 10, 20)}
    found |= {f"ndcg_at_{k}": NDCG(k, divide_by_achievable=True).calc(shown, truth) for k in (10, 20)}
    found["mrr_at_20"] = MRR(DEPTH).calc(shown, truth)
    found["novelty_at_10"] = MeanInvUserFreq(10).calc(shown, previous)
    found["overlap_at_10"] = Intersection(10).calc(shown, other)
    found["coverage_at_1"] = CatalogCoverage(1, normalize=True).calc(shown, list(range(NUM_ITEMS)))
    return {name: float(value) for name, value in found.items()}


if __name__ == "__main__":
    sys.stdout.write(
        json.dumps({"lenskit": lenskit_values, "rectools": rectools_values}[sys.argv[1]](), indent=1) + "\n"
    )
