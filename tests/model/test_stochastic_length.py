"""Stochastic length follows its rule on lengths, keeps what must be kept, and prefers what its selection says."""

from __future__ import annotations

import itertools
from typing import get_args

import pytest
import torch
from torch import Tensor

from model.batch import HistoryBatch, Targets
from model.stochastic_length import (
    Selection,
    StochasticLength,
    kept_positions,
    sampled_lengths,
    short_len,
    shortened,
)

SELECTIONS: tuple[Selection, ...] = get_args(Selection)
LENGTHS = [0, 1, 100, 5, 0, 33, 32, 31, 100, 64, 2, 0]


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def offsets_of(lengths: list[int]) -> Tensor:
    return torch.tensor([0, *lengths]).cumsum(0)


def times_of(lengths: list[int]) -> Tensor:
    gaps = torch.randint(0, 1000, (sum(lengths),), generator=seeded(9))
    return 1_700_000_000_000 + gaps.cumsum(0)


def rows_kept(offsets: Tensor, kept: Tensor) -> list[list[int]]:
    """The places kept in each row."""
    bounds = torch.searchsorted(kept, offsets).tolist()
    starts = offsets.tolist()
    return [(kept[low:high] - starts[b]).tolist() for b, (low, high) in enumerate(itertools.pairwise(bounds))]


# Lengths


@pytest.mark.parametrize(
    ("alpha", "max_len", "want"),
    [(1.6, 1024, 256), (1.6, 4096, 776), (1.8, 1024, 512), (2.0, 1000, 1000), (4 / 3, 1000, 100), (1.5, 16, 8)],
)
def test_a_short_history_has_the_papers_length_to_the_interaction(alpha: float, max_len: int, want: int) -> None:
    assert short_len(alpha=alpha, max_len=max_len) == want


def test_a_history_at_the_limit_is_read_whole_and_one_above_it_is_not() -> None:
    lengths = torch.tensor([0, 1, 255, 256, 257]).repeat(200)
    sampled = sampled_lengths(lengths, alpha=1.6, max_len=1024, generator=seeded()).view(200, 5)
    assert bool((sampled[:, :4] == lengths[:4]).all())
    assert set(sampled[:, 4].tolist()) == {256, 257}


@pytest.mark.parametrize("length", [300, 512, 1024])
def test_long_histories_are_read_whole_as_often_as_the_rule_says(length: int) -> None:
    trials = 20_000
    sampled = sampled_lengths(torch.full((trials,), length), alpha=1.6, max_len=1024, generator=seeded())
    want = 1024**1.6 / length**2
    deviation = (want * (1 - want) / trials) ** 0.5
    assert abs(float((sampled == length).double().mean()) - want) < 4 * deviation
    assert set(sampled.tolist()) == {256, length}


def test_alpha_2_keeps_everything() -> None:
    lengths = torch.tensor(LENGTHS)
    assert torch.equal(sampled_lengths(lengths, alpha=2.0, max_len=100, generator=seeded()), lengths)
    for selection in SELECTIONS:
        rule = StochasticLength(alpha=2.0, max_len=100, selection=selection)
        kept = kept_positions(rule, offsets_of(LENGTHS), times_of(LENGTHS), generator=seeded())
        assert torch.equal(kept, torch.arange(sum(LENGTHS)))


PAPER_SPARSITY = {(1.6, 1024): 71.5, (1.6, 2048): 76.1, (1.6, 4096): 80.5, (1.8, 1024): 40.2, (1.8, 2048): 45.3}
"""HSTU's table 3 in percent, of histories of which some are shorter than N."""


def sparsity(alpha: float, max_len: int) -> float:
    """Percent of N not read, of users who all have N interactions."""
    sampled = sampled_lengths(torch.full((50_000,), max_len), alpha=alpha, max_len=max_len, generator=seeded())
    return 100 * (1 - float(sampled.double().mean()) / max_len)


def test_sparsity_has_the_shape_of_the_papers_table() -> None:
    table = {(alpha, n): sparsity(alpha, n) for alpha in (1.6, 1.7, 1.8) for n in (1024, 2048, 4096, 8192)}
    for (alpha, n), percent in table.items():
        if n < 8192:
            assert table[alpha, 2 * n] > percent, "longer limits are sparser"
        for lower in {1.7: [1.6], 1.8: [1.6, 1.7]}.get(alpha, []):
            assert table[lower, n] > percent, "a lower alpha is sparser"
    for cell, percent in PAPER_SPARSITY.items():
        # Full histories are a little less sparse than the paper's, 3 to 7 % of whose places are padding.
        assert percent - 6 < table[cell] < percent, cell


# Positions


@pytest.mark.parametrize("selection", SELECTIONS)
def test_each_history_keeps_its_sampled_length_and_its_newest_interaction(selection: Selection) -> None:
    rule = StochasticLength(alpha=1.5, max_len=100, selection=selection)
    offsets = offsets_of(LENGTHS)
    kept = kept_positions(rule, offsets, times_of(LENGTHS), generator=seeded(4))
    want = sampled_lengths(torch.tensor(LENGTHS), alpha=1.5, max_len=100, generator=seeded(4)).tolist()
    rows = rows_kept(offsets, kept)
    assert [len(row) for row in rows] == want
    assert 31 in want[2:], "no history was shortened: the test tests nothing"
    for row, length in zip(rows, LENGTHS, strict=True):
        assert row == sorted(set(row))
        assert not length or row[-1] == length - 1


