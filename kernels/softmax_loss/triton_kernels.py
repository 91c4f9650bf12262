"""Softmax losses in Triton: logits exist a tile at a time, sums are in float32 and in a fixed order (no atomics).

Shapes: P positions, V catalogue rows, C candidates (all rows, or the shared negatives), C1 = C + 1 with the target in
column 0, D width, S splits: programs that share one block of rows, whose partial sums are added afterwards.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.softmax_loss.formed import FormedSoftmax, without_gradients
from kernels.triton_support import autotuned, block_size, dot_precision

_NEVER = tl.constexpr(-1.0e30)
"""The maximum of no logits: finite, so that its difference to itself is 0 and not NaN."""

_TILES = [
    triton.Config({"BLOCK_P": block_p, "BLOCK_C": block_c}, num_warps=num_warps, num_stages=num_stages)
    for block_p, block_c, num_warps, num_stages in (
        (16, 16, 4, 1),
        (32, 64, 4, 2),
        (64, 32, 4, 2),
        (64, 64, 4, 3),
        (64, 128, 8, 2),
        (128, 64, 8, 2),
        (128, 128, 8, 2),
    )
]
_ENTRIES = [triton.Config({"BLOCK_E": size}, num_warps=warps) for size, warps in ((16, 1), (32, 2), (64, 4))]

# ----------------------------------------------------------------------------------------------------------------------
# One table of candidates for all positions; a candidate that is a position's target is left out.


@triton.jit
def _tile(x_ptr, rows, num_rows, width, BLOCK_D: tl.constexpr):
    """[len(rows), BLOCK_D] of a contiguous [num_rows, width], zeros outside."""
    columns = tl.arange(0, BLOCK_D)
    inside = (rows < num_rows)[:, None] & (columns < width)[None, :]
    return tl.load(x_ptr + rows.to(tl.int64)[:, None] * width + columns[None, :], mask=inside, other=0.0)


@triton.jit
def _scores(
    u_PD, item_CD, positions, candidates, offset_ptr, ids_ptr, target_ptr, scale, num_positions, num_candidates,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Logits [BLOCK_P, BLOCK_C]; -inf outside and where a candidate is the position's target."""
    offset_C = tl.load(offset_ptr + candidates, mask=candidates < num_candidates, other=0.0)
    id_C = tl.load(ids_ptr + candidates, mask=candidates < num_candidates, other=-1)
    target_P = tl.load(target_ptr + positions, mask=positions < num_positions, other=-1)
    counts = (positions < num_positions)[:, None] & (candidates < num_candidates)[None, :]
    counts = counts & (id_C[None, :] != target_P[:, None])
    scores = tl.dot(u_PD, tl.trans(item_CD), input_precision=PRECISION) * scale + offset_C[None, :]
    return tl.where(counts, scores, float("-inf"))


