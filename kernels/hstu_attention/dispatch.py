"""The one entry point of HSTU attention; which implementation runs is decided here.

Shapes: L packed positions, B rows, H heads, A query/key width, V value width, N = max_len.
"""

from __future__ import annotations

from typing import Literal, get_args

from torch import Tensor

from kernels.errors import KernelUnavailableError
from kernels.hstu_attention.bias import RelativeBias
from kernels.hstu_attention.plan import AttentionPlan
from kernels.hstu_attention.reference import hstu_attention_reference
from kernels.jagged import check_offsets_shape

KernelName = Literal["auto", "reference", "triton"]


def hstu_attention(
    q_LHA: Tensor,
    k_LHA: Tensor,
    v_LHV: Tensor,
    offsets: Tensor,
    *,
    max_len: int,
    bias: RelativeBias | None = None,
    kernel: KernelName = "auto",
    plan: AttentionPlan | None = None,
) -> Tensor:
    """o_LHV: ``o[i] = (1 / N) * sum over j <= i of silu(q[i] . k[j] + bias[i, j]) * v[j]`` inside each row.

    q_LHA, k_LHA: float[L, H, A]. v_LHV: float[L, H, V], same dtype and device. offsets: int64[B + 1], rows of at
    most max_len positions. max_len: N, the constant every sum is divided by, whatever the length of its row.
    kernel: "auto" chooses by device; a name forces one implementation (for debugging).
    plan: work shared by the layers of one forward pass (``plan_attention``), used by the reference only.
    Differentiable in q, k, v and both bias tables. Raises ValueError for wrong shapes or a row longer than
    max_len, KernelUnavailableError for a kernel that is not built. Source: HSTU eq. 2; maths in README.md.
    """
    _check(q_LHA, k_LHA, v_LHV, offsets, max_len, bias)
    if kernel not in get_args(KernelName):
        raise ValueError(f"kernel is {kernel!r}; it must be one of {', '.join(get_args(KernelName))}")
    if kernel == "triton":
        raise KernelUnavailableError(
            f"kernel='triton' was asked for on {q_LHA.device}, but no Triton implementation of hstu_attention is built;"
            " use kernel='auto' or 'reference'"
        )
    # Every device takes the reference until it has an implementation of its own.
    return hstu_attention_reference(q_LHA, k_LHA, v_LHV, offsets, max_len=max_len, bias=bias, plan=plan)


def _check(
    q_LHA: Tensor, k_LHA: Tensor, v_LHV: Tensor, offsets: Tensor, max_len: int, bias: RelativeBias | None
) -> None:
    if q_LHA.dim() != 3 or q_LHA.shape != k_LHA.shape:
        raise ValueError(f"q and k must both be [L, H, A], got {tuple(q_LHA.shape)} and {tuple(k_LHA.shape)}")
    if v_LHV.dim() != 3 or v_LHV.shape[:2] != q_LHA.shape[:2]:
        raise ValueError(f"v must be [L, H, V] with the L and H of q, got {tuple(v_LHV.shape)}")
    if not q_LHA.dtype == k_LHA.dtype == v_LHV.dtype:
        raise ValueError(f"q, k and v must share a dtype, got {q_LHA.dtype}, {k_LHA.dtype} and {v_LHV.dtype}")
    check_offsets_shape(offsets, q_LHA)
    if max_len < 1:
        raise ValueError(f"max_len is {max_len}; it divides every sum and must be 1 or more")
    if bias is None:
        return
    if bias.position_weight.shape != (2 * max_len - 1,):
        raise ValueError(
            f"position_weight is {list(bias.position_weight.shape)}; max_len {max_len} needs [{2 * max_len - 1}]"
        )
    if bias.timestamps_s_L.shape[0] != q_LHA.shape[0]:
        raise ValueError(f"bias has {bias.timestamps_s_L.shape[0]} timestamps for {q_LHA.shape[0]} positions")
