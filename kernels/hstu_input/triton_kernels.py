"""The input half of an HSTU layer in Triton; the maths is in README.md.

Shapes: L packed positions, D model width, E = u + v + q + k widths. Sums are taken in float32 whatever the dtype of x.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.triton_support import autotuned, block_size, dot_precision

WHOLE_ROW_MAX = 128
"""Up to this D a tile of the product holds whole rows, so each program can take the statistics itself. Beyond it every
column block would read x twice more for them, which costs more than one small kernel ahead."""

ROWS_PER_PROGRAM = 128
"""Rows of which one program sums the gradients of the norm's parameters: L / 128 partial sums are left to torch."""

TILES = [
    triton.Config({"BLOCK_M": 32, "BLOCK_N": 32}, num_warps=2, num_stages=2),
    triton.Config({"BLOCK_M": 64, "BLOCK_N": 64}, num_warps=4, num_stages=3),
    triton.Config({"BLOCK_M": 128, "BLOCK_N": 64}, num_warps=4, num_stages=3),
    triton.Config({"BLOCK_M": 64, "BLOCK_N": 128}, num_warps=4, num_stages=3),
    triton.Config({"BLOCK_M": 128, "BLOCK_N": 128}, num_warps=8, num_stages=3),
    triton.Config({"BLOCK_M": 128, "BLOCK_N": 256}, num_warps=8, num_stages=3),
]


