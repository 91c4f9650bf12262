"""Softmax losses over the catalogue whose gradients are formed in the forward pass; which implementation runs.

Shapes: P supervised positions, V catalogue rows, C negatives, D width.
"""

from __future__ import annotations

from typing import Any, TypedDict

import torch
from torch import Tensor

from kernels.implementations import Implementation, KernelName, choose
from kernels.operators import operator
from kernels.softmax_loss.cpu import form_full_softmax, form_sampled_softmax, form_shared_softmax
from kernels.softmax_loss.formed import SoftmaxLoss
from kernels.softmax_loss.reference import (
    accumulation_dtype,
    full_softmax_reference,
    sampled_softmax_reference,
)


def sampled_softmax_loss(
    u_PD: Tensor,
    item_VD: Tensor,
    target_rows_P: Tensor,
    negative_rows: Tensor,
    *,
    scale: Tensor | float,
    offset_V: Tensor | None = None,
    weights_P: Tensor | None = None,
    log_q_C: Tensor | None = None,
    log_q_target_P: Tensor | None = None,
    kernel: KernelName = "auto",
) -> SoftmaxLoss:
    """Weighted sum over p of ``-log(e^s_pt / (e^s_pt + sum over c with neg_c != t of e^s_pc))``.

    ``s = scale * u . item + offset``; a negative that equals the position's target is left out, one drawn twice counts
    twice. u_PD, item_VD: float[P, D] and float[V, D] of one dtype, used as given (normalise them before).
    target_rows_P: int64[P] rows of item_VD. negative_rows: int64[P, C], or int64[C] shared by all positions; only with
    these may log_q_C, float[C], be given, which is taken off the negatives' logits, and log_q_target_P, float[P], off
    the targets'. scale: 1 / temperature, a float or a scalar tensor. weights_P: float[P], 1 / P (the mean) unless
    given. Differentiable once in u, item, scale and offset (item: a dense [V, D]); weights and log-Q are constants.
    ValueError for wrong shapes, dtypes or devices, and on the CPU for rows outside the catalogue.
    Source: the HSTU research code, papers 2402.17152; Bengio & Senecal 2008 and Yi et al., RecSys 2019 for log-Q.
    """
    _check(u_PD, item_VD, target_rows_P, offset_V, weights_P)
    _check_negatives(u_PD, negative_rows, log_q_C, log_q_target_P)
    scale = _scale_tensor(scale, u_PD)
    implementation = choose(kernel, u_PD.device, has_cpu_path=True)
    if implementation == "reference":
        loss_P = sampled_softmax_reference(
            u_PD,
            item_VD,
            target_rows_P,
            negative_rows,
            scale=scale,
            offset_V=offset_V,
            log_q_C=log_q_C,
            log_q_target_P=log_q_target_P,
        )
        return _weighted(loss_P, weights_P)
    constants = (weights_P, log_q_C, log_q_target_P)
    return _formed(u_PD, item_VD, target_rows_P, negative_rows, scale, offset_V, constants, implementation)


def full_softmax_loss(
    u_PD: Tensor,
    item_VD: Tensor,
    target_rows_P: Tensor,
    *,
    scale: Tensor | float,
    offset_V: Tensor | None = None,
    weights_P: Tensor | None = None,
    kernel: KernelName = "auto",
) -> SoftmaxLoss:
    """Weighted sum over p of ``-log softmax over all V rows of (scale * u . item + offset)`` at the target.

    Arguments, gradients and errors as in ``sampled_softmax_loss``. Logits exist a chunk of positions at a time on the
    CPU and a tile at a time in Triton; ``form_full_softmax`` is the CPU's chunked pass with a callback on the logits.
    """
    _check(u_PD, item_VD, target_rows_P, offset_V, weights_P)
    scale = _scale_tensor(scale, u_PD)
    implementation = choose(kernel, u_PD.device, has_cpu_path=True)
    if implementation == "reference":
        loss_P = full_softmax_reference(u_PD, item_VD, target_rows_P, scale=scale, offset_V=offset_V)
        return _weighted(loss_P, weights_P)
    constants = (weights_P, None, None)
    return _formed(u_PD, item_VD, target_rows_P, None, scale, offset_V, constants, implementation)


