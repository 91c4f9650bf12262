"""The k best rows are exactly the k best rows: in order, equals by row number, without those left out."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kernels.implementations import KernelName
from kernels.jagged import JaggedTensor
from kernels.top_k import TopK, top_k
from kernels.top_k.keys import keys_of, read_keys

IMPLEMENTATIONS = ["reference", "cpu", "triton"]
SHAPES = {
    "plain": (3, 23, 5),
    "one query": (1, 40, 7),
    "no query": (0, 5, 2),
    "one row": (2, 1, 1),
    "few rows": (2, 4, 9),
}
"""Queries, rows, k."""


def device_of(kernel: KernelName) -> str:
    return "cuda" if kernel == "triton" and torch.cuda.is_available() else "cpu"


def make_inputs(shape: tuple[int, int, int], width: int = 6) -> tuple[dict[str, Tensor], JaggedTensor]:
    """Small whole numbers: products are exact in every dtype, and most scores occur several times."""
    num_queries, num_items, _ = shape
    generator = torch.Generator().manual_seed(sum(shape))

    def whole(*size: int) -> Tensor:
        return torch.randint(-2, 3, size, generator=generator).float()

    tensors = {"u_BD": whole(num_queries, width), "item_VD": whole(num_items, width), "offset_V": whole(num_items) / 2}
    lengths = torch.randint(0, num_items + 1, (num_queries,), generator=generator)
    offsets = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)])
    rows = torch.randint(-1, num_items + 1, (int(offsets[-1]),), generator=generator)  # some are outside, some twice
    return tensors, JaggedTensor(values=rows, offsets=offsets, max_len=num_items)


def sorted_by_hand(
    tensors: dict[str, Tensor], k: int, scale: float, excluded: JaggedTensor | None
) -> tuple[list[list[float]], list[list[int]]]:
    scores_BV = scale * tensors["u_BD"] @ tensors["item_VD"].T
    if "offset_V" in tensors:
        scores_BV = scores_BV + tensors["offset_V"]
    all_scores, all_rows = [], []
    for query, scores in enumerate(scores_BV.tolist()):
        seen: set[int] = set()
        if excluded is not None:
            seen = set(excluded.values[excluded.offsets[query] : excluded.offsets[query + 1]].tolist())
        order = sorted(
            (row for row in range(len(scores)) if row not in seen),
            key=lambda row: (math.isnan(scores[row]), 0.0 if math.isnan(scores[row]) else -scores[row], row),
        )[:k]
        missing = k - len(order)
        all_scores.append([scores[row] for row in order] + [-math.inf] * missing)
        all_rows.append(order + [-1] * missing)
    return all_scores, all_rows


def run(tensors: dict[str, Tensor], k: int, excluded: JaggedTensor | None, kernel: KernelName, **options: Any) -> TopK:
    device = device_of(kernel)
    moved: dict[str, Any] = {name: x.to(device) for name, x in tensors.items()}
    if excluded is not None:
        moved["excluded"] = JaggedTensor(
            values=excluded.values.to(device), offsets=excluded.offsets.to(device), max_len=excluded.max_len
        )
    found = top_k(moved.pop("u_BD"), moved.pop("item_VD"), k, kernel=kernel, **moved, **options)
    return TopK(scores_BK=found.scores_BK.cpu(), rows_BK=found.rows_BK.cpu())


def assert_found(found: TopK, want: tuple[list[list[float]], list[list[int]]], k: int) -> None:
    assert found.scores_BK.shape == (len(want[0]), k)
    assert found.scores_BK.dtype == torch.float32
    assert found.rows_BK.tolist() == want[1]
    wanted_scores = torch.tensor(want[0]).reshape(found.scores_BK.shape)
    torch.testing.assert_close(found.scores_BK, wanted_scores, atol=0, rtol=0, equal_nan=True)


@pytest.mark.parametrize("chunk", [3, 16, 1000])
@pytest.mark.parametrize("with_filter", [True, False], ids=["seen rows left out", "all rows"])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
@pytest.mark.parametrize("kernel", IMPLEMENTATIONS)
def test_the_result_equals_sorting_by_hand(
    kernel: KernelName, shape: tuple[int, int, int], chunk: int, *, with_filter: bool
) -> None:
    tensors, excluded = make_inputs(shape)
    kept = excluded if with_filter else None
    want = sorted_by_hand(tensors, shape[2], -0.5, kept)
    assert_found(run(tensors, shape[2], kept, kernel, rows_per_chunk=chunk, scale=-0.5), want, shape[2])


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kernel", IMPLEMENTATIONS)
def test_every_dtype_gives_the_same_rows(kernel: KernelName, dtype: torch.dtype) -> None:
    if kernel == "triton" and (dtype == torch.float64 or not (torch.cuda.is_available() or dtype == torch.float16)):
        pytest.skip("not computed in float64, and bfloat16 products are wrong when interpreted")
    tensors, excluded = make_inputs((3, 23, 5))
    given_tensors = {name: x.to(dtype) for name, x in tensors.items()}
    assert_found(run(given_tensors, 5, excluded, kernel), sorted_by_hand(tensors, 5, 1.0, excluded), 5)


@pytest.mark.parametrize("kernel", IMPLEMENTATIONS)
def test_without_offset_and_with_a_scalar_tensor_as_scale(kernel: KernelName) -> None:
    tensors, _ = make_inputs((3, 23, 5))
    del tensors["offset_V"]
    scale = torch.tensor(2.0, device=device_of(kernel))
    assert_found(run(tensors, 5, None, kernel, scale=scale), sorted_by_hand(tensors, 5, 2.0, None), 5)


@pytest.mark.parametrize("kernel", IMPLEMENTATIONS)
def test_infinite_scores_rank_by_size_and_nan_comes_last(kernel: KernelName) -> None:
    offset = torch.tensor([0.0, math.nan, -math.inf, 1.0, -0.0, math.inf, -math.nan, 0.0])
    tensors = {"u_BD": torch.zeros(1, 4), "item_VD": torch.zeros(8, 4), "offset_V": offset}
    found = run(tensors, 9, None, kernel, rows_per_chunk=3)
    assert found.rows_BK.tolist() == [[5, 3, 0, 4, 7, 2, 1, 6, -1]]
    torch.testing.assert_close(found.scores_BK[0, :6], torch.tensor([math.inf, 1.0, 0.0, 0.0, 0.0, -math.inf]))
    assert found.scores_BK[0, 6:8].isnan().all()
    assert found.scores_BK[0, 8] == -math.inf


@pytest.mark.parametrize("kernel", IMPLEMENTATIONS)
def test_a_query_that_has_seen_everything_gets_nothing(kernel: KernelName) -> None:
    tensors, _ = make_inputs((2, 23, 5))
    excluded = JaggedTensor.of([torch.arange(23), torch.tensor([], dtype=torch.int64)])
    found = run(tensors, 4, excluded, kernel)
    assert found.rows_BK[0].tolist() == [-1] * 4
    assert found.scores_BK[0].tolist() == [-math.inf] * 4
    assert -1 not in found.rows_BK[1].tolist()


@pytest.mark.parametrize("kernel", IMPLEMENTATIONS)
def test_an_empty_catalogue_and_a_k_of_zero_are_answered(kernel: KernelName) -> None:
    tensors, _ = make_inputs((2, 0, 3))
    assert run(tensors, 3, None, kernel).rows_BK.tolist() == [[-1] * 3] * 2
    tensors, _ = make_inputs((2, 5, 0))
    assert run(tensors, 0, None, kernel).rows_BK.shape == (2, 0)


@pytest.mark.parametrize("kernel", ["cpu", "triton"])
def test_nothing_around_the_inputs_is_read(kernel: KernelName) -> None:
    tensors, excluded = make_inputs((3, 23, 5))
    want = sorted_by_hand(tensors, 23, 1.0, excluded)
    halo = {}
    for name, x in tensors.items():
        padded = torch.full((x.shape[0] + 40, *x.shape[1:]), math.nan)
        padded[20:-20] = x
        halo[name] = padded[20:-20]
    assert_found(run(halo, 23, excluded, kernel, rows_per_chunk=9), want, 23)
    turned = {name: x.mT.contiguous().mT if x.dim() == 2 else x for name, x in tensors.items()}
    assert_found(run(turned, 23, excluded, kernel, rows_per_chunk=9), want, 23)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.lists(st.floats(width=32, allow_nan=False), min_size=1, max_size=40))
def test_keys_order_and_keep_every_float(values: list[float]) -> None:
    scores = torch.tensor([values])
    keys = keys_of(scores, torch.arange(7, 7 + len(values)))
    assert len(set(keys[0].tolist())) == len(values)
    got_scores, got_rows = read_keys(keys.sort(descending=True).values)
    assert got_rows[0].tolist() == sorted(range(7, 7 + len(values)), key=lambda row: (-values[row - 7], row))
    assert torch.equal(got_scores, scores.sort(descending=True).values)


@pytest.mark.parametrize("rows_per_chunk", [1, 7, 64, 1000])
def test_c_and_torch_find_the_same_rows_among_many_equal_scores(
    rows_per_chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    tensors, excluded = make_inputs((4, 300, 40))
    tensors["item_VD"][[3, 70, 299]] = torch.nan
    tensors["offset_V"][[5, 6, 200]] = torch.tensor([torch.inf, -torch.inf, torch.inf])
    arguments: dict[str, Any] = {"excluded": excluded, "rows_per_chunk": rows_per_chunk, "kernel": "cpu"}
    for k in (1, 40, 400):
        asked: dict[str, Any] = tensors | arguments | {"k": k}
        compiled = top_k(**asked)
        with monkeypatch.context() as patch:
            patch.setattr("kernels.top_k.cpu.native_library", lambda *_, **__: None)
            without = top_k(**asked)
        assert torch.equal(compiled.rows_BK, without.rows_BK)
        assert torch.equal(compiled.scores_BK.nan_to_num(nan=7e9), without.scores_BK.nan_to_num(nan=7e9))


@pytest.mark.parametrize("kernel", IMPLEMENTATIONS)
def test_the_operator_keeps_the_contract_of_custom_operators(kernel: KernelName) -> None:
    tensors, excluded = make_inputs((3, 23, 5))
    device = device_of(kernel)
    u, item, offset = (tensors[name].to(device) for name in ("u_BD", "item_VD", "offset_V"))
    offsets, rows = excluded.offsets.to(device), excluded.values.to(device)
    arguments = (u, item, 5, torch.tensor(2.0, device=device), offset, offsets, rows, 16, kernel)
    torch.library.opcheck(torch.ops.headrace.top_k.default, arguments)


def test_it_compiles_into_one_graph_and_exports() -> None:
    tensors, excluded = make_inputs((3, 23, 5))

    class Search(torch.nn.Module):
        def forward(self, u: Tensor, item: Tensor) -> tuple[Tensor, Tensor]:
            found = top_k(u, item, 5, excluded=excluded)
            return found.scores_BK * 2, found.rows_BK + 1

    arguments = (tensors["u_BD"], tensors["item_VD"])
    want = Search()(*arguments)
    compiled = torch.compile(Search(), fullgraph=True, backend="aot_eager")
    exported = torch.export.export(Search(), arguments).module()
    for got in (compiled(*arguments), exported(*arguments)):
        assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


WRONG: dict[str, dict[str, Any]] = {
    "u_BD must be": {"u_BD": torch.zeros(3)},
    "item_VD must be": {"item_VD": torch.zeros(23, 5)},
    "item_VD must be torch.float32": {"item_VD": torch.zeros(23, 6).double()},
    "item_VD is on meta": {"item_VD": torch.zeros(23, 6, device="meta")},
    "item_VD has 4294967297 rows": {
        "item_VD": torch.zeros(1, 6, device="meta").expand((1 << 32) + 1, 6),
        "u_BD": torch.zeros(3, 6, device="meta"),
    },
    "k is -1": {"k": -1},
    "offset_V must be": {"offset_V": torch.zeros(22)},
    "scale must be": {"scale": torch.zeros(1)},
    "rows_per_chunk is 0": {"rows_per_chunk": 0},
    "excluded must hold int64": {"excluded": JaggedTensor.of([torch.zeros(2)] * 3)},
    "offsets of excluded must ascend from 0 to its 2 rows": {
        "kernel": "cpu",
        "excluded": JaggedTensor(values=torch.zeros(2).long(), offsets=torch.tensor([0, 3, 1, 2]), max_len=3),
    },
    "excluded has 2 rows": {"excluded": JaggedTensor.of([torch.zeros(2, dtype=torch.int64)] * 2)},
    "float64; kernel='triton'": {
        "u_BD": torch.zeros(3, 6).double(), "item_VD": torch.zeros(23, 6).double(), "kernel": "triton",
    },
}  # fmt: skip


@pytest.mark.parametrize(("message", "wrong"), WRONG.items(), ids=WRONG.keys())
def test_wrong_arguments_are_named(message: str, wrong: dict[str, Any]) -> None:
    if "triton" in message and torch.cuda.is_available():
        wrong = {name: x.cuda() if isinstance(x, Tensor) else x for name, x in wrong.items()}
    arguments = {"u_BD": torch.zeros(3, 6), "item_VD": torch.zeros(23, 6), "k": 2, **wrong}
    with pytest.raises(ValueError, match=message):
        top_k(**arguments)
