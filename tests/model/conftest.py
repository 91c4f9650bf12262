"""A small recommender, and histories for it."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch

from model.batch import HistoryBatch
from model.config import ModelConfig
from model.recommender import Recommender
from tests.model.study import DAY_MS, START_MS, Study


@pytest.fixture(scope="session")
def small_config() -> ModelConfig:
    return ModelConfig(
        embedding_dim=8,
        num_layers=2,
        num_heads=2,
        attention_dim=4,
        hidden_dim=4,
        max_len=12,
        input_dropout=0.1,
        linear_dropout=0.1,
    )


@pytest.fixture
def study(small_config: ModelConfig) -> Study:
    return Study(small_config)


@pytest.fixture
def make_study(small_config: ModelConfig) -> Callable[[str], Study]:
    return lambda kind: Study(small_config, kind=kind)


def answers(recommender: Recommender) -> torch.Tensor:
    """float32[P, V]: scores of fixed histories made of item ids, over the whole catalogue."""
    ids = np.array([0, 1, 5, 2, 9, 3, 1]) * 1_000_003
    times = torch.arange(7) * DAY_MS + START_MS
    batch = HistoryBatch(
        rows_L=torch.from_numpy(recommender.items.lookup(ids)),
        timestamps_ms_L=times,
        query_times_ms_L=times + DAY_MS,
        offsets=torch.tensor([0, 4, 4, 7]),
    )
    with torch.no_grad():
        return recommender.scores(recommender.encode(batch))


@pytest.fixture
def answer() -> Callable[[Recommender], torch.Tensor]:
    return answers
