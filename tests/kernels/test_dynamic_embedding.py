"""The hash index behaves like a dict, duplicates are summed, and the row-wise optimisers follow their formulas."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kernels.dynamic_embedding import HashIndex, accumulate_rows, rowwise_adagrad_, rowwise_adamw_
from kernels.dynamic_embedding.ops import find_rows, insert_rows_, remove_rows_
from kernels.dynamic_embedding.reference import EMPTY, mix64
from kernels.implementations import KernelName

TRITON_DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DEVICES: dict[KernelName, str] = {"reference": "cpu", "triton": TRITON_DEVICE}
KERNELS: list[KernelName] = ["reference", "triton"]
OPS = torch.ops.headrace
ID_MAX = (1 << 63) - 1

TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 2e-2}
"""Relative and absolute, of sums and updates computed from gradients of this dtype, against float64."""

both = pytest.mark.parametrize("kernel", KERNELS)


def tensor(*values: int, device: str = "cpu") -> Tensor:
    return torch.tensor(values, dtype=torch.int64, device=device)


def index_on(kernel: KernelName, *, num_slots: int = 16) -> HashIndex:
    return HashIndex(num_slots=num_slots, device=DEVICES[kernel], kernel=kernel)


def insert(index: HashIndex, entries: dict[int, int]) -> None:
    device = str(index.keys_S.device)
    index.insert(tensor(*entries.keys(), device=device), tensor(*entries.values(), device=device))


def find(index: HashIndex, ids: list[int]) -> list[int]:
    return index.find(tensor(*ids, device=str(index.keys_S.device))).tolist()


# Hash index


def test_the_hash_is_the_finaliser_of_splitmix64() -> None:
    mask = (1 << 64) - 1

    def mix(value: int) -> int:
        value = (value + 0x9E3779B97F4A7C15) & mask
        value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & mask
        value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & mask
        return value ^ (value >> 31)

    ids = [0, 1, 2, 1234567, (1 << 31) - 1, 1 << 32, ID_MAX - 1, ID_MAX]
    assert [value & mask for value in mix64(torch.tensor(ids)).tolist()] == [mix(value) for value in ids]


@both
def test_an_id_lies_where_its_hash_says(kernel: KernelName) -> None:
    for number in (0, 5, 1 << 40, ID_MAX):
        index = index_on(kernel)
        insert(index, {number: 7})
        home = int(mix64(torch.tensor([number]))) & 15
        assert int(index.keys_S[home]) == number
        assert int(index.rows_S[home]) == 7


Step = tuple[str, list[int]]
IDS = st.lists(st.integers(0, 12) | st.integers(ID_MAX - 3, ID_MAX), unique=True, max_size=9)
STEPS = st.lists(st.tuples(st.sampled_from(["insert", "remove"]), IDS), min_size=1, max_size=6)


@both
@settings(max_examples=40, deadline=None, derandomize=True)
@given(steps=STEPS)
def test_the_index_does_what_a_dict_does(kernel: KernelName, steps: list[Step]) -> None:
    index, want = index_on(kernel, num_slots=2), dict[int, int]()
    every = [*range(13), *range(ID_MAX - 3, ID_MAX + 1)]
    for number, (verb, ids) in enumerate(steps):
        if verb == "insert":
            entries = {id_: 100 * number + place for place, id_ in enumerate(ids)}
            insert(index, entries)
            want |= entries
        else:
            index.remove(tensor(*ids, device=DEVICES[kernel]))
            want = {id_: row for id_, row in want.items() if id_ not in ids}
        assert find(index, every) == [want.get(id_, -1) for id_ in every]
        assert len(index) == len(want)
    ids_held, rows_held = index.entries()
    assert dict(zip(ids_held.tolist(), rows_held.tolist(), strict=True)) == want


@both
def test_growing_keeps_every_entry_and_forgets_removed_slots(kernel: KernelName) -> None:
    index, want = index_on(kernel), dict[int, int]()
    generator = torch.Generator().manual_seed(3)
    for number in range(6):
        ids = torch.randint(0, ID_MAX, (50,), generator=generator).tolist()
        entries = {id_: 50 * number + place for place, id_ in enumerate(ids)}
        insert(index, entries)
        want |= entries
        gone = list(want)[::3]
        index.remove(tensor(*gone, device=DEVICES[kernel]))
        for id_ in gone:
            del want[id_]
    assert find(index, list(want)) == list(want.values())
    assert 2 * int((index.keys_S != EMPTY).sum()) <= index.num_slots


@both
def test_ids_that_all_collide_are_still_told_apart(kernel: KernelName) -> None:
    candidates = torch.arange(4000)
    colliding = candidates[(mix64(candidates) & 63) == 63][:30].tolist()  # the last slot: probes wrap around
    assert len(colliding) == 30
    index = index_on(kernel, num_slots=64)
    insert(index, {id_: place for place, id_ in enumerate(colliding)})
    assert index.num_slots == 64
    assert find(index, colliding) == list(range(30))
    index.remove(tensor(*colliding[:29], device=DEVICES[kernel]))
    assert find(index, colliding) == [-1] * 29 + [29], "a removed slot ended the probe"


@both
def test_more_ids_than_one_program_takes_are_inserted_and_found(kernel: KernelName) -> None:
    ids = torch.arange(300) * 7919
    index = index_on(kernel)
    index.insert(ids.to(DEVICES[kernel]), torch.arange(300, device=DEVICES[kernel]))
    asked = torch.cat([ids.flip(0), ids[:5] + 1]).to(DEVICES[kernel])
    assert index.find(asked).tolist() == [*reversed(range(300)), -1, -1, -1, -1, -1]


@both
def test_negative_ids_are_unknown_even_where_a_slot_is_marked_with_one(kernel: KernelName) -> None:
    index = index_on(kernel)
    candidates = torch.arange(1000)
    shares_home = int(candidates[(mix64(candidates) & 15) == (mix64(tensor(-2)) & 15)][0])
    insert(index, {shares_home: 7})
    index.remove(tensor(shares_home, device=DEVICES[kernel]))
    before = index.keys_S.clone()
    index.remove(tensor(-1, -2, -3, device=DEVICES[kernel]))
    assert torch.equal(index.keys_S, before)
    assert find(index, [-1, -2, -3, -ID_MAX - 1]) == [-1, -1, -1, -1]


@both
def test_asking_for_nothing_gives_nothing_and_a_repeated_id_is_found_twice(kernel: KernelName) -> None:
    index = index_on(kernel)
    empty = tensor(device=DEVICES[kernel])
    index.insert(empty, empty)
    index.remove(empty)
    assert index.find(empty).shape == (0,)
    insert(index, {5: 2})
    assert find(index, [5, 6, 5]) == [2, -1, 2]
    index.remove(tensor(5, 5, device=DEVICES[kernel]))
    assert len(index) == 0


@both
def test_finding_reads_no_id_beyond_those_asked_for(kernel: KernelName) -> None:
    index = index_on(kernel)
    insert(index, {number: number for number in range(8)})
    surrounded = torch.full((7,), 5, dtype=torch.int64, device=DEVICES[kernel])
    surrounded[2:5] = torch.arange(3)
    assert index.find(surrounded[2:5]).tolist() == [0, 1, 2]
    assert find(index, [0, 0, 1]) == [0, 0, 1]
    before = index.keys_S.clone()
    index.remove(surrounded[2:5])
    assert int((index.keys_S != before).sum()) == 3
    assert find(index, [5]) == [5]


@pytest.mark.parametrize(
    ("ids", "rows", "says"),
    [
        (tensor(3, -1), tensor(0, 1), "id -1 is negative"),
        (tensor(3, 9, 3), tensor(0, 1, 2), "twice"),
        (tensor(3), tensor(-1), "row -1 is negative"),
        (tensor(3, 4), tensor(1), "rows must be int64"),
        (tensor(3).int(), tensor(1), "ids must be int64"),
        (tensor(3)[:, None], tensor(1), "ids must be int64"),
    ],
)
def test_entries_that_cannot_be_held_are_refused_and_nothing_is_set(ids: Tensor, rows: Tensor, says: str) -> None:
    index = HashIndex(num_slots=2)
    with pytest.raises(ValueError, match=says):
        index.insert(ids, rows)
    assert len(index) == 0
    assert index.num_slots == 2


def test_slots_and_ids_of_a_wrong_shape_or_type_are_refused() -> None:
    slots = torch.full((8,), -1)
    with pytest.raises(ValueError, match="num_slots is 12"):
        HashIndex(num_slots=12)
    with pytest.raises(ValueError, match="power of two"):
        find_rows(slots[:7], slots[:7], tensor(1))
    with pytest.raises(ValueError, match="rows of the slots"):
        find_rows(slots, slots[:4], tensor(1))
    with pytest.raises(ValueError, match="ids must be a flat int64"):
        find_rows(slots, slots, torch.tensor([1.0]))
    with pytest.raises(ValueError, match="rows has 1 elements for 2 ids"):
        insert_rows_(slots, slots.clone(), tensor(1, 2), tensor(1))
    with pytest.raises(ValueError, match="ids must be a flat int64"):
        remove_rows_(slots, tensor(1).to("meta"))
    with pytest.raises(ValueError, match="kernel is 'fast'"):
        HashIndex(kernel="fast").find(tensor(1))  # type: ignore[arg-type]


# Sum of duplicate gradients


@both
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize(
    ("rows", "width"),
    [
        ([4, 1, 4, 4, 9, 1], 5),
        ([7], 1),
        ([3] * 40 + [2], 16),  # more duplicates than one block
        ([0, 1, 2], 130),  # more columns than one block
        ([-1, 5, -1, 5, -7, 0], 3),
        ([-1, -1], 3),
        ([], 4),
    ],
)
def test_gradients_of_one_row_are_summed(kernel: KernelName, dtype: torch.dtype, rows: list[int], width: int) -> None:
    generator = torch.Generator().manual_seed(len(rows))
    grad = torch.randn(len(rows), width, generator=generator, dtype=torch.float64).to(dtype)
    # A NaN halo: what lies before and behind the gradients must not be read.
    halo = torch.full((len(rows) + 2, width), math.nan, dtype=dtype, device=DEVICES[kernel])
    halo[1:-1] = grad
    got_rows, got = accumulate_rows(tensor(*rows, device=DEVICES[kernel]), halo[1:-1], kernel=kernel)
    distinct = sorted({row for row in rows if row >= 0})
    assert got_rows.tolist() == distinct
    assert got.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert got.shape == (len(distinct), width)
    for row, summed in zip(distinct, got.cpu(), strict=True):
        want = grad[torch.tensor(rows) == row].double().sum(0)
        torch.testing.assert_close(summed.double(), want, rtol=1e-5, atol=TOLERANCE[dtype])


@both
def test_summing_twice_gives_the_same_bits(kernel: KernelName) -> None:
    generator = torch.Generator().manual_seed(0)
    rows = torch.randint(0, 5, (200,), generator=generator).to(DEVICES[kernel])
    grad = (torch.randn(200, 6, generator=generator) * 1e3).to(DEVICES[kernel])
    first, second = accumulate_rows(rows, grad, kernel=kernel)[1], accumulate_rows(rows, grad, kernel=kernel)[1]
    assert torch.equal(first, second)


# Row-wise optimisers

ADAGRAD = {"learning_rate": 0.1, "epsilon": 1e-6, "weight_decay": 0.01}
ADAMW = {"learning_rate": 0.1, "beta1": 0.9, "beta2": 0.98, "epsilon": 1e-8, "weight_decay": 0.01}

Table = dict[str, Tensor]


def table(num_rows: int, width: int, *, dtype: torch.dtype = torch.float32, device: str = "cpu") -> Table:
    weight = torch.randn(num_rows, width, generator=torch.Generator().manual_seed(num_rows), dtype=torch.float64)
    zeros = torch.zeros(num_rows, dtype=dtype, device=device)
    return {
        "weight": weight.to(device=device, dtype=dtype),
        "first": torch.zeros(num_rows, width, dtype=dtype, device=device),
        "second": zeros,
        "steps": zeros.clone(),
    }


def adagrad(held: Table, rows: Tensor, grad: Tensor, **options: Any) -> None:
    rowwise_adagrad_(held["weight"], held["second"], rows, grad, **{**ADAGRAD, **options})


def adamw(held: Table, rows: Tensor, grad: Tensor, **options: Any) -> None:
    rowwise_adamw_(
        held["weight"], held["first"], held["second"], held["steps"], rows, grad, **{**ADAMW, **options}
    )  # fmt: skip


def adagrad_row(weight: list[float], state: dict[str, Any], grad: list[float]) -> list[float]:
    """README.md, one number at a time."""
    state["second"] += sum(g * g for g in grad) / len(grad)
    size = ADAGRAD["learning_rate"] / (math.sqrt(state["second"]) + ADAGRAD["epsilon"])
    keep = 1 - ADAGRAD["learning_rate"] * ADAGRAD["weight_decay"]
    return [keep * w - size * g for w, g in zip(weight, grad, strict=True)]


def adamw_row(weight: list[float], state: dict[str, Any], grad: list[float]) -> list[float]:
    """README.md, one number at a time."""
    beta1, beta2 = ADAMW["beta1"], ADAMW["beta2"]
    state["steps"] += 1
    state["first"] = [beta1 * m + (1 - beta1) * g for m, g in zip(state["first"], grad, strict=True)]
    state["second"] = beta2 * state["second"] + (1 - beta2) * sum(g * g for g in grad) / len(grad)
    root = math.sqrt(state["second"] / (1 - beta2 ** state["steps"])) + ADAMW["epsilon"]
    size = ADAMW["learning_rate"] / (1 - beta1 ** state["steps"]) / root
    keep = 1 - ADAMW["learning_rate"] * ADAMW["weight_decay"]
    return [keep * w - size * m for w, m in zip(weight, state["first"], strict=True)]


Update = Callable[..., None]
RowUpdate = Callable[[list[float], dict[str, Any], list[float]], list[float]]
optimisers = pytest.mark.parametrize(
    ("update", "row_update"), [(adagrad, adagrad_row), (adamw, adamw_row)], ids=["adagrad", "adamw"]
)
PRECISIONS: list[Any] = [
    pytest.param("reference", torch.float64, torch.float64, id="reference-float64"),
    pytest.param("reference", torch.float32, torch.float32, id="reference-float32"),
    pytest.param("reference", torch.float32, torch.float16, id="reference-float16 gradients"),
    pytest.param("triton", torch.float32, torch.float32, id="triton-float32"),
    pytest.param("triton", torch.float32, torch.float16, id="triton-float16 gradients"),
    pytest.param("triton", torch.float32, torch.bfloat16, id="triton-bfloat16 gradients"),
]


@optimisers
@pytest.mark.parametrize(("kernel", "dtype", "grad_dtype"), PRECISIONS)
@pytest.mark.parametrize("width", [1, 6, 16])
def test_steps_follow_the_formula_row_by_row(
    update: Update,
    row_update: RowUpdate,
    kernel: KernelName,
    dtype: torch.dtype,
    grad_dtype: torch.dtype,
    width: int,
) -> None:
    held = table(9, width, dtype=dtype, device=DEVICES[kernel])
    weights: list[list[float]] = held["weight"].double().tolist()
    states = [{"first": [0.0] * width, "second": 0.0, "steps": 0} for _ in weights]
    generator = torch.Generator().manual_seed(width)
    for rows in ([7, 0, 3], [3], [], [8, 3, 7, 1, 0]):
        grad = torch.randn(len(rows), width, generator=generator, dtype=torch.float64).to(grad_dtype)
        halo = torch.full((len(rows) + 2, width), math.nan, dtype=grad_dtype, device=DEVICES[kernel])
        halo[1:-1] = grad
        update(held, tensor(*rows, device=DEVICES[kernel]), halo[1:-1], kernel=kernel)
        for row, grad_row in zip(rows, grad.double().tolist(), strict=True):
            weights[row] = row_update(weights[row], states[row], grad_row)
    tolerance = TOLERANCE[dtype]
    want: dict[str, Any] = {name: [state[name] for state in states] for name in ("second", "first", "steps")}
    for name, numbers in ({"weight": weights} | want).items():
        if update is adagrad and name in {"first", "steps"}:
            continue
        want_column = torch.tensor(numbers, dtype=torch.float64)
        torch.testing.assert_close(held[name].double().cpu(), want_column, rtol=5 * tolerance, atol=tolerance, msg=name)


@optimisers
@both
def test_rows_outside_a_step_keep_every_bit(update: Update, row_update: RowUpdate, kernel: KernelName) -> None:
    held = table(40, 5, device=DEVICES[kernel])
    for name in ("first", "second", "steps"):
        held[name].fill_(math.nan)  # reading one of them would show
    rows = tensor(3, 17, device=DEVICES[kernel])
    for name in ("first", "second", "steps"):
        held[name][rows] = 1.0
    before = {name: column.clone() for name, column in held.items()}
    update(held, rows, torch.ones(2, 5, device=DEVICES[kernel]), kernel=kernel)
    others = torch.ones(40, dtype=torch.bool)
    others[[3, 17]] = False
    for name, column in held.items():
        torch.testing.assert_close(column[others], before[name][others], rtol=0, atol=0, equal_nan=True, msg=name)
        assert bool(column[rows].isfinite().all()), name
    assert not bool((held["weight"][rows] == before["weight"][rows]).any())


@both
def test_a_first_step_without_momentum_moves_by_the_learning_rate(kernel: KernelName) -> None:
    held = table(2, 1, device=DEVICES[kernel])
    before = held["weight"].clone()
    grad = torch.tensor([[3.0], [-1e-3]], device=DEVICES[kernel])
    adamw(held, tensor(0, 1, device=DEVICES[kernel]), grad, beta1=0.0, weight_decay=0.0, kernel=kernel)
    torch.testing.assert_close(held["weight"] - before, -0.1 * grad.sign(), rtol=1e-4, atol=1e-6)


def test_both_implementations_of_an_optimiser_agree_on_many_rows() -> None:
    generator = torch.Generator().manual_seed(5)
    for update in (adagrad, adamw):
        held = {kernel: table(400, 12, device=DEVICES[kernel]) for kernel in KERNELS}
        for _ in range(2):
            rows = torch.randperm(400, generator=generator)[:333]  # more than one program
            grad = torch.randn(333, 12, generator=generator)
            for kernel in KERNELS:
                update(held[kernel], rows.to(DEVICES[kernel]), grad.to(DEVICES[kernel]), kernel=kernel)
        for name, want in held["reference"].items():
            torch.testing.assert_close(held["triton"][name].cpu(), want, rtol=1e-5, atol=1e-6, msg=name)


def test_ids_gradients_and_rows_meet_in_one_step() -> None:
    """find, accumulate and update, as a training step chains them: unknown ids teach nothing."""
    index, held = HashIndex(), table(3, 4)
    insert(index, {900: 0, 901: 1, 902: 2})
    before = held["weight"].clone()
    rows = index.find(tensor(902, 5, 900, 902))
    adagrad(held, *accumulate_rows(rows, torch.ones(4, 4)))
    assert held["second"].tolist() == [1.0, 0.0, 4.0]
    assert torch.equal(held["weight"][1], before[1])


@pytest.mark.parametrize(
    ("changed", "says"),
    [
        ({"weight": torch.zeros(4, 3).half()}, "weight must be contiguous float32"),
        ({"weight": torch.zeros(3, 4).T}, "weight must be contiguous"),
        ({"first": torch.zeros(4, 2)}, "first must be"),
        ({"second": torch.zeros(4, 1)}, "second must be"),
        ({"steps": torch.zeros(4, dtype=torch.int64)}, "steps must be"),
        ({"steps": torch.zeros(4, device="meta")}, "steps is on meta"),
        ({"rows": torch.zeros(2)}, "rows must be a flat int64"),
        ({"grad": torch.zeros(2, 4)}, "grad must be float"),
        ({"grad": torch.zeros(2, 3, dtype=torch.int64)}, "grad must be float"),
        ({"learning_rate": -1.0}, "learning_rate is -1.0"),
        ({"weight_decay": math.nan}, "weight_decay is nan"),
        ({"epsilon": 0.0}, "epsilon is 0.0"),
        ({"beta1": 1.0}, "beta1 is 1.0"),
        ({"beta2": -0.1}, "beta2 is -0.1"),
    ],
)
def test_an_update_that_does_not_fit_its_table_is_refused(changed: dict[str, Any], says: str) -> None:
    tensors: dict[str, Any] = {**table(4, 3), "rows": tensor(0, 2), "grad": torch.zeros(2, 3)}
    tensors |= {name: value for name, value in changed.items() if name in tensors}
    options = {name: value for name, value in changed.items() if name not in tensors}
    with pytest.raises(ValueError, match=says):
        adamw(tensors, tensors["rows"], tensors["grad"], **options)


def test_gradients_that_do_not_fit_their_rows_are_refused() -> None:
    with pytest.raises(ValueError, match=r"grad must be float\[2, D\]"):
        accumulate_rows(tensor(0, 1), torch.zeros(3, 4))
    with pytest.raises(ValueError, match="rows must be a flat int64"):
        accumulate_rows(torch.zeros(3), torch.zeros(3, 4))
    double = table(2, 3, dtype=torch.float64, device=TRITON_DEVICE)
    with pytest.raises(ValueError, match="weight must be contiguous float32"):
        adagrad(double, tensor(0, device=TRITON_DEVICE), double["weight"][:1], kernel="triton")


# Operators


@both
def test_the_operators_keep_the_promises_of_custom_operators(kernel: KernelName) -> None:
    device = DEVICES[kernel]
    index = index_on(kernel)
    insert(index, {1: 0, 2: 1})
    ids, rows = tensor(2, 7, device=device), tensor(5, 6, device=device)
    held, grad = table(8, 3, device=device), torch.ones(2, 3, device=device)
    numbers, betas = tuple(ADAGRAD.values()), tuple(ADAMW.values())
    moments = (held["first"], held["second"], held["steps"])
    calls: list[tuple[Any, tuple[Any, ...]]] = [
        (OPS.dynamic_embedding_find, (index.keys_S, index.rows_S, ids, kernel)),
        (OPS.dynamic_embedding_insert, (index.keys_S, index.rows_S, ids, rows, kernel)),
        (OPS.dynamic_embedding_remove, (index.keys_S, ids, kernel)),
        (OPS.dynamic_embedding_accumulate_rows, (tensor(4, 4, device=device), grad, kernel)),
        (OPS.dynamic_embedding_adagrad, (held["weight"], held["second"], rows, grad, *numbers, kernel)),
        (OPS.dynamic_embedding_adamw, (held["weight"], *moments, rows, grad, *betas, kernel)),
    ]
    for operator, arguments in calls:
        torch.library.opcheck(operator, arguments)


def test_a_training_step_compiles_without_a_break() -> None:
    index = HashIndex()
    insert(index, {900: 0, 901: 1, 902: 2})

    def step(ids: Tensor, grad: Tensor, weight: Tensor, second: Tensor) -> Tensor:
        rows = index.find(ids)
        rowwise_adagrad_(weight, second, *accumulate_rows(rows, grad), learning_rate=0.1, epsilon=1e-6)
        return rows

    results = []
    for run in (step, torch.compile(step, fullgraph=True, backend="aot_eager")):
        held = table(3, 4)
        rows = run(tensor(902, 5, 900, 902), torch.ones(4, 4), held["weight"], held["second"])
        results.append((rows, held["weight"], held["second"]))
    for name, want, got in zip(("rows", "weight", "second"), *results, strict=True):
        assert torch.equal(want, got), name


def test_a_lookup_and_a_sum_of_gradients_can_be_exported() -> None:
    index = HashIndex()
    insert(index, {900: 0, 901: 1, 902: 2})

    class Lookup(torch.nn.Module):
        keys: Tensor
        rows: Tensor

        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("keys", index.keys_S)
            self.register_buffer("rows", index.rows_S)

        def forward(self, ids: Tensor, grad: Tensor) -> tuple[Tensor, Tensor]:
            return accumulate_rows(find_rows(self.keys, self.rows, ids), grad)

    example = (tensor(902, 5, 900, 902), torch.ones(4, 4))
    exported = torch.export.export(Lookup(), example).module()
    for name, want, got in zip(("rows", "grad"), Lookup()(*example), exported(*example), strict=True):
        assert torch.equal(want, got), name
    rows, _ = exported(tensor(901, 901, 901, 901), torch.ones(4, 4))
    assert rows.tolist() == [1], "the number of distinct rows was frozen"
