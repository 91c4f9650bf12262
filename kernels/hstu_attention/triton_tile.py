"""What the Triton kernels of HSTU attention do with a tile of scores: which exist, the bias, the activation.

A tile is a block of one row's queries against a block of its keys. Its index tensors are passed ready to broadcast
(one of them [rows, 1], the other [1, columns]), so that a kernel may hold the tile either way round.
"""
# mypy: ignore-errors

from __future__ import annotations

import math

import triton
import triton.language as tl

from kernels.hstu_attention.bias import BUCKET_WIDTH

_BUCKETS_PER_OCTAVE = tl.constexpr(math.log(2) / BUCKET_WIDTH)
_MARGIN = tl.constexpr(1e-3)
"""Hundredfold the error of the float32 logarithm, in buckets: the estimate is never too high, and at most 1 too low."""
_FEW_BUCKETS = tl.constexpr(2)
"""Buckets after the first that a tile may hold to be compared with borders instead of taking logarithms."""
_INT32_LIMIT = tl.constexpr(2**31 - 1)


@triton.jit
def row_bounds(row, offsets_ptr, query_offsets_ptr, num_targets_ptr, HAS_TARGETS: tl.constexpr):
    """First packed key and number of keys; first packed query and number of queries; index behind the history."""
    key_start = tl.load(offsets_ptr + row)
    length = (tl.load(offsets_ptr + row + 1) - key_start).to(tl.int32)
    query_start = tl.load(query_offsets_ptr + row)
    num_queries = (tl.load(query_offsets_ptr + row + 1) - query_start).to(tl.int32)
    history_len = length
    if HAS_TARGETS:
        history_len = length - tl.load(num_targets_ptr + row).to(tl.int32)
    return key_start, length, query_start, num_queries, history_len


@triton.jit
def place_of(index, history_len, CONTEXTUAL_LEN: tl.constexpr):
    """The place of an index of a row, see mask.py."""
    SHIFT: tl.constexpr = CONTEXTUAL_LEN - 1 if CONTEXTUAL_LEN > 1 else 0
    return tl.minimum(tl.maximum(index - SHIFT, 0), history_len - SHIFT)


@triton.jit
def key_bounds(
    first, last, history_len,
    HAS_TARGETS: tl.constexpr, CONTEXTUAL_LEN: tl.constexpr, MAX_ATTN_LEN: tl.constexpr,
    MIN_FULL_ATTN_LEN: tl.constexpr, NUM_OLDEST_KEYS: tl.constexpr,
):  # fmt: skip
    """The keys that the queries with the indices first to last may see: three ranges of indices, ascending.

    [0, oldest), [start, stop) and [own, last], where the last one is of targets, which see themselves.
    """
    SHIFT: tl.constexpr = CONTEXTUAL_LEN - 1 if CONTEXTUAL_LEN > 1 else 0
    start = first * 0
    oldest = first * 0
    if MAX_ATTN_LEN >= 0:
        farthest = place_of(first, history_len, CONTEXTUAL_LEN) - MAX_ATTN_LEN
        unlimited = farthest <= 0
        if MIN_FULL_ATTN_LEN > 0:
            newest = place_of(last, history_len, CONTEXTUAL_LEN)
            unlimited = unlimited | (newest >= history_len - SHIFT - MIN_FULL_ATTN_LEN)
        start = tl.where(unlimited, 0, farthest + SHIFT)
        oldest = tl.minimum(start, NUM_OLDEST_KEYS)
    stop = last + 1
    own = last + 1
    if CONTEXTUAL_LEN > 0:
        stop = tl.where(first < CONTEXTUAL_LEN, tl.maximum(stop, history_len), stop)
    if HAS_TARGETS:
        stop = tl.minimum(stop, history_len)
        own = tl.minimum(tl.maximum(first, history_len), own)
    return oldest, start, stop, own


