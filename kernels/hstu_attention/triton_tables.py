"""The backward kernel of the bias tables: the gradient of every score, summed by distance and by time bucket.

Adding each score's gradient to its two table entries would be one atomic operation a score, most of them to the same
few addresses. Instead each program adds up tiles that lie on one block diagonal: equal elements of such tiles have
equal distances, so that a tile of all heads is one addition to a tile in registers, whose diagonals are summed once
at the end. By time bucket a tile is reduced after its heads are summed; far from the diagonal it holds one bucket or
few. Every program writes to partial tables of its own: no atomic operations, and equal results in every run.
"""
# mypy: ignore-errors

from __future__ import annotations

import triton
import triton.language as tl

from kernels.hstu_attention.triton_tile import (
    add_bias,
    is_visible,
    is_wholly_visible,
    key_bounds,
    load_block,
    place_of,
    row_bounds,
    silu_slope,
    time_bucket,
)
from kernels.triton_support import autotuned

_CONFIGS = [
    triton.Config({"BLOCK": block, "TILES": 8}, num_warps=warps, num_stages=stages)
    for block, warps, stages in [(32, 4, 2), (32, 4, 3), (64, 4, 2), (64, 8, 2), (64, 8, 3)]
]


@triton.jit
def _fold(total, index, first, history_len, AXIS: tl.constexpr, CONTEXTUAL_LEN: tl.constexpr, BLOCK: tl.constexpr):
    """Add what lies on indices that share a place to one of them, along an axis of a tile; zero on the others.

    The one of contextual positions is the last, the one of targets the first in the tile: there, as everywhere
    else, index minus ``_origin`` is where the element stands in the block.
    """
    SHIFT: tl.constexpr = CONTEXTUAL_LEN - 1 if CONTEXTUAL_LEN > 1 else 0
    early = index < SHIFT
    late = index > history_len
    sum_early = tl.expand_dims(tl.sum(tl.where(early, total, 0.0), axis=AXIS), AXIS)
    sum_late = tl.expand_dims(tl.sum(tl.where(late, total, 0.0), axis=AXIS), AXIS)
    total = tl.where(early | late, 0.0, total)
    total += tl.where(index == tl.minimum(first + BLOCK - 1, SHIFT), sum_early, 0.0)
    return total + tl.where(index == tl.maximum(first, history_len), sum_late, 0.0)


@triton.jit
def _origin(first, history_len, CONTEXTUAL_LEN: tl.constexpr, BLOCK: tl.constexpr):
    """The place from which the elements of a folded block count."""
    SHIFT: tl.constexpr = CONTEXTUAL_LEN - 1 if CONTEXTUAL_LEN > 1 else 0
    return tl.minimum(tl.maximum(first - SHIFT, 1 - BLOCK), history_len - SHIFT)


@triton.jit
def _add_diagonals(table_ptr, total, distance, table_len, BLOCK: tl.constexpr):
    """table[distance + column - row] += total[row, column]."""
    row = tl.arange(0, BLOCK)[:, None]
    column = tl.arange(0, BLOCK)
    turned = row + column[None, :]
    straight = tl.gather(total, turned % BLOCK, 1)  # each column now holds two diagonals, one above the other
    above = distance + column
    inside = (above >= 0) & (above < table_len)
    held = tl.load(table_ptr + above, mask=inside, other=0.0)
    tl.store(table_ptr + above, held + tl.sum(tl.where(turned < BLOCK, straight, 0.0), axis=0), mask=inside)
    below = above - BLOCK
    inside = (below >= 0) & (below < table_len)
    held = tl.load(table_ptr + below, mask=inside, other=0.0)
    tl.store(table_ptr + below, held + tl.sum(tl.where(turned >= BLOCK, straight, 0.0), axis=0), mask=inside)
    tl.debug_barrier()  # the next call may add to the same entries from other threads


@triton.jit
def _add_buckets(
    sums, total, query_s_ptr, key_s_ptr, shortest, longest, thresholds_ptr, MAX_BUCKET: tl.constexpr,
    BLOCK_BUCKETS: tl.constexpr,
):  # fmt: skip
    """sums[bucket of each gap] += total."""
    lane = tl.arange(0, BLOCK_BUCKETS)
    first = time_bucket(tl.maximum(shortest, 0), thresholds_ptr, MAX_BUCKET)
    last = time_bucket(tl.maximum(tl.abs(shortest), tl.abs(longest)), thresholds_ptr, MAX_BUCKET)
    if first == last:
        sums += tl.where(lane == first, tl.sum(total), 0.0)
    else:
        bucket = time_bucket(tl.abs(tl.load(query_s_ptr) - tl.load(key_s_ptr)), thresholds_ptr, MAX_BUCKET)
        for each in range(first, last + 1):
            sums += tl.where(lane == each, tl.sum(tl.where(bucket == each, total, 0.0)), 0.0)
    return sums


