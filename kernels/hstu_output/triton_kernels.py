"""The output half of an HSTU layer in Triton; the maths is in README.md, the mask's in dropout.py.

Shapes: L packed positions, D model width, G width of u and attended in H groups of V, W = G or 3 G. Sums are taken in
float32 whatever the dtype of x.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.hstu_output.dropout import COUNTER, FIRST, SECOND, DropoutKey
from kernels.triton_support import autotuned, block_size, dot_precision

ROWS_PER_PROGRAM = 128
"""Rows of which one program sums the gradients of the norm's parameters: L / 128 partial sums are left to torch."""

TILE_ELEMENTS = 4096
"""Elements of one tile of the kernels that only pass over memory."""

_COUNTER, _FIRST, _SECOND = tl.constexpr(COUNTER), tl.constexpr(FIRST), tl.constexpr(SECOND)

TILES = [
    triton.Config({"BLOCK_M": 32, "BLOCK_N": 32, "BLOCK_K": 32}, num_warps=2, num_stages=2),
    triton.Config({"BLOCK_M": 64, "BLOCK_N": 64, "BLOCK_K": 64}, num_warps=4, num_stages=3),
    triton.Config({"BLOCK_M": 128, "BLOCK_N": 64, "BLOCK_K": 64}, num_warps=4, num_stages=3),
    triton.Config({"BLOCK_M": 64, "BLOCK_N": 128, "BLOCK_K": 64}, num_warps=4, num_stages=3),
    triton.Config({"BLOCK_M": 128, "BLOCK_N": 128, "BLOCK_K": 64}, num_warps=8, num_stages=3),
    triton.Config({"BLOCK_M": 128, "BLOCK_N": 256, "BLOCK_K": 64}, num_warps=8, num_stages=3),
]


