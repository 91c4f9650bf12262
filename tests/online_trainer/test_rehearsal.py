"""Which positions are learned from again."""

from __future__ import annotations

import torch

from model.batch import HistoryBatch, Targets
from online_trainer.rehearsal import rehearsal_targets


def test_what_is_new_enough_in_order_and_known_is_learned_from_again() -> None:
    # Two users: items 0 1 2 3 (then 4), and 5 -1 6 (then 7).
    history = HistoryBatch(
        rows_L=torch.tensor([0, 1, 2, 3, 5, -1, 6]),
        timestamps_ms_L=torch.tensor([10, 20, 30, 40, 20, 30, 40]),
        query_times_ms_L=torch.tensor([20, 30, 40, 50, 30, 40, 50]),
        offsets=torch.tensor([0, 4, 7]),
    )
    targets = Targets(positions_P=torch.tensor([3, 6]), rows_P=torch.tensor([4, 7]))
    in_order_L = torch.ones(7, dtype=torch.bool)
    found = rehearsal_targets(history, targets, in_order_L, since_ms=20)
    assert found.positions_P.tolist() == [1, 2, 3, 5, 6]  # 0: too old; 4: leads to an item that is unknown
    assert found.rows_P.tolist() == [2, 3, 4, 6, 7]
    in_order_L[1] = False
    assert rehearsal_targets(history, targets, in_order_L, since_ms=20).positions_P.tolist() == [2, 3, 5, 6]


def test_the_steps_own_targets_always_stay() -> None:
    history = HistoryBatch(
        rows_L=torch.tensor([0, 1]),
        timestamps_ms_L=torch.tensor([10, 20]),
        query_times_ms_L=torch.tensor([20, 30]),
        offsets=torch.tensor([0, 0, 2, 2]),
    )
    targets = Targets(positions_P=torch.tensor([1]), rows_P=torch.tensor([2]))
    found = rehearsal_targets(history, targets, torch.ones(2, dtype=torch.bool), since_ms=1_000)
    assert (found.positions_P.tolist(), found.rows_P.tolist()) == ([1], [2])
