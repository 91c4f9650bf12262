"""What the arms would have shown: coverage, novelty, churn, and how far their probabilities can be believed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import numpy as np
import polars as pl
from numpy.typing import NDArray

from backtest.metrics import FirstMeetings, coverage, novelties, overlaps, shown_action_metrics
from backtest.run_files import RunFolder
from online_trainer.action_metrics import ActionMetrics

Int64s = NDArray[np.int64]

DEPTH: Final = 10
"""Items of a list that are looked at."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ListMetrics:
    """Of an arm's sampled lists, their first ``DEPTH`` items; None where there is nothing to measure."""

    num_lists: int
    coverage: float
    """Share of the largest catalogue that was shown at least once."""
    novelty_bits: float | None
    """Mean -log2 of the share of users who had met a shown item before."""
    churn_from_reference: float | None
    """Share of a list that is not in the reference arm's list for the same query."""
    churn_between_versions: float | None
    """Share of a user's list that was not in the user's list before, where another version answered."""
    churn_within_version: float | None
    """The same where the version was equal: what new interactions alone changed."""
    shown: ActionMetrics | None
    """NE, AUC and calibration of the shown items' probabilities, against which of them came next."""


def list_metrics(run: RunFolder, reference: str, interactions: tuple[Int64s, Int64s, Int64s]) -> dict[str, ListMetrics]:
    """By arm, for those that gave lists. interactions: event, user and item of all queries, i64[E] each."""
    event_E, user_E, item_E = interactions
    met = FirstMeetings.of(event_E, user_E, item_E)
    compared = run.lists(reference).select("event", pl.col("item_ids").alias("reference_ids")).collect()
    found = {}
    for arm in run.manifest.arms:
        lists = run.lists(arm.name).collect()
        if not lists.height:
            continue
        ranks = run.ranks(arm.name).select("event", "version", "num_candidates").collect()
        queries = pl.DataFrame({"event": event_E, "user_id": user_E, "item_id": item_E})
        joined = lists.join(ranks, on="event").join(queries, on="event").sort("event")
        found[arm.name] = _of_arm(joined, met, compared if arm.name != reference else None)
    return found


def _of_arm(lists: pl.DataFrame, met: FirstMeetings, compared: pl.DataFrame | None) -> ListMetrics:
    shown_NK = _padded(lists["item_ids"])
    between, within = _churn_of_users(lists, shown_NK)
    from_reference = None
    if compared is not None:
        pairs = lists.join(compared, on="event")
        from_reference = _mean(1 - overlaps(_padded(pairs["reference_ids"]), _padded(pairs["item_ids"])))
    return ListMetrics(
        num_lists=lists.height,
        coverage=coverage(shown_NK, int(lists["num_candidates"].to_numpy().max(initial=0))),
        novelty_bits=_mean(novelties(shown_NK, lists["event"].to_numpy(), met)),
        churn_from_reference=from_reference,
        churn_between_versions=between,
        churn_within_version=within,
        shown=_shown(lists),
    )


def _padded(lists: pl.Series) -> Int64s:
    """i64[N, DEPTH], -1 pads."""
    first = lists.list.head(DEPTH)
    length_N = first.list.len().fill_null(0).to_numpy().astype(np.int64)
    padded = np.full((len(lists), DEPTH), -1, np.int64)
    padded[np.arange(DEPTH) < length_N[:, None]] = first.filter(first.list.len() > 0).explode().to_numpy()
    return padded


def _churn_of_users(lists: pl.DataFrame, shown_NK: Int64s) -> tuple[float | None, float | None]:
    """Mean churn of a user's successive lists where the version changed, and where it did not."""
    order = np.lexsort((lists["event"].to_numpy(), lists["user_id"].to_numpy()))
    user, version = lists["user_id"].to_numpy()[order], lists["version"].to_numpy()[order]
    is_next = user[1:] == user[:-1]
    churn = 1 - overlaps(shown_NK[order][:-1][is_next], shown_NK[order][1:][is_next])
    has_changed = version[1:][is_next] != version[:-1][is_next]
    return _mean(churn[has_changed]), _mean(churn[~has_changed])


def _shown(lists: pl.DataFrame) -> ActionMetrics | None:
    known = lists.filter(pl.col("probabilities").is_not_null())
    if not known.height:
        return None
    pairs = (
        known.select("item_id", pl.col("item_ids").list.head(DEPTH), pl.col("probabilities").list.head(DEPTH))
        .explode("item_ids", "probabilities")
        .drop_nulls()
    )
    is_taken = (pairs["item_ids"] == pairs["item_id"]).to_numpy().astype(np.int64)
    return shown_action_metrics(pairs["probabilities"].cast(pl.Float64).to_numpy(), is_taken)


def _mean(values: NDArray[np.float64]) -> float | None:
    known = values[np.isfinite(values)]
    return float(known.mean()) if len(known) else None
