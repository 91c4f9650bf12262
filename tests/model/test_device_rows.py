"""Rows that are sent rounded are those of snapshots, follow every change of the table, and learn in float32."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import numpy as np
import pytest
import torch

from model.compute import Compute
from model.config import LossConfig, ModelConfig, OptimizerConfig, RowPrecision
from model.device_rows import DeviceRows
from model.item_table import ItemTable
from model.optimizer import RecommenderOptimizer
from model.recommender import Recommender
from model.row_precision import as_published, rounded_rows
from online_trainer.rollback import WeightsCopy
from tests.model.test_compute import a_pass, recommender_of

Rounded = Literal["int8", "int4"]
PRECISIONS: tuple[Rounded, ...] = ("int8", "int4")
CPU = torch.device("cpu")


def sent(rows: DeviceRows, num_items: int) -> torch.Tensor:
    return rows.weight(slice(0, num_items), lambda tensor: tensor)


@pytest.fixture
def table(small_config: ModelConfig) -> ItemTable:
    made = ItemTable(small_config)
    made.admit(np.arange(30) * 7)
    return made


@pytest.mark.parametrize("precision", PRECISIONS)
def test_what_is_sent_is_what_a_snapshot_carries(table: ItemTable, precision: Rounded) -> None:
    rows = DeviceRows(table, precision)
    assert torch.equal(sent(rows, 30), as_published(table.weight[:30], precision))
    asked = torch.tensor([4, 4, 0, 29])
    moved: list[torch.Tensor] = []

    def send(tensor: torch.Tensor) -> torch.Tensor:
        moved.append(tensor)
        return tensor

    assert torch.equal(rows.weight(asked, send), as_published(table.weight[asked], precision))
    want = rounded_rows(table.weight[asked], precision)
    assert torch.equal(moved[0], want.codes)
    assert torch.equal(moved[1], want.scale)


def _admitted(table: ItemTable) -> None:
    table.admit(np.array([1_000, 1_001]))


def _removed(table: ItemTable) -> None:
    table.remove(np.array([0, 7, 140]))  # the last rows move into their places


def _removed_and_came_back(table: ItemTable) -> None:
    table.remove(np.array([0, 203]))
    table.admit(np.array([203]))


def _learned(table: ItemTable) -> None:
    table.weight[3] += 0.5
    table.mark_changed(torch.tensor([3]))


def _loaded(table: ItemTable) -> None:
    other = table.alike()
    other.admit(np.arange(5) + 90)
    table.load_state_dict(other.state_dict())


def _swapped(table: ItemTable) -> None:
    change = table.plan(np.array([14]), np.array([21, 5_000]))
    table.carry_out(change, torch.ones(2, table.weight.shape[1]), torch.zeros(2), torch.zeros(2, dtype=torch.float64))


def _exchanged(table: ItemTable) -> None:
    other = table.alike()
    other.admit(np.arange(8) + 500)
    table.exchange(other)


@pytest.mark.parametrize(
    "change", [_admitted, _removed, _removed_and_came_back, _learned, _loaded, _swapped, _exchanged]
)
def test_it_follows_every_change_of_the_table(table: ItemTable, change: Callable[[ItemTable], None]) -> None:
    rows = DeviceRows(table, "int8")
    assert rows.refresh() == 30
    assert rows.refresh() == 0
    change(table)
    assert torch.equal(sent(rows, table.num_items), as_published(table.weight[: table.num_items], "int8"))


def test_only_rows_that_changed_are_rounded_anew(table: ItemTable) -> None:
    rows = DeviceRows(table, "int4")
    rows.refresh()
    _admitted(table)
    _learned(table)
    assert rows.refresh() == 3


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("loss", [LossConfig(num_hard_negatives=4), LossConfig(kind="sampled", num_negatives=6)])
def test_a_step_computes_with_the_rounded_rows_and_learns_in_float32(
    small_config: ModelConfig, loss: LossConfig, precision: RowPrecision
) -> None:
    """The gradients are those of a model whose table holds the rounded rows; the rows themselves move."""
    holding, sending = recommender_of(small_config), recommender_of(small_config)
    holding.items.weight[: holding.items.num_items] = as_published(
        holding.items.weight[: holding.items.num_items], precision
    )
    sending.use(Compute(device=CPU, row_precision=precision))
    before = sending.items.weight[: sending.items.num_items].clone()
    want, got = a_pass(holding, loss), a_pass(sending, loss)
    torch.testing.assert_close(got.loss, want.loss)
    torch.testing.assert_close(got.active.weight_RD.grad, want.active.weight_RD.grad)
    RecommenderOptimizer(sending, OptimizerConfig()).step(got.active)
    moved = (sending.items.weight[: len(before)] - before).abs().amax(1)
    assert 0 < moved[got.active.rows_R].max() < 0.05
    assert not torch.equal(
        sending.items.weight[: len(before)], as_published(sending.items.weight[: len(before)], precision)
    )
    assert torch.equal(
        sending.catalogue().unit_VD,
        torch.nn.functional.normalize(as_published(sending.items.weight[: len(before)], precision), dim=1, eps=1e-6),
    )


def test_weights_that_come_back_are_sent(small_config: ModelConfig) -> None:
    recommender = recommender_of(small_config)
    recommender.use(Compute(device=CPU, row_precision="int8"))
    kept = WeightsCopy.of(recommender)
    first = recommender.catalogue().unit_VD
    RecommenderOptimizer(recommender, OptimizerConfig()).step(a_pass(recommender, LossConfig()).active)
    assert not torch.equal(recommender.catalogue().unit_VD, first)
    kept.restore(recommender)
    assert torch.equal(recommender.catalogue().unit_VD, first)


def test_without_a_device_it_is_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match=r"trainer\.device_rows is int4, .* set trainer\.device_rows to float32"):
        Compute.chosen("auto", "auto", "int4")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("precision", PRECISIONS)
def test_a_device_makes_the_same_rows_of_the_codes(small_config: ModelConfig, precision: RowPrecision) -> None:
    host, device = recommender_of(small_config), recommender_of(small_config)
    host.use(Compute(device=CPU, row_precision=precision))
    device.use(Compute(device=torch.device("cuda"), row_precision=precision))
    assert isinstance(device, Recommender)
    torch.testing.assert_close(device.catalogue().unit_VD.cpu(), host.catalogue().unit_VD)
    want, got = a_pass(host, LossConfig()), a_pass(device, LossConfig())
    torch.testing.assert_close(got.active.weight_RD.grad, want.active.weight_RD.grad, rtol=1e-3, atol=1e-5)
