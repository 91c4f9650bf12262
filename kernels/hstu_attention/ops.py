"""The one entry point of HSTU attention: arguments are checked, an implementation is chosen, autograd is wired up.

Shapes: L packed keys, M packed queries, B rows, H heads, A query/key width, V value width, N = max_len.
"""

from __future__ import annotations

from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from kernels.errors import KernelUnavailableError
from kernels.hstu_attention import cpu, native
from kernels.hstu_attention.bias import RelativeBias
from kernels.hstu_attention.mask import CAUSAL, AttentionMask
from kernels.hstu_attention.problem import AttentionGradients, AttentionProblem
from kernels.hstu_attention.reference import hstu_attention_reference
from kernels.implementations import KernelName, choose
from kernels.jagged import check_offsets, check_offsets_shape
from kernels.operators import operator


def hstu_attention(
    q_MHA: Tensor,
    k_LHA: Tensor,
    v_LHV: Tensor,
    offsets: Tensor,
    *,
    max_len: int,
    alpha: float = 1.0,
    bias: RelativeBias | None = None,
    mask: AttentionMask = CAUSAL,
    query_offsets: Tensor | None = None,
    kernel: KernelName = "auto",
) -> Tensor:
    """o_MHV: ``o[i] = (1 / N) * sum over visible j of silu(alpha * q[i] . k[j] + bias[i, j]) * v[j]`` in each row.

    q_MHA: float[M, H, A]. k_LHA: float[L, H, A]. v_LHV: float[L, H, V], same dtype and device. offsets: int64[B + 1],
    rows of at most max_len positions. max_len: N, the constant every sum is divided by, whatever the length of its
    row. query_offsets: int64[B + 1], how the M queries fall to the rows, if only the newest positions of each row
    have one (their keys and values are among the L); None: every position has one, M = L.
    kernel: "auto" chooses by device; a name forces one implementation (for debugging).

    Differentiable in q, k, v and both bias tables; every sum is formed in the same order in every run.
    ValueError for wrong shapes or dtypes and, where it needs no device synchronisation, wrong offsets;
    KernelUnavailableError for a kernel that cannot run here.
    Source: HSTU eq. 2; maths in README.md.
    """
    num_rows = _check_shapes(q_MHA, k_LHA, v_LHV, offsets, query_offsets, max_len)
    _check_bias(bias, max_len=max_len, num_keys=k_LHA.shape[0], num_queries=q_MHA.shape[0], device=q_MHA.device)
    if mask.num_targets_B is not None and mask.num_targets_B.shape != (num_rows,):
        raise ValueError(f"num_targets_B has {mask.num_targets_B.shape[0]} entries for {num_rows} rows")
    if offsets.device.type == "cpu" and not torch.compiler.is_compiling():
        check_attention_rows(
            offsets, query_offsets, num_keys=k_LHA.shape[0], num_queries=q_MHA.shape[0], max_len=max_len, mask=mask
        )
    implementation: str = kernel
    if kernel != "native":
        implementation = choose(kernel, q_MHA.device, has_cpu_path=True)
    if implementation == "cpu" and kernel == "auto":
        implementation = "host"
    if implementation == "reference":
        return hstu_attention_reference(
            q_MHA,
            k_LHA,
            v_LHV,
            offsets,
            max_len=max_len,
            alpha=alpha,
            bias=bias,
            mask=mask,
            query_offsets=offsets if query_offsets is None else query_offsets,
        )
    out: Tensor = attention_forward(
        q_MHA,
        k_LHA,
        v_LHV,
        offsets,
        query_offsets,
        mask.num_targets_B,
        None if bias is None else bias.position_weight,
        None if bias is None else bias.time_weight,
        None if bias is None else bias.timestamps_s_L,
        None if bias is None else bias.query_timestamps_s_M,
        [max_len, mask.contextual_len, mask.limit, mask.min_full_attn_len, mask.num_oldest_keys],
        alpha,
        implementation,
    )
    return out


