"""Rank metrics over the run and over a window, by group, and their way through a checkpoint."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from model.ranking import MISS_RANK
from online_trainer.prequential import ITEM_KINDS, USER_KINDS, PrequentialMeter, RankMetrics, cells

ARMS = ("left", "right")
Events = list[tuple[int, int, int, int]]
"""(rank by the left arm, by the right arm, kind of item, kind of user)."""

some_rank = st.integers(1, 60) | st.just(MISS_RANK)
batches = st.lists(
    st.lists(st.tuples(some_rank, some_rank, st.integers(0, 2), st.integers(0, 1)), max_size=80), max_size=6
)


def added(meter: PrequentialMeter, *parts: Events) -> PrequentialMeter:
    for part in parts:
        left, right, items, users = np.array(part, np.int64).reshape(-1, 4).T
        meter.add({"left": left, "right": right}, cells(items, users))
    return meter


def found(meter: PrequentialMeter) -> dict[tuple[str, str, str], RankMetrics]:
    return {(one.arm, one.span, one.group): one.metrics for one in meter.measured()}


def literal(ranks: list[int]) -> dict[str, Any]:
    """Every metric by its definition, one rank at a time."""
    if not ranks:
        return asdict(RankMetrics(0))
    hits = {f"hr_at_{k}": sum(rank <= k for rank in ranks) for k in (1, 10, 20, 50)}
    gains = {f"ndcg_at_{k}": sum(1 / np.log2(rank + 1) for rank in ranks if rank <= k) for k in (10, 20)}
    sums = hits | gains | {"mrr": sum(1 / rank for rank in ranks)}
    return {"count": len(ranks)} | {name: pytest.approx(value / len(ranks)) for name, value in sums.items()}


def test_metrics_of_known_ranks() -> None:
    metrics = RankMetrics.of_ranks(np.array([1, 10, 11, 20, 21, 50, 51, MISS_RANK]))
    assert metrics.count == 8
    assert (metrics.hr_at_1, metrics.hr_at_10, metrics.hr_at_20, metrics.hr_at_50) == (1 / 8, 2 / 8, 4 / 8, 6 / 8)
    gains = [1.0, 1 / np.log2(11), 1 / np.log2(12), 1 / np.log2(21)]
    assert metrics.ndcg_at_10 == pytest.approx(sum(gains[:2]) / 8)
    assert metrics.ndcg_at_20 == pytest.approx(sum(gains) / 8)
    assert metrics.mrr == pytest.approx((1 + 1 / 10 + 1 / 11 + 1 / 20 + 1 / 21 + 1 / 50 + 1 / 51) / 8)


def test_nothing_evaluated_has_no_metrics() -> None:
    assert set(found(PrequentialMeter(ARMS, 5)).values()) == {RankMetrics(0)}
    assert found(added(PrequentialMeter(ARMS, 5), [])) == found(PrequentialMeter(ARMS, 5))


@settings(max_examples=40)
@given(batches, st.integers(1, 50))
def test_every_metric_of_every_group_and_span_follows_its_definition(parts: list[Events], window: int) -> None:
    measured = found(added(PrequentialMeter(ARMS, window), *parts))
    events = [event for part in parts for event in part]
    for arm, name in enumerate(ARMS):
        for span, of_span in (("lifetime", events), ("window", events[-window:])):
            groups = {"all": of_span}
            groups |= {kind: [e for e in of_span if e[2] == number] for number, kind in enumerate(ITEM_KINDS)}
            groups |= {kind: [e for e in of_span if e[3] == number] for number, kind in enumerate(USER_KINDS)}
            for group, of_group in groups.items():
                assert asdict(measured[name, span, group]) == literal([event[arm] for event in of_group]), group


@settings(max_examples=40)
@given(batches, batches, st.integers(1, 50))
def test_a_restored_meter_continues_bit_by_bit(before: list[Events], after: list[Events], window: int) -> None:
    meter = added(PrequentialMeter(ARMS, window), *before)
    again = PrequentialMeter(ARMS, window)
    again.load_state(meter.state())
    assert found(added(again, *after)) == found(added(meter, *after))
    for name, array in meter.state().items():
        np.testing.assert_array_equal(array, again.state()[name])


@settings(max_examples=40)
@given(batches, batches, st.integers(1, 50), st.integers(1, 50))
def test_another_window_goes_on_with_the_newest_there_are(
    before: list[Events], after: list[Events], window: int, other: int
) -> None:
    meter = added(PrequentialMeter(ARMS, window), *before)
    again = PrequentialMeter(ARMS, other)
    again.load_state(meter.state())
    kept = [event for part in before for event in part][-window:]
    expected = found(added(PrequentialMeter(ARMS, other), kept, *after))
    for (arm, span, group), metrics in found(added(again, *after)).items():
        if span == "window":
            assert asdict(metrics) == {n: pytest.approx(v) for n, v in asdict(expected[arm, span, group]).items()}
    assert found(again)["left", "lifetime", "all"].count == sum(map(len, [*before, *after]))


def test_names_say_the_group_only_where_it_is_not_everything() -> None:
    meter = added(PrequentialMeter(ARMS, 5), [(1, 7, 2, 0)])
    named = {name: value for one in meter.measured() for name, value in one.named().items()}
    assert named["left.lifetime.hr_at_1"] == 1.0
    assert named["right.window.known_item.mrr"] == pytest.approx(1 / 7)
    assert named["right.window.new_item.count"] == 0
    assert "right.window.new_item.mrr" not in named