def _formed(
    u_PD: Tensor,
    item_VD: Tensor,
    target_rows_P: Tensor,
    negative_rows: Tensor | None,
    scale: Tensor,
    offset_V: Tensor | None,
    constants: tuple[Tensor | None, Tensor | None, Tensor | None],
    implementation: Implementation,
) -> SoftmaxLoss:
    if implementation == "triton" and u_PD.dtype == torch.float64:
        raise ValueError("u_PD and item_VD are float64; kernel='triton' takes float32 or smaller: use 'reference'")
    differentiated = (u_PD, item_VD, scale, offset_V)
    with_gradients = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in differentiated)
    outputs = _softmax_loss(
        u_PD, item_VD, target_rows_P, negative_rows, scale, offset_V, *constants, with_gradients, implementation
    )
    return SoftmaxLoss(loss=outputs[0], loss_P=outputs[1].detach())


def _weighted(loss_P: Tensor, weights_P: Tensor | None) -> SoftmaxLoss:
    if weights_P is None:
        weights_P = torch.full_like(loss_P, 1 / max(loss_P.shape[0], 1))
    return SoftmaxLoss(loss=(weights_P.detach().to(loss_P.dtype) * loss_P).sum(), loss_P=loss_P.detach())


# ----------------------------------------------------------------------------------------------------------------------
# The operator: without negatives it is the full softmax. It returns the loss, the losses, and the gradients of u, item,
# offset and scale, which the backward pass only multiplies.

_OpOutput = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]