@dataclass(frozen=True, kw_only=True, slots=True)
class Gate:
    """Everything about ``y = dropout(gate(attended, u))`` besides the two tensors."""

    norm: tuple[Tensor | None, Tensor | None]
    num_groups: int
    concat: bool
    key: DropoutKey

    @staticmethod
    def of(
        norm: tuple[Tensor | None, Tensor | None], num_groups: int, *, concat: bool, dropout_p: float, seed: int
    ) -> Gate:
        """The norm's parameters made contiguous, the seed made a key."""
        weight, bias = (None if tensor is None else tensor.contiguous() for tensor in norm)
        return Gate(norm=(weight, bias), num_groups=num_groups, concat=concat, key=DropoutKey.of(dropout_p, seed))

    def arguments(self, width: int) -> dict[str, object]:
        """The arguments both gate kernels share, for tensors of ``width`` columns."""
        return {
            "first_key": self.key.first,
            "second_key": self.key.second,
            "threshold": self.key.threshold,
            "scale": self.key.scale,
            "G": width,
            "H": self.num_groups,
            "AFFINE": self.norm[0] is not None,
            "CONCAT": self.concat,
            "DROPOUT": self.key.threshold > 0,
            "BLOCK_V": block_size(width // self.num_groups),
        }


@triton.jit
def _multiplier(places, first_key, second_key, threshold, scale):
    """0 where the elements at ``places`` are dropped, else the scale: the numbers of dropout.dropout_multiplier."""
    hashes = (places >> 1).to(tl.uint32) * _COUNTER + first_key.to(tl.uint32)
    hashes = (hashes ^ (hashes >> 16)) * _FIRST + second_key.to(tl.uint32)
    hashes = (hashes ^ (hashes >> 15)) * _SECOND
    hashes = hashes ^ (hashes >> 16)
    halves = tl.where((places & 1) == 1, hashes >> 16, hashes & 0xFFFF).to(tl.int32)
    return tl.where((halves ^ 0x8000) >= threshold, scale, 0.0)


@triton.jit
def _store_dropped(y_ptr, value, places, inside, first_key, second_key, threshold, scale, DROPOUT: tl.constexpr):
    if DROPOUT:
        value = value * _multiplier(places, first_key, second_key, threshold, scale)
    tl.store(y_ptr + places, value.to(y_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _load_dropped(grad_ptr, places, inside, first_key, second_key, threshold, scale, DROPOUT: tl.constexpr):
    grad = tl.load(grad_ptr + places, mask=inside, other=0.0).to(tl.float32)
    if DROPOUT:
        grad = grad * _multiplier(places, first_key, second_key, threshold, scale)
    return grad


@triton.jit(do_not_specialize=["first_key", "second_key", "threshold"])
def _gate_kernel(
    attended_ptr,
    u_ptr,
    norm_weight_ptr,
    norm_bias_ptr,
    y_ptr,
    mean_ptr,
    rstd_ptr,
    num_rows,
    eps,
    first_key,
    second_key,
    threshold,
    scale,
    G: tl.constexpr,
    H: tl.constexpr,
    AFFINE: tl.constexpr,
    CONCAT: tl.constexpr,
    DROPOUT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    """``y = dropout(u * norm(attended))``, or of [u, attended, u * norm], of one group of some rows."""
    group = tl.program_id(1)
    V: tl.constexpr = G // H
    rows = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    lanes = tl.arange(0, BLOCK_V)
    cols = group * V + lanes
    in_rows = rows < num_rows
    in_cols = lanes < V
    inside = in_rows[:, None] & in_cols[None, :]
    places = rows[:, None] * G + cols[None, :]
    attended = tl.load(attended_ptr + places, mask=inside, other=0.0).to(tl.float32)
    u = tl.load(u_ptr + places, mask=inside, other=0.0).to(tl.float32)
    mean = tl.sum(attended, axis=1) / V
    centered = tl.where(inside, attended - mean[:, None], 0.0)
    rstd = 1.0 / tl.sqrt(tl.sum(centered * centered, axis=1) / V + eps)
    tl.store(mean_ptr + rows * H + group, mean, mask=in_rows)
    tl.store(rstd_ptr + rows * H + group, rstd, mask=in_rows)
    normed = centered * rstd[:, None]
    if AFFINE:
        normed = normed * tl.load(norm_weight_ptr + cols, mask=in_cols, other=0.0).to(tl.float32)[None, :]
        normed = normed + tl.load(norm_bias_ptr + cols, mask=in_cols, other=0.0).to(tl.float32)[None, :]
    if CONCAT:
        places = rows[:, None] * (3 * G) + cols[None, :]
        _store_dropped(y_ptr, u, places, inside, first_key, second_key, threshold, scale, DROPOUT)
        _store_dropped(y_ptr, attended, places + G, inside, first_key, second_key, threshold, scale, DROPOUT)
        places = places + 2 * G
    _store_dropped(y_ptr, u * normed, places, inside, first_key, second_key, threshold, scale, DROPOUT)


@autotuned(TILES, key=["W", "D"])
@triton.jit
def _project_kernel(
    y_ptr,
    weight_ptr,
    bias_ptr,
    x_ptr,
    out_ptr,
    num_rows,
    stride_ww,
    stride_wd,
    W: tl.constexpr,
    D: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """``x + y @ weight + bias``: the residual is added while the product is still in registers."""
    num_column_blocks = tl.cdiv(D, BLOCK_N)
    rows = (tl.program_id(0) // num_column_blocks).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    cols = (tl.program_id(0) % num_column_blocks) * BLOCK_N + tl.arange(0, BLOCK_N)
    in_rows = rows < num_rows
    in_cols = cols < D
    total = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for start in range(0, W, BLOCK_K):
        depth = start + tl.arange(0, BLOCK_K)
        in_depth = depth < W
        y = tl.load(y_ptr + rows[:, None] * W + depth[None, :], mask=in_rows[:, None] & in_depth[None, :], other=0.0)
        weight = tl.load(
            weight_ptr + depth[:, None].to(tl.int64) * stride_ww + cols[None, :] * stride_wd,
            mask=in_depth[:, None] & in_cols[None, :],
            other=0.0,
        )
        total = tl.dot(y, weight, total, input_precision=PRECISION)
    inside = in_rows[:, None] & in_cols[None, :]
    places = rows[:, None] * D + cols[None, :]
    total += tl.load(x_ptr + places, mask=inside, other=0.0).to(tl.float32)
    if HAS_BIAS:
        total += tl.load(bias_ptr + cols, mask=in_cols, other=0.0).to(tl.float32)[None, :]
    tl.store(out_ptr + places, total.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["first_key", "second_key", "threshold"])
def _gate_backward_kernel(
    grad_y_ptr,
    y_ptr,
    attended_ptr,
    u_ptr,
    norm_weight_ptr,
    norm_bias_ptr,
    mean_ptr,
    rstd_ptr,
    grad_attended_ptr,
    grad_u_ptr,
    grad_norm_weight_ptr,
    grad_norm_bias_ptr,
    num_rows,
    first_key,
    second_key,
    threshold,
    scale,
    G: tl.constexpr,
    H: tl.constexpr,
    AFFINE: tl.constexpr,
    CONCAT: tl.constexpr,
    DROPOUT: tl.constexpr,
    RECOMPUTE: tl.constexpr,
    NUM_BLOCKS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    """Gradients of attended and u, this program's share of those of the norm's parameters, and y if RECOMPUTE."""
    group = tl.program_id(1)
    V: tl.constexpr = G // H
    WIDTH: tl.constexpr = 3 * G if CONCAT else G
    lanes = tl.arange(0, BLOCK_V)
    cols = group * V + lanes
    in_cols = lanes < V
    weight_share = tl.zeros((BLOCK_V,), dtype=tl.float32)
    bias_share = tl.zeros((BLOCK_V,), dtype=tl.float32)
    if AFFINE:
        norm_weight = tl.load(norm_weight_ptr + cols, mask=in_cols, other=0.0).to(tl.float32)
        norm_bias = tl.load(norm_bias_ptr + cols, mask=in_cols, other=0.0).to(tl.float32)
    for block in range(NUM_BLOCKS):
        rows = (tl.program_id(0).to(tl.int64) * NUM_BLOCKS + block) * BLOCK_M + tl.arange(0, BLOCK_M)
        in_rows = rows < num_rows
        inside = in_rows[:, None] & in_cols[None, :]
        places = rows[:, None] * G + cols[None, :]
        attended = tl.load(attended_ptr + places, mask=inside, other=0.0).to(tl.float32)
        u = tl.load(u_ptr + places, mask=inside, other=0.0).to(tl.float32)
        mean = tl.load(mean_ptr + rows * H + group, mask=in_rows, other=0.0)
        rstd = tl.load(rstd_ptr + rows * H + group, mask=in_rows, other=0.0)
        unit = (attended - mean[:, None]) * rstd[:, None]  # beyond the row it is multiplied by a gradient of 0
        normed = unit
        if AFFINE:
            normed = unit * norm_weight[None, :] + norm_bias[None, :]
        gated = rows[:, None] * WIDTH + (WIDTH - G) + cols[None, :]
        grad = _load_dropped(grad_y_ptr, gated, inside, first_key, second_key, threshold, scale, DROPOUT)
        grad_u = grad * normed
        grad = grad * u
        if AFFINE:
            weight_share += tl.sum(grad * unit, axis=0)
            bias_share += tl.sum(grad, axis=0)
            grad = grad * norm_weight[None, :]
        along = tl.sum(grad * unit, axis=1) / V
        level = tl.sum(grad, axis=1) / V
        grad_attended = (grad - level[:, None] - unit * along[:, None]) * rstd[:, None]
        if CONCAT:
            grad_u += _load_dropped(grad_y_ptr, gated - 2 * G, inside, first_key, second_key, threshold, scale, DROPOUT)
            grad_attended += _load_dropped(
                grad_y_ptr, gated - G, inside, first_key, second_key, threshold, scale, DROPOUT
            )
        tl.store(grad_u_ptr + places, grad_u.to(grad_u_ptr.dtype.element_ty), mask=inside)
        tl.store(grad_attended_ptr + places, grad_attended.to(grad_attended_ptr.dtype.element_ty), mask=inside)
        if RECOMPUTE:
            if CONCAT:
                _store_dropped(y_ptr, u, gated - 2 * G, inside, first_key, second_key, threshold, scale, DROPOUT)
                _store_dropped(y_ptr, attended, gated - G, inside, first_key, second_key, threshold, scale, DROPOUT)
            _store_dropped(y_ptr, u * normed, gated, inside, first_key, second_key, threshold, scale, DROPOUT)
    if AFFINE:
        share = tl.program_id(0).to(tl.int64) * G + cols
        tl.store(grad_norm_weight_ptr + share, weight_share, mask=in_cols)
        tl.store(grad_norm_bias_ptr + share, bias_share, mask=in_cols)


def forward(
    attended_LG: Tensor,
    u_LG: Tensor,
    x_LD: Tensor,
    weight_WD: Tensor,
    bias_D: Tensor | None,
    gate: Gate,
    eps: float,
    recompute: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The output, mean_LH, rstd_LH and y_LW; the last has no rows if it is to be recomputed."""
    attended_LG, u_LG, x_LD = attended_LG.contiguous(), u_LG.contiguous(), x_LD.contiguous()
    (num_rows, width), (width_in, width_out) = attended_LG.shape, weight_WD.shape
    y_LW = x_LD.new_empty(num_rows, width_in)
    mean_LH = x_LD.new_empty(num_rows, gate.num_groups, dtype=torch.float32)
    rstd_LH = torch.empty_like(mean_LH)
    arguments = gate.arguments(width)
    block_m = max(1, TILE_ELEMENTS // arguments["BLOCK_V"])
    _gate_kernel[triton.cdiv(num_rows, block_m), gate.num_groups](
        attended_LG, u_LG, *gate.norm, y_LW, mean_LH, rstd_LH, num_rows, eps, **arguments, BLOCK_M=block_m
    )
    out_LD = torch.empty_like(x_LD)
    _project_kernel[lambda tile: (triton.cdiv(num_rows, tile["BLOCK_M"]) * triton.cdiv(width_out, tile["BLOCK_N"]),)](
        y_LW,
        weight_WD,
        bias_D,
        x_LD,
        out_LD,
        num_rows,
        *weight_WD.stride(),
        W=width_in,
        D=width_out,
        HAS_BIAS=bias_D is not None,
        PRECISION=dot_precision(x_LD.dtype),
    )
    return out_LD, mean_LH, rstd_LH, y_LW.new_empty(0, width_in) if recompute else y_LW


def backward(
    grad_LD: Tensor,
    attended_LG: Tensor,
    u_LG: Tensor,
    weight_WD: Tensor,
    gate: Gate,
    statistics: tuple[Tensor, Tensor],
    y_LW: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of attended, u, weight, norm weight and norm bias; y_LW is None if it is to be recomputed."""
    attended_LG, u_LG = attended_LG.contiguous(), u_LG.contiguous()
    num_rows, width = attended_LG.shape
    affine = gate.norm[0] is not None
    grad_y_LW = grad_LD @ weight_WD.t()
    grad_attended_LG, grad_u_LG = torch.empty_like(attended_LG), torch.empty_like(u_LG)
    num_programs = triton.cdiv(num_rows, ROWS_PER_PROGRAM)
    shares = [grad_LD.new_empty(num_programs, width if affine else 0, dtype=torch.float32) for _ in range(2)]
    arguments = gate.arguments(width)
    block_m = max(1, min(ROWS_PER_PROGRAM, TILE_ELEMENTS // arguments["BLOCK_V"]))
    recompute = y_LW is None
    if y_LW is None:
        y_LW = torch.empty_like(grad_y_LW)
    _gate_backward_kernel[num_programs, gate.num_groups](
        grad_y_LW,
        y_LW,
        attended_LG,
        u_LG,
        *gate.norm,
        *statistics,
        grad_attended_LG,
        grad_u_LG,
        *shares,
        num_rows,
        **arguments,
        RECOMPUTE=recompute,
        NUM_BLOCKS=ROWS_PER_PROGRAM // block_m,
        BLOCK_M=block_m,
    )
    grad_weight_WD = y_LW.t() @ grad_LD
    return (grad_attended_LG, grad_u_LG, grad_weight_WD, *(share.sum(0).to(grad_LD.dtype) for share in shares))
