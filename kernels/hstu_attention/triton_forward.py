"""The forward kernel of HSTU attention: one program a block of queries of one row and head, long rows first."""
# mypy: ignore-errors

from __future__ import annotations

import triton
import triton.language as tl

from kernels.hstu_attention.triton_tile import (
    add_bias,
    block_of_step,
    block_ranges,
    is_visible,
    is_wholly_visible,
    key_bounds,
    load_block,
    place_of,
    row_bounds,
    sigmoid,
    store_block,
)
from kernels.triton_support import autotuned

_CONFIGS = [
    triton.Config({"BLOCK_M": m, "BLOCK_N": n}, num_warps=warps, num_stages=stages)
    for m, n, warps, stages in [
        (32, 32, 4, 2),
        (64, 32, 4, 3),
        (64, 64, 4, 2),
        (64, 64, 4, 3),
        (64, 64, 4, 4),
        (128, 32, 8, 3),
        (128, 64, 8, 2),
        (128, 64, 8, 3),
        (128, 64, 4, 2),
        (128, 128, 8, 2),
    ]
]


@autotuned(
    _CONFIGS,
    ["WIDTH_A", "WIDTH_V", "HAS_BIAS", "MAX_ATTN_LEN", "length_class"],
    interpreted={"BLOCK_M": 16, "BLOCK_N": 16},
)
@triton.jit(do_not_specialize=["most_queries", "max_len", "length_class"])
def forward_kernel(
    q_ptr, k_ptr, v_ptr, o_ptr,
    order_ptr, offsets_ptr, query_offsets_ptr, num_targets_ptr,
    position_ptr, time_ptr, thresholds_ptr, key_times_ptr, query_times_ptr,
    q_stride, q_head_stride, k_stride, k_head_stride, v_stride, v_head_stride, o_stride, o_head_stride,
    num_heads, most_queries, max_len, alpha, length_class,
    WIDTH_A: tl.constexpr, WIDTH_V: tl.constexpr, BLOCK_A: tl.constexpr, BLOCK_V: tl.constexpr,
    HAS_BIAS: tl.constexpr, MAX_BUCKET: tl.constexpr, HAS_TARGETS: tl.constexpr, CONTEXTUAL_LEN: tl.constexpr,
    MAX_ATTN_LEN: tl.constexpr, MIN_FULL_ATTN_LEN: tl.constexpr, NUM_OLDEST_KEYS: tl.constexpr,
    FAST_SIGMOID: tl.constexpr, PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """o[i] = sum over visible j of silu(alpha * q[i] . k[j] + bias[i, j]) * v[j] / max_len."""
    program = tl.program_id(0)
    head = (program % num_heads).to(tl.int64)
    slot = program // num_heads
    slots = tl.cdiv(most_queries, BLOCK_M)
    row = tl.load(order_ptr + slot // slots)
    key_start, length, query_start, num_queries, history_len = row_bounds(
        row, offsets_ptr, query_offsets_ptr, num_targets_ptr, HAS_TARGETS
    )
    block = tl.cdiv(num_queries, BLOCK_M) - 1 - slot % slots  # the last queries see most keys: they start first
    if block < 0:
        return
    cached = length - num_queries
    local = block * BLOCK_M + tl.arange(0, BLOCK_M)
    first_query = cached + block * BLOCK_M
    last_query = tl.minimum(first_query + BLOCK_M, length) - 1
    query = (cached + local)[:, None]
    query_place = place_of(tl.minimum(query, length - 1), history_len, CONTEXTUAL_LEN)
    q_ptr += query_start * q_stride + head * q_head_stride
    k_ptr += key_start * k_stride + head * k_head_stride
    v_ptr += key_start * v_stride + head * v_head_stride
    o_ptr += query_start * o_stride + head * o_head_stride
    q = load_block(q_ptr, local, num_queries, q_stride, WIDTH_A, BLOCK_A)
    if HAS_BIAS:
        query_s_ptr = query_times_ptr + query_start + tl.minimum(local, num_queries - 1)
        first_query_s = tl.min(tl.load(query_s_ptr), axis=0)
        last_query_s = tl.max(tl.load(query_s_ptr), axis=0)

    oldest, start, stop, own = key_bounds(
        first_query, last_query, history_len, HAS_TARGETS, CONTEXTUAL_LEN, MAX_ATTN_LEN, MIN_FULL_ATTN_LEN,
        NUM_OLDEST_KEYS,
    )  # fmt: skip
    oldest_blocks, start_block, own_from, own_block, steps = block_ranges(
        oldest, start, stop, own, last_query + 1, BLOCK_N
    )
    acc = tl.zeros([BLOCK_M, BLOCK_V], tl.float32)
    for step in range(steps):
        first_key = block_of_step(step, oldest_blocks, start_block, own_from, own_block) * BLOCK_N
        last_key = tl.minimum(first_key + BLOCK_N, length) - 1
        at = first_key + tl.arange(0, BLOCK_N)
        k = load_block(k_ptr, at, length, k_stride, WIDTH_A, BLOCK_A)
        v = load_block(v_ptr, at, length, v_stride, WIDTH_V, BLOCK_V)
        score = tl.dot(q, tl.trans(k), input_precision=PRECISION) * alpha
        inside = tl.minimum(at, length - 1)
        key_place = place_of(inside, history_len, CONTEXTUAL_LEN)[None, :]
        if HAS_BIAS:
            key_s_ptr = key_times_ptr + key_start + inside
            shortest = first_query_s - tl.max(tl.load(key_s_ptr), axis=0)
            longest = last_query_s - tl.min(tl.load(key_s_ptr), axis=0)
            score = add_bias(
                score, key_place - query_place + (max_len - 1), query_s_ptr[:, None], key_s_ptr[None, :], shortest,
                longest, position_ptr, time_ptr, thresholds_ptr, MAX_BUCKET,
            )  # fmt: skip
        weight = score * sigmoid(score, FAST_SIGMOID)
        if not is_wholly_visible(
            first_query, last_query, first_key, last_key, history_len, CONTEXTUAL_LEN, MAX_ATTN_LEN,
            MIN_FULL_ATTN_LEN, NUM_OLDEST_KEYS,
        ):  # fmt: skip
            visible = is_visible(
                query, at[None, :], query_place, key_place, history_len, HAS_TARGETS, CONTEXTUAL_LEN, MAX_ATTN_LEN,
                MIN_FULL_ATTN_LEN, NUM_OLDEST_KEYS,
            )  # fmt: skip
            weight = tl.where(visible, weight, 0.0)
        acc = tl.dot(weight.to(v.dtype), v, acc, input_precision=PRECISION)
    store_block(o_ptr, acc / max_len, local, num_queries, o_stride, WIDTH_V, BLOCK_V)
