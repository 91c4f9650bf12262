"""Jagged tensors pack and unpack without loss and refuse inconsistent offsets."""

from __future__ import annotations

import pytest
import torch

from kernels.jagged import JaggedTensor


def jagged_of(lengths: list[int], *, max_len: int | None = None) -> JaggedTensor:
    return JaggedTensor.of([torch.arange(n, dtype=torch.float32) + 10 * n for n in lengths], max_len=max_len)


@pytest.mark.parametrize("lengths", [[3, 0, 1, 5], [0], [0, 0, 0], [1], [7]])
def test_packing_what_was_padded_gives_the_same_tensor(lengths: list[int]) -> None:
    jagged = jagged_of(lengths, max_len=8)
    again = JaggedTensor.from_padded(jagged.to_padded(fill=float("nan")), jagged.lengths())
    assert torch.equal(again.values, jagged.values)
    assert torch.equal(again.offsets, jagged.offsets)


def test_row_and_position_index_name_the_place_of_each_value() -> None:
    jagged = jagged_of([2, 0, 3])
    assert jagged.row_index().tolist() == [0, 0, 2, 2, 2]
    assert jagged.position_index().tolist() == [0, 1, 0, 1, 2]


@pytest.mark.parametrize(
    ("offsets", "max_len", "says"),
    [
        ([1, 3], 3, "run from 1"),
        ([0, 2], 3, "run from 0 to 2"),
        ([0, 3, 2, 3], 3, "descend"),
        ([0, 3], 2, "max_len is 2"),
    ],
)
def test_inconsistent_offsets_are_refused(offsets: list[int], max_len: int, says: str) -> None:
    jagged = JaggedTensor(values=torch.zeros(3), offsets=torch.tensor(offsets), max_len=max_len)
    with pytest.raises(ValueError, match=says):
        jagged.checked()


def test_offsets_of_another_dtype_are_refused_on_construction() -> None:
    with pytest.raises(ValueError, match="int64"):
        JaggedTensor(values=torch.zeros(3), offsets=torch.tensor([0, 3], dtype=torch.int32), max_len=3)


def test_a_value_that_is_no_number_is_named() -> None:
    values = torch.ones(4, 2)
    values[2, 1] = torch.nan
    jagged = JaggedTensor(values=values, offsets=torch.tensor([0, 4]), max_len=4)
    with pytest.raises(ValueError, match=r"values\[2\] is not a number"):
        jagged.checked()
