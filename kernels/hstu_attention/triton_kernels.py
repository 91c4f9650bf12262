"""HSTU attention on CUDA devices: how the Triton kernels are launched. What they do and why: TRITON.md.

Shapes: L packed keys, M packed queries, B rows, H heads, A query/key width, V value width, N = max_len, K time
buckets, P programs.
"""
# mypy: ignore-errors

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import torch
import triton
from torch import Tensor

from kernels.hstu_attention.bias import time_bucket
from kernels.hstu_attention.problem import AttentionGradients, AttentionProblem
from kernels.hstu_attention.triton_backward import key_gradient_kernel, query_gradient_kernel
from kernels.hstu_attention.triton_forward import forward_kernel
from kernels.hstu_attention.triton_tables import table_gradient_kernel
from kernels.triton_support import INTERPRETED, block_size, dot_precision

_LONGEST_GAP_S = 2**63 - 1
_MAX_WIDTH = 256
_PROGRAMS_PER_MULTIPROCESSOR = 2
_PROGRAMS_INTERPRETED = 3


def forward(q_MHA: Tensor, k_LHA: Tensor, v_LHV: Tensor, problem: AttentionProblem) -> Tensor:
    """o_MHV of ``hstu_attention``. ValueError for a dtype or width that the kernels do not take."""
    call = _Call.of(q_MHA, k_LHA, v_LHV, problem)
    o = q_MHA.new_empty(q_MHA.shape[0], q_MHA.shape[1], v_LHV.shape[2])
    most = min(problem.max_len, q_MHA.shape[0])
    call.launch(
        forward_kernel, most, "BLOCK_M", o_ptr=o, o_stride=o.stride(0), o_head_stride=o.stride(1), most_queries=most
    )
    return o


def backward(
    grad_MHV: Tensor, q_MHA: Tensor, k_LHA: Tensor, v_LHV: Tensor, problem: AttentionProblem
) -> AttentionGradients:
    """Gradients of all inputs; equal in every run."""
    call = _Call.of(q_MHA, k_LHA, v_LHV, problem)
    grad = _dense(grad_MHV)
    upstream = {"grad_ptr": grad, "grad_stride": grad.stride(0), "grad_head_stride": grad.stride(1)}
    dq, dk, dv = (torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q_MHA, k_LHA, v_LHV))
    most = min(problem.max_len, q_MHA.shape[0])
    call.launch(
        query_gradient_kernel, most, "BLOCK_M", **upstream, dq_ptr=dq, dq_stride=dq.stride(0),
        dq_head_stride=dq.stride(1), most_queries=most,
    )  # fmt: skip
    most = min(problem.max_len, k_LHA.shape[0])
    call.launch(
        key_gradient_kernel, most, "BLOCK_N", **upstream, dk_ptr=dk, dk_stride=dk.stride(0),
        dk_head_stride=dk.stride(1), dv_ptr=dv, dv_stride=dv.stride(0), dv_head_stride=dv.stride(1), most_keys=most,
    )  # fmt: skip
    position, time = _table_gradients(call, upstream, problem)
    return AttentionGradients(q_MHA=dq, k_LHA=dk, v_LHV=dv, position_weight=position, time_weight=time)


def _table_gradients(call: _Call, upstream: dict[str, Any], problem: AttentionProblem) -> tuple[Tensor, Tensor]:
    """Gradients of both tables: partial sums of P programs, added up. Empty tensors without a bias."""
    q, bias, N = call.arguments["q_ptr"], problem.bias, problem.max_len
    if bias is None:
        return q.new_empty(0), q.new_empty(0)
    position, time = torch.zeros_like(bias.position_weight), torch.zeros_like(bias.time_weight)
    if q.shape[0] == 0:
        return position, time
    max_bucket = call.arguments["MAX_BUCKET"]
    programs = _num_programs(q.device)
    table_len = 2 * N - 1 if problem.mask.contextual_len else N  # no key is seen that comes after its query
    position_sums = torch.zeros(programs, table_len, device=q.device)
    time_sums = torch.empty(programs, max_bucket + 1, device=q.device)
    arguments = {name: value for name, value in call.arguments.items() if name != "HAS_BIAS"}
    with torch.cuda.device_of(q):
        table_gradient_kernel[(programs,)](
            **arguments, **upstream, position_sums_ptr=position_sums, time_sums_ptr=time_sums,
            num_rows=problem.offsets.shape[0] - 1, table_len=table_len,
            BLOCK_BUCKETS=triton.next_power_of_2(max_bucket + 1),
        )  # fmt: skip
    position[:table_len] = position_sums.sum(0) / N
    time[: max_bucket + 1] = time_sums.sum(0) / N
    return position, time