def check_attention_rows(
    offsets: Tensor,
    query_offsets: Tensor | None,
    *,
    num_keys: int,
    num_queries: int,
    max_len: int,
    mask: AttentionMask = CAUSAL,
) -> None:
    """ValueError if the rows do not fit together; reads the offsets, so synchronises a CUDA device.

    ``hstu_attention`` calls it itself on the CPU.
    """
    check_offsets(offsets, num_values=num_keys, max_len=max_len)
    if query_offsets is not None:
        check_offsets(query_offsets, num_values=num_queries, max_len=max_len, name="query_offsets")
        if bool((query_offsets.diff() > offsets.diff()).any()):
            raise ValueError("query_offsets gives a row more queries than offsets gives it keys")
    mask.checked(offsets)


def _check_shapes(
    q_MHA: Tensor, k_LHA: Tensor, v_LHV: Tensor, offsets: Tensor, query_offsets: Tensor | None, max_len: int
) -> int:
    """B."""
    if k_LHA.dim() != 3 or q_MHA.dim() != 3 or q_MHA.shape[1:] != k_LHA.shape[1:]:
        raise ValueError(f"q and k must be [M, H, A] and [L, H, A], got {tuple(q_MHA.shape)} and {tuple(k_LHA.shape)}")
    if v_LHV.dim() != 3 or v_LHV.shape[:2] != k_LHA.shape[:2]:
        raise ValueError(f"v must be [L, H, V] with the L and H of k, got {tuple(v_LHV.shape)}")
    if not q_MHA.dtype == k_LHA.dtype == v_LHV.dtype or not q_MHA.is_floating_point():
        raise ValueError(f"q, k and v must share a float dtype, got {q_MHA.dtype}, {k_LHA.dtype} and {v_LHV.dtype}")
    if not q_MHA.device == k_LHA.device == v_LHV.device:
        raise ValueError(f"q, k and v must share a device, got {q_MHA.device}, {k_LHA.device} and {v_LHV.device}")
    if max_len < 1:
        raise ValueError(f"max_len is {max_len}; it divides every sum and must be 1 or more")
    check_offsets_shape(offsets, k_LHA)
    if query_offsets is None:
        if q_MHA.shape[0] != k_LHA.shape[0]:
            raise ValueError(
                f"q has {q_MHA.shape[0]} positions and k has {k_LHA.shape[0]}: pass query_offsets, or as many of both"
            )
        return offsets.shape[0] - 1
    check_offsets_shape(query_offsets, q_MHA, name="query_offsets")
    if query_offsets.shape != offsets.shape:
        raise ValueError(f"query_offsets has {query_offsets.shape[0] - 1} rows and offsets {offsets.shape[0] - 1}")
    return offsets.shape[0] - 1


def _check_bias(
    bias: RelativeBias | None, *, max_len: int, num_keys: int, num_queries: int, device: torch.device
) -> None:
    if bias is None:
        return
    if bias.position_weight.shape != (2 * max_len - 1,):
        raise ValueError(
            f"position_weight is {list(bias.position_weight.shape)}; max_len {max_len} needs [{2 * max_len - 1}]"
        )
    if bias.timestamps_s_L.shape[0] != num_keys:
        raise ValueError(f"timestamps_s_L has {bias.timestamps_s_L.shape[0]} times for {num_keys} keys")
    if bias.query_timestamps_s_M.shape[0] != num_queries:
        raise ValueError(
            f"query_timestamps_s_M has {bias.query_timestamps_s_M.shape[0]} times for {num_queries} queries"
        )
    for name in ("position_weight", "time_weight", "timestamps_s_L", "query_timestamps_s_M"):
        if getattr(bias, name).device != device:
            raise ValueError(f"{name} is on {getattr(bias, name).device}, q is on {device}; move them together")


_ON_HOST = ("host", "cpu", "native")
"""host: the compiled form where it takes the problem, else torch's tiles; decided when the operator runs, not when it
is traced."""


def _host_form(implementation: str, q: Tensor, v: Tensor, problem: AttentionProblem) -> ModuleType:
    """`cpu` or `native`, which have the same two functions. Double precision is left to torch unless asked for."""
    if implementation == "cpu" or (implementation == "host" and q.dtype == torch.float64):
        return cpu
    if native.takes(q, v, problem):
        return native
    if implementation == "native":
        raise KernelUnavailableError(
            "kernel='native' is for a CPU, heads up to 1024 wide and a machine with a C compiler: use kernel='auto'"
        )
    return cpu


