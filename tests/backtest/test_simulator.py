"""Simulated streams: equal for equal seeds, changes where they are said to be, and scores nobody can beat."""

from __future__ import annotations

import itertools
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import polars as pl
import pytest
from numpy.typing import NDArray

from backtest.datasets import RecordedColumns
from backtest.dirichlet import DirichletConfig, dirichlet_records
from backtest.ideal import ideal_scores
from backtest.replay import read_recorded
from backtest.simulator import SCENARIOS, Scenario, SimulatedStream, SimulatorConfig, simulate

SMALL = SimulatorConfig(num_events=4_000, num_items=100, num_groups=5, num_clusters=1, interactions_per_user=20)


def stream_of(scenario: Scenario, **others: int) -> SimulatedStream:
    return simulate(replace(SMALL, scenario=scenario, **others))


def habits(stream: SimulatedStream, part: slice) -> NDArray[np.float64]:
    """[G, G] share of each group's next groups, over the users of a part of the stream."""
    counts = np.zeros((SMALL.num_groups, SMALL.num_groups))
    order = np.argsort(stream.user_id[part], kind="stable")
    users, groups = stream.user_id[part][order], stream.item_id[part][order] % SMALL.num_groups
    same = users[1:] == users[:-1]
    np.add.at(counts, (groups[:-1][same], groups[1:][same]), 1)
    shares: NDArray[np.float64] = counts / counts.sum(1, keepdims=True)
    return shares


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_a_seed_decides_every_event(scenario: Scenario) -> None:
    one, again, other = stream_of(scenario), stream_of(scenario), stream_of(scenario, seed=1)
    for name in ("user_id", "item_id", "event_time_ms", "ideal_hr_at_10", "ideal_ndcg_at_20"):
        np.testing.assert_array_equal(getattr(one, name), getattr(again, name))
    assert one.changes == again.changes
    assert (one.item_id != other.item_id).mean() > 0.5


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_events_are_in_order_of_time_and_only_first_ones_have_no_ideal(scenario: Scenario) -> None:
    stream = stream_of(scenario)
    assert len(stream.item_id) == SMALL.num_events
    assert (np.diff(stream.event_time_ms) >= 0).all()
    first = np.zeros(SMALL.num_events, bool)
    first[np.unique(stream.user_id, return_index=True)[1]] = True
    np.testing.assert_array_equal(np.isnan(stream.ideal_hr_at_10), first)
    known = stream.ideal_hr_at_10[~first]
    assert (known >= 0).all()
    assert known.mean() > 0.1
    assert (known <= 1 + 1e-12).all()


@pytest.mark.parametrize("scenario", [one for one in SCENARIOS if one != "dirichlet"])
def test_nobody_takes_an_item_twice(scenario: Scenario) -> None:
    stream = stream_of(scenario)
    pairs = set(zip(stream.user_id.tolist(), stream.item_id.tolist(), strict=True))
    assert len(pairs) == SMALL.num_events


def test_a_sudden_change_is_where_it_is_said_to_be_and_nowhere_else() -> None:
    stream = stream_of("sudden")
    (change,) = stream.changes
    assert (change.first, change.last) == (2_000, 2_000)
    assert change.first_ms == stream.event_time_ms[2_000]
    before, still, after = (habits(stream, slice(first, first + 1_000)) for first in (0, 1_000, 2_000))
    assert np.abs(before - still).max() < 0.2
    assert np.abs(still - after).max() > 0.4


def test_a_gradual_change_is_over_when_it_is_said_to_be() -> None:
    stream = stream_of("gradual")
    (change,) = stream.changes
    assert change.last - change.first == 800
    before, during, after = (
        habits(stream, slice(first, end)) for first, end in ((0, 2_000), (2_000, 2_800), (2_800, 4_000))
    )
    assert np.abs(before - after).max() > 0.4
    np.testing.assert_allclose(during, (before + after) / 2, atol=0.2)


def test_recurring_habits_return() -> None:
    stream = stream_of("recurring", num_changes=3)
    assert [change.first for change in stream.changes] == [1_000, 2_000, 3_000]
    first, second, third, fourth = (habits(stream, slice(at, at + 1_000)) for at in (0, 1_000, 2_000, 3_000))
    assert np.abs(first - third).max() < 0.2
    assert np.abs(second - fourth).max() < 0.2
    assert np.abs(first - second).max() > 0.4


