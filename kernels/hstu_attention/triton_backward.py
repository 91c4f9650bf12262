"""The backward kernels of HSTU attention for q, k and v. Both form the scores anew: none stores more than its result.

One program a block of queries adds up dq; one program a block of keys adds up dk and dv, over the tile turned round
(keys down, queries across) so that its weights multiply from registers. No atomic operations: the sums are always
formed in the same order.
"""
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
    query_bounds,
    row_bounds,
    silu_slope,
    store_block,
)
from kernels.triton_support import autotuned

_KEY = ["WIDTH_A", "WIDTH_V", "HAS_BIAS", "MAX_ATTN_LEN", "length_class"]


def _configs(*blocks: tuple[int, int, int, int]) -> list[triton.Config]:
    return [
        triton.Config({"BLOCK_M": m, "BLOCK_N": n}, num_warps=warps, num_stages=stages)
        for m, n, warps, stages in blocks
    ]


_QUERY_CONFIGS = _configs(
    (32, 32, 4, 2), (64, 32, 4, 3), (64, 64, 4, 2), (64, 64, 4, 3), (64, 64, 8, 2), (128, 32, 8, 3), (128, 64, 8, 2),
    (128, 64, 8, 3),
)  # fmt: skip
_KEY_CONFIGS = _configs(
    (32, 32, 4, 2), (32, 64, 4, 2), (32, 64, 4, 3), (64, 64, 4, 2), (32, 64, 8, 2), (64, 64, 8, 2), (64, 64, 8, 3),
    (32, 128, 8, 2), (64, 128, 8, 2),
)  # fmt: skip


