"""Rows are joined, split and truncated as one by one, and gradients go back where the values came from."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from torch import Tensor

from kernels.errors import KernelUnavailableError
from kernels.implementations import KernelName
from kernels.jagged import JaggedTensor
from kernels.jagged_ops import Keep, jagged_concat, jagged_split, jagged_truncate

IMPLEMENTATIONS = ["reference", "triton"]

LENGTHS = {
    "mixed rows": ([5, 0, 1, 17, 3], [0, 2, 9, 1, 4]),
    "one row": ([3], [4]),
    "one value": ([0], [1]),
    "all rows empty": ([0, 0], [0, 0]),
    "empty rows at both ends": ([0, 4, 0], [0, 0, 0]),
    "no rows": ([], []),
}
TRAILING: list[tuple[int, ...]] = [(), (3,), (2, 5)]


def device_of(kernel: KernelName) -> str:
    return "cuda" if kernel == "triton" and torch.cuda.is_available() else "cpu"


def make_jagged(
    lengths: list[int], trailing: tuple[int, ...], device: str, dtype: torch.dtype = torch.float64
) -> JaggedTensor:
    """Between values that are not numbers, which no copy may reach."""
    num_values = sum(lengths)
    generator = torch.Generator().manual_seed(num_values + len(lengths))
    around = torch.full((num_values + 40, *trailing), math.nan, dtype=torch.float64)
    around[20:-20] = torch.randn(num_values, *trailing, generator=generator, dtype=torch.float64)
    around = around.nan_to_num(99).to(dtype) if not dtype.is_floating_point else around.to(dtype)
    values = around.to(device)[20:-20]
    offsets = torch.tensor([0, *itertools.accumulate(lengths)], device=device)
    return JaggedTensor(
        values=values.requires_grad_() if dtype.is_floating_point else values,
        offsets=offsets,
        max_len=max(lengths, default=0) + 2,
    ).checked()


def rows_of(jagged: JaggedTensor) -> list[Tensor]:
    return [jagged.values[a:b] for a, b in itertools.pairwise(jagged.offsets.tolist())]


def assert_rows(got: JaggedTensor, want: list[Tensor], *sources: JaggedTensor) -> None:
    got.checked()
    packed = torch.cat(want) if want else sources[0].values[:0]
    assert torch.equal(got.values, packed)
    assert got.lengths().tolist() == [row.shape[0] for row in want]
    if not packed.requires_grad:
        return
    upstream = torch.randn(packed.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    upstream = upstream.to(packed.device, packed.dtype)
    leaves = [source.values for source in sources]
    wanted = torch.autograd.grad(packed, leaves, upstream, retain_graph=True, allow_unused=True, materialize_grads=True)
    found = torch.autograd.grad(got.values, leaves, upstream, allow_unused=True, materialize_grads=True)
    for place, (a, b) in enumerate(zip(found, wanted, strict=True)):
        assert torch.equal(a, b), f"gradient of source {place}"


@pytest.mark.parametrize("trailing", TRAILING, ids=str)
@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS.keys())
@pytest.mark.parametrize("kernel", IMPLEMENTATIONS)
def test_concatenation_puts_each_right_row_behind_its_left_row(
    kernel: KernelName, lengths: tuple[list[int], list[int]], trailing: tuple[int, ...]
) -> None:
    left, right = (make_jagged(some, trailing, device_of(kernel)) for some in lengths)
    got = jagged_concat(left, right, kernel=kernel)
    want = [torch.cat(pair) for pair in zip(rows_of(left), rows_of(right), strict=True)]
    assert_rows(got, want, left, right)
    assert got.max_len == left.max_len + right.max_len


@pytest.mark.parametrize("trailing", TRAILING, ids=str)
@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS.keys())
@pytest.mark.parametrize("kernel", IMPLEMENTATIONS)
def test_splitting_gives_the_first_values_and_the_rest(
    kernel: KernelName, lengths: tuple[list[int], list[int]], trailing: tuple[int, ...]
) -> None:
    jagged = make_jagged(lengths[0], trailing, device_of(kernel))
    cuts = lengths[1]  # some are longer than the row
    got = jagged_split(jagged, torch.tensor(cuts, dtype=torch.int64, device=device_of(kernel)), kernel=kernel)
    rows = rows_of(jagged)
    assert_rows(got.left, [row[:cut] for row, cut in zip(rows, cuts, strict=True)], jagged)
    assert_rows(got.right, [row[cut:] for row, cut in zip(rows, cuts, strict=True)], jagged)


@pytest.mark.parametrize("kernel", IMPLEMENTATIONS)
def test_splitting_undoes_concatenation(kernel: KernelName) -> None:
    left, right = (make_jagged(some, (3,), device_of(kernel)) for some in LENGTHS["mixed rows"])
    joined = jagged_concat(left, right, kernel=kernel)
    got = jagged_split(joined, left.lengths(), num_left=left.num_values, kernel=kernel)
    for part, want in ((got.left, left), (got.right, right)):
        assert torch.equal(part.values, want.values)
        assert torch.equal(part.offsets, want.offsets)


@pytest.mark.parametrize(("max_len", "prefix_len"), [(4, 0), (4, 2), (1, 1), (0, 0), (17, 3), (40, 5)])
@pytest.mark.parametrize("keep", ["newest", "oldest"])
@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS.keys())
@pytest.mark.parametrize("kernel", IMPLEMENTATIONS)
def test_truncation_keeps_the_prefix_and_one_end(
    kernel: KernelName, lengths: tuple[list[int], list[int]], keep: Keep, max_len: int, prefix_len: int
) -> None:
    jagged = make_jagged(lengths[0], (3,), device_of(kernel))
    want = []
    for row in rows_of(jagged):
        if row.shape[0] <= max_len or keep == "oldest":
            want.append(row[:max_len])
        else:
            want.append(torch.cat([row[:prefix_len], row[row.shape[0] - (max_len - prefix_len) :]]))
    got = jagged_truncate(jagged, max_len, keep=keep, prefix_len=prefix_len, kernel=kernel)
    assert_rows(got, want, jagged)
    assert got.max_len == min(jagged.max_len, max_len)
    known = jagged_truncate(jagged, max_len, keep=keep, prefix_len=prefix_len, num_values=got.num_values, kernel=kernel)
    assert torch.equal(known.values, got.values)


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.bool, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kernel", IMPLEMENTATIONS)
def test_every_dtype_is_copied(kernel: KernelName, dtype: torch.dtype) -> None:
    left, right = (make_jagged(some, (3,), device_of(kernel), dtype) for some in LENGTHS["mixed rows"])
    want = [torch.cat(pair) for pair in zip(rows_of(left), rows_of(right), strict=True)]
    assert_rows(jagged_concat(left, right, kernel=kernel), want, left, right)
    got = jagged_truncate(left, 4, prefix_len=1, kernel=kernel)
    assert_rows(got, [torch.cat([r[:1], r[1:][-3:]]) for r in rows_of(left)], left)


def test_values_need_not_be_contiguous() -> None:
    jagged = make_jagged([3, 5], (4,), device_of("triton"))
    turned = jagged.with_values(jagged.values.detach().T.contiguous().T)
    got = jagged_truncate(turned, 2, kernel="triton")
    assert torch.equal(got.values, jagged_truncate(jagged, 2, kernel="triton").values)


def test_a_tensor_that_is_short_enough_is_returned_as_it_is() -> None:
    jagged = make_jagged([3, 5], (), "cpu")
    assert jagged_truncate(jagged, jagged.max_len) is jagged


def test_the_operators_keep_the_contract_of_custom_operators() -> None:
    device = device_of("triton")
    left, right = (make_jagged([3, 0, 5], (2,), device), make_jagged([1, 4, 0], (2,), device))
    of_left = (left.offsets[:-1], left.lengths())
    of_right = (right.offsets[:-1], right.lengths())
    ops = torch.ops.headrace
    torch.library.opcheck(ops.jagged_take.default, (left.values, *of_left, 8, 5))
    torch.library.opcheck(ops.jagged_join.default, (left.values, *of_left, right.values, *of_right, 13, 5))
    torch.library.opcheck(ops.jagged_spread.default, (left.values.detach(), left.offsets[:-1], *of_left, 12, 5))


@pytest.mark.parametrize("kernel", IMPLEMENTATIONS)
def test_it_compiles_into_one_graph(kernel: KernelName) -> None:
    left, right = (make_jagged(some, (3,), device_of(kernel)) for some in LENGTHS["mixed rows"])

    def there_and_back() -> Tensor:
        joined = jagged_concat(left, right, kernel=kernel)
        short = jagged_truncate(joined, 4, prefix_len=1, num_values=18, kernel=kernel)
        ones = torch.ones(5, dtype=torch.int64, device=device_of(kernel))
        return jagged_split(short, ones, num_left=5, kernel=kernel).right.values.sin()

    got, want = torch.compile(there_and_back, fullgraph=True, backend="aot_eager")(), there_and_back()
    assert torch.equal(got, want)
    leaves = [left.values, right.values]
    for a, b in zip(torch.autograd.grad(got.sum(), leaves), torch.autograd.grad(want.sum(), leaves), strict=True):
        assert torch.equal(a, b)


def test_a_wrong_total_touches_no_foreign_memory() -> None:
    device = device_of("triton")
    values = torch.arange(8.0, device=device, requires_grad=True)
    starts, lengths = torch.tensor([0, 4], device=device), torch.tensor([3, 4], device=device)
    taken = torch.ops.headrace.jagged_take(values, starts, lengths, 5, 4)
    assert taken.tolist() == [0, 1, 2, 4, 5]
    assert torch.autograd.grad(taken.sum(), values)[0].tolist() == [1, 1, 1, 0, 1, 1, 0, 0]


def test_a_total_outside_the_values_is_refused_on_every_device() -> None:
    jagged = make_jagged([3, 5], (2,), device_of("triton"))
    with pytest.raises(ValueError, match="num_values is 99"):
        jagged_truncate(jagged, 2, num_values=99)


def test_there_is_no_cpu_path_beside_the_reference() -> None:
    jagged = make_jagged([3], (), "cpu")
    with pytest.raises(KernelUnavailableError):
        jagged_concat(jagged, jagged, kernel="cpu")


def test_wrong_arguments_are_named() -> None:
    jagged = make_jagged([3, 5], (2,), "cpu")
    others: dict[str, JaggedTensor] = {
        "same number": make_jagged([3], (2,), "cpu"),
        "trailing shape": make_jagged([3, 5], (3,), "cpu"),
        "dtype": make_jagged([3, 5], (2,), "cpu", torch.float32),
    }
    for message, other in others.items():
        with pytest.raises(ValueError, match=message):
            jagged_concat(jagged, other)
    wrong_lengths: dict[str, Tensor] = {
        "left_lengths must be int64.2.": torch.zeros(3, dtype=torch.int64),
        "got torch.int32": torch.zeros(2, dtype=torch.int32),
        "left_lengths are on meta": torch.zeros(2, dtype=torch.int64, device="meta"),
    }
    for message, lengths in wrong_lengths.items():
        with pytest.raises(ValueError, match=message):
            jagged_split(jagged, lengths)
    with pytest.raises(ValueError, match="num_left is 9; the rows hold 0 such values"):
        jagged_split(jagged, torch.zeros(2, dtype=torch.int64), num_left=9)
    limits: dict[str, dict[str, Any]] = {
        "max_len is -1": {"max_len": -1},
        "prefix_len is 3": {"max_len": 2, "prefix_len": 3},
        "prefix_len is -1": {"max_len": 2, "prefix_len": -1},
        "keep is 'middle'": {"max_len": 2, "keep": "middle"},
        "num_values is -1": {"max_len": 2, "num_values": -1},
    }
    for message, options in limits.items():
        with pytest.raises(ValueError, match=message):
            jagged_truncate(jagged, **options)