@dataclass(frozen=True, kw_only=True, slots=True)
class _Call:
    """One problem, as the arguments that all kernels take. B * H programs for each block of the longest row."""

    num_pairs: int
    arguments: dict[str, Any]

    @staticmethod
    def of(q_MHA: Tensor, k_LHA: Tensor, v_LHV: Tensor, problem: AttentionProblem) -> _Call:
        H, A, V = q_MHA.shape[1], q_MHA.shape[2], v_LHV.shape[2]
        if q_MHA.dtype not in (torch.float16, torch.bfloat16, torch.float32):
            raise ValueError(f"q is {q_MHA.dtype}; the Triton kernels take float32, float16 and bfloat16")
        if max(A, V) > _MAX_WIDTH:
            raise ValueError(f"heads are {A} and {V} wide; the Triton kernels take at most {_MAX_WIDTH}")
        q, k, v = _dense(q_MHA), _dense(k_LHA), _dense(v_LHV)
        mask, longest = problem.mask, min(problem.max_len, k.shape[0])
        arguments = {
            "q_ptr": q, "k_ptr": k, "v_ptr": v,
            "q_stride": q.stride(0), "q_head_stride": q.stride(1),
            "k_stride": k.stride(0), "k_head_stride": k.stride(1),
            "v_stride": v.stride(0), "v_head_stride": v.stride(1),
            "order_ptr": _dearest_first(problem),
            "offsets_ptr": problem.offsets.contiguous(), "query_offsets_ptr": problem.query_offsets.contiguous(),
            "num_targets_ptr": problem.offsets if mask.num_targets_B is None else mask.num_targets_B.contiguous(),
            "num_heads": H, "max_len": problem.max_len, "alpha": problem.alpha, "length_class": longest.bit_length(),
            "WIDTH_A": A, "WIDTH_V": V, "BLOCK_A": block_size(A), "BLOCK_V": block_size(V),
            "HAS_TARGETS": mask.num_targets_B is not None, "CONTEXTUAL_LEN": mask.contextual_len,
            "MAX_ATTN_LEN": mask.limit, "MIN_FULL_ATTN_LEN": mask.min_full_attn_len,
            "NUM_OLDEST_KEYS": mask.num_oldest_keys,
            "FAST_SIGMOID": not INTERPRETED and q.dtype != torch.float32 and torch.version.hip is None,
            "PRECISION": dot_precision(q.dtype),
            **_bias_arguments(problem, unused=q),
        }  # fmt: skip
        return _Call(num_pairs=(problem.offsets.shape[0] - 1) * H, arguments=arguments)

    def launch(self, kernel: Any, most: int, block: str, **own: Any) -> None:
        """Run a kernel whose programs take a pair of row and head and one of the blocks of ``most`` positions."""
        if most == 0 or self.num_pairs == 0:
            return
        with torch.cuda.device_of(self.arguments["q_ptr"]):
            kernel[lambda constants: (triton.cdiv(most, constants[block]) * self.num_pairs,)](**self.arguments, **own)


def _bias_arguments(problem: AttentionProblem, *, unused: Tensor) -> dict[str, Any]:
    bias = problem.bias
    names = ("position_ptr", "time_ptr", "thresholds_ptr", "key_times_ptr", "query_times_ptr")
    if bias is None:
        return {"HAS_BIAS": False, "MAX_BUCKET": 0, **dict.fromkeys(names, unused)}
    thresholds = _thresholds(bias.num_buckets, unused.device)
    tensors = (
        bias.position_weight.float().contiguous(),
        bias.time_weight.float().contiguous(),
        thresholds,
        bias.timestamps_s_L.contiguous(),
        bias.query_timestamps_s_M.contiguous(),
    )
    return {"HAS_BIAS": True, "MAX_BUCKET": thresholds.shape[0] - 2, **dict(zip(names, tensors, strict=True))}


@functools.lru_cache(maxsize=32)
def _thresholds(num_buckets: int, device: torch.device) -> Tensor:
    """int64[J + 2]: the shortest gap of each bucket up to J, the highest that a gap of int64 can reach; then no gap.

    Found by bisection of ``time_bucket`` itself, on the CPU, so that they are its borders exactly.
    """
    highest = int(time_bucket(torch.tensor([_LONGEST_GAP_S]), num_buckets))
    buckets = torch.arange(1, highest + 1)
    below, reached = torch.zeros_like(buckets), torch.full_like(buckets, _LONGEST_GAP_S)
    while bool((reached - below > 1).any()):
        middle = below + (reached - below) // 2
        is_reached = time_bucket(middle, num_buckets) >= buckets
        below, reached = torch.where(is_reached, below, middle), torch.where(is_reached, middle, reached)
    ends = torch.tensor([0]), torch.tensor([_LONGEST_GAP_S])
    return torch.cat([ends[0], reached, ends[1]]).to(device)


def _dearest_first(problem: AttentionProblem) -> Tensor:
    """int64[B]: rows in descending order of their pairs of query and key; sorted on the device, nothing waits."""
    pairs_B = problem.offsets.diff() * problem.query_offsets.diff()
    return pairs_B.argsort(descending=True, stable=True)


def _dense(x: Tensor) -> Tensor:
    """The tensor itself if each vector of a head is contiguous, as in a slice of a wider buffer; else a copy."""
    return x if x.stride(-1) == 1 else x.contiguous()


def _num_programs(device: torch.device) -> int:
    if device.type != "cuda":
        return _PROGRAMS_INTERPRETED
    return _PROGRAMS_PER_MULTIPROCESSOR * torch.cuda.get_device_properties(device).multi_processor_count
