"""Going back to earlier weights."""

from __future__ import annotations

import numpy as np
import torch

from model.recommender import Recommender
from online_trainer.rollback import LastGoodWeights
from tests.online_trainer.conftest import MODEL


def disturb(model: Recommender, by: float) -> None:
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(by)
    model.items.weight[: model.items.num_items] += by
    model.items.bias[: model.items.num_items] += by


def content(model: Recommender) -> dict[str, torch.Tensor]:
    n = model.items.num_items
    return {**model.dense_state(), "weight": model.items.weight[:n].clone(), "bias": model.items.bias[:n].clone()}


def test_it_goes_back_to_the_last_but_one_copy_and_keeps_what_came_since() -> None:
    model, good = Recommender(MODEL), LastGoodWeights(100)
    model.items.admit(np.array([3, 5, 9]))
    good.take_if_due(model, 100)
    first = content(model)
    disturb(model, 1.0)
    good.take_if_due(model, 150)  # too early for another copy
    good.take_if_due(model, 210)
    model.items.admit(np.array([11]))
    disturb(model, 1.0)
    newcomer = model.items.weight[3].clone()
    model.items.clear_dirty()
    assert good.restore(model)
    now = content(model)
    for name, tensor in first.items():
        assert torch.equal(now[name][:3] if name in {"weight", "bias"} else now[name], tensor), name
    assert torch.equal(model.items.weight[3], newcomer)
    assert model.items.dirty_rows().tolist() == [0, 1, 2]
    # What is trained from here on does not reach into the copy.
    disturb(model, 1.0)
    assert not good.restore(model)


def test_an_item_that_was_removed_stays_away() -> None:
    model, good = Recommender(MODEL), LastGoodWeights(1)
    model.items.admit(np.array([3, 5]))
    good.take_if_due(model, 1)
    good.take_if_due(model, 2)
    weight_D = model.items.weight[1].clone()
    model.items.remove(np.array([3]))
    disturb(model, 1.0)
    assert good.restore(model)
    assert model.items.lookup(np.array([3, 5])).tolist() == [-1, 0], "the one that stays has moved"
    assert torch.equal(model.items.weight[0], weight_D)


def test_without_two_copies_nothing_changes() -> None:
    model, good = Recommender(MODEL), LastGoodWeights(1)
    good.take_if_due(model, 1)
    before = content(model)
    assert not good.restore(model)
    for name, tensor in content(model).items():
        assert torch.equal(tensor, before[name])


def test_copies_pass_through_tensors() -> None:
    model, good, again = Recommender(MODEL), LastGoodWeights(10), LastGoodWeights(10)
    model.items.admit(np.array([3]))
    good.take_if_due(model, 10)
    first = content(model)
    disturb(model, 1.0)
    good.take_if_due(model, 20)
    again.load_tensors(good.tensors())
    again.take_if_due(model, 25)  # the interval goes on where it was
    assert again.restore(model)
    for name, tensor in content(model).items():
        assert torch.equal(tensor, first[name])


def test_another_interval_does_not_put_off_the_next_copy() -> None:
    model, good, longer = Recommender(MODEL), LastGoodWeights(1), LastGoodWeights(100)
    model.items.admit(np.array([3, 5]))
    for num_tested in range(1, 1_001):
        good.take_if_due(model, num_tested)
    longer.load_tensors(good.tensors())
    taken = content(model)
    disturb(model, 1.0)
    for num_tested in (1_050, 1_100, 1_200):
        longer.take_if_due(model, num_tested)
    disturbed = content(model)
    disturb(model, 1.0)
    assert longer.restore(model)
    now = content(model)
    assert torch.equal(now["weight"], disturbed["weight"])
    assert not torch.equal(now["weight"], taken["weight"])
