"""HSTU attention in C (native.c): what goes in and out, and the division among threads.

Shapes: L packed positions, M packed queries (M = L unless the history is cached), H heads, A query/key width, V value
width, N = max_len, K time buckets.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from pathlib import Path

import torch
from torch import Tensor

from kernels.hstu_attention.bias import time_bucket
from kernels.hstu_attention.problem import AttentionGradients, AttentionProblem
from kernels.native_build import native_library

_SOURCE = Path(__file__).with_name("native.c")
_PAIRS_PER_THREAD_MIN = 1 << 16
"""Pairs of query and key worth a thread of their own: about a millisecond."""
_WIDTH_MAX = 1024
_BUCKETS_MAX = (1 << 16) - 1
_LONGEST_GAP_S = 1 << 62
_LIMITS = ("contextual_len", "max_attn_len", "min_full_attn_len", "num_oldest_keys")


class _Call(ctypes.Structure):
    """``Call`` of native.c, field by field."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("q", "k", "v", "grad", "out", "dq", "dk", "dv")),
        *((name, ctypes.c_void_p) for name in ("offsets", "query_offsets", "num_targets", "rows")),
        *((name, ctypes.c_void_p) for name in ("key_times_s", "query_times_s", "bucket_from_s")),
        *((name, ctypes.c_void_p) for name in ("position_weight", "time_weight", "dposition", "dtime", "scratch")),
        *((name, ctypes.c_int64) for name in ("num_rows", "heads", "A", "V", "max_len")),
        *((name, ctypes.c_int64) for name in _LIMITS),
        *(
            (f"{tensor}_{stride}", ctypes.c_int64)
            for tensor in ("q", "k", "v")
            for stride in ("position", "head")
        ),
        ("alpha", ctypes.c_double),
    ]  # fmt: skip


def takes(q_MHA: Tensor, v_LHV: Tensor, problem: AttentionProblem) -> bool:
    """Whether the C code is for this problem and can be had here; compiles it the first time."""
    fits = q_MHA.device.type == "cpu" and max(q_MHA.shape[2], v_LHV.shape[2]) <= _WIDTH_MAX
    fits = fits and (problem.bias is None or problem.bias.num_buckets <= _BUCKETS_MAX)
    return fits and _library(q_MHA.dtype) is not None


def forward(q_MHA: Tensor, k_LHA: Tensor, v_LHV: Tensor, problem: AttentionProblem) -> Tensor:
    """o_MHV of ``hstu_attention``."""
    dtype = _computed_in(q_MHA.dtype)
    out_MHV = torch.empty((q_MHA.shape[0], *v_LHV.shape[1:]), dtype=dtype)
    shared = _Shared.of(q_MHA, k_LHA, v_LHV, problem)
    _run(shared, problem, out=out_MHV)
    return out_MHV.to(v_LHV.dtype)


