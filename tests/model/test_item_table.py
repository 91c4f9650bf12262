"""The item table grows without changing what it holds."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import numpy as np
import pytest
import torch

from model.config import ModelConfig
from model.errors import ItemTableFullError, StateMismatchError
from model.item_table import ItemTable, assign
from model.recommender import Recommender


def test_a_new_row_depends_on_its_id_and_the_seed_only(small_config: ModelConfig) -> None:
    one, other = ItemTable(small_config), ItemTable(small_config)
    one.admit(np.array([5, 9, 7]))
    other.admit(np.arange(1000))
    for item in (5, 9, 7):
        assert torch.equal(one.weight[one.lookup(np.array([item]))[0]], other.weight[other.lookup(np.array([item]))[0]])
    reseeded = ItemTable(dataclasses.replace(small_config, seed=1))
    reseeded.admit(np.array([5]))
    assert not torch.equal(reseeded.weight[0], one.weight[0])


def test_initial_embeddings_are_normal_and_cut_at_two_deviations() -> None:
    table = ItemTable(ModelConfig(item_init_std=0.02))
    table.admit(np.arange(4000))
    weight = table.weight[:4000]
    assert float(weight.abs().max()) <= 0.0400001
    assert abs(float(weight.mean())) < 1e-4
    assert float(weight.std()) == pytest.approx(0.02 * 0.8796, rel=0.01)
    correlation = torch.corrcoef(weight.T) - torch.eye(64)
    assert float(correlation.abs().max()) < 0.08


def test_rows_are_numbered_in_order_of_first_appearance(small_config: ModelConfig) -> None:
    table = ItemTable(small_config)
    assert table.admit(np.array([50, 10, 50, 30])).tolist() == [0, 1, 0, 2]
    assert table.admit(np.array([99, 10])).tolist() == [3, 1]
    assert table.ids().tolist() == [50, 10, 30, 99]
    assert table.lookup(np.array([30, 31])).tolist() == [2, -1]


def test_growth_keeps_every_column(small_config: ModelConfig) -> None:
    table = ItemTable(small_config)
    table.admit(np.arange(3))
    table.observe(np.array([0, 2]), np.array([1000, 2000]))
    before = table.state_dict()
    table.admit(np.arange(100))
    after = table.state_dict()
    for name in ("ids", "weight", "bias", "trend"):
        assert torch.equal(after[name][:3], before[name]), name


def test_too_many_items_are_refused_and_none_admitted(small_config: ModelConfig) -> None:
    table = ItemTable(dataclasses.replace(small_config, max_items=5))
    table.admit(np.arange(4))
    with pytest.raises(ItemTableFullError, match="max_items"):
        table.admit(np.arange(6))
    assert table.num_items == 4
    assert table.lookup(np.array([4])).tolist() == [-1]


def test_negative_ids_are_refused(small_config: ModelConfig) -> None:
    with pytest.raises(ValueError, match="negative"):
        ItemTable(small_config).admit(np.array([3, -1]))


def test_a_saved_table_is_restored_exactly(small_config: ModelConfig) -> None:
    table = ItemTable(small_config)
    table.admit(np.arange(20))
    table.clear_dirty()
    table.observe(np.array([3, 3, 4]), np.array([9000, 1000, 5000]))
    table.remove(np.array([7]))
    again = ItemTable(small_config)
    again.load_state_dict(table.state_dict())
    for name, tensor in table.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor), name
    assert again.lookup(np.arange(21)).tolist() == table.lookup(np.arange(21)).tolist()


def test_a_table_of_another_width_is_refused(small_config: ModelConfig) -> None:
    table = ItemTable(small_config)
    table.admit(np.arange(3))
    other = ItemTable(dataclasses.replace(small_config, embedding_dim=4))
    with pytest.raises(StateMismatchError):
        other.load_state_dict(table.state_dict())
    assert other.num_items == 0


def test_a_removed_item_leaves_no_gap_and_comes_back_as_a_new_one(
    small_config: ModelConfig, answer: Callable[[Recommender], torch.Tensor]
) -> None:
    recommender = Recommender(small_config)
    items = recommender.items
    items.admit(np.arange(6) * 1_000_003)
    items.observe(np.arange(6), np.arange(6) + 1_700_000_000_000)
    before = answer(recommender)
    moves = items.remove(np.array([1_000_003 * 4, 77]))
    assert (moves.sources.tolist(), moves.targets.tolist()) == ([5], [4]), "the last row moves into the gap"
    assert items.lookup(np.array([0, 1, 2, 3, 4, 5]) * 1_000_003).tolist() == [0, 1, 2, 3, -1, 4]
    assert items.removed_ids().tolist() == [4_000_012]
    torch.testing.assert_close(answer(recommender), before[:, [0, 1, 2, 3, 5]])
    items.clear_dirty()
    assert items.admit(np.array([1_000_003 * 4])).tolist() == [5]
    assert items.dirty_rows().tolist() == [5]
    assert (float(items.trend[5]), int(items.seen_ms[5]), float(items.bias[5])) == (-torch.inf, 0, 0)


def test_what_is_kept_by_row_follows_the_rows_that_move(small_config: ModelConfig) -> None:
    rng = np.random.default_rng(1)
    table, kept = ItemTable(small_config), torch.zeros(1000, 2)
    for _ in range(30):
        rows = table.admit(rng.integers(0, 300, 40))
        kept[torch.from_numpy(rows)] = torch.from_numpy(table.ids_of(rows)).float()[:, None]
        moves = table.remove(rng.integers(0, 300, 60))
        moves.follow(kept)
        assert (table.lookup(table.ids()) == np.arange(table.num_items)).all()
        assert kept[: table.num_items, 1].tolist() == table.ids().tolist()
        assert not kept[table.num_items :].any()


def test_rows_are_assigned_in_parts_as_if_at_once() -> None:
    rng = np.random.default_rng(0)
    for shape, num_rows in (((3_000,), 1_203), ((3_000, 7), 501), ((3_000, 7), 0), ((3_000, 600), 3)):
        rows = rng.permutation(3_000)[:num_rows]
        content = rng.normal(size=(num_rows, *shape[1:]))
        expected, found = np.zeros(shape), np.zeros(shape)
        expected[rows] = content
        assign(found, rows, content)
        np.testing.assert_array_equal(found, expected)
        expected[rows] = -np.inf
        assign(found, rows, -np.inf)
        np.testing.assert_array_equal(found, expected)


def test_a_state_of_more_items_than_there_is_room_for_is_refused(small_config: ModelConfig) -> None:
    table = ItemTable(small_config)
    table.admit(np.arange(3))
    smaller = ItemTable(dataclasses.replace(small_config, max_items=2))
    with pytest.raises(
        ItemTableFullError, match=r"3 items are more than max_items \(2\): raise max_items to at least 3"
    ):
        smaller.load_state_dict(table.state_dict())
    assert smaller.num_items == 0