def test_a_wave_brings_items_that_nobody_had_and_takes_old_ones_away() -> None:
    stream = stream_of("new_items", num_changes=2)
    bounds = [0, *(change.first for change in stream.changes), SMALL.num_events]
    sets = [set(stream.item_id[a:b].tolist()) for a, b in itertools.pairwise(bounds)]
    for before, after in itertools.pairwise(sets):
        assert max(after) > max(before)
        assert min(after) > min(before)
        assert after & before


def test_the_ideal_is_what_ranking_by_the_truth_scores() -> None:
    # The most probable unseen items of a stationary stream without clusters, counted, are the ranking of the truth.
    stream = simulate(replace(SMALL, scenario="stationary", num_events=15_000, interactions_per_user=5))
    G = SMALL.num_groups
    weight_V = np.bincount(stream.item_id, minlength=SMALL.num_items).astype(float)
    transition_GG = habits(stream, slice(0, 15_000))
    group_V = np.arange(SMALL.num_items) % G
    within_V = weight_V / np.bincount(group_V, weight_V, minlength=G)[group_V]
    histories: dict[int, list[int]] = {}
    hits = []
    for user, item in zip(stream.user_id.tolist(), stream.item_id.tolist(), strict=True):
        had = histories.setdefault(user, [])
        if had:
            score_V = transition_GG[had[-1] % G][group_V] * within_V
            score_V[had] = -1
            hits.append(int((score_V > score_V[item]).sum()) < 10)
        had.append(item)
    assert np.mean(hits) == pytest.approx(np.nanmean(stream.ideal_hr_at_10), abs=0.03)


def test_ideal_scores_of_a_known_distribution() -> None:
    probability_V = np.r_[0.5, 0.2, np.full(30, 0.01)]
    hr, ndcg = ideal_scores(probability_V)
    assert hr == pytest.approx(0.78)
    gains = 1 / np.log2(np.arange(2, 22))
    assert ndcg == pytest.approx(0.5 * gains[0] + 0.2 * gains[1] + 0.01 * gains[2:].sum())


def test_the_ideal_of_dirichlet_records_is_what_ranking_by_the_truth_scores() -> None:
    # Records of one category: every item is equally likely, so it is the share of unseen items that fit in the list.
    config = DirichletConfig(
        num_records=50, num_items=80, record_len=30, num_categories=2, categories_per_record=1, first_share=1.0
    )
    records = dirichlet_records(config)
    num_unseen = np.array([[40 - len(set(items[:step])) for step in range(30)] for items in records.items_RT.tolist()])
    np.testing.assert_allclose(records.ideal_hr_at_10_RT, np.minimum(num_unseen, 10) / 40)
    gains = np.concatenate([[0.0], (1 / np.log2(np.arange(2, 22))).cumsum()])
    np.testing.assert_allclose(records.ideal_ndcg_at_20_RT, gains[np.minimum(num_unseen, 20)] / 40)


def test_the_dirichlet_catalogue_grows() -> None:
    stream = stream_of("dirichlet", num_items=400, num_users=10)
    assert stream.item_id[:400].max() < 240 < stream.item_id[-400:].max()
    assert (stream.changes[0].first, stream.changes[0].last) == (0, SMALL.num_events)


def test_the_file_can_be_replayed_and_the_truth_lies_beside_it(tmp_path: Path) -> None:
    config = replace(SMALL, scenario="sudden")
    stream = simulate(config)
    truth = stream.write(tmp_path / "made" / "stream.parquet", config)
    columns = RecordedColumns(user="user_id", item="item_id", time="event_time")
    recorded = read_recorded(tmp_path / "made" / "stream.parquet", columns)
    assert recorded.item_id == stream.item_id.tolist()
    np.testing.assert_array_equal(recorded.event_time_ms, stream.event_time_ms)
    stored = json.loads(truth.read_text())
    assert stored["changes"][0]["first"] == 2_000
    assert [segment["first"] for segment in stored["segments"]] == [0, 2_000]
    frame = pl.read_parquet(tmp_path / "made" / "stream.parquet")
    assert stored["ideal_hr_at_10"] == pytest.approx(np.nanmean(frame["ideal_hr_at_10"].to_numpy()))


@pytest.mark.parametrize(
    ("field", "value"),
    [("num_items", 99), ("num_changes", 0), ("interactions_per_user", 0.5), ("wave_share", 0.9), ("scenario", "odd")],
)
def test_a_stream_that_cannot_be_is_refused(field: str, value: object) -> None:
    with pytest.raises(ValueError, match=field):
        replace(SMALL, **{field: value})  # type: ignore[arg-type]
