"""Triton kernels of the hash index, of the sum of duplicate gradients and of the row-wise optimisers.

None is autotuned: most change their arguments in place, which timing them would repeat, and all are bound by latency
or by memory traffic, so that only the amount of work a program does matters.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.dynamic_embedding.reference import EMPTY, REMOVED, segments, sum_dtype

_EMPTY = tl.constexpr(EMPTY)
_REMOVED = tl.constexpr(REMOVED)
_NEVER_HELD = tl.constexpr(-3)
_GOLDEN = tl.constexpr(0x9E3779B97F4A7C15)
_FIRST_FACTOR = tl.constexpr(0xBF58476D1CE4E5B9)
_SECOND_FACTOR = tl.constexpr(0x94D049BB133111EB)

IDS_PER_PROGRAM = 128
"""One id a thread of four warps: no thread repeats the atomic operation of another."""
ELEMENTS_PER_PROGRAM = 2048
"""Elements of rows a program of the optimisers updates at once."""


@triton.jit
def _home(ids, last_slot):
    """Where the probe of each id starts."""
    mixed = ids.to(tl.uint64) + _GOLDEN
    mixed = (mixed ^ (mixed >> 30)) * _FIRST_FACTOR
    mixed = (mixed ^ (mixed >> 27)) * _SECOND_FACTOR
    mixed = mixed ^ (mixed >> 31)
    return mixed.to(tl.int64) & last_slot


@triton.jit
def _find_kernel(keys_ptr, rows_ptr, ids_ptr, out_ptr, num_ids, last_slot, BLOCK_N: tl.constexpr, REMOVE: tl.constexpr):
    """Write the row of each id; or, with REMOVE, mark its slot (lanes may see a slot before or after it is marked)."""
    at = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = at < num_ids
    ids = tl.load(ids_ptr + at, mask=inside, other=-1)
    slots = _home(ids, last_slot)
    found = tl.full([BLOCK_N], -1, tl.int64)
    pending = inside & (ids >= 0)
    while tl.max(pending.to(tl.int32), axis=0) > 0:
        held = tl.load(keys_ptr + slots, mask=pending, other=_EMPTY)
        hit = pending & (held == ids)
        if REMOVE:
            tl.store(keys_ptr + slots, tl.full([BLOCK_N], _REMOVED, tl.int64), mask=hit)
        else:
            found = tl.where(hit, tl.load(rows_ptr + slots, mask=hit, other=-1), found)
        pending = pending & (held != ids) & (held != _EMPTY)
        slots = (slots + 1) & last_slot
    if not REMOVE:
        tl.store(out_ptr + at, found, mask=inside)


@triton.jit
def _insert_kernel(keys_ptr, rows_ptr, ids_ptr, new_rows_ptr, num_ids, last_slot, BLOCK_N: tl.constexpr):
    """Every lane walks from its home and swaps its id into the first empty slot.

    atomic_cas knows no mask: a lane that is done compares with a key that no slot ever holds, which changes nothing.
    """
    at = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = at < num_ids
    ids = tl.load(ids_ptr + at, mask=inside, other=0)
    new_rows = tl.load(new_rows_ptr + at, mask=inside, other=0)
    slots = _home(ids, last_slot)
    empty = tl.full([BLOCK_N], _EMPTY, tl.int64)
    never = tl.full([BLOCK_N], _NEVER_HELD, tl.int64)
    pending = inside
    while tl.max(pending.to(tl.int32), axis=0) > 0:
        held = tl.atomic_cas(keys_ptr + slots, tl.where(pending, empty, never), tl.where(pending, ids, never))
        won = pending & ((held == _EMPTY) | (held == ids))
        tl.store(rows_ptr + slots, new_rows, mask=won)
        pending = pending & (held != _EMPTY) & (held != ids)
        slots = (slots + 1) & last_slot


@triton.jit
def _segment_sum_kernel(
    grad_ptr, order_ptr, offsets_ptr, out_ptr, grad_stride, width, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr
):
    """One program a distinct row and block of columns: its gradients are gathered and summed, always in one order."""
    segment = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    start = tl.load(offsets_ptr + segment)
    end = tl.load(offsets_ptr + segment + 1)
    total = tl.zeros([BLOCK_D], dtype=out_ptr.dtype.element_ty)
    for first in range(start, end, BLOCK_N):
        at = first + tl.arange(0, BLOCK_N)
        places = tl.load(order_ptr + at, mask=at < end, other=0)
        grad = tl.load(
            grad_ptr + places[:, None] * grad_stride + columns[None, :],
            mask=(at < end)[:, None] & (columns < width)[None, :],
            other=0.0,
        )
        total += tl.sum(grad.to(out_ptr.dtype.element_ty), axis=0)
    tl.store(out_ptr + segment * width + columns, total, mask=columns < width)


@triton.jit
def _adagrad_kernel(
    weight_ptr, second_ptr, rows_ptr, grad_ptr, num_rows, width,
    learning_rate, epsilon, keep, BLOCK_R: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """The state grows by mean(grad^2); weight = keep * weight - learning_rate * grad / (sqrt(second) + epsilon)."""
    places = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    columns = tl.arange(0, BLOCK_D)
    inside = places < num_rows
    block = inside[:, None] & (columns < width)[None, :]
    rows = tl.load(rows_ptr + places, mask=inside, other=0)
    at = rows[:, None] * width + columns[None, :]
    grad = tl.load(grad_ptr + places[:, None] * width + columns[None, :], mask=block, other=0.0).to(tl.float32)
    second = tl.load(second_ptr + rows, mask=inside, other=0.0) + tl.sum(grad * grad, axis=1) / width
    size = learning_rate / (tl.sqrt(second) + epsilon)
    weight = tl.load(weight_ptr + at, mask=block, other=0.0)
    tl.store(weight_ptr + at, weight * keep - size[:, None] * grad, mask=block)
    tl.store(second_ptr + rows, second, mask=inside)


@triton.jit
def _adamw_kernel(
    weight_ptr, first_ptr, second_ptr, steps_ptr, rows_ptr, grad_ptr, num_rows, width,
    learning_rate, rest1, rest2, log2_beta1, log2_beta2, epsilon, keep,
    BLOCK_R: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """AdamW with one second moment and one count of steps a row; rest = 1 - beta, keep = 1 - rate * decay."""
    places = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    columns = tl.arange(0, BLOCK_D)
    inside = places < num_rows
    block = inside[:, None] & (columns < width)[None, :]
    rows = tl.load(rows_ptr + places, mask=inside, other=0)
    at = rows[:, None] * width + columns[None, :]
    grad = tl.load(grad_ptr + places[:, None] * width + columns[None, :], mask=block, other=0.0).to(tl.float32)
    steps = tl.load(steps_ptr + rows, mask=inside, other=0.0) + 1.0
    first = tl.load(first_ptr + at, mask=block, other=0.0)
    first += rest1 * (grad - first)
    second = tl.load(second_ptr + rows, mask=inside, other=0.0)
    second += rest2 * (tl.sum(grad * grad, axis=1) / width - second)
    root = tl.sqrt(second / (1.0 - tl.exp2(steps * log2_beta2))) + epsilon
    size = learning_rate / ((1.0 - tl.exp2(steps * log2_beta1)) * root)
    weight = tl.load(weight_ptr + at, mask=block, other=0.0)
    tl.store(weight_ptr + at, weight * keep - size[:, None] * first, mask=block)
    tl.store(first_ptr + at, first, mask=block)
    tl.store(second_ptr + rows, second, mask=inside)
    tl.store(steps_ptr + rows, steps, mask=inside)


def find_triton(keys_S: Tensor, rows_S: Tensor, ids_N: Tensor) -> Tensor:
    """int64[N]: the row of each id, -1 where it is unknown."""
    found_N = torch.empty_like(ids_N)
    _launch_find(keys_S, rows_S, ids_N, found_N, remove=False)
    return found_N


def remove_triton(keys_S: Tensor, ids_N: Tensor) -> None:
    """Mark the slots of ids as removed, in place; unknown ids are ignored."""
    _launch_find(keys_S, keys_S, ids_N, ids_N, remove=True)


def _launch_find(keys_S: Tensor, rows_S: Tensor, ids_N: Tensor, found_N: Tensor, *, remove: bool) -> None:
    num_ids = ids_N.shape[0]
    if num_ids:
        _find_kernel[(triton.cdiv(num_ids, IDS_PER_PROGRAM),)](
            keys_S, rows_S, ids_N, found_N, num_ids, keys_S.shape[0] - 1, BLOCK_N=IDS_PER_PROGRAM, REMOVE=remove
        )  # fmt: skip


def insert_triton(keys_S: Tensor, rows_S: Tensor, ids_N: Tensor, rows_N: Tensor) -> None:
    """Set the row of distinct ids in place. Which slots they take depends on the order the device runs them in."""
    num_ids = ids_N.shape[0]
    if num_ids:
        _insert_kernel[(triton.cdiv(num_ids, IDS_PER_PROGRAM),)](
            keys_S, rows_S, ids_N, rows_N, num_ids, keys_S.shape[0] - 1, BLOCK_N=IDS_PER_PROGRAM
        )  # fmt: skip


def accumulate_rows_triton(rows_N: Tensor, grad_ND: Tensor) -> tuple[Tensor, Tensor]:
    """rows_R ascending and distinct, grad_RD summed without a sorted copy of grad_ND."""
    rows_R, order_N, offsets = segments(rows_N)
    width = grad_ND.shape[1]
    grad_RD = grad_ND.new_empty(rows_R.shape[0], width, dtype=sum_dtype(grad_ND.dtype))
    if grad_RD.numel():
        block_d = min(128, triton.next_power_of_2(width))
        _segment_sum_kernel[(rows_R.shape[0], triton.cdiv(width, block_d))](
            grad_ND, order_N, offsets, grad_RD, grad_ND.stride(0), width, BLOCK_N=16, BLOCK_D=block_d
        )  # fmt: skip
    return rows_R, grad_RD


def rowwise_adagrad_triton_(
    weight_VD: Tensor,
    second_V: Tensor,
    rows_R: Tensor,
    grad_RD: Tensor,
    *,
    learning_rate: float,
    epsilon: float,
    weight_decay: float,
) -> None:
    """One step of row-wise Adagrad on distinct rows, in place."""
    if not grad_RD.numel():
        return
    (num_rows, width), (block_r, block_d) = grad_RD.shape, _blocks(grad_RD)
    _adagrad_kernel[(triton.cdiv(num_rows, block_r),)](
        weight_VD, second_V, rows_R, grad_RD, num_rows, width,
        learning_rate, epsilon, 1 - learning_rate * weight_decay, BLOCK_R=block_r, BLOCK_D=block_d,
    )  # fmt: skip


def rowwise_adamw_triton_(
    weight_VD: Tensor,
    first_VD: Tensor,
    second_V: Tensor,
    steps_V: Tensor,
    rows_R: Tensor,
    grad_RD: Tensor,
    *,
    learning_rate: float,
    beta1: float,
    beta2: float,
    epsilon: float,
    weight_decay: float,
) -> None:
    """One step of row-wise AdamW on distinct rows, in place."""
    if not grad_RD.numel():
        return
    (num_rows, width), (block_r, block_d) = grad_RD.shape, _blocks(grad_RD)
    _adamw_kernel[(triton.cdiv(num_rows, block_r),)](
        weight_VD, first_VD, second_V, steps_V, rows_R, grad_RD, num_rows, width,
        learning_rate, 1 - beta1, 1 - beta2, _log2(beta1), _log2(beta2), epsilon, 1 - learning_rate * weight_decay,
        BLOCK_R=block_r, BLOCK_D=block_d,
    )  # fmt: skip


def _log2(beta: float) -> float:
    return math.log2(beta) if beta > 0 else -math.inf


def _blocks(grad_RD: Tensor) -> tuple[int, int]:
    """Rows and columns of a program: a whole row, since its squares are averaged."""
    block_d = triton.next_power_of_2(grad_RD.shape[1])
    return max(1, ELEMENTS_PER_PROGRAM // block_d), block_d
