"""The functions of dynamic embeddings: arguments are checked, an implementation is chosen, a custom operator runs it.

Shapes: S slots of the index (a power of two), N ids or rows of one call, V rows of the table, R distinct rows of one
step, D width.

Nothing here has a gradient: ids and rows are integers, and the optimisers are what gradients end in.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kernels.dynamic_embedding.reference import (
    accumulate_rows_reference,
    find_reference,
    insert_reference,
    remove_reference,
    rowwise_adagrad_reference_,
    rowwise_adamw_reference_,
    sum_dtype,
)
from kernels.implementations import KernelName, choose
from kernels.operators import operator


def find_rows(keys_S: Tensor, rows_S: Tensor, ids_N: Tensor, *, kernel: KernelName = "auto") -> Tensor:
    """int64[N]: the row of each id, -1 where it is unknown or negative.

    keys_S, rows_S: int64[S], the slots of a ``HashIndex``. ids_N: int64[N]. ValueError for another dtype, shape or
    device.
    """
    _check_slots(keys_S, rows_S)
    _check_flat("ids", ids_N, keys_S.device)
    implementation = choose(kernel, keys_S.device, has_cpu_path=False)
    found_N: Tensor = _find_op(keys_S, rows_S, ids_N.contiguous(), implementation)
    return found_N


def insert_rows_(keys_S: Tensor, rows_S: Tensor, ids_N: Tensor, rows_N: Tensor, *, kernel: KernelName = "auto") -> None:
    """Set the row of each id, in place.

    The caller sees to it that ids_N are distinct and not negative, and that N slots are empty besides one that stays
    so, as ``HashIndex.insert`` does. On a GPU the layout of the slots differs from run to run, what is found does not.
    ValueError for another dtype, shape or device.
    """
    _check_slots(keys_S, rows_S)
    _check_flat("ids", ids_N, keys_S.device)
    _check_flat("rows", rows_N, keys_S.device)
    if ids_N.shape != rows_N.shape:
        raise ValueError(f"rows has {rows_N.shape[0]} elements for {ids_N.shape[0]} ids; each id needs one row")
    implementation = choose(kernel, keys_S.device, has_cpu_path=False)
    _insert_op(keys_S, rows_S, ids_N.contiguous(), rows_N.contiguous(), implementation)


def remove_rows_(keys_S: Tensor, ids_N: Tensor, *, kernel: KernelName = "auto") -> None:
    """Mark the slots of ids as removed, in place; unknown ids are ignored. ValueError as ``find_rows``."""
    _check_slots(keys_S, keys_S)
    _check_flat("ids", ids_N, keys_S.device)
    _remove_op(keys_S, ids_N.contiguous(), choose(kernel, keys_S.device, has_cpu_path=False))


def accumulate_rows(rows_N: Tensor, grad_ND: Tensor, *, kernel: KernelName = "auto") -> tuple[Tensor, Tensor]:
    """(rows_R, grad_RD): the distinct rows, ascending, and the sum of the gradients of each.

    rows_N: int64[N]; negative ones (unknown ids) are dropped. grad_ND: float[N, D]. grad_RD: float32, or float64 for
    float64 gradients. Every run gives the same bits: a row's gradients are added in one order. R is read from the
    device. ValueError for another dtype, shape or device.
    """
    _check_flat("rows", rows_N, grad_ND.device)
    if grad_ND.dim() != 2 or not grad_ND.is_floating_point() or grad_ND.shape[0] != rows_N.shape[0]:
        raise ValueError(
            f"grad must be float[{rows_N.shape[0]}, D], a gradient for each of rows; got {grad_ND.dtype} of shape"
            f" {tuple(grad_ND.shape)}"
        )
    implementation = choose(kernel, grad_ND.device, has_cpu_path=False)
    rows_R, grad_RD = _accumulate_op(rows_N.contiguous(), grad_ND.contiguous(), implementation)
    return rows_R, grad_RD


def rowwise_adagrad_(
    weight_VD: Tensor,
    second_V: Tensor,
    rows_R: Tensor,
    grad_RD: Tensor,
    *,
    learning_rate: float,
    epsilon: float,
    weight_decay: float = 0.0,
    kernel: KernelName = "auto",
) -> None:
    """One step of row-wise Adagrad in place, on the rows of rows_R alone; the formula is in README.md.

    weight_VD: float32[V, D] (the reference also takes float64), contiguous. second_V: [V], the sum over a row's steps
    of the mean of its squared gradient. rows_R: int64[R], distinct, 0 to V - 1 (not checked: that would synchronise;
    ``accumulate_rows`` gives such rows). grad_RD: float[R, D], half precision is taken. ValueError for other dtypes,
    shapes, devices or hyperparameters.
    """
    implementation = choose(kernel, weight_VD.device, has_cpu_path=False)
    _check_update(weight_VD, {"second": second_V}, rows_R, grad_RD, implementation)
    _check_numbers(learning_rate=learning_rate, epsilon=epsilon, weight_decay=weight_decay)
    _adagrad_op(
        weight_VD, second_V, rows_R.contiguous(), grad_RD.contiguous(),
        learning_rate, epsilon, weight_decay, implementation,
    )  # fmt: skip


def rowwise_adamw_(
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
    weight_decay: float = 0.0,
    kernel: KernelName = "auto",
) -> None:
    """One step of row-wise AdamW in place, on the rows of rows_R alone; the formula is in README.md.

    first_VD: [V, D], mean gradient. second_V: [V], mean over steps of the mean of a row's squared gradient. steps_V:
    [V], how many steps each row took. All of the weight's dtype, contiguous; otherwise as ``rowwise_adagrad_``.
    """
    implementation = choose(kernel, weight_VD.device, has_cpu_path=False)
    state = {"first": first_VD, "second": second_V, "steps": steps_V}
    _check_update(weight_VD, state, rows_R, grad_RD, implementation)
    _check_numbers(learning_rate=learning_rate, epsilon=epsilon, weight_decay=weight_decay)
    for name, beta in (("beta1", beta1), ("beta2", beta2)):
        if not 0 <= beta < 1:
            raise ValueError(f"{name} is {beta}; it must be at least 0 and below 1")
    _adamw_op(
        weight_VD, first_VD, second_V, steps_V, rows_R.contiguous(), grad_RD.contiguous(),
        learning_rate, beta1, beta2, epsilon, weight_decay, implementation,
    )  # fmt: skip


@operator("dynamic_embedding_find")
def _find_op(keys_S: Tensor, rows_S: Tensor, ids_N: Tensor, implementation: str) -> Tensor:
    if implementation == "reference":
        return find_reference(keys_S, rows_S, ids_N)
    from kernels.dynamic_embedding.triton_kernels import find_triton  # noqa: PLC0415 - needs triton, an optional package

    return find_triton(keys_S, rows_S, ids_N)


@_find_op.register_fake
def _(keys_S: Tensor, rows_S: Tensor, ids_N: Tensor, implementation: str) -> Tensor:
    return torch.empty_like(ids_N)


@operator("dynamic_embedding_insert", mutates_args=("keys_S", "rows_S"))
def _insert_op(keys_S: Tensor, rows_S: Tensor, ids_N: Tensor, rows_N: Tensor, implementation: str) -> None:
    if implementation == "reference":
        insert_reference(keys_S, rows_S, ids_N, rows_N)
        return
    from kernels.dynamic_embedding.triton_kernels import insert_triton  # noqa: PLC0415 - needs triton, optional

    insert_triton(keys_S, rows_S, ids_N, rows_N)


@operator("dynamic_embedding_remove", mutates_args=("keys_S",))
def _remove_op(keys_S: Tensor, ids_N: Tensor, implementation: str) -> None:
    if implementation == "reference":
        remove_reference(keys_S, ids_N)
        return
    from kernels.dynamic_embedding.triton_kernels import remove_triton  # noqa: PLC0415 - needs triton, optional

    remove_triton(keys_S, ids_N)


@operator("dynamic_embedding_accumulate_rows")
def _accumulate_op(rows_N: Tensor, grad_ND: Tensor, implementation: str) -> tuple[Tensor, Tensor]:
    if implementation == "reference":
        return accumulate_rows_reference(rows_N, grad_ND)
    from kernels.dynamic_embedding.triton_kernels import accumulate_rows_triton  # noqa: PLC0415 - needs triton, optional

    return accumulate_rows_triton(rows_N, grad_ND)


@_accumulate_op.register_fake
def _(rows_N: Tensor, grad_ND: Tensor, implementation: str) -> tuple[Tensor, Tensor]:
    num_distinct = torch.library.get_ctx().new_dynamic_size()
    grad_RD = grad_ND.new_empty(num_distinct, grad_ND.shape[1], dtype=sum_dtype(grad_ND.dtype))
    return rows_N.new_empty(num_distinct), grad_RD


@operator("dynamic_embedding_adagrad", mutates_args=("weight_VD", "second_V"))
def _adagrad_op(
    weight_VD: Tensor,
    second_V: Tensor,
    rows_R: Tensor,
    grad_RD: Tensor,
    learning_rate: float,
    epsilon: float,
    weight_decay: float,
    implementation: str,
) -> None:
    numbers = {"learning_rate": learning_rate, "epsilon": epsilon, "weight_decay": weight_decay}
    if implementation == "reference":
        rowwise_adagrad_reference_(weight_VD, second_V, rows_R, grad_RD, **numbers)
        return
    from kernels.dynamic_embedding.triton_kernels import rowwise_adagrad_triton_  # noqa: PLC0415 - needs triton, optional

    rowwise_adagrad_triton_(weight_VD, second_V, rows_R, grad_RD, **numbers)


@operator("dynamic_embedding_adamw", mutates_args=("weight_VD", "first_VD", "second_V", "steps_V"))
def _adamw_op(
    weight_VD: Tensor,
    first_VD: Tensor,
    second_V: Tensor,
    steps_V: Tensor,
    rows_R: Tensor,
    grad_RD: Tensor,
    learning_rate: float,
    beta1: float,
    beta2: float,
    epsilon: float,
    weight_decay: float,
    implementation: str,
) -> None:
    numbers = {
        "learning_rate": learning_rate,
        "beta1": beta1,
        "beta2": beta2,
        "epsilon": epsilon,
        "weight_decay": weight_decay,
    }
    if implementation == "reference":
        rowwise_adamw_reference_(weight_VD, first_VD, second_V, steps_V, rows_R, grad_RD, **numbers)
        return
    from kernels.dynamic_embedding.triton_kernels import rowwise_adamw_triton_  # noqa: PLC0415 - needs triton, optional

    rowwise_adamw_triton_(weight_VD, first_VD, second_V, steps_V, rows_R, grad_RD, **numbers)


def _check_slots(keys_S: Tensor, rows_S: Tensor) -> None:
    num_slots = keys_S.shape[0] if keys_S.dim() == 1 else 0
    if keys_S.dtype != torch.int64 or num_slots < 2 or num_slots & (num_slots - 1) or not keys_S.is_contiguous():
        raise ValueError(
            f"keys must be contiguous int64[S] with S a power of two of at least 2, got {keys_S.dtype} of shape"
            f" {tuple(keys_S.shape)}"
        )
    _check_flat("rows of the slots", rows_S, keys_S.device)
    if rows_S.shape != keys_S.shape or not rows_S.is_contiguous():
        raise ValueError(f"rows of the slots must be contiguous and of the {num_slots} slots of keys")


def _check_flat(name: str, tensor: Tensor, device: torch.device) -> None:
    if tensor.dtype != torch.int64 or tensor.dim() != 1 or tensor.device != device:
        raise ValueError(
            f"{name} must be a flat int64 tensor on {device}, got {tensor.dtype} of shape {tuple(tensor.shape)} on"
            f" {tensor.device}"
        )


def _check_update(
    weight_VD: Tensor, state: dict[str, Tensor], rows_R: Tensor, grad_RD: Tensor, implementation: str
) -> None:
    allowed = (torch.float32, torch.float64) if implementation == "reference" else (torch.float32,)
    if weight_VD.dim() != 2 or weight_VD.dtype not in allowed or not weight_VD.is_contiguous():
        names = " or ".join(str(dtype).removeprefix("torch.") for dtype in allowed)
        raise ValueError(
            f"weight must be contiguous {names}[V, D] for kernel={implementation!r}, got {weight_VD.dtype} of shape"
            f" {tuple(weight_VD.shape)}"
        )
    for name, tensor in state.items():
        shape = weight_VD.shape if name == "first" else weight_VD.shape[:1]
        if tensor.shape != shape or tensor.dtype != weight_VD.dtype or not tensor.is_contiguous():
            raise ValueError(
                f"{name} must be contiguous {weight_VD.dtype} of shape {tuple(shape)}, got {tensor.dtype} of shape"
                f" {tuple(tensor.shape)}"
            )
        if tensor.device != weight_VD.device:
            raise ValueError(f"{name} is on {tensor.device} and weight on {weight_VD.device}; move them together")
    _check_flat("rows", rows_R, weight_VD.device)
    want = (rows_R.shape[0], weight_VD.shape[1])
    if grad_RD.shape != want or not grad_RD.is_floating_point() or grad_RD.device != weight_VD.device:
        raise ValueError(
            f"grad must be float{list(want)} on {weight_VD.device}, got {grad_RD.dtype} of shape"
            f" {tuple(grad_RD.shape)} on {grad_RD.device}"
        )


def _check_numbers(*, learning_rate: float, epsilon: float, weight_decay: float) -> None:
    for name, value in (("learning_rate", learning_rate), ("weight_decay", weight_decay)):
        if not value >= 0:
            raise ValueError(f"{name} is {value}; it must be 0 or more")
    if not epsilon > 0:
        raise ValueError(f"epsilon is {epsilon}; it must be above 0: a gradient of zeros divides by it")


__all__ = [
    "accumulate_rows",
    "find_rows",
    "insert_rows_",
    "remove_rows_",
    "rowwise_adagrad_",
    "rowwise_adamw_",
]