@triton.jit
def block_ranges(first_stop, start, stop, second_start, second_stop, BLOCK: tl.constexpr):
    """Cut [0, first_stop), [start, stop) and [second_start, second_stop) into blocks, none of them twice.

    Steps before the first number returned are blocks of the first range, counted from 0; those before the third are
    of the middle one, counted from the second number; the rest count from the fourth. The fifth: how many steps.
    """
    first_blocks = tl.cdiv(first_stop, BLOCK)
    start_block = tl.maximum(start // BLOCK, first_blocks)
    stop_block = tl.maximum(tl.cdiv(stop, BLOCK), start_block)
    second_block = tl.maximum(second_start // BLOCK, stop_block)
    second_from = first_blocks + stop_block - start_block
    second_blocks = tl.where(second_start < second_stop, tl.cdiv(second_stop, BLOCK) - second_block, 0)
    return first_blocks, start_block, second_from, second_block, second_from + tl.maximum(second_blocks, 0)


@triton.jit
def block_of_step(step, first_blocks, start_block, second_from, second_block):
    """The block of a step of ``block_ranges``: one loop runs over all three, and so do the loads ahead of it."""
    block = tl.where(step < first_blocks, step, step - first_blocks + start_block)
    return tl.where(step < second_from, block, step - second_from + second_block)


@triton.jit
def query_bounds(
    first, last, cached, num_queries, history_len,
    HAS_TARGETS: tl.constexpr, CONTEXTUAL_LEN: tl.constexpr, MAX_ATTN_LEN: tl.constexpr,
    MIN_FULL_ATTN_LEN: tl.constexpr, NUM_OLDEST_KEYS: tl.constexpr,
):  # fmt: skip
    """The queries that may see the keys with the indices first to last: three ranges of queries (0: index ``cached``).

    [0, contextual), [start, stop) and [full, num_queries), where the last one is of queries without a limit.
    """
    SHIFT: tl.constexpr = CONTEXTUAL_LEN - 1 if CONTEXTUAL_LEN > 1 else 0
    contextual = first * 0
    start = tl.maximum(first - cached, 0)
    stop = num_queries
    full = num_queries
    if CONTEXTUAL_LEN > 0:
        contextual = tl.minimum(tl.maximum(CONTEXTUAL_LEN - cached, 0), num_queries)
        contextual = tl.where(first < history_len, contextual, 0)
    if MAX_ATTN_LEN >= 0:
        farthest = place_of(last, history_len, CONTEXTUAL_LEN) + MAX_ATTN_LEN
        limited = farthest < history_len - SHIFT
        if NUM_OLDEST_KEYS > 0:
            limited = limited & (first >= NUM_OLDEST_KEYS)
        stop = tl.where(limited, tl.minimum(farthest + SHIFT + 1 - cached, num_queries), num_queries)
        if MIN_FULL_ATTN_LEN > 0:
            full = tl.where(limited, tl.maximum(history_len - MIN_FULL_ATTN_LEN - cached, 0), num_queries)
            full = tl.minimum(full, num_queries)
    if HAS_TARGETS:
        only_targets = first >= history_len
        stop = tl.where(only_targets, last + 1 - cached, stop)
        full = tl.where(only_targets, num_queries, full)
    return contextual, start, tl.maximum(start, stop), full


@triton.jit
def is_wholly_visible(
    first_query, last_query, first_key, last_key, history_len,
    CONTEXTUAL_LEN: tl.constexpr, MAX_ATTN_LEN: tl.constexpr, MIN_FULL_ATTN_LEN: tl.constexpr,
    NUM_OLDEST_KEYS: tl.constexpr,
):  # fmt: skip
    """Every query of a tile sees every key of it for the plain reason, so that no mask need be made."""
    SHIFT: tl.constexpr = CONTEXTUAL_LEN - 1 if CONTEXTUAL_LEN > 1 else 0
    visible = (last_key < first_query) & (last_key < history_len)
    if SHIFT > 0:
        visible = visible & (first_query > SHIFT)
    if MAX_ATTN_LEN >= 0:
        longest = place_of(last_query, history_len, CONTEXTUAL_LEN) - place_of(first_key, history_len, CONTEXTUAL_LEN)
        near = longest <= MAX_ATTN_LEN
        if MIN_FULL_ATTN_LEN > 0:
            oldest_query = place_of(first_query, history_len, CONTEXTUAL_LEN)
            near = near | (oldest_query >= history_len - SHIFT - MIN_FULL_ATTN_LEN)
        if NUM_OLDEST_KEYS > 0:
            near = near | (last_key < NUM_OLDEST_KEYS)
        visible = visible & near
    return visible


@triton.jit
def is_visible(
    query, key, query_place, key_place, history_len,
    HAS_TARGETS: tl.constexpr, CONTEXTUAL_LEN: tl.constexpr, MAX_ATTN_LEN: tl.constexpr,
    MIN_FULL_ATTN_LEN: tl.constexpr, NUM_OLDEST_KEYS: tl.constexpr,
):  # fmt: skip
    """AttentionMask.visible of indices and places that broadcast to the tile."""
    SHIFT: tl.constexpr = CONTEXTUAL_LEN - 1 if CONTEXTUAL_LEN > 1 else 0
    if not HAS_TARGETS and CONTEXTUAL_LEN == 0 and MAX_ATTN_LEN < 0:
        visible = query >= key
    else:
        visible = query_place > key_place
        if MAX_ATTN_LEN >= 0:
            near = query_place - key_place <= MAX_ATTN_LEN
            if MIN_FULL_ATTN_LEN > 0:
                near = near | (query_place >= history_len - SHIFT - MIN_FULL_ATTN_LEN)
            if NUM_OLDEST_KEYS > 0:
                near = near | (key < NUM_OLDEST_KEYS)
            visible = visible & near
        if CONTEXTUAL_LEN > 0:
            visible = visible | ((query_place == 0) & (key_place < history_len - SHIFT))
        visible = visible | (query == key)
    return visible


@triton.jit
def time_bucket(gap_s, thresholds_ptr, MAX_BUCKET: tl.constexpr):
    """The bucket of gaps >= 0, exactly bias.time_bucket: a float32 estimate, then one comparison with its border."""
    steps = tl.log2(tl.maximum(gap_s.to(tl.float32), 1.0)) * _BUCKETS_PER_OCTAVE - _MARGIN
    below = tl.minimum(steps.to(tl.int32), MAX_BUCKET)
    above = (gap_s >= tl.load(thresholds_ptr + below + 1)).to(tl.int32)
    return tl.minimum(below + above, MAX_BUCKET)


@triton.jit
def add_bias(
    score, distance, query_s_ptr, key_s_ptr, shortest, longest, position_ptr, time_ptr, thresholds_ptr,
    MAX_BUCKET: tl.constexpr,
):  # fmt: skip
    """Add the weight of each distance (an index of the table) and of each gap's bucket to a score.

    query_s_ptr, key_s_ptr: where the times lie, ready to broadcast. shortest, longest: the extreme values of query
    minus key in the tile. Far from the diagonal, gaps are alike: there the tile falls into one bucket or a few, whose
    borders are compared with. Only the others take a logarithm and two gathers a score, in 64 bits only for gaps of
    68 years. All is loaded inside the branches: what lies outside of them Triton copies to shared memory ahead of the
    loop (a tile of weights for each stage), and what they share is kept in registers from before the first.
    """
    if shortest <= longest:  # always
        score += tl.load(position_ptr + distance)
    first = time_bucket(tl.maximum(shortest, 0), thresholds_ptr, MAX_BUCKET)
    last = time_bucket(tl.maximum(longest, 0), thresholds_ptr, MAX_BUCKET)
    few = (shortest >= 0) & (last - first <= _FEW_BUCKETS)
    if few & (first == last):
        score += tl.load(time_ptr + first)
    elif few:
        query_s = tl.load(query_s_ptr)
        key_s = tl.load(key_s_ptr)
        weight = tl.zeros_like(score) + tl.load(time_ptr + first)
        for step in tl.static_range(1, _FEW_BUCKETS + 1):
            border = tl.minimum(first + step, MAX_BUCKET)
            reached = query_s - tl.load(thresholds_ptr + border) >= key_s
            weight = tl.where(reached, tl.load(time_ptr + border), weight)
        score += weight
    elif (shortest > -_INT32_LIMIT) & (longest < _INT32_LIMIT):
        gap_s = tl.abs(tl.load(query_s_ptr).to(tl.int32) - tl.load(key_s_ptr).to(tl.int32))
        score += tl.load(time_ptr + time_bucket(gap_s, thresholds_ptr, MAX_BUCKET))
    else:
        long_gap_s = tl.abs(tl.load(query_s_ptr) - tl.load(key_s_ptr))
        score += tl.load(time_ptr + time_bucket(long_gap_s, thresholds_ptr, MAX_BUCKET))
    return score


@triton.jit
def half_tanh_half(x):
    """tanh(x / 2) / 2 in one instruction of the special function unit; relative error below 2**-10."""
    return 0.5 * tl.inline_asm_elementwise(
        "tanh.approx.f32 $0, $1;", "=f,f", [0.5 * x], dtype=tl.float32, is_pure=True, pack=1
    )


@triton.jit
def sigmoid(x, FAST_SIGMOID: tl.constexpr):
    """1 / (1 + exp(-x)) of float32."""
    if FAST_SIGMOID:
        sigma = 0.5 + half_tanh_half(x)
    else:
        sigma = tl.sigmoid(x)
    return sigma


@triton.jit
def silu_slope(x, FAST_SIGMOID: tl.constexpr):
    """silu(x) and its slope: sigma * (1 + x * (1 - sigma))."""
    sigma = sigmoid(x, FAST_SIGMOID)
    weight = x * sigma
    return weight, sigma + weight * (1.0 - sigma)


@triton.jit
def load_block(ptr, index, limit, stride, WIDTH: tl.constexpr, BLOCK_WIDTH: tl.constexpr):
    """[rows, BLOCK_WIDTH] of a head's vectors, zero outside [0, limit) and behind WIDTH."""
    columns = tl.arange(0, BLOCK_WIDTH)
    inside = ((index >= 0) & (index < limit))[:, None]
    if WIDTH < BLOCK_WIDTH:
        inside = inside & (columns < WIDTH)[None, :]
    return tl.load(ptr + index[:, None] * stride + columns[None, :], mask=inside, other=0.0)


@triton.jit
def store_block(ptr, value, index, limit, stride, WIDTH: tl.constexpr, BLOCK_WIDTH: tl.constexpr):
    """Store the rows of value [rows, BLOCK_WIDTH] below limit, rounded to the buffer's type."""
    columns = tl.arange(0, BLOCK_WIDTH)
    inside = (index < limit)[:, None]
    if WIDTH < BLOCK_WIDTH:
        inside = inside & (columns < WIDTH)[None, :]
    tl.store(ptr + index[:, None] * stride + columns[None, :], value.to(ptr.dtype.element_ty), mask=inside)
