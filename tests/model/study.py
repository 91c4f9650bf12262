"""A recommender that learns from a made-up stream."""

from __future__ import annotations

import numpy as np
import torch

from model.batch import HistoryBatch, Targets
from model.config import LossConfig, ModelConfig, OptimizerConfig
from model.learning import supervised_pass
from model.optimizer import RecommenderOptimizer
from model.recommender import Recommender

DAY_MS = 86_400_000
START_MS = 1_400_000_000_000


class Study:
    """A recommender learning from a made-up stream, one step at a time; every step depends on its number only."""

    def __init__(self, config: ModelConfig, *, kind: str = "full", stochastic_length_alpha: float = 0.0) -> None:
        self.recommender = Recommender(config)
        self.optimizer = RecommenderOptimizer(self.recommender, OptimizerConfig(row_learning_rate=0.01))
        self.loss_config = LossConfig(
            kind="sampled" if kind == "sampled" else "full",
            num_negatives=4,
            stochastic_length_alpha=stochastic_length_alpha,
        )
        self.generator = torch.Generator().manual_seed(7)
        self.num_steps = 0

    def histories(self, step: int) -> tuple[HistoryBatch, Targets]:
        rng = np.random.default_rng(step)
        lengths = rng.integers(0, 9, size=5)
        offsets = np.concatenate([[0], lengths.cumsum()])
        num_positions = int(offsets[-1])
        newest_item = 10 + 3 * step
        rows = self.recommender.items.admit(rng.integers(0, newest_item, size=2 * num_positions) * 1_000_003)
        times = START_MS + step * DAY_MS + rng.integers(0, DAY_MS, size=num_positions).cumsum()
        self.recommender.items.observe(rows[:num_positions], times)
        batch = HistoryBatch(
            rows_L=torch.from_numpy(rows[:num_positions]),
            timestamps_ms_L=torch.from_numpy(times),
            query_times_ms_L=torch.from_numpy(times + 60_000),
            offsets=torch.from_numpy(offsets),
        )
        positions = torch.arange(0, num_positions, 2)
        return batch, Targets(positions_P=positions, rows_P=torch.from_numpy(rows[num_positions:])[positions])

    def learn(self, num_steps: int = 1) -> list[float]:
        losses = []
        for _ in range(num_steps):
            batch, targets = self.histories(self.num_steps)
            found = supervised_pass(self.recommender, batch, targets, self.loss_config, generator=self.generator)
            found.backward()
            self.optimizer.step(found.active)
            losses.append(float(found.loss.detach()))
            self.num_steps += 1
        return losses
