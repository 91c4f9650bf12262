"""Row-wise concatenation, splitting and truncation of jagged tensors; which implementation copies is decided here.

Shapes: B rows, L packed values. Values may be of any dtype and have any trailing shape; floating ones carry gradients.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from kernels.implementations import KernelName, choose
from kernels.jagged import JaggedTensor
from kernels.jagged_ops.reference import Segments, join_reference, offsets_of, take_reference
from kernels.operators import operator

Keep = Literal["newest", "oldest"]
"""Which end of a row that is too long stays: its last values, or its first."""


@dataclass(frozen=True, kw_only=True, slots=True)
class JaggedSplit:
    """The first values of each row, and the rest."""

    left: JaggedTensor
    right: JaggedTensor


def jagged_concat(left: JaggedTensor, right: JaggedTensor, *, kernel: KernelName = "auto") -> JaggedTensor:
    """Row b is left's row b followed by right's; max_len is the sum of both. Differentiable in both values.

    ValueError unless both have the same number of rows, dtype, trailing shape and device.

    >>> left = JaggedTensor.of([torch.tensor([1, 2]), torch.tensor([3])])
    >>> right = JaggedTensor.of([torch.tensor([4]), torch.tensor([5, 6])])
    >>> jagged_concat(left, right).values.tolist()
    [1, 2, 4, 3, 5, 6]
    """
    if left.num_rows != right.num_rows:
        raise ValueError(f"left has {left.num_rows} rows and right {right.num_rows}; they must have the same number")
    a, b = left.values, right.values
    if a.dtype != b.dtype or a.shape[1:] != b.shape[1:] or a.device != b.device:
        raise ValueError(
            f"left holds {a.dtype}{list(a.shape)} on {a.device} and right {b.dtype}{list(b.shape)} on {b.device};"
            " dtype, trailing shape and device must be the same"
        )
    lengths_a, lengths_b = left.lengths(), right.lengths()
    values = _join(
        a,
        Segments(starts=left.offsets[:-1], lengths=lengths_a),
        b,
        Segments(starts=right.offsets[:-1], lengths=lengths_b),
        num_values=a.shape[0] + b.shape[0],
        max_len=max(left.max_len, right.max_len),
        kernel=kernel,
    )
    return JaggedTensor(values=values, offsets=left.offsets + right.offsets, max_len=left.max_len + right.max_len)


def jagged_split(
    jagged: JaggedTensor, left_lengths: Tensor, *, num_left: int | None = None, kernel: KernelName = "auto"
) -> JaggedSplit:
    """The first ``left_lengths[b]`` values of each row (all of a shorter row), and the rest; undoes ``jagged_concat``.

    left_lengths: int64[B]. num_left: how many values that is in total; None asks the device, which synchronises it.
    Both results keep the max_len of ``jagged``. Differentiable. ValueError for wrong left_lengths.
    """
    offsets = jagged.offsets
    if left_lengths.dtype != torch.int64 or left_lengths.shape != (jagged.num_rows,):
        raise ValueError(
            f"left_lengths must be int64[{jagged.num_rows}], got {left_lengths.dtype}{list(left_lengths.shape)}"
        )
    if left_lengths.device != offsets.device:
        raise ValueError(f"left_lengths are on {left_lengths.device} and the rows on {offsets.device}")
    lengths = jagged.lengths()
    left_of = Segments(starts=offsets[:-1], lengths=left_lengths.clamp(min=0).minimum(lengths))
    right_of = Segments(starts=left_of.starts + left_of.lengths, lengths=lengths - left_of.lengths)
    num_left = _total(left_of.lengths, num_left, "num_left", jagged)
    return JaggedSplit(
        left=_taken(jagged, left_of, num_left, jagged.max_len, kernel),
        right=_taken(jagged, right_of, jagged.num_values - num_left, jagged.max_len, kernel),
    )


def jagged_truncate(
    jagged: JaggedTensor,
    max_len: int,
    *,
    keep: Keep = "newest",
    prefix_len: int = 0,
    num_values: int | None = None,
    kernel: KernelName = "auto",
) -> JaggedTensor:
    """Rows of at most ``max_len`` values: of a longer one the newest (last) or oldest (first), in their order.

    prefix_len: values at the start of each row (contextual tokens) that always stay, and count. num_values: how many
    values remain in total; None asks the device, which synchronises it. Nothing is copied, and num_values not needed,
    where ``jagged.max_len`` already is that short. Differentiable. ValueError for a wrong limit.
    """
    if max_len < 0:
        raise ValueError(f"max_len is {max_len}; it must be 0 or more values")
    if not 0 <= prefix_len <= max_len:
        raise ValueError(f"prefix_len is {prefix_len}; it must be between 0 and max_len, which is {max_len}")
    if keep not in get_args(Keep):
        raise ValueError(f"keep is {keep!r}; it must be one of {', '.join(get_args(Keep))}")
    if jagged.max_len <= max_len:
        return jagged
    kept = jagged.lengths().clamp(max=max_len)
    num_values = _total(kept, num_values, "num_values", jagged)
    starts, ends = jagged.offsets[:-1], jagged.offsets[1:]
    if keep == "oldest":
        return _taken(jagged, Segments(starts=starts, lengths=kept), num_values, max_len, kernel)
    if prefix_len == 0:
        return _taken(jagged, Segments(starts=ends - kept, lengths=kept), num_values, max_len, kernel)
    prefix = kept.clamp(max=prefix_len)
    values = _join(
        jagged.values,
        Segments(starts=starts, lengths=prefix),
        jagged.values,
        Segments(starts=ends - (kept - prefix), lengths=kept - prefix),
        num_values=num_values,
        max_len=max_len,
        kernel=kernel,
    )
    return JaggedTensor(values=values, offsets=offsets_of(kept), max_len=max_len)


def _taken(jagged: JaggedTensor, segments: Segments, num_values: int, max_len: int, kernel: KernelName) -> JaggedTensor:
    if choose(kernel, jagged.values.device, has_cpu_path=False) == "reference":
        values = take_reference(jagged.values, segments, num_values)
    else:
        values = _take_op(jagged.values, segments.starts, segments.lengths, num_values, max_len)
    return JaggedTensor(values=values, offsets=offsets_of(segments.lengths), max_len=max_len)


def _join(
    left: Tensor,
    left_of: Segments,
    right: Tensor,
    right_of: Segments,
    *,
    num_values: int,
    max_len: int,
    kernel: KernelName,
) -> Tensor:
    if choose(kernel, left.device, has_cpu_path=False) == "reference":
        return join_reference(left, left_of, right, right_of, num_values)
    joined: Tensor = _join_op(
        left, left_of.starts, left_of.lengths, right, right_of.starts, right_of.lengths, num_values, max_len
    )
    return joined


def _total(lengths: Tensor, given: int | None, name: str, jagged: JaggedTensor) -> int:
    if given is None:
        return int(lengths.sum())
    # On the CPU the total can be compared without waiting for a device; in a traced graph it is not known yet.
    if lengths.device.type == "cpu" and not torch.compiler.is_compiling() and given != int(lengths.sum()):
        raise ValueError(f"{name} is {given}; the rows hold {int(lengths.sum())} such values")
    if not 0 <= given <= jagged.num_values:
        raise ValueError(f"{name} is {given}; it must be between 0 and the {jagged.num_values} values there are")
    return given


# ----------------------------------------------------------------------------------------------------------------------
# Operators, run by Triton. What one copies from a segment, its gradient copies back.


@operator("jagged_take")
def _take_op(values: Tensor, starts: Tensor, lengths: Tensor, num_values: int, max_len: int) -> Tensor:
    from kernels.jagged_ops.triton_kernels import take_triton  # noqa: PLC0415 - needs triton, an optional package

    return take_triton(values, Segments(starts=starts, lengths=lengths), num_values, max_len)


@_take_op.register_fake
def _fake_take(values: Tensor, starts: Tensor, lengths: Tensor, num_values: int, max_len: int) -> Tensor:
    return values.new_empty(num_values, *values.shape[1:])


@operator("jagged_join")
def _join_op(
    left: Tensor,
    left_starts: Tensor,
    left_lengths: Tensor,
    right: Tensor,
    right_starts: Tensor,
    right_lengths: Tensor,
    num_values: int,
    max_len: int,
) -> Tensor:
    from kernels.jagged_ops.triton_kernels import join_triton  # noqa: PLC0415 - needs triton, an optional package

    left_of = Segments(starts=left_starts, lengths=left_lengths)
    right_of = Segments(starts=right_starts, lengths=right_lengths)
    return join_triton(left, left_of, right, right_of, num_values, max_len)


@_join_op.register_fake
def _fake_join(
    left: Tensor,
    left_starts: Tensor,
    left_lengths: Tensor,
    right: Tensor,
    right_starts: Tensor,
    right_lengths: Tensor,
    num_values: int,
    max_len: int,
) -> Tensor:
    return left.new_empty(num_values, *left.shape[1:])


@operator("jagged_spread")
def _spread_op(
    values: Tensor, value_starts: Tensor, starts: Tensor, lengths: Tensor, num_values: int, max_len: int
) -> Tensor:
    from kernels.jagged_ops.triton_kernels import spread_triton  # noqa: PLC0415 - needs triton, an optional package

    return spread_triton(values, value_starts, Segments(starts=starts, lengths=lengths), num_values, max_len)


@_spread_op.register_fake
def _fake_spread(
    values: Tensor,
    value_starts: Tensor,
    starts: Tensor,
    lengths: Tensor,
    num_values: int,
    max_len: int,
) -> Tensor:
    return values.new_empty(num_values, *values.shape[1:])


def _keep_take(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    values, starts, lengths, _, ctx.max_len = inputs
    ctx.num_values = values.shape[0]
    ctx.save_for_backward(starts, lengths)


def _take_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    starts, lengths = ctx.saved_tensors
    spread = _spread_op(grad, offsets_of(lengths)[:-1], starts, lengths, ctx.num_values, ctx.max_len)
    return spread, None, None, None, None


def _keep_join(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    left, left_starts, left_lengths, right, right_starts, right_lengths, _, ctx.max_len = inputs
    ctx.num_left, ctx.num_right = left.shape[0], right.shape[0]
    ctx.save_for_backward(left_starts, left_lengths, right_starts, right_lengths)


def _join_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    left_starts, left_lengths, right_starts, right_lengths = ctx.saved_tensors
    starts = offsets_of(left_lengths + right_lengths)[:-1]
    left, right = None, None
    if ctx.needs_input_grad[0]:
        left = _spread_op(grad, starts, left_starts, left_lengths, ctx.num_left, ctx.max_len)
    if ctx.needs_input_grad[3]:
        right = _spread_op(grad, starts + left_lengths, right_starts, right_lengths, ctx.num_right, ctx.max_len)
    return left, None, None, right, None, None, None, None


_take_op.register_autograd(_take_backward, setup_context=_keep_take)
_join_op.register_autograd(_join_backward, setup_context=_keep_join)
