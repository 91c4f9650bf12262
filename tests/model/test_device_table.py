"""The device's hash index and row-wise AdamW do what the model's own do on the CPU."""

from __future__ import annotations

import numpy as np
import torch

from kernels.dynamic_embedding import HashIndex, rowwise_adamw_
from kernels.dynamic_embedding.reference import mix64 as device_mix64
from model.config import ModelConfig, OptimizerConfig
from model.id_index import IdIndex, mix64
from model.optimizer import RecommenderOptimizer
from model.recommender import Recommender


def test_both_indexes_scramble_ids_alike_and_find_the_same_rows() -> None:
    rng = np.random.default_rng(7)
    ids = np.unique(np.concatenate([rng.integers(0, 1 << 63, 500, dtype=np.int64), [0, 1, (1 << 63) - 1]]))
    want = mix64(ids.astype(np.uint64)).view(np.int64)
    assert device_mix64(torch.from_numpy(ids)).tolist() == want.tolist()
    host, device = IdIndex(num_slots=4), HashIndex(num_slots=4)
    rows = rng.permutation(len(ids))
    host.put(ids, rows)
    device.insert(torch.from_numpy(ids), torch.from_numpy(rows))
    host.remove(ids[::5])
    device.remove(torch.from_numpy(ids[::5]))
    asked = np.concatenate([ids, ids[:9] + 1, [-1, -2]])
    assert device.find(torch.from_numpy(asked)).tolist() == host.find(asked).tolist()


def test_row_steps_are_those_of_the_optimizer_bit_for_bit(small_config: ModelConfig) -> None:
    config = OptimizerConfig(row_learning_rate=0.02, row_weight_decay=0.5)
    recommender = Recommender(small_config)
    recommender.items.admit(np.arange(20))
    optimizer = RecommenderOptimizer(recommender, config)
    weight, bias = recommender.items.weight.clone(), recommender.items.bias.clone()[:, None]
    capacity, width = weight.shape
    moments, bias_moments = (
        (torch.zeros(capacity, columns), torch.zeros(capacity), torch.zeros(capacity)) for columns in (width, 1)
    )
    generator = torch.Generator().manual_seed(0)
    for step in range(6):
        active = recommender.items.activate(torch.randint(step, 20, (7,), generator=generator))
        grad = torch.randn(active.weight_RD.shape, generator=generator)
        bias_grad = torch.randn(active.bias_R.shape, generator=generator)
        active.weight_RD.grad, active.bias_R.grad = grad, bias_grad
        optimizer.step(active)
        for table, (first, second, steps), gradient, decay in (
            (weight, moments, grad, config.row_weight_decay),
            (bias, bias_moments, bias_grad[:, None], 0.0),
        ):
            rowwise_adamw_(
                table,
                first,
                second,
                steps,
                active.rows_R,
                gradient,
                learning_rate=config.row_learning_rate,
                beta1=config.beta1,
                beta2=config.beta2,
                epsilon=config.epsilon,
                weight_decay=decay,
            )
    assert torch.equal(recommender.items.weight, weight)
    assert torch.equal(recommender.items.bias, bias[:, 0])
    state_dict = optimizer.state_dict()
    for name, column in zip(("first", "second", "steps"), moments, strict=True):
        assert torch.equal(state_dict[f"rows.{name}"], column[:20]), name