@autotuned(
    _CONFIGS,
    ["WIDTH_A", "WIDTH_V", "MAX_ATTN_LEN", "length_class"],
    interpreted={"BLOCK": 16, "TILES": 2},
    reset_to_zero=["position_sums_ptr"],
)
@triton.jit(do_not_specialize=["num_rows", "table_len", "max_len", "length_class"])
def table_gradient_kernel(
    q_ptr, k_ptr, v_ptr, grad_ptr, position_sums_ptr, time_sums_ptr,
    order_ptr, offsets_ptr, query_offsets_ptr, num_targets_ptr,
    position_ptr, time_ptr, thresholds_ptr, key_times_ptr, query_times_ptr,
    q_stride, q_head_stride, k_stride, k_head_stride, v_stride, v_head_stride, grad_stride, grad_head_stride,
    num_rows, num_heads, table_len, max_len, alpha, length_class,
    WIDTH_A: tl.constexpr, WIDTH_V: tl.constexpr, BLOCK_A: tl.constexpr, BLOCK_V: tl.constexpr,
    MAX_BUCKET: tl.constexpr, BLOCK_BUCKETS: tl.constexpr, HAS_TARGETS: tl.constexpr, CONTEXTUAL_LEN: tl.constexpr,
    MAX_ATTN_LEN: tl.constexpr, MIN_FULL_ATTN_LEN: tl.constexpr, NUM_OLDEST_KEYS: tl.constexpr,
    FAST_SIGMOID: tl.constexpr, PRECISION: tl.constexpr, TILES: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """This program's share of the sums over heads and pairs of the scores' gradients times max_len.

    An item of work is a row, a block diagonal of it and up to TILES blocks of queries along the diagonal; the
    items are dealt to the programs like cards. Blocks of queries start at multiples of BLOCK of the row's indices,
    cached or not.
    """
    program = tl.program_id(0)
    num_programs = tl.num_programs(0)
    position_sums_ptr += program.to(tl.int64) * table_len
    lane = tl.arange(0, BLOCK)
    time_sums = tl.zeros([BLOCK_BUCKETS], tl.float32)
    dealt = 0
    for rank in range(num_rows):
        row = tl.load(order_ptr + rank)
        key_start, length, query_start, num_queries, history_len = row_bounds(
            row, offsets_ptr, query_offsets_ptr, num_targets_ptr, HAS_TARGETS
        )
        cached = length - num_queries
        num_blocks = tl.cdiv(length, BLOCK)
        runs = tl.cdiv(num_blocks - cached // BLOCK, TILES)
        diagonals = num_blocks
        if CONTEXTUAL_LEN > 0:
            diagonals = 2 * num_blocks - 1  # contextual queries see later keys
        items = tl.where(num_queries > 0, runs * diagonals, 0)
        mine = (program - dealt % num_programs + num_programs) % num_programs
        dealt += items
        for item in range(mine, items, num_programs):
            diagonal = item % diagonals  # how many blocks the keys are behind the queries
            if CONTEXTUAL_LEN > 0:
                diagonal -= num_blocks - 1
            first_block = cached // BLOCK + item // diagonals * TILES
            stop_block = tl.minimum(tl.minimum(first_block + TILES, num_blocks), num_blocks + diagonal)
            banded = tl.zeros([BLOCK, BLOCK], tl.float32)
            num_banded = 0
            for block in range(tl.maximum(first_block, diagonal), stop_block):
                first_query = block * BLOCK
                first_key = (block - diagonal) * BLOCK
                last_query = tl.minimum(first_query + BLOCK, length) - 1
                last_key = tl.minimum(first_key + BLOCK, length) - 1
                oldest, start, stop, own = key_bounds(
                    tl.maximum(first_query, cached), last_query, history_len, HAS_TARGETS, CONTEXTUAL_LEN,
                    MAX_ATTN_LEN, MIN_FULL_ATTN_LEN, NUM_OLDEST_KEYS,
                )  # fmt: skip
                seen = (first_key < oldest) | ((last_key >= start) & (first_key < stop))
                if seen | ((last_key >= own) & (first_key <= last_query)):
                    query = first_query + lane
                    key = first_key + lane
                    inside_query = tl.minimum(tl.maximum(query, cached), length - 1)
                    inside_key = tl.minimum(key, length - 1)
                    query_place = place_of(inside_query, history_len, CONTEXTUAL_LEN)[:, None]
                    key_place = place_of(inside_key, history_len, CONTEXTUAL_LEN)[None, :]
                    query_s_ptr = query_times_ptr + query_start + inside_query - cached
                    key_s_ptr = key_times_ptr + key_start + inside_key
                    query_s = tl.load(query_s_ptr)
                    key_s = tl.load(key_s_ptr)
                    shortest = tl.min(query_s, axis=0) - tl.max(key_s, axis=0)
                    longest = tl.max(query_s, axis=0) - tl.min(key_s, axis=0)
                    total = tl.zeros([BLOCK, BLOCK], tl.float32)
                    bias = add_bias(
                        total, key_place - query_place + (max_len - 1), query_s_ptr[:, None], key_s_ptr[None, :],
                        shortest, longest, position_ptr, time_ptr, thresholds_ptr, MAX_BUCKET,
                    )  # fmt: skip
                    for each in range(num_heads):
                        head = tl.cast(each, tl.int64)
                        q = load_block(
                            q_ptr + query_start * q_stride + head * q_head_stride, query - cached, num_queries,
                            q_stride, WIDTH_A, BLOCK_A,
                        )  # fmt: skip
                        k = load_block(
                            k_ptr + key_start * k_stride + head * k_head_stride, key, length, k_stride, WIDTH_A, BLOCK_A
                        )
                        v = load_block(
                            v_ptr + key_start * v_stride + head * v_head_stride, key, length, v_stride, WIDTH_V, BLOCK_V
                        )
                        grad = load_block(
                            grad_ptr + query_start * grad_stride + head * grad_head_stride, query - cached, num_queries,
                            grad_stride, WIDTH_V, BLOCK_V,
                        )  # fmt: skip
                        score = tl.dot(q, tl.trans(k), input_precision=PRECISION) * alpha + bias
                        _weight, slope = silu_slope(score, FAST_SIGMOID)
                        total += tl.dot(grad, tl.trans(v), input_precision=PRECISION) * slope
                    if not is_wholly_visible(
                        first_query, last_query, first_key, last_key, history_len, CONTEXTUAL_LEN, MAX_ATTN_LEN,
                        MIN_FULL_ATTN_LEN, NUM_OLDEST_KEYS,
                    ):  # fmt: skip
                        visible = is_visible(
                            query[:, None], key[None, :], query_place, key_place, history_len, HAS_TARGETS,
                            CONTEXTUAL_LEN, MAX_ATTN_LEN, MIN_FULL_ATTN_LEN, NUM_OLDEST_KEYS,
                        )  # fmt: skip
                        total = tl.where(visible, total, 0.0)
                    time_sums = _add_buckets(
                        time_sums, total, query_s_ptr[:, None], key_s_ptr[None, :], shortest, longest, thresholds_ptr,
                        MAX_BUCKET, BLOCK_BUCKETS,
                    )  # fmt: skip
                    if HAS_TARGETS or CONTEXTUAL_LEN > 1:
                        distance = _origin(first_key, history_len, CONTEXTUAL_LEN, BLOCK) - _origin(
                            first_query, history_len, CONTEXTUAL_LEN, BLOCK
                        )
                        first = tl.minimum(first_query, first_key)
                        last = tl.maximum(last_query, last_key)
                        if (first < CONTEXTUAL_LEN - 1) | (last > history_len):
                            total = _fold(total, query[:, None], first_query, history_len, 0, CONTEXTUAL_LEN, BLOCK)
                            total = _fold(total, key[None, :], first_key, history_len, 1, CONTEXTUAL_LEN, BLOCK)
                        if distance == -diagonal * BLOCK:
                            banded += total
                            num_banded += 1
                        else:
                            _add_diagonals(position_sums_ptr, total, distance + max_len - 1, table_len, BLOCK)
                    else:
                        banded += total
                        num_banded += 1
            if num_banded > 0:
                _add_diagonals(position_sums_ptr, banded, max_len - 1 - diagonal * BLOCK, table_len, BLOCK)
    buckets = tl.arange(0, BLOCK_BUCKETS)
    tl.store(time_sums_ptr + program * (MAX_BUCKET + 1) + buckets, time_sums, mask=buckets <= MAX_BUCKET)
