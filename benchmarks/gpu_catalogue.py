"""What touches the whole catalogue on a GPU: the softmax loss, top-k, the hash index and the row-wise optimiser."""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from benchmarks import yardsticks
from benchmarks.gpu_harness import Arm, Bench, Calls, Case
from kernels.dynamic_embedding import HashIndex, accumulate_rows, rowwise_adamw_
from kernels.implementations import KernelName
from kernels.softmax_loss import form_full_softmax, full_softmax_loss

SCALE = 20.0
LOSS = "forward+backward"
ADAMW = {"learning_rate": 1e-2, "beta1": 0.9, "beta2": 0.98, "epsilon": 1e-8}


def loss(bench: Bench) -> None:
    """Full softmax over the catalogue and its gradients; 6 P V D floating-point operations for every arm."""
    sizes = bench.sizes
    for num_items in sizes.catalogues:
        P, D = sizes.loss_positions, sizes.loss_width
        arms = [
            Arm(name="headrace", ours=True, make=functools.partial(_ours_loss, bench, num_items)),
            Arm(name="cross_entropy of logits", make=functools.partial(_cross_entropy, bench, num_items)),
            Arm(name="formed in chunks (torch)", make=functools.partial(_chunked_loss, bench, num_items)),
        ]
        bench.run(Case(shape={"V": num_items, "P": P, "D": D}, arms=arms, work={LOSS: 6.0 * P * num_items * D}))


def _loss_inputs(bench: Bench, num_items: int) -> tuple[Tensor, Tensor, Tensor]:
    P, D = bench.sizes.loss_positions, bench.sizes.loss_width
    u, item = (bench.randn(n, D, std=D**-0.5).requires_grad_() for n in (P, num_items))
    return u, item, torch.randint(num_items, (P,), device=bench.device, generator=bench.generator(3))


def _ours_loss(bench: Bench, num_items: int) -> Calls:
    u, item, targets = _loss_inputs(bench, num_items)
    return {
        LOSS: lambda: torch.autograd.grad(
            full_softmax_loss(u, item, targets, scale=SCALE, kernel="triton").loss, [u, item]
        )
    }


def _cross_entropy(bench: Bench, num_items: int) -> Calls:
    u, item, targets = _loss_inputs(bench, num_items)
    return {LOSS: lambda: torch.autograd.grad(yardsticks.cross_entropy(u, item, targets, SCALE), [u, item])}


def _chunked_loss(bench: Bench, num_items: int) -> Calls:
    u, item, targets = (x.detach() for x in _loss_inputs(bench, num_items))
    scale = torch.tensor(SCALE, device=bench.device)
    return {LOSS: lambda: form_full_softmax(u, item, targets, scale=scale)}


def top_k(bench: Bench) -> None:
    """The best of the catalogue for a batch of queries; 2 B V D floating-point operations for every arm."""
    if find_spec("kernels.top_k") is None:
        bench.skipped.append("kernels.top_k does not exist")
        return
    sizes = bench.sizes
    B, D = sizes.num_queries, sizes.loss_width
    for num_items in sizes.catalogues:
        arms = [
            Arm(name="headrace", ours=True, make=functools.partial(_ours_top_k, bench, num_items)),
            Arm(name="topk of all scores", make=functools.partial(_torch_top_k, bench, num_items)),
        ]
        shape = {"V": num_items, "B": B, "D": D, "k": sizes.num_wanted}
        bench.run(Case(shape=shape, arms=arms, work={"search": 2.0 * B * num_items * D}))


def _ours_top_k(bench: Bench, num_items: int) -> Calls:
    search = importlib.import_module("kernels.top_k").top_k  # it need not exist
    u, item = _queries(bench, num_items)
    return {"search": lambda: search(u, item, bench.sizes.num_wanted, kernel="triton")}


def _torch_top_k(bench: Bench, num_items: int) -> Calls:
    u, item = _queries(bench, num_items)
    return {"search": lambda: torch.topk(u @ item.T, bench.sizes.num_wanted)}


def _queries(bench: Bench, num_items: int) -> tuple[Tensor, Tensor]:
    D = bench.sizes.loss_width
    return bench.randn(bench.sizes.num_queries, D), bench.randn(num_items, D)


# ----------------------------------------------------------------------------------------------------------------------
# Dynamic embedding