def test_recent_keeps_the_newest() -> None:
    rule = StochasticLength(alpha=1.5, max_len=100, selection="recent")
    offsets = offsets_of([100] * 20)
    for row in rows_kept(offsets, kept_positions(rule, offsets, times_of([100] * 20), generator=seeded())):
        assert row == list(range(100 - len(row), 100))


@pytest.mark.parametrize("selection", SELECTIONS)
def test_the_same_seed_keeps_the_same_positions_and_another_does_not(selection: Selection) -> None:
    rule = StochasticLength(alpha=1.5, max_len=100, selection=selection)
    lengths = [90] * 30
    first, again, other = (
        kept_positions(rule, offsets_of(lengths), times_of(lengths), generator=seeded(seed)) for seed in (1, 1, 2)
    )
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def keep_shares(selection: Selection, times: list[int], num_rows: int = 20_000) -> Tensor:
    """How often each of 4 places is kept by histories shortened to 2 (N = 4, of which 1 in 4 stays whole)."""
    rule = StochasticLength(alpha=1.0 + 1e-9, max_len=4, selection=selection)
    offsets = offsets_of([4] * num_rows)
    kept = kept_positions(rule, offsets, torch.tensor(times * num_rows), generator=seeded())
    rows = [row for row in rows_kept(offsets, kept) if len(row) == 2]
    return torch.tensor([sum(place in row for row in rows) / len(rows) for place in range(4)])


def test_uniform_draws_all_but_the_newest_alike() -> None:
    torch.testing.assert_close(
        keep_shares("uniform", [0, 1, 2, 9]), torch.tensor([1 / 3, 1 / 3, 1 / 3, 1.0]), atol=0.015, rtol=0
    )


def test_feature_weighted_draws_by_recency() -> None:
    # Ages 8, 4, 4 and 0 of 16: weights 1/2, 3/4 and 3/4 beside the newest, which is always kept.
    want = torch.tensor([1 / 4, 3 / 8, 3 / 8, 1.0])
    torch.testing.assert_close(keep_shares("feature_weighted", [0, 4, 4, 8]), want, atol=0.015, rtol=0)


def test_interactions_of_one_moment_weigh_alike() -> None:
    want = torch.tensor([1 / 3, 1 / 3, 1 / 3, 1.0])
    torch.testing.assert_close(keep_shares("feature_weighted", [7, 7, 7, 7]), want, atol=0.015, rtol=0)


# Batches


def batch_of(lengths: list[int]) -> HistoryBatch:
    times = times_of(lengths)
    return HistoryBatch(
        rows_L=torch.arange(sum(lengths)) * 3,
        timestamps_ms_L=times,
        query_times_ms_L=times + torch.arange(sum(lengths)),
        offsets=offsets_of(lengths),
    )


@pytest.mark.parametrize("selection", SELECTIONS)
def test_supervised_positions_are_kept_with_their_item_time_and_query_time(selection: Selection) -> None:
    batch = batch_of(LENGTHS)
    positions = torch.tensor([0, 3, 100, 101, 105, 6, 300, 301])
    targets = Targets(positions_P=positions, rows_P=torch.arange(8))
    rule = StochasticLength(alpha=1.2, max_len=100, selection=selection)
    short, moved = shortened(batch, targets, rule, generator=seeded())
    assert short.num_positions < batch.num_positions
    for name in ("rows_L", "timestamps_ms_L", "query_times_ms_L"):
        want, got = getattr(batch, name)[positions], getattr(short, name)[moved.positions_P]
        assert torch.equal(want, got), name
    assert torch.equal(moved.rows_P, targets.rows_P)
    assert int(short.offsets[-1]) == short.num_positions
    place = torch.searchsorted(batch.offsets, short.rows_L // 3, right=True) - 1
    row = torch.repeat_interleave(torch.arange(len(LENGTHS)), short.offsets.diff())
    assert torch.equal(place, row), "a position moved to another user"


def test_supervised_positions_take_the_place_of_others_and_lengthen_a_history_only_beyond_it() -> None:
    batch = batch_of([100] * 40)
    rule = StochasticLength(alpha=1.2, max_len=100, selection="recent")  # 15 of 100
    assert short_len(alpha=1.2, max_len=100) == 15
    few, many = torch.arange(5), torch.arange(100, 150)
    targets = Targets(positions_P=torch.cat([few, many]), rows_P=torch.zeros(55, dtype=torch.int64))
    short, _ = shortened(batch, targets, rule, generator=seeded())
    lengths = short.offsets.diff().tolist()
    assert lengths[0] == 15
    assert short.rows_L[:15].tolist() == [3 * place for place in (*range(5), *range(90, 100))]
    assert lengths[1] == 51  # the newest, too


def test_a_batch_without_positions_or_targets_stays_empty() -> None:
    none = torch.empty(0, dtype=torch.int64)
    rule = StochasticLength(alpha=1.6, max_len=100)
    short, moved = shortened(batch_of([0, 0]), Targets(positions_P=none, rows_P=none), rule, generator=seeded())
    assert short.offsets.tolist() == [0, 0, 0]
    assert moved.positions_P.shape == (0,)


@pytest.mark.parametrize(
    ("setting", "says"),
    [
        ({"alpha": 1.0}, "alpha is 1.0"),
        ({"alpha": 2.1}, "alpha is 2.1"),
        ({"alpha": float("nan")}, "alpha is nan"),
        ({"max_len": 0}, "max_len is 0"),
        ({"selection": "oldest"}, "selection is 'oldest'"),
    ],
)
def test_settings_outside_their_range_are_refused(setting: dict[str, object], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        StochasticLength(**{"alpha": 1.6, "max_len": 100, **setting})  # type: ignore[arg-type]