@autotuned(_QUERY_CONFIGS, _KEY, interpreted={"BLOCK_M": 16, "BLOCK_N": 16})
@triton.jit(do_not_specialize=["most_queries", "max_len", "length_class"])
def query_gradient_kernel(
    q_ptr, k_ptr, v_ptr, grad_ptr, dq_ptr,
    order_ptr, offsets_ptr, query_offsets_ptr, num_targets_ptr,
    position_ptr, time_ptr, thresholds_ptr, key_times_ptr, query_times_ptr,
    q_stride, q_head_stride, k_stride, k_head_stride, v_stride, v_head_stride, grad_stride, grad_head_stride,
    dq_stride, dq_head_stride,
    num_heads, most_queries, max_len, alpha, length_class,
    WIDTH_A: tl.constexpr, WIDTH_V: tl.constexpr, BLOCK_A: tl.constexpr, BLOCK_V: tl.constexpr,
    HAS_BIAS: tl.constexpr, MAX_BUCKET: tl.constexpr, HAS_TARGETS: tl.constexpr, CONTEXTUAL_LEN: tl.constexpr,
    MAX_ATTN_LEN: tl.constexpr, MIN_FULL_ATTN_LEN: tl.constexpr, NUM_OLDEST_KEYS: tl.constexpr,
    FAST_SIGMOID: tl.constexpr, PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """dq[i] = alpha / max_len * sum over visible j of (grad[i] . v[j]) * silu'(score[i, j]) * k[j]."""
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
    grad_ptr += query_start * grad_stride + head * grad_head_stride
    dq_ptr += query_start * dq_stride + head * dq_head_stride
    q = load_block(q_ptr, local, num_queries, q_stride, WIDTH_A, BLOCK_A)
    grad = load_block(grad_ptr, local, num_queries, grad_stride, WIDTH_V, BLOCK_V)
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
    dq = tl.zeros([BLOCK_M, BLOCK_A], tl.float32)
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
        _weight, slope = silu_slope(score, FAST_SIGMOID)
        dscore = tl.dot(grad, tl.trans(v), input_precision=PRECISION) * slope
        if not is_wholly_visible(
            first_query, last_query, first_key, last_key, history_len, CONTEXTUAL_LEN, MAX_ATTN_LEN,
            MIN_FULL_ATTN_LEN, NUM_OLDEST_KEYS,
        ):  # fmt: skip
            visible = is_visible(
                query, at[None, :], query_place, key_place, history_len, HAS_TARGETS, CONTEXTUAL_LEN, MAX_ATTN_LEN,
                MIN_FULL_ATTN_LEN, NUM_OLDEST_KEYS,
            )  # fmt: skip
            dscore = tl.where(visible, dscore, 0.0)
        dq = tl.dot(dscore.to(k.dtype), k, dq, input_precision=PRECISION)
    store_block(dq_ptr, dq * (alpha / max_len), local, num_queries, dq_stride, WIDTH_A, BLOCK_A)


@autotuned(_KEY_CONFIGS, _KEY, interpreted={"BLOCK_M": 16, "BLOCK_N": 16})
@triton.jit(do_not_specialize=["most_keys", "max_len", "length_class"])
def key_gradient_kernel(
    q_ptr, k_ptr, v_ptr, grad_ptr, dk_ptr, dv_ptr,
    order_ptr, offsets_ptr, query_offsets_ptr, num_targets_ptr,
    position_ptr, time_ptr, thresholds_ptr, key_times_ptr, query_times_ptr,
    q_stride, q_head_stride, k_stride, k_head_stride, v_stride, v_head_stride, grad_stride, grad_head_stride,
    dk_stride, dk_head_stride, dv_stride, dv_head_stride,
    num_heads, most_keys, max_len, alpha, length_class,
    WIDTH_A: tl.constexpr, WIDTH_V: tl.constexpr, BLOCK_A: tl.constexpr, BLOCK_V: tl.constexpr,
    HAS_BIAS: tl.constexpr, MAX_BUCKET: tl.constexpr, HAS_TARGETS: tl.constexpr, CONTEXTUAL_LEN: tl.constexpr,
    MAX_ATTN_LEN: tl.constexpr, MIN_FULL_ATTN_LEN: tl.constexpr, NUM_OLDEST_KEYS: tl.constexpr,
    FAST_SIGMOID: tl.constexpr, PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """dv[j] = sum over i that see j of silu(score[i, j]) * grad[i] / max_len; dk[j] as dq, with q[i]."""
    program = tl.program_id(0)
    head = (program % num_heads).to(tl.int64)
    slot = program // num_heads
    slots = tl.cdiv(most_keys, BLOCK_N)
    row = tl.load(order_ptr + slot // slots)
    key_start, length, query_start, num_queries, history_len = row_bounds(
        row, offsets_ptr, query_offsets_ptr, num_targets_ptr, HAS_TARGETS
    )
    first_key = slot % slots * BLOCK_N  # the first keys are seen by most queries
    if first_key >= length:
        return
    cached = length - num_queries
    last_key = tl.minimum(first_key + BLOCK_N, length) - 1
    at = first_key + tl.arange(0, BLOCK_N)
    key = at[:, None]
    key_place = place_of(tl.minimum(key, length - 1), history_len, CONTEXTUAL_LEN)
    q_ptr += query_start * q_stride + head * q_head_stride
    k_ptr += key_start * k_stride + head * k_head_stride
    v_ptr += key_start * v_stride + head * v_head_stride
    grad_ptr += query_start * grad_stride + head * grad_head_stride
    dk_ptr += key_start * dk_stride + head * dk_head_stride
    dv_ptr += key_start * dv_stride + head * dv_head_stride
    k = load_block(k_ptr, at, length, k_stride, WIDTH_A, BLOCK_A)
    v = load_block(v_ptr, at, length, v_stride, WIDTH_V, BLOCK_V)
    if HAS_BIAS:
        key_s_ptr = key_times_ptr + key_start + tl.minimum(at, length - 1)
        first_key_s = tl.min(tl.load(key_s_ptr), axis=0)
        last_key_s = tl.max(tl.load(key_s_ptr), axis=0)

    contextual, start, stop, full = query_bounds(
        first_key, last_key, cached, num_queries, history_len, HAS_TARGETS, CONTEXTUAL_LEN, MAX_ATTN_LEN,
        MIN_FULL_ATTN_LEN, NUM_OLDEST_KEYS,
    )  # fmt: skip
    contextual_blocks, start_block, full_from, full_block, steps = block_ranges(
        contextual, start, stop, full, num_queries, BLOCK_M
    )
    dk = tl.zeros([BLOCK_N, BLOCK_A], tl.float32)
    dv = tl.zeros([BLOCK_N, BLOCK_V], tl.float32)
    for step in range(steps):
        first = block_of_step(step, contextual_blocks, start_block, full_from, full_block) * BLOCK_M
        local = first + tl.arange(0, BLOCK_M)
        first_query = cached + first
        last_query = tl.minimum(first_query + BLOCK_M, length) - 1
        q = load_block(q_ptr, local, num_queries, q_stride, WIDTH_A, BLOCK_A)
        grad = load_block(grad_ptr, local, num_queries, grad_stride, WIDTH_V, BLOCK_V)
        score = tl.dot(k, tl.trans(q), input_precision=PRECISION) * alpha
        inside = tl.minimum(local, num_queries - 1)
        query_place = place_of(cached + inside, history_len, CONTEXTUAL_LEN)[None, :]
        if HAS_BIAS:
            query_s_ptr = query_times_ptr + query_start + inside
            shortest = tl.min(tl.load(query_s_ptr), axis=0) - last_key_s
            longest = tl.max(tl.load(query_s_ptr), axis=0) - first_key_s
            score = add_bias(
                score, key_place - query_place + (max_len - 1), query_s_ptr[None, :], key_s_ptr[:, None], shortest,
                longest, position_ptr, time_ptr, thresholds_ptr, MAX_BUCKET,
            )  # fmt: skip
        weight, slope = silu_slope(score, FAST_SIGMOID)
        dscore = tl.dot(v, tl.trans(grad), input_precision=PRECISION) * slope
        if not is_wholly_visible(
            first_query, last_query, first_key, last_key, history_len, CONTEXTUAL_LEN, MAX_ATTN_LEN,
            MIN_FULL_ATTN_LEN, NUM_OLDEST_KEYS,
        ):  # fmt: skip
            visible = is_visible(
                (cached + local)[None, :], key, query_place, key_place, history_len, HAS_TARGETS, CONTEXTUAL_LEN,
                MAX_ATTN_LEN, MIN_FULL_ATTN_LEN, NUM_OLDEST_KEYS,
            )  # fmt: skip
            weight = tl.where(visible, weight, 0.0)
            dscore = tl.where(visible, dscore, 0.0)
        dv = tl.dot(weight.to(grad.dtype), grad, dv, input_precision=PRECISION)
        dk = tl.dot(dscore.to(q.dtype), q, dk, input_precision=PRECISION)
    store_block(dk_ptr, dk * (alpha / max_len), at, length, dk_stride, WIDTH_A, BLOCK_A)
    store_block(dv_ptr, dv / max_len, at, length, dv_stride, WIDTH_V, BLOCK_V)