@triton.jit
def _moments(x_ptr, rows, in_rows, eps, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """Mean and 1 / standard deviation of whole rows; the variance about the mean, since E[x²] - E[x]² cancels."""
    cols = tl.arange(0, BLOCK_D)
    inside = in_rows[:, None] & (cols < D)[None, :]
    x = tl.load(x_ptr + rows[:, None] * D + cols[None, :], mask=inside, other=0.0).to(tl.float32)
    mean = tl.sum(x, axis=1) / D
    centered = tl.where(inside, x - mean[:, None], 0.0)
    return mean, 1.0 / tl.sqrt(tl.sum(centered * centered, axis=1) / D + eps)


@triton.jit
def _statistics_kernel(
    x_ptr, mean_ptr, rstd_ptr, num_rows, eps, D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr
):
    rows = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    in_rows = rows < num_rows
    mean, rstd = _moments(x_ptr, rows, in_rows, eps, D, BLOCK_D)
    tl.store(mean_ptr + rows, mean, mask=in_rows)
    tl.store(rstd_ptr + rows, rstd, mask=in_rows)


@triton.jit
def _projected(
    x_ptr,
    weight_ptr,
    bias_ptr,
    norm_weight_ptr,
    norm_bias_ptr,
    normed_ptr,
    rows,
    in_rows,
    mean,
    rstd,
    cols,
    stride_wd,
    stride_we,
    D: tl.constexpr,
    E: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    AFFINE: tl.constexpr,
    STORE_NORMED: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """One tile of ``norm(x) @ weight + bias``, x being normed as it is loaded; the first column block stores it."""
    in_cols = cols < E
    total = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for start in range(0, D, BLOCK_K):
        depth = start + tl.arange(0, BLOCK_K)
        in_depth = depth < D
        inside = in_rows[:, None] & in_depth[None, :]
        x = tl.load(x_ptr + rows[:, None] * D + depth[None, :], mask=inside, other=0.0)
        normed = (x.to(tl.float32) - mean[:, None]) * rstd[:, None]
        if AFFINE:
            scale = tl.load(norm_weight_ptr + depth, mask=in_depth, other=0.0).to(tl.float32)
            shift = tl.load(norm_bias_ptr + depth, mask=in_depth, other=0.0).to(tl.float32)
            normed = normed * scale[None, :] + shift[None, :]
        normed = tl.where(inside, normed, 0.0).to(x.dtype)  # -mean * rstd may be infinite in float16: no NaN of inf * 0
        if STORE_NORMED:  # noqa: SIM102 - one is decided when the kernel is compiled, the other when it runs
            if tl.program_id(0) % tl.cdiv(E, BLOCK_N) == 0:
                tl.store(normed_ptr + rows[:, None] * D + depth[None, :], normed, mask=inside)
        weight = tl.load(
            weight_ptr + depth[:, None].to(tl.int64) * stride_wd + cols[None, :] * stride_we,
            mask=in_depth[:, None] & in_cols[None, :],
            other=0.0,
        )
        total = tl.dot(normed, weight, total, input_precision=PRECISION)
    if HAS_BIAS:
        total += tl.load(bias_ptr + cols, mask=in_cols, other=0.0).to(tl.float32)[None, :]
    return total


@triton.jit
def _store_part(part_ptr, tile, rows, in_rows, cols, begin, WIDTH: tl.constexpr):
    """The columns of a tile that belong to the part [begin, begin + WIDTH)."""
    inside = in_rows[:, None] & ((cols >= begin) & (cols < begin + WIDTH))[None, :]
    places = rows[:, None] * WIDTH + (cols - begin)[None, :]
    tl.store(part_ptr + places, tile.to(part_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _load_part(part_ptr, rows, in_rows, cols, begin, WIDTH: tl.constexpr):
    """A tile that holds the part's values in its columns, zeros elsewhere."""
    inside = in_rows[:, None] & ((cols >= begin) & (cols < begin + WIDTH))[None, :]
    places = rows[:, None] * WIDTH + (cols - begin)[None, :]
    return tl.load(part_ptr + places, mask=inside, other=0.0).to(tl.float32)


@autotuned(TILES, key=["D", "E"])
@triton.jit
def _forward_kernel(
    x_ptr,
    weight_ptr,
    bias_ptr,
    norm_weight_ptr,
    norm_bias_ptr,
    u_ptr,
    v_ptr,
    q_ptr,
    k_ptr,
    mean_ptr,
    rstd_ptr,
    normed_ptr,
    projected_ptr,
    num_rows,
    num_activated,
    eps,
    stride_wd,
    stride_we,
    U: tl.constexpr,
    V: tl.constexpr,
    Q: tl.constexpr,
    K: tl.constexpr,
    D: tl.constexpr,
    E: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    AFFINE: tl.constexpr,
    STATISTICS_INSIDE: tl.constexpr,
    KEEP: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    num_column_blocks = tl.cdiv(E, BLOCK_N)
    column_block = tl.program_id(0) % num_column_blocks
    rows = (tl.program_id(0) // num_column_blocks).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    cols = column_block * BLOCK_N + tl.arange(0, BLOCK_N)
    in_rows = rows < num_rows
    if STATISTICS_INSIDE:
        mean, rstd = _moments(x_ptr, rows, in_rows, eps, D, BLOCK_K)
        if column_block == 0:
            tl.store(mean_ptr + rows, mean, mask=in_rows)
            tl.store(rstd_ptr + rows, rstd, mask=in_rows)
    else:
        mean = tl.load(mean_ptr + rows, mask=in_rows, other=0.0)
        rstd = tl.load(rstd_ptr + rows, mask=in_rows, other=0.0)
    projected = _projected(
        x_ptr, weight_ptr, bias_ptr, norm_weight_ptr, norm_bias_ptr, normed_ptr, rows, in_rows, mean, rstd, cols,
        stride_wd, stride_we, D, E, HAS_BIAS, AFFINE, KEEP, PRECISION, BLOCK_M, BLOCK_N, BLOCK_K,
    )  # fmt: skip
    if KEEP:
        _store_part(projected_ptr, projected, rows, in_rows, cols, 0, E)
    out = tl.where((cols < num_activated)[None, :], projected * tl.sigmoid(projected), projected)
    _store_part(u_ptr, out, rows, in_rows, cols, 0, U)
    _store_part(v_ptr, out, rows, in_rows, cols, U, V)
    _store_part(q_ptr, out, rows, in_rows, cols, U + V, Q)
    _store_part(k_ptr, out, rows, in_rows, cols, U + V + Q, K)


@autotuned(TILES, key=["D", "E"])
@triton.jit
def _activation_backward_kernel(
    grad_u_ptr,
    grad_v_ptr,
    grad_q_ptr,
    grad_k_ptr,
    x_ptr,
    weight_ptr,
    bias_ptr,
    norm_weight_ptr,
    norm_bias_ptr,
    mean_ptr,
    rstd_ptr,
    normed_ptr,
    projected_ptr,
    grad_projected_ptr,
    num_rows,
    num_activated,
    stride_wd,
    stride_we,
    U: tl.constexpr,
    V: tl.constexpr,
    Q: tl.constexpr,
    K: tl.constexpr,
    D: tl.constexpr,
    E: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    AFFINE: tl.constexpr,
    RECOMPUTE: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Gradient of ``norm(x) @ weight + bias``; with RECOMPUTE the product is repeated and norm(x) stored."""
    num_column_blocks = tl.cdiv(E, BLOCK_N)
    column_block = tl.program_id(0) % num_column_blocks
    rows = (tl.program_id(0) // num_column_blocks).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    cols = column_block * BLOCK_N + tl.arange(0, BLOCK_N)
    in_rows = rows < num_rows
    projected = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    if column_block * BLOCK_N < num_activated:  # a block without SiLU needs no product; the first one always has it
        if RECOMPUTE:
            mean = tl.load(mean_ptr + rows, mask=in_rows, other=0.0)
            rstd = tl.load(rstd_ptr + rows, mask=in_rows, other=0.0)
            projected = _projected(
                x_ptr, weight_ptr, bias_ptr, norm_weight_ptr, norm_bias_ptr, normed_ptr, rows, in_rows, mean, rstd,
                cols, stride_wd, stride_we, D, E, HAS_BIAS, AFFINE, True, PRECISION, BLOCK_M, BLOCK_N, BLOCK_K,
            )  # fmt: skip
        else:
            projected = _load_part(projected_ptr, rows, in_rows, cols, 0, E)
    grad = _load_part(grad_u_ptr, rows, in_rows, cols, 0, U)
    grad += _load_part(grad_v_ptr, rows, in_rows, cols, U, V)
    grad += _load_part(grad_q_ptr, rows, in_rows, cols, U + V, Q)
    grad += _load_part(grad_k_ptr, rows, in_rows, cols, U + V + Q, K)
    sigma = tl.sigmoid(projected)
    slope = tl.where((cols < num_activated)[None, :], sigma * (1.0 + projected * (1.0 - sigma)), 1.0)
    _store_part(grad_projected_ptr, grad * slope, rows, in_rows, cols, 0, E)


@triton.jit
def _norm_backward_kernel(
    grad_normed_ptr,
    x_ptr,
    norm_weight_ptr,
    mean_ptr,
    rstd_ptr,
    grad_x_ptr,
    grad_norm_weight_ptr,
    grad_norm_bias_ptr,
    num_rows,
    D: tl.constexpr,
    AFFINE: tl.constexpr,
    NUM_BLOCKS: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    """Gradient of x, and this program's share of the gradients of the norm's parameters: one row of partial sums."""
    first_row = tl.program_id(0).to(tl.int64) * NUM_BLOCKS * BLOCK_M
    cols = tl.arange(0, BLOCK_D)
    in_cols = cols < D
    weight_share = tl.zeros((BLOCK_D,), dtype=tl.float32)
    bias_share = tl.zeros((BLOCK_D,), dtype=tl.float32)
    if AFFINE:
        scale = tl.load(norm_weight_ptr + cols, mask=in_cols, other=0.0).to(tl.float32)
    for block in range(NUM_BLOCKS):
        rows = first_row + block * BLOCK_M + tl.arange(0, BLOCK_M)
        in_rows = rows < num_rows
        inside = in_rows[:, None] & in_cols[None, :]
        places = rows[:, None] * D + cols[None, :]
        mean = tl.load(mean_ptr + rows, mask=in_rows, other=0.0)
        rstd = tl.load(rstd_ptr + rows, mask=in_rows, other=0.0)
        x = tl.load(x_ptr + places, mask=inside, other=0.0).to(tl.float32)
        grad = tl.load(grad_normed_ptr + places, mask=inside, other=0.0).to(tl.float32)
        unit = (x - mean[:, None]) * rstd[:, None]  # beyond the row it is multiplied by a gradient of 0
        if AFFINE:
            weight_share += tl.sum(grad * unit, axis=0)
            bias_share += tl.sum(grad, axis=0)
            grad = grad * scale[None, :]
        along = tl.sum(grad * unit, axis=1) / D
        level = tl.sum(grad, axis=1) / D
        grad_x = (grad - level[:, None] - unit * along[:, None]) * rstd[:, None]
        tl.store(grad_x_ptr + places, grad_x.to(grad_x_ptr.dtype.element_ty), mask=inside)
    if AFFINE:
        share = tl.program_id(0).to(tl.int64) * D + cols
        tl.store(grad_norm_weight_ptr + share, weight_share, mask=in_cols)
        tl.store(grad_norm_bias_ptr + share, bias_share, mask=in_cols)


def forward(
    x_LD: Tensor,
    weight_DE: Tensor,
    bias_E: Tensor | None,
    norm: tuple[Tensor | None, Tensor | None],
    eps: float,
    split_sizes: list[int],
    num_activated: int,
    recompute: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """u, v, q, k, mean_L, rstd_L, normed_LD, projected_LE; the last two have no rows if they are to be recomputed."""
    x_LD = x_LD.contiguous()
    (num_rows, width), num_columns = x_LD.shape, weight_DE.shape[1]
    parts = [x_LD.new_empty(num_rows, size) for size in split_sizes]
    mean_L = x_LD.new_empty(num_rows, dtype=torch.float32)
    rstd_L = torch.empty_like(mean_L)
    kept = 0 if recompute else num_rows
    normed_LD, projected_LE = x_LD.new_empty(kept, width), x_LD.new_empty(kept, num_columns)
    inside = width <= WHOLE_ROW_MAX
    if not inside:
        block_d = block_size(width)
        block_m = max(1, 4096 // block_d)
        _statistics_kernel[triton.cdiv(num_rows, block_m),](
            x_LD, mean_L, rstd_L, num_rows, eps, D=width, BLOCK_D=block_d, BLOCK_M=block_m
        )
    _forward_kernel[_grid(num_rows, num_columns)](
        x_LD,
        weight_DE,
        bias_E,
        *(None if tensor is None else tensor.contiguous() for tensor in norm),
        *parts,
        mean_L,
        rstd_L,
        normed_LD,
        projected_LE,
        num_rows,
        num_activated,
        eps,
        *weight_DE.stride(),
        *split_sizes,
        **_shape_arguments(x_LD, weight_DE, bias_E, norm),
        STATISTICS_INSIDE=inside,
        KEEP=not recompute,
    )
    return (*parts, mean_L, rstd_L, normed_LD, projected_LE)


def backward(
    grads: list[Tensor],
    x_LD: Tensor,
    weight_DE: Tensor,
    bias_E: Tensor | None,
    norm: tuple[Tensor | None, Tensor | None],
    state: list[Tensor],
    num_activated: int,
    recompute: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, weight, bias, norm weight and norm bias; no elements for those that were not given."""
    x_LD = x_LD.contiguous()
    mean_L, rstd_L, normed_LD, projected_LE = state
    (num_rows, _), num_columns = x_LD.shape, weight_DE.shape[1]
    if recompute:
        normed_LD = torch.empty_like(x_LD)
    grad_projected_LE = x_LD.new_empty(num_rows, num_columns)
    _activation_backward_kernel[_grid(num_rows, num_columns)](
        *(grad.contiguous() for grad in grads),
        x_LD,
        weight_DE,
        bias_E,
        *(None if tensor is None else tensor.contiguous() for tensor in norm),
        mean_L,
        rstd_L,
        normed_LD,
        projected_LE,
        grad_projected_LE,
        num_rows,
        num_activated,
        *weight_DE.stride(),
        *(grad.shape[1] for grad in grads),
        **_shape_arguments(x_LD, weight_DE, bias_E, norm),
        RECOMPUTE=recompute,
    )
    grad_weight_DE = normed_LD.t() @ grad_projected_LE
    grad_bias_E = grad_projected_LE.sum(0) if bias_E is not None else x_LD.new_empty(0)
    grad_normed_LD = grad_projected_LE @ weight_DE.t()
    grad_x_LD, *grad_norm = _norm_backward(grad_normed_LD, x_LD, norm[0], mean_L, rstd_L)
    return (grad_x_LD, grad_weight_DE, grad_bias_E, *grad_norm)


def _norm_backward(
    grad_normed_LD: Tensor, x_LD: Tensor, norm_weight_D: Tensor | None, mean_L: Tensor, rstd_L: Tensor
) -> list[Tensor]:
    num_rows, width = x_LD.shape
    grad_x_LD = torch.empty_like(x_LD)
    affine = norm_weight_D is not None
    num_programs = triton.cdiv(num_rows, ROWS_PER_PROGRAM)
    shares = [x_LD.new_empty(num_programs, width if affine else 0, dtype=torch.float32) for _ in range(2)]
    block_d = block_size(width)
    block_m = max(1, min(ROWS_PER_PROGRAM, 4096 // block_d))
    _norm_backward_kernel[num_programs,](
        grad_normed_LD,
        x_LD,
        norm_weight_D.contiguous() if affine else None,
        mean_L,
        rstd_L,
        grad_x_LD,
        *shares,
        num_rows,
        D=width,
        AFFINE=affine,
        NUM_BLOCKS=ROWS_PER_PROGRAM // block_m,
        BLOCK_D=block_d,
        BLOCK_M=block_m,
    )
    return [grad_x_LD, *(share.sum(0).to(x_LD.dtype) for share in shares)]


def _grid(num_rows: int, num_columns: int):
    """One axis, column blocks fastest: the programs that read the same rows of x run next to each other."""
    return lambda tile: (triton.cdiv(num_rows, tile["BLOCK_M"]) * triton.cdiv(num_columns, tile["BLOCK_N"]),)


def _shape_arguments(
    x_LD: Tensor, weight_DE: Tensor, bias_E: Tensor | None, norm: tuple[Tensor | None, Tensor | None]
) -> dict[str, object]:
    width = x_LD.shape[1]
    return {
        "D": width,
        "E": weight_DE.shape[1],
        "HAS_BIAS": bias_E is not None,
        "AFFINE": norm[0] is not None,
        "PRECISION": dot_precision(x_LD.dtype),
        "BLOCK_K": block_size(width) if width <= WHOLE_ROW_MAX else 64,
    }