@operator("softmax_loss")
def _softmax_loss(
    u: Tensor,
    item: Tensor,
    target_rows: Tensor,
    negative_rows: Tensor | None,
    scale: Tensor,
    offset: Tensor | None,
    weights: Tensor | None,
    log_q: Tensor | None,
    log_q_target: Tensor | None,
    with_gradients: bool,
    implementation: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    shared: _SharedArguments = {
        "scale": scale,
        "offset_V": offset,
        "weights_P": weights,
        "with_gradients": with_gradients,
    }
    if implementation == "triton":
        from kernels.softmax_loss import triton_kernels  # noqa: PLC0415 - needs triton, an optional package

        if negative_rows is None or negative_rows.dim() == 1:
            formed = triton_kernels.form_shared_softmax_triton(
                u, item, target_rows, negative_rows, log_q_C=log_q, log_q_target_P=log_q_target, **shared
            )
        else:
            formed = triton_kernels.form_sampled_softmax_triton(u, item, target_rows, negative_rows, **shared)
    elif negative_rows is None:
        formed = form_full_softmax(u, item, target_rows, **shared)
    elif negative_rows.dim() == 2:
        formed = form_sampled_softmax(u, item, target_rows, negative_rows, **shared)
    else:
        formed = form_shared_softmax(
            u, item, target_rows, negative_rows, log_q_C=log_q, log_q_target_P=log_q_target, **shared
        )
    return formed.loss, formed.loss_P, formed.u_PD, formed.item_VD, formed.offset_V, formed.scale


class _SharedArguments(TypedDict):
    scale: Tensor
    offset_V: Tensor | None
    weights_P: Tensor | None
    with_gradients: bool


@_softmax_loss.register_fake
def _fake(
    u: Tensor,
    item: Tensor,
    target_rows: Tensor,
    negative_rows: Tensor | None,
    scale: Tensor,
    offset: Tensor | None,
    weights: Tensor | None,
    log_q: Tensor | None,
    log_q_target: Tensor | None,
    with_gradients: bool,
    implementation: str,
) -> _OpOutput:
    dtype = accumulation_dtype(u)
    empty = (u.new_empty(0, dtype=dtype) for _ in range(4))
    grad_u, grad_item, grad_offset, grad_scale = empty
    if with_gradients:
        grad_u, grad_item, grad_scale = u.new_empty(u.shape), item.new_empty(item.shape), scale.new_empty(())
        grad_offset = grad_offset if offset is None else offset.new_empty(offset.shape)
    loss_P = u.new_empty(u.shape[0], dtype=dtype)
    return loss_P.new_empty(()), loss_P, grad_u, grad_item, grad_offset, grad_scale


def _keep_gradients(ctx: Any, inputs: tuple[Any, ...], output: _OpOutput) -> None:
    ctx.save_for_backward(*output[2:])
    ctx.has_offset = inputs[5] is not None


def _scale_gradients(ctx: Any, grad: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
    grad_u, grad_item, grad_offset, grad_scale = (saved * grad.to(saved.dtype) for saved in ctx.saved_tensors)
    return grad_u, grad_item, None, None, grad_scale, grad_offset if ctx.has_offset else None, *(None,) * 5


_softmax_loss.register_autograd(_scale_gradients, setup_context=_keep_gradients)


# ----------------------------------------------------------------------------------------------------------------------
# Arguments. Shapes, dtypes and devices only: nothing here waits for a device.


def _check(
    u_PD: Tensor, item_VD: Tensor, target_rows_P: Tensor, offset_V: Tensor | None, weights_P: Tensor | None
) -> None:
    if u_PD.dim() != 2 or not u_PD.is_floating_point():
        raise ValueError(f"u_PD must be float[P, D], got {u_PD.dtype} of shape {tuple(u_PD.shape)}")
    if item_VD.dim() != 2 or item_VD.shape[1] != u_PD.shape[1] or item_VD.dtype != u_PD.dtype:
        raise ValueError(
            f"item_VD must be {u_PD.dtype}[V, {u_PD.shape[1]}] like u_PD, got {item_VD.dtype} of shape"
            f" {tuple(item_VD.shape)}"
        )
    _check_rows("target_rows_P", target_rows_P, (u_PD.shape[0],), u_PD)
    _check_floats("offset_V", offset_V, (item_VD.shape[0],), u_PD)
    _check_floats("weights_P", weights_P, (u_PD.shape[0],), u_PD)
    if item_VD.device != u_PD.device:
        raise ValueError(f"item_VD is on {item_VD.device} and u_PD on {u_PD.device}; move them together")


def _check_negatives(
    u_PD: Tensor, negative_rows: Tensor, log_q_C: Tensor | None, log_q_target_P: Tensor | None
) -> None:
    if negative_rows.dim() not in {1, 2}:
        raise ValueError(f"negative_rows must be int64[P, C] or int64[C], got shape {tuple(negative_rows.shape)}")
    num_negatives = negative_rows.shape[-1]
    shape = (num_negatives,) if negative_rows.dim() == 1 else (u_PD.shape[0], num_negatives)
    _check_rows("negative_rows", negative_rows, shape, u_PD)
    if negative_rows.dim() == 2 and (log_q_C is not None or log_q_target_P is not None):
        raise ValueError("log_q_C and log_q_target_P belong to shared negatives: pass negative_rows as int64[C]")
    _check_floats("log_q_C", log_q_C, (num_negatives,), u_PD)
    _check_floats("log_q_target_P", log_q_target_P, (u_PD.shape[0],), u_PD)


def _check_rows(name: str, rows: Tensor, shape: tuple[int, ...], like: Tensor) -> None:
    if rows.dtype != torch.int64 or tuple(rows.shape) != shape or rows.device != like.device:
        raise ValueError(
            f"{name} must be int64{list(shape)} on {like.device}, got {rows.dtype}{list(rows.shape)} on {rows.device}"
        )


def _check_floats(name: str, given: Tensor | None, shape: tuple[int, ...], like: Tensor) -> None:
    if given is None:
        return
    if not given.is_floating_point() or tuple(given.shape) != shape or given.device != like.device:
        raise ValueError(
            f"{name} must be float{list(shape)} on {like.device}, got {given.dtype}{list(given.shape)} on"
            f" {given.device}"
        )


def _scale_tensor(scale: Tensor | float, u_PD: Tensor) -> Tensor:
    if not isinstance(scale, Tensor):
        return torch.full((), scale, dtype=accumulation_dtype(u_PD), device=u_PD.device)
    _check_floats("scale", scale, (), u_PD)
    return scale
