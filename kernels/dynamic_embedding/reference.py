"""The hash index and the row-wise optimisers in plain PyTorch: the truth the Triton kernels are compared with.

Shapes: S slots of the index (a power of two), N ids or rows of one call, V rows of the table, R distinct rows of one
step, D width.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

EMPTY = -1
"""Key of a slot that was never used: a probe ends here."""
REMOVED = -2
"""Key of a slot whose id was removed: a probe goes on, and nothing is placed here."""


def _signed(bits: int) -> int:
    return bits - (1 << 64) if bits >= 1 << 63 else bits


def mix64(values: Tensor) -> Tensor:
    """Scramble the bits of int64 values (the finaliser of splitmix64); the same bits as ``model.id_index.mix64``.

    >>> mix64(torch.tensor([1234567])).tolist()
    [6457827717110365317]
    """
    mixed = values + _signed(0x9E3779B97F4A7C15)
    mixed = (mixed ^ _shifted(mixed, 30)) * _signed(0xBF58476D1CE4E5B9)
    mixed = (mixed ^ _shifted(mixed, 27)) * _signed(0x94D049BB133111EB)
    return mixed ^ _shifted(mixed, 31)


def _shifted(values: Tensor, by: int) -> Tensor:
    """Logical shift to the right; the one of int64 tensors repeats the sign bit."""
    return (values >> by) & ((1 << (64 - by)) - 1)


def find_slots(keys_S: Tensor, ids_N: Tensor) -> Tensor:
    """int64[N]: the slot that holds each id, -1 where none does (negative ids are never held)."""
    slots_N = torch.full_like(ids_N, -1)
    pending = (ids_N >= 0).nonzero().flatten()
    probed = mix64(ids_N[pending]) & (keys_S.shape[0] - 1)
    while pending.numel():
        held = keys_S[probed]
        hit = held == ids_N[pending]
        slots_N[pending[hit]] = probed[hit]
        on = ~hit & (held != EMPTY)
        pending, probed = pending[on], (probed[on] + 1) & (keys_S.shape[0] - 1)
    return slots_N


def find_reference(keys_S: Tensor, rows_S: Tensor, ids_N: Tensor) -> Tensor:
    """int64[N]: the row of each id, -1 where it is unknown."""
    slots_N = find_slots(keys_S, ids_N)
    return torch.where(slots_N >= 0, rows_S[slots_N.clamp_min(0)], -1)


def insert_reference(keys_S: Tensor, rows_S: Tensor, ids_N: Tensor, rows_N: Tensor) -> None:
    """Set the row of distinct ids in place; ids that are not held take the first empty slot of their probe."""
    pending = torch.arange(ids_N.shape[0], device=ids_N.device)
    probed = mix64(ids_N) & (keys_S.shape[0] - 1)
    while pending.numel():
        free = keys_S[probed] == EMPTY
        # Two ids may want one slot: one of them is written, the other sees that on reading back.
        keys_S[probed[free]] = ids_N[pending[free]]
        won = keys_S[probed] == ids_N[pending]
        rows_S[probed[won]] = rows_N[pending[won]]
        pending, probed = pending[~won], (probed[~won] + 1) & (keys_S.shape[0] - 1)


def remove_reference(keys_S: Tensor, ids_N: Tensor) -> None:
    """Mark the slots of ids as removed, in place; unknown ids are ignored."""
    slots_N = find_slots(keys_S, ids_N)
    keys_S[slots_N[slots_N >= 0]] = REMOVED


def accumulate_rows_reference(rows_N: Tensor, grad_ND: Tensor) -> tuple[Tensor, Tensor]:
    """rows_R ascending and distinct, grad_RD their gradients summed in the order of rows_N; negative rows dropped."""
    rows_R, order_N, offsets = segments(rows_N)
    # A bag sums the places listed for it one after the other; segment_reduce needs a sorted copy, at 5 times the time.
    grad_ND = grad_ND.to(sum_dtype(grad_ND.dtype))
    return rows_R, functional.embedding_bag(order_N, grad_ND, offsets, mode="sum", include_last_offset=True)


def segments(rows_N: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """rows_R ascending and distinct; order_N: places of rows >= 0 sorted by row; offsets: int64[R + 1] into order_N."""
    sorted_N, order_N = rows_N.sort(stable=True)
    num_dropped = int((rows_N < 0).sum())
    rows_R, counts_R = torch.unique_consecutive(sorted_N[num_dropped:], return_counts=True)
    return rows_R, order_N[num_dropped:], functional.pad(counts_R.cumsum(0), (1, 0))


def sum_dtype(dtype: torch.dtype) -> torch.dtype:
    """What gradients of this dtype are summed in: never less than float32."""
    return torch.promote_types(dtype, torch.float32)


def rowwise_adagrad_reference_(
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
    grad_RD = grad_RD.to(weight_VD.dtype)
    second_R = second_V[rows_R] + grad_RD.square().mean(1)
    weight_RD = weight_VD[rows_R].mul_(1 - learning_rate * weight_decay)
    size_R = learning_rate / (second_R.sqrt() + epsilon)
    weight_VD[rows_R] = weight_RD.addcmul_(grad_RD, size_R[:, None], value=-1)
    second_V[rows_R] = second_R


def rowwise_adamw_reference_(
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
    """One step of row-wise AdamW on distinct rows, in place; bit for bit what ``model.optimizer`` does to them."""
    grad_RD = grad_RD.to(weight_VD.dtype)
    steps_R = steps_V[rows_R] + 1
    first_RD = first_VD[rows_R].lerp_(grad_RD, 1 - beta1)
    second_R = second_V[rows_R].lerp_(grad_RD.square().mean(1), 1 - beta2)
    weight_RD = weight_VD[rows_R].mul_(1 - learning_rate * weight_decay)
    root_R = (second_R / (1 - beta2**steps_R)).sqrt_().add_(epsilon)
    size_R = learning_rate / ((1 - beta1**steps_R) * root_R)
    weight_VD[rows_R] = weight_RD.addcmul_(first_RD, size_R[:, None], value=-1)
    first_VD[rows_R], second_V[rows_R], steps_V[rows_R] = first_RD, second_R, steps_R