def backward(
    grad_MHV: Tensor, q_MHA: Tensor, k_LHA: Tensor, v_LHV: Tensor, problem: AttentionProblem
) -> AttentionGradients:
    """Gradients of ``forward`` for the upstream gradient grad_MHV."""
    dtype, bias = _computed_in(q_MHA.dtype), problem.bias
    dq_MHA = torch.empty(q_MHA.shape, dtype=dtype)
    # Rows without a query are not visited: nothing sees their keys.
    new = torch.empty if problem.all_are_queries else torch.zeros
    dk_LHA, dv_LHV = (new(x.shape, dtype=dtype) for x in (k_LHA, v_LHV))
    shared = _Shared.of(q_MHA, k_LHA, v_LHV, problem)
    tables = _run(shared, problem, grad=grad_MHV.to(dtype).contiguous(), dq=dq_MHA, dk=dk_LHA, dv=dv_LHV)
    if bias is None:
        dposition, dtime = (torch.empty(0, dtype=q_MHA.dtype) for _ in range(2))
    else:
        dposition = tables[: bias.position_weight.shape[0]].to(bias.position_weight.dtype)
        dtime = tables[bias.position_weight.shape[0] :].to(bias.time_weight.dtype)
    return AttentionGradients(
        q_MHA=dq_MHA.to(q_MHA.dtype),
        k_LHA=dk_LHA.to(k_LHA.dtype),
        v_LHV=dv_LHV.to(v_LHV.dtype),
        position_weight=dposition,
        time_weight=dtime,
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class _Shared:
    """What all threads of a call read, and the tensors that hold it."""

    fields: dict[str, int | float]
    held: list[Tensor]
    dtype: torch.dtype

    @staticmethod
    def of(q_MHA: Tensor, k_LHA: Tensor, v_LHV: Tensor, problem: AttentionProblem) -> _Shared:
        dtype, mask = _computed_in(q_MHA.dtype), problem.mask
        q_MHA, k_LHA, v_LHV = (_readable(x.to(dtype)) for x in (q_MHA, k_LHA, v_LHV))
        read = {"q": q_MHA, "k": k_LHA, "v": v_LHV, "offsets": problem.offsets.contiguous()}
        if not problem.all_are_queries:
            read["query_offsets"] = problem.query_offsets.contiguous()
        if mask.num_targets_B is not None:
            read["num_targets"] = mask.num_targets_B.contiguous()
        if (bias := problem.bias) is not None:
            read |= {
                "key_times_s": bias.timestamps_s_L.contiguous(),
                "query_times_s": bias.query_timestamps_s_M.contiguous(),
                "bucket_from_s": bucket_from_s(bias.num_buckets),
                "position_weight": bias.position_weight.to(dtype).contiguous(),
                "time_weight": bias.time_weight.to(dtype).contiguous(),
            }
        fields: dict[str, int | float] = {name: tensor.data_ptr() for name, tensor in read.items()}
        for name, tensor in (("q", q_MHA), ("k", k_LHA), ("v", v_LHV)):
            fields |= {f"{name}_position": tensor.stride(0), f"{name}_head": tensor.stride(1)}
        fields |= {"heads": q_MHA.shape[1], "A": q_MHA.shape[2], "V": v_LHV.shape[2]}
        fields |= {name: getattr(mask, name) for name in _LIMITS} | {"max_attn_len": mask.limit}
        fields |= {"max_len": problem.max_len, "alpha": problem.alpha}
        return _Shared(fields=fields, held=list(read.values()), dtype=dtype)


def _run(shared: _Shared, problem: AttentionProblem, **passed: Tensor) -> Tensor:
    """Compute all rows, in as many threads as torch may use; float64[2N - 1 + K + 1], the tables' gradients.

    Each thread sums those of its own rows, and the sums are added in the order of the rows.
    """
    bias = problem.bias
    num_distances = 0 if bias is None else bias.position_weight.shape[0]
    num_weights = 0 if bias is None else num_distances + bias.time_weight.shape[0]
    lengths_B = problem.offsets.diff()
    longest = int(lengths_B.max()) if lengths_B.numel() else 0
    library = _library(shared.dtype)
    assert library is not None, "takes() was not asked"
    sizes = (ctypes.c_int64(int(shared.fields[name])) for name in ("heads", "A", "V", "max_len"))
    scratch_size = library.hstu_attention_scratch(ctypes.c_int64(longest), *sizes)
    calls, held = [], []
    pairs_B = problem.mask.num_pairs(lengths_B, problem.query_offsets.diff())
    for rows in _divided(pairs_B, torch.get_num_threads()):
        tables = torch.zeros(num_weights, dtype=torch.float64)
        scratch = torch.empty(scratch_size, dtype=shared.dtype)
        own = {**passed, "rows": rows, "scratch": scratch, "dposition": tables, "dtime": tables[num_distances:]}
        pointers = {name: tensor.data_ptr() for name, tensor in own.items()}
        calls.append(_Call(**shared.fields, **pointers, num_rows=rows.shape[0]))
        held.append((tables, own))

    def run(call: _Call) -> None:
        library.hstu_attention_run(ctypes.byref(call))

    _each(run, calls)
    return sum((tables for tables, _ in held), torch.zeros(num_weights, dtype=torch.float64))


def _divided(pairs_B: Tensor, num_threads: int) -> list[Tensor]:
    """int64 each: the rows of every thread, neighbours with about as many of the pairs of query and key."""
    done_B = pairs_B.cumsum(0)
    total = int(done_B[-1]) if done_B.numel() else 0
    num_parts = min(num_threads, max(total // _PAIRS_PER_THREAD_MIN, 1))
    ends = torch.searchsorted(done_B, torch.arange(1, num_parts) * total // num_parts).tolist()
    bounds = [0, *ends, pairs_B.shape[0]]
    return [torch.arange(start, end) for start, end in pairwise(bounds)]


def _each(run: Callable[[_Call], None], calls: list[_Call]) -> None:
    """Run all, the last one in this thread; C code holds no lock of Python's."""
    others = [_pool(len(calls) - 1).submit(run, call) for call in calls[:-1]]
    run(calls[-1])
    for other in others:
        other.result()


@lru_cache(maxsize=1)
def _pool(num_threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(num_threads, thread_name_prefix="hstu-attention")


def _computed_in(dtype: torch.dtype) -> torch.dtype:
    """Half precision is summed in single, as every other implementation does."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def _library(dtype: torch.dtype) -> ctypes.CDLL | None:
    bits = torch.finfo(_computed_in(dtype)).bits
    library = native_library(_SOURCE, (f"REAL_BITS={bits}",))
    if library is not None:
        library.hstu_attention_scratch.restype = ctypes.c_int64
    return library


def _readable(x: Tensor) -> Tensor:
    """With the numbers of one head side by side."""
    return x if x.stride(2) == 1 else x.contiguous()


@lru_cache(maxsize=8)
def bucket_from_s(num_buckets: int) -> Tensor:
    """int64[K + 2]: the shortest gap (s) of each bucket, by bisection of ``time_bucket``, then one none reaches."""
    bucket_K = torch.arange(num_buckets + 1)
    low_K, high_K = torch.zeros_like(bucket_K), torch.full_like(bucket_K, _LONGEST_GAP_S)
    while bool((low_K < high_K).any()):
        middle_K = (low_K + high_K) // 2
        reached_K = time_bucket(middle_K, num_buckets) >= bucket_K
        low_K, high_K = torch.where(reached_K, low_K, middle_K + 1), torch.where(reached_K, middle_K, high_K)
    return torch.cat([low_K, torch.tensor([(1 << 63) - 1])])