@operator("hstu_attention")
def attention_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    offsets: Tensor,
    query_offsets: Tensor | None,
    num_targets: Tensor | None,
    position_weight: Tensor | None,
    time_weight: Tensor | None,
    timestamps: Tensor | None,
    query_timestamps: Tensor | None,
    limits: list[int],
    alpha: float,
    implementation: str,
) -> Tensor:
    problem = _problem(
        offsets, query_offsets, num_targets, (position_weight, time_weight, timestamps, query_timestamps), limits,
        alpha,
    )  # fmt: skip
    if implementation in _ON_HOST:
        of_host: Tensor = _host_form(implementation, q, v, problem).forward(q, k, v, problem)
        return of_host
    from kernels.hstu_attention.triton_kernels import forward  # noqa: PLC0415 - triton is an optional package

    out: Tensor = forward(q, k, v, problem)
    return out


@operator("hstu_attention_backward")
def attention_backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    offsets: Tensor,
    query_offsets: Tensor | None,
    num_targets: Tensor | None,
    position_weight: Tensor | None,
    time_weight: Tensor | None,
    timestamps: Tensor | None,
    query_timestamps: Tensor | None,
    limits: list[int],
    alpha: float,
    implementation: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    problem = _problem(
        offsets, query_offsets, num_targets, (position_weight, time_weight, timestamps, query_timestamps), limits,
        alpha,
    )  # fmt: skip
    if implementation in _ON_HOST:
        return _as_tuple(_host_form(implementation, q, v, problem).backward(grad, q, k, v, problem))
    from kernels.hstu_attention.triton_kernels import backward  # noqa: PLC0415 - triton is an optional package

    return _as_tuple(backward(grad, q, k, v, problem))


def _as_tuple(found: AttentionGradients) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    return found.q_MHA, found.k_LHA, found.v_LHV, found.position_weight, found.time_weight


def _problem(
    offsets: Tensor,
    query_offsets: Tensor | None,
    num_targets: Tensor | None,
    bias: tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None],
    limits: list[int],
    alpha: float,
) -> AttentionProblem:
    position_weight, time_weight, timestamps, query_timestamps = bias
    relative = None
    if position_weight is not None:
        assert time_weight is not None and timestamps is not None and query_timestamps is not None  # noqa: PT018
        relative = RelativeBias(
            position_weight=position_weight,
            time_weight=time_weight,
            timestamps_s_L=timestamps,
            query_timestamps_s_M=query_timestamps,
        )
    max_len, contextual_len, limit, min_full_attn_len, num_oldest_keys = limits
    return AttentionProblem(
        offsets=offsets,
        query_offsets=offsets if query_offsets is None else query_offsets,
        max_len=max_len,
        alpha=alpha,
        mask=AttentionMask(
            num_targets_B=num_targets,
            contextual_len=contextual_len,
            max_attn_len=None if limit < 0 else limit,
            min_full_attn_len=min_full_attn_len,
            num_oldest_keys=num_oldest_keys,
        ),
        bias=relative,
    )


@attention_forward.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, *_rest: Any) -> Tensor:
    return v.new_empty(q.shape[0], q.shape[1], v.shape[2])


@attention_backward.register_fake
def _(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    offsets: Tensor,
    query_offsets: Tensor | None,
    num_targets: Tensor | None,
    position_weight: Tensor | None,
    time_weight: Tensor | None,
    *_rest: Any,
) -> tuple[Tensor, ...]:
    tables = [q.new_empty(0) if t is None else torch.empty_like(t) for t in (position_weight, time_weight)]
    dq, dk, dv = (x.new_empty(x.shape) for x in (q, k, v))
    return dq, dk, dv, *tables


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:10])
    ctx.constants = inputs[10:]


def _differentiate(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    saved = ctx.saved_tensors
    dq, dk, dv, dposition, dtime = attention_backward(grad, *saved, *ctx.constants)
    tables = (None, None) if saved[6] is None else (dposition, dtime)
    return dq, dk, dv, None, None, None, *tables, None, None, None, None, None


attention_forward.register_autograd(_differentiate, setup_context=_save)
