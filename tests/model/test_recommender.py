"""The recommender is causal, deterministic, and scores what its parts say."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch.nn import functional

from model.batch import HistoryBatch
from model.config import ModelConfig, OptimizerConfig
from model.recommender import Recommender


def history(rows: list[int], *, lengths: list[int] | None = None) -> HistoryBatch:
    times = 1_400_000_000_000 + torch.arange(len(rows)) * 3_600_000
    return HistoryBatch(
        rows_L=torch.tensor(rows, dtype=torch.int64),
        timestamps_ms_L=times,
        query_times_ms_L=times + 1_800_000,
        offsets=torch.tensor([0, *(lengths or [len(rows)])]).cumsum(0),
    )


@pytest.fixture
def recommender(small_config: ModelConfig) -> Recommender:
    recommender = Recommender(small_config)
    recommender.items.admit(np.arange(10))
    return recommender


def test_states_have_unit_length_at_every_position(recommender: Recommender) -> None:
    u = recommender.encode(history([1, 2, 3, 4, 5], lengths=[2, 0, 3])).detach()
    torch.testing.assert_close(u.norm(dim=1), torch.ones(5))


def test_a_later_interaction_changes_no_earlier_state(recommender: Recommender) -> None:
    u = recommender.encode(history([1, 2, 3, 4, 5]))
    changed = recommender.encode(history([1, 2, 3, 9, 5]))
    assert torch.equal(changed[:3], u[:3])
    assert not torch.equal(changed[3:], u[3:])


def test_the_time_of_the_request_changes_the_answer(recommender: Recommender) -> None:
    batch = history([1, 2, 3])
    later = dataclasses.replace(batch, query_times_ms_L=batch.query_times_ms_L + 10 * 86_400_000)
    assert not torch.equal(recommender.encode(later), recommender.encode(batch))


def test_unknown_items_read_as_zeros_and_do_not_fail(recommender: Recommender) -> None:
    u = recommender.encode(history([-1, 2]))
    assert u[0].tolist() == [0.0] * 8
    assert bool(u.isfinite().all())


def test_an_empty_batch_and_an_empty_catalogue_work(small_config: ModelConfig) -> None:
    recommender = Recommender(small_config)
    assert recommender.encode(history([], lengths=[0, 0])).shape == (0, 8)
    u = recommender.encode(history([-1, -1]))
    assert recommender.scores(u).shape == (2, 0)


def test_a_score_is_scaled_cosine_plus_bias_plus_weighted_log_popularity(recommender: Recommender) -> None:
    items = recommender.items
    half_life_ms = int(recommender.config.trend_half_life_s * 1000)
    items.observe(np.array([2, 2, 5]), np.array([0, half_life_ms, half_life_ms]))
    items.bias[:10] = torch.arange(10) / 7
    u = recommender.encode(history([1, 2, 3])).detach()
    got = recommender.scores(u).detach()
    floor = recommender.config.trend_floor
    popularity = {2: 1.5, 5: 1.0}
    for row in range(10):
        cosine = functional.cosine_similarity(u, items.weight[row][None])
        trend = recommender.config.trend_coefficient * math.log(popularity.get(row, 0.0) + floor)
        want = cosine / recommender.config.temperature + row / 7 + trend
        torch.testing.assert_close(got[:, row], want, atol=1e-4, rtol=0)


def test_asking_for_rows_or_keeping_the_catalogue_changes_no_score(recommender: Recommender) -> None:
    u = recommender.encode(history([1, 2, 3]))
    rows = torch.tensor([7, 0, 7])
    full = recommender.scores(u)
    catalogue = recommender.catalogue()
    assert torch.equal(recommender.scores(u, catalogue=catalogue), full)
    torch.testing.assert_close(recommender.scores(u, rows), full[:, rows])
    torch.testing.assert_close(recommender.scores(u, rows, catalogue=catalogue), full[:, rows])


def test_training_and_inference_read_the_same_table(recommender: Recommender) -> None:
    batch = history([3, -1, 9, 4])
    everything = recommender.items.activate(torch.arange(recommender.items.num_items))
    some = recommender.items.activate(torch.tensor([9, 3, 4, 3, -1]))
    assert some.rows_R.tolist() == [3, 4, 9]
    assert torch.equal(recommender.encode(batch, everything), recommender.encode(batch))
    assert torch.equal(recommender.encode(batch, some), recommender.encode(batch))


def test_two_recommenders_of_one_configuration_are_identical(
    small_config: ModelConfig, answer: Callable[[Recommender], torch.Tensor]
) -> None:
    one, other = Recommender(small_config), Recommender(small_config)
    for recommender in (one, other):
        recommender.items.admit(np.arange(10) * 1_000_003)
    assert torch.equal(answer(one), answer(other))


def test_a_history_longer_than_max_len_is_refused(recommender: Recommender) -> None:
    with pytest.raises(ValueError, match="max_len is 12"):
        recommender.encode(history([1] * 13))


@pytest.mark.parametrize(
    ("name", "value"), [("embedding_dim", 0), ("temperature", 0.0), ("input_dropout", 1.0), ("trend_floor", 0.0)]
)
def test_impossible_settings_are_refused_by_name(name: str, value: float) -> None:
    with pytest.raises(ValueError, match=name):
        ModelConfig(**{name: value})  # type: ignore[arg-type]


def test_an_impossible_learning_rate_is_refused_by_name() -> None:
    with pytest.raises(ValueError, match="row_learning_rate"):
        OptimizerConfig(row_learning_rate=-1.0)


def test_the_configuration_hash_tells_configurations_apart(small_config: ModelConfig) -> None:
    assert small_config.config_hash() == dataclasses.replace(small_config).config_hash()
    assert small_config.config_hash() != dataclasses.replace(small_config, max_len=13).config_hash()
    roomier = dataclasses.replace(small_config, max_items=13)
    assert small_config.config_hash() == roomier.config_hash(), "a full table is enlarged without a new model"


@pytest.mark.parametrize(
    ("rows", "offsets", "message"),
    [
        ([0, 5], [0, 2], r"rows_L\[1\] is 5; the table has 5 items"),
        ([-2, 0], [0, 2], r"rows_L\[0\] is -2"),
        ([0, 0], [0, 1], "must run from 0 to the 2"),
        ([0, 0, 0, 0], [0, 4], "max_len is 3"),
    ],
)
def test_a_batch_that_does_not_fit_the_table_is_refused(rows: list[int], offsets: list[int], message: str) -> None:
    times = torch.arange(len(rows))
    batch = HistoryBatch(
        rows_L=torch.tensor(rows), timestamps_ms_L=times, query_times_ms_L=times, offsets=torch.tensor(offsets)
    )
    with pytest.raises(ValueError, match=message):
        batch.checked(num_items=5, max_len=3)