def embedding(bench: Bench) -> None:
    """Ids to rows, gradients to distinct rows, and a row-wise AdamW step.

    Bytes: what must be read and written at least (find: 8 of the id, 16 of a slot, 8 of the row; AdamW: the gradient
    once, weight and first moment twice each).
    """
    sizes = bench.sizes
    N, R, D = sizes.ids_per_call, sizes.rows_per_step, sizes.row_width
    find = [
        Arm(name="headrace", ours=True, make=lambda: _find(bench, ours=True)),
        Arm(name="searchsorted", make=lambda: _find(bench, ours=False)),
    ]
    shape: dict[str, Any] = {"ids": sizes.num_ids, "N": N}
    bench.run(Case(shape=shape, arms=find, work={"find": 32.0 * N}, rate="GB/s"))
    accumulate = [
        Arm(name="headrace", ours=True, make=lambda: _accumulate(bench, "triton")),
        Arm(name="torch, sorted", make=lambda: _accumulate(bench, "reference")),
        Arm(name="unique and index_add_", make=lambda: _accumulate_by_unique(bench)),
    ]
    shape = {"N": N // 4, "D": D}
    bench.run(Case(shape=shape, arms=accumulate, work={"accumulate": 4.0 * D * N // 4}, rate="GB/s"))
    adamw = [
        Arm(name="headrace", ours=True, make=lambda: _adamw(bench, "triton")),
        Arm(name="torch", make=lambda: _adamw(bench, "reference")),
    ]
    shape = {"V": sizes.table_rows, "R": R, "D": D}
    bench.run(Case(shape=shape, arms=adamw, work={"adamw": 20.0 * R * D}, rate="GB/s"))


def _find(bench: Bench, *, ours: bool) -> Calls:
    sizes = bench.sizes
    drawn = torch.randint(1 << 62, (2 * sizes.num_ids,), device=bench.device, generator=bench.generator())
    ids = torch.unique(drawn)
    ids = ids[torch.randperm(ids.shape[0], device=bench.device, generator=bench.generator(1))]
    known, unknown = ids[: sizes.num_ids], ids[sizes.num_ids :]
    rows = torch.arange(known.shape[0], device=bench.device)
    # Nine in ten are known, as in a stream.
    place = torch.randint(known.shape[0], (sizes.ids_per_call,), device=bench.device, generator=bench.generator(2))
    asked = torch.where(place % 10 > 0, known[place], unknown[place % unknown.shape[0]])
    find: Callable[[Tensor], Tensor]
    if ours:
        index = HashIndex(device=bench.device, kernel="triton")
        index.insert(known, rows)
        find = index.find
    else:
        find = yardsticks.SortedIndex(known, rows).find
    return {"find": lambda: find(asked)}


def _occurrences(bench: Bench) -> tuple[Tensor, Tensor]:
    """Rows drawn by Zipf's law (exponent 1), and a gradient for each."""
    sizes = bench.sizes
    num = sizes.ids_per_call // 4
    drawn = torch.rand(num, device=bench.device, generator=bench.generator())
    rows = torch.pow(float(sizes.table_rows), drawn).long() - 1
    return rows, bench.randn(num, sizes.row_width)


def _accumulate(bench: Bench, kernel: KernelName) -> Calls:
    rows, grad = _occurrences(bench)
    return {"accumulate": lambda: accumulate_rows(rows, grad, kernel=kernel)}


def _accumulate_by_unique(bench: Bench) -> Calls:
    rows, grad = _occurrences(bench)
    return {"accumulate": lambda: yardsticks.accumulate_by_unique(rows, grad)}


def _adamw(bench: Bench, kernel: KernelName) -> Calls:
    sizes = bench.sizes
    V, R, D = sizes.table_rows, sizes.rows_per_step, sizes.row_width
    weight, first = (torch.zeros(V, D, device=bench.device) for _ in range(2))
    second, steps = (torch.zeros(V, device=bench.device) for _ in range(2))
    rows = torch.randperm(V, device=bench.device, generator=bench.generator())[:R].sort().values
    grad = bench.randn(R, D, dtype=torch.float32)
    return {"adamw": lambda: rowwise_adamw_(weight, first, second, steps, rows, grad, kernel=kernel, **ADAMW)}