@autotuned(_TILES, key=["width"])
@triton.jit
def _log_sum_exp_kernel(
    u_ptr, item_ptr, offset_ptr, ids_ptr, target_ptr, scale_ptr, lse_ptr, num_positions, num_candidates, split_size,
    width, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_D: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """lse[S, P]: log of the sum of e^logit over a split's candidates; -inf where none counts."""
    positions = tl.program_id(0) * BLOCK_P + tl.arange(0, BLOCK_P)
    split = tl.program_id(1)
    scale = tl.load(scale_ptr)
    u_PD = _tile(u_ptr, positions, num_positions, width, BLOCK_D)
    top_P = tl.full([BLOCK_P], _NEVER, tl.float32)
    sum_P = tl.zeros([BLOCK_P], tl.float32)
    for start in range(split * split_size, min((split + 1) * split_size, num_candidates), BLOCK_C):
        candidates = start + tl.arange(0, BLOCK_C)
        item_CD = _tile(item_ptr, candidates, num_candidates, width, BLOCK_D)
        scores = _scores(
            u_PD, item_CD, positions, candidates, offset_ptr, ids_ptr, target_ptr, scale, num_positions,
            num_candidates, PRECISION,
        )  # fmt: skip
        new_top_P = tl.maximum(top_P, tl.max(scores, axis=1))
        sum_P = sum_P * tl.exp(top_P - new_top_P) + tl.sum(tl.exp(scores - new_top_P[:, None]), axis=1)
        top_P = new_top_P
    rows = split.to(tl.int64) * num_positions + positions
    lse_P = tl.where(sum_P == 0, float("-inf"), top_P + tl.log(tl.where(sum_P == 0, 1.0, sum_P)))
    tl.store(lse_ptr + rows, lse_P, mask=positions < num_positions)


@autotuned(_TILES, key=["width"])
@triton.jit
def _query_gradient_kernel(
    u_ptr, item_ptr, offset_ptr, ids_ptr, target_ptr, scale_ptr, lse_ptr, out_ptr, num_positions, num_candidates,
    split_size, width, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_D: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """out[S, P, D]: sum over a split's candidates of probability * item; logits are computed again."""
    positions = tl.program_id(0) * BLOCK_P + tl.arange(0, BLOCK_P)
    split = tl.program_id(1)
    scale = tl.load(scale_ptr)
    u_PD = _tile(u_ptr, positions, num_positions, width, BLOCK_D)
    lse_P = tl.load(lse_ptr + positions, mask=positions < num_positions, other=0.0)
    sum_PD = tl.zeros([BLOCK_P, BLOCK_D], tl.float32)
    for start in range(split * split_size, min((split + 1) * split_size, num_candidates), BLOCK_C):
        candidates = start + tl.arange(0, BLOCK_C)
        item_CD = _tile(item_ptr, candidates, num_candidates, width, BLOCK_D)
        scores = _scores(
            u_PD, item_CD, positions, candidates, offset_ptr, ids_ptr, target_ptr, scale, num_positions,
            num_candidates, PRECISION,
        )  # fmt: skip
        probability = tl.exp(scores - lse_P[:, None])
        sum_PD += tl.dot(probability.to(item_CD.dtype), item_CD, input_precision=PRECISION)
    columns = tl.arange(0, BLOCK_D)
    rows = split.to(tl.int64) * num_positions + positions
    inside = (positions < num_positions)[:, None] & (columns < width)[None, :]
    tl.store(out_ptr + rows[:, None] * width + columns[None, :], sum_PD, mask=inside)


@autotuned(_TILES, key=["width"])
@triton.jit
def _candidate_gradient_kernel(
    u_ptr, item_ptr, offset_ptr, ids_ptr, target_ptr, scale_ptr, lse_ptr, weights_ptr, out_ptr, out_offset_ptr,
    num_positions, num_candidates, split_size, width, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
    BLOCK_D: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """out[S, C, D]: sum over a split's positions of weight * probability * u; out_offset[S, C]: the same without u."""
    candidates = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    split = tl.program_id(1)
    scale = tl.load(scale_ptr)
    item_CD = _tile(item_ptr, candidates, num_candidates, width, BLOCK_D)
    sum_CD = tl.zeros([BLOCK_C, BLOCK_D], tl.float32)
    sum_C = tl.zeros([BLOCK_C], tl.float32)
    for start in range(split * split_size, min((split + 1) * split_size, num_positions), BLOCK_P):
        positions = start + tl.arange(0, BLOCK_P)
        u_PD = _tile(u_ptr, positions, num_positions, width, BLOCK_D)
        lse_P = tl.load(lse_ptr + positions, mask=positions < num_positions, other=0.0)
        weight_P = tl.load(weights_ptr + positions, mask=positions < num_positions, other=0.0)
        scores = _scores(
            u_PD, item_CD, positions, candidates, offset_ptr, ids_ptr, target_ptr, scale, num_positions,
            num_candidates, PRECISION,
        )  # fmt: skip
        grad = tl.exp(scores - lse_P[:, None]) * weight_P[:, None]
        sum_CD += tl.dot(tl.trans(grad).to(u_PD.dtype), u_PD, input_precision=PRECISION)
        sum_C += tl.sum(grad, axis=0)
    columns = tl.arange(0, BLOCK_D)
    rows = split.to(tl.int64) * num_candidates + candidates
    inside = (candidates < num_candidates)[:, None] & (columns < width)[None, :]
    tl.store(out_ptr + rows[:, None] * width + columns[None, :], sum_CD, mask=inside)
    tl.store(out_offset_ptr + rows, sum_C, mask=candidates < num_candidates)


# ----------------------------------------------------------------------------------------------------------------------
# Candidates of each position's own.


@autotuned(
    [triton.Config({"BLOCK_C": size}, num_warps=warps) for size, warps in ((16, 2), (32, 4), (64, 4))], key=["width"]
)
@triton.jit
def _sampled_kernel(
    u_ptr, item_ptr, offset_ptr, rows_ptr, scale_ptr, logits_ptr, lse_ptr, mean_ptr, num_candidates, width,
    BLOCK_C: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """One position: logits[C1] (-inf for a negative that is the target), their lse, mean[D] of items by probability."""
    position = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK_D)
    scale = tl.load(scale_ptr)
    u_D = tl.load(u_ptr + position * width + columns, mask=columns < width, other=0.0).to(tl.float32) * scale
    target = tl.load(rows_ptr + position * num_candidates)
    top = tl.full([1], _NEVER, tl.float32)
    total = tl.zeros([1], tl.float32)
    sum_D = tl.zeros([BLOCK_D], tl.float32)
    for start in range(0, num_candidates, BLOCK_C):
        places = start + tl.arange(0, BLOCK_C)
        rows = tl.load(rows_ptr + position * num_candidates + places, mask=places < num_candidates, other=0)
        inside = (places < num_candidates)[:, None] & (columns < width)[None, :]
        item_CD = tl.load(item_ptr + rows[:, None] * width + columns[None, :], mask=inside, other=0.0).to(tl.float32)
        scores = tl.sum(item_CD * u_D[None, :], axis=1)
        scores += tl.load(offset_ptr + rows, mask=places < num_candidates, other=0.0)
        counts = (places < num_candidates) & ((places == 0) | (rows != target))
        scores = tl.where(counts, scores, float("-inf"))
        new_top = tl.maximum(top, tl.max(scores, axis=0))
        weights = tl.exp(scores - new_top)
        kept = tl.exp(top - new_top)
        sum_D = sum_D * kept + tl.sum(weights[:, None] * item_CD, axis=0)
        total = total * kept + tl.sum(weights, axis=0)
        top = new_top
        tl.store(logits_ptr + position * num_candidates + places, scores, mask=places < num_candidates)
    tl.store(lse_ptr + position + tl.arange(0, 1), top + tl.log(total))
    tl.store(mean_ptr + position * width + columns, sum_D / total, mask=columns < width)


@autotuned(_ENTRIES, key=["width"])
@triton.jit
def _sum_by_item_kernel(
    order_ptr, starts_ptr, coefficient_ptr, source_ptr, out_ptr, out_total_ptr, entries_per_source, width,
    BLOCK_E: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """One item: out[D], its entries' sum of coefficient * source[entry // entries_per_source]; sum of coefficients."""
    item = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK_D)
    start = tl.load(starts_ptr + item)
    end = tl.load(starts_ptr + item + 1)
    sum_D = tl.zeros([BLOCK_D], tl.float32)
    total = tl.zeros([1], tl.float32)
    for first in range(start, end, BLOCK_E):
        places = first + tl.arange(0, BLOCK_E)
        entries = tl.load(order_ptr + places, mask=places < end, other=0)
        coefficients = tl.load(coefficient_ptr + entries, mask=places < end, other=0.0)
        inside = (places < end)[:, None] & (columns < width)[None, :]
        rows = entries // entries_per_source
        source = tl.load(source_ptr + rows[:, None] * width + columns[None, :], mask=inside, other=0.0)
        sum_D += tl.sum(coefficients[:, None] * source.to(tl.float32), axis=0)
        total += tl.sum(coefficients, axis=0)
    tl.store(out_ptr + item * width + columns, sum_D, mask=columns < width)
    tl.store(out_total_ptr + item + tl.arange(0, 1), total)


# ----------------------------------------------------------------------------------------------------------------------
# Launchers


@torch.no_grad()
def form_sampled_softmax_triton(
    u_PD: Tensor,
    item_VD: Tensor,
    target_rows_P: Tensor,
    negative_rows_PC: Tensor,
    *,
    scale: Tensor,
    offset_V: Tensor | None,
    weights_P: Tensor | None,
    with_gradients: bool,
) -> FormedSoftmax:
    """``sampled_softmax_loss``, negatives of each position's own; keeps the [P, C1] logits for the items' gradient."""
    u_PD, item_VD = u_PD.contiguous(), item_VD.contiguous()
    weights_P = _weights(u_PD, weights_P)
    rows_PC1 = torch.cat([target_rows_P[:, None], negative_rows_PC], 1)
    num_positions, width = u_PD.shape
    logits_PC1 = u_PD.new_empty(rows_PC1.shape, dtype=torch.float32)
    lse_P = u_PD.new_empty(num_positions, dtype=torch.float32)
    mean_PD = u_PD.new_empty(u_PD.shape, dtype=torch.float32)
    if num_positions:
        _sampled_kernel[(num_positions,)](
            u_PD, item_VD, _offset(item_VD, offset_V), rows_PC1, scale.float(), logits_PC1, lse_P, mean_PD,
            rows_PC1.shape[1], width, BLOCK_D=block_size(width),
        )  # fmt: skip
    loss_P = lse_P - logits_PC1[:, 0]
    loss = (weights_P * loss_P).sum()
    if not with_gradients:
        return without_gradients(loss, loss_P)
    grad_PC1 = (logits_PC1 - lse_P[:, None]).exp_()
    grad_PC1[:, 0] -= 1
    grad_PC1 *= weights_P[:, None]
    by_item_PD = weights_P[:, None] * (mean_PD - item_VD[target_rows_P])
    sums_VD, sums_V = _sum_by_item(rows_PC1, grad_PC1, u_PD, item_VD.shape[0])
    return _formed(loss, loss_P, by_item_PD, sums_VD, sums_V, (u_PD, item_VD, offset_V, scale))


@torch.no_grad()
def form_shared_softmax_triton(
    u_PD: Tensor,
    item_VD: Tensor,
    target_rows_P: Tensor,
    negative_rows_C: Tensor | None,
    *,
    scale: Tensor,
    offset_V: Tensor | None,
    log_q_C: Tensor | None = None,
    log_q_target_P: Tensor | None = None,
    weights_P: Tensor | None,
    with_gradients: bool,
) -> FormedSoftmax:
    """``sampled_softmax_loss`` with shared negatives; without any, ``full_softmax_loss``: all rows are candidates.

    The target of a position is taken out of the candidates and counted by itself.
    """
    u_PD, item_VD = u_PD.contiguous(), item_VD.contiguous()
    weights_P, offset_of_V = _weights(u_PD, weights_P), _offset(item_VD, offset_V)
    ids_C = torch.arange(item_VD.shape[0], device=u_PD.device) if negative_rows_C is None else negative_rows_C
    candidates_CD = item_VD if negative_rows_C is None else item_VD[negative_rows_C]
    offset_C = offset_of_V if negative_rows_C is None else offset_of_V[negative_rows_C]
    if log_q_C is not None:
        offset_C = offset_C - log_q_C.float()
    target_PD = item_VD[target_rows_P].float()
    target_P = scale.float() * (u_PD.float() * target_PD).sum(1) + offset_of_V[target_rows_P]
    if log_q_target_P is not None:
        target_P = target_P - log_q_target_P.float()
    tiles = _Tiles(u_PD, candidates_CD, offset_C, ids_C, target_rows_P, scale.float())
    lse_P = torch.logaddexp(tiles.log_sum_exp(), target_P)
    loss_P = lse_P - target_P
    loss = (weights_P * loss_P).sum()
    if not with_gradients:
        return without_gradients(loss, loss_P)
    miss_P = torch.expm1(target_P - lse_P)  # probability of the target, less 1
    by_item_PD = weights_P[:, None] * (tiles.query_gradient(lse_P) + miss_P[:, None] * target_PD)
    sums_VD, sums_V = tiles.candidate_gradient(lse_P, weights_P)
    if negative_rows_C is not None:
        # rows drawn twice are added in the order they were drawn
        ones_C = sums_V.new_ones(sums_V.shape)
        by_row_V = _sum_by_item(negative_rows_C, ones_C, sums_V[:, None], item_VD.shape[0])[0][:, 0]
        sums_VD, sums_V = _sum_by_item(negative_rows_C, ones_C, sums_VD, item_VD.shape[0])[0], by_row_V
    target_sums_VD, target_sums_V = _sum_by_item(target_rows_P, weights_P * miss_P, u_PD, item_VD.shape[0])
    inputs = (u_PD, item_VD, offset_V, scale)
    return _formed(loss, loss_P, by_item_PD, sums_VD + target_sums_VD, sums_V + target_sums_V, inputs)


class _Tiles:
    """The kernels over tiles of positions and candidates, and how many programs share a block of either."""

    def __init__(
        self, u_PD: Tensor, item_CD: Tensor, offset_C: Tensor, ids_C: Tensor, target_rows_P: Tensor, scale: Tensor
    ) -> None:
        self._inputs = (u_PD, item_CD, offset_C.contiguous(), ids_C, target_rows_P, scale)
        self._num_positions, self._width = u_PD.shape
        self._num_candidates = item_CD.shape[0]
        self._constants = {"BLOCK_D": block_size(self._width), "PRECISION": dot_precision(u_PD.dtype)}
        self._by_position = _split(self._num_positions, self._num_candidates, u_PD.device)
        self._by_candidate = _split(self._num_candidates, self._num_positions, u_PD.device)

    def log_sum_exp(self) -> Tensor:
        num_splits, split_size = self._by_position
        lse_SP = self._inputs[0].new_empty(num_splits, self._num_positions, dtype=torch.float32)
        if self._num_positions:
            _log_sum_exp_kernel[self._position_grid](
                *self._inputs, lse_SP, self._num_positions, self._num_candidates, split_size, self._width,
                **self._constants,
            )  # fmt: skip
        return lse_SP.logsumexp(0)

    def query_gradient(self, lse_P: Tensor) -> Tensor:
        num_splits, split_size = self._by_position
        sums_SPD = lse_P.new_empty(num_splits, self._num_positions, self._width)
        if self._num_positions:
            _query_gradient_kernel[self._position_grid](
                *self._inputs, lse_P, sums_SPD, self._num_positions, self._num_candidates, split_size, self._width,
                **self._constants,
            )  # fmt: skip
        return sums_SPD.sum(0)

    def candidate_gradient(self, lse_P: Tensor, weights_P: Tensor) -> tuple[Tensor, Tensor]:
        """[C, D] and [C]. Weights are taken relative to the largest, or float16 would round 1 / P to nothing."""
        largest = weights_P.abs().max() if weights_P.numel() else weights_P.new_ones(())
        largest = torch.where(largest > 0, largest, 1.0)
        num_splits, split_size = self._by_candidate
        sums_SCD = lse_P.new_empty(num_splits, self._num_candidates, self._width)
        sums_SC = lse_P.new_empty(num_splits, self._num_candidates)
        if self._num_candidates:
            _candidate_gradient_kernel[lambda meta: (triton.cdiv(self._num_candidates, meta["BLOCK_C"]), num_splits)](
                *self._inputs, lse_P, weights_P / largest, sums_SCD, sums_SC, self._num_positions,
                self._num_candidates, split_size, self._width, **self._constants,
            )  # fmt: skip
        return sums_SCD.sum(0) * largest, sums_SC.sum(0) * largest

    def _position_grid(self, meta: dict[str, int]) -> tuple[int, int]:
        return triton.cdiv(self._num_positions, meta["BLOCK_P"]), self._by_position[0]


def _split(num_rows: int, num_summed: int, device: torch.device) -> tuple[int, int]:
    """Programs per block of rows, and how much of the sum each takes: enough to occupy the device twice."""
    programs = 2 * torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 2
    wanted = triton.cdiv(programs, max(1, triton.cdiv(num_rows, 64)))
    split_size = max(128, triton.cdiv(triton.cdiv(num_summed, wanted), 128) * 128) if device.type == "cuda" else 16
    return max(1, triton.cdiv(num_summed, split_size)), split_size


def _sum_by_item(rows: Tensor, coefficients: Tensor, source: Tensor, num_items: int) -> tuple[Tensor, Tensor]:
    """[V, D]: for each item the sum of coefficient * source over its entries, in order; [V]: of the coefficients.

    rows, coefficients: [N] or [N, C1], entries of the rows of source, [N, D].
    """
    rows, order = rows.reshape(-1).sort(stable=True)
    starts = torch.searchsorted(rows, torch.arange(num_items + 1, device=rows.device))
    width = source.shape[1]
    sums_VD = source.new_empty(num_items, width, dtype=torch.float32)
    sums_V = source.new_empty(num_items, dtype=torch.float32)
    if num_items:
        _sum_by_item_kernel[(num_items,)](
            order, starts, coefficients.contiguous(), source.contiguous(), sums_VD, sums_V,
            max(1, rows.shape[0] // max(1, source.shape[0])), width, BLOCK_D=block_size(width),
        )  # fmt: skip
    return sums_VD, sums_V


def _weights(u_PD: Tensor, weights_P: Tensor | None) -> Tensor:
    if weights_P is None:
        return u_PD.new_full((u_PD.shape[0],), 1 / max(u_PD.shape[0], 1), dtype=torch.float32)
    return weights_P.float().contiguous()


def _offset(item_VD: Tensor, offset_V: Tensor | None) -> Tensor:
    if offset_V is None:
        return item_VD.new_zeros(item_VD.shape[0], dtype=torch.float32)
    return offset_V.float().contiguous()


def _formed(
    loss: Tensor,
    loss_P: Tensor,
    by_item_PD: Tensor,
    sums_VD: Tensor,
    sums_V: Tensor,
    inputs: tuple[Tensor, Tensor, Tensor | None, Tensor],
) -> FormedSoftmax:
    u_PD, item_VD, offset_V, scale = inputs
    return FormedSoftmax(
        loss=loss,
        loss_P=loss_P,
        u_PD=(by_item_PD * scale.float()).to(u_PD.dtype),
        item_VD=(sums_VD * scale.float()).to(item_VD.dtype),
        offset_V=loss.new_empty(0) if offset_V is None else sums_V.to(offset_V.dtype),
        scale=(by_item_PD * u_PD).sum().to(scale.dtype),
    )
