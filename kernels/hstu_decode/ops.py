"""All layers of HSTU for the newest positions of cached histories, in C (decode.c): what goes in and out.

Shapes: L packed positions, M of them new, B rows, D model width, H heads, A query/key width, V value width, G = H * V,
W = H * (A + V), N = max_len, K time buckets.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import torch
from torch import Tensor

from kernels.errors import KernelUnavailableError
from kernels.hstu_attention.mask import CAUSAL, AttentionMask
from kernels.hstu_attention.native import bucket_from_s
from kernels.native_build import native_library

_SOURCE = Path(__file__).with_name("decode.c")
_SHORT = 8
"""New positions that take so little time that no other thread needs the interpreter meanwhile."""
_POINTERS_OF_A_LAYER = (
    "uvqk", "output", "output_bias", "input_scale", "input_shift", "output_scale", "output_shift", "position_weight",
    "time_weight",
)  # fmt: skip


@dataclass(frozen=True, kw_only=True, slots=True)
class LayerWeights:
    """Weights of one layer, contiguous and of one dtype, float32 or float64, on the CPU.

    uvqk_DE: [D, 2 G + 2 H A]. output_WD: [G or, with ``concat``, 3 G, D]. output_bias_D. input_norm, output_norm: scale
    and shift, [D] and [G], or None. position_weight: [2N - 1] and time_weight: [K + 1], or None: no relative bias.
    """

    uvqk_DE: Tensor
    output_WD: Tensor
    output_bias_D: Tensor
    input_norm: tuple[Tensor, Tensor] | None
    output_norm: tuple[Tensor, Tensor] | None
    position_weight: Tensor | None
    time_weight: Tensor | None

    def pointers(self) -> _Layer:
        """As decode.c reads them."""
        scale_and_shift = (*(self.input_norm or (None, None)), *(self.output_norm or (None, None)))
        weights = (self.uvqk_DE, self.output_WD, self.output_bias_D, *scale_and_shift)
        return _Layer(*(_pointer(weight) for weight in (*weights, self.position_weight, self.time_weight)))


@dataclass(frozen=True, kw_only=True, slots=True)
class LayerForm:
    """What all layers of a call have in common.

    heads: H. attention_dim: A. hidden_dim: V. max_len: N, positions of a row at most, by which sums are divided.
    alpha: factor of the scores. eps: of the norms. gate_only: SiLU on the gate alone. concat: the output matrix reads
    gate, attended and gated.
    """

    heads: int
    attention_dim: int
    hidden_dim: int
    max_len: int
    alpha: float
    eps: float
    gate_only: bool
    concat: bool

    @property
    def kept_width(self) -> int:
        """W."""
        return self.heads * (self.attention_dim + self.hidden_dim)


class _Layer(ctypes.Structure):
    """``Layer`` of decode.c."""

    _fields_ = [(name, ctypes.c_void_p) for name in _POINTERS_OF_A_LAYER]


class _Call(ctypes.Structure):
    """``Call`` of decode.c, field by field."""

    _fields_ = [
        ("layers", ctypes.POINTER(_Layer)),
        *((name, ctypes.c_void_p) for name in ("x", "kept", "offsets", "query_offsets")),
        *((name, ctypes.c_void_p) for name in ("key_times_s", "query_times_s", "bucket_from_s", "scratch")),
        *((name, ctypes.c_int64) for name in ("num_layers", "num_rows", "num_positions", "D", "heads", "A", "V")),
        *((name, ctypes.c_int64) for name in ("max_len", "gate_only", "concat")),
        *((name, ctypes.c_int64) for name in ("max_attn_len", "min_full_attn_len", "num_oldest_keys")),
        ("alpha", ctypes.c_double),
        ("eps", ctypes.c_double),
    ]  # fmt: skip


def is_available(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether ``hstu_decode`` can be had for tensors of this dtype and device; compiles it the first time."""
    return device.type == "cpu" and dtype in {torch.float32, torch.float64} and _library(dtype) is not None


def takes(mask: AttentionMask) -> bool:
    """Whether ``hstu_decode`` computes under this mask."""
    return mask.num_targets_B is None and mask.contextual_len == 0


def hstu_decode(
    x_MD: Tensor,
    kept_layers_LW: Tensor,
    layers: Sequence[LayerWeights],
    *,
    offsets: Tensor,
    query_offsets: Tensor,
    times_s: tuple[Tensor, Tensor],
    form: LayerForm,
    mask: AttentionMask = CAUSAL,
) -> Tensor:
    """x_MD behind the last layer; the new positions' keys and values are written into kept_layers_LW. No gradients.

    x_MD: float[M, D], what the first layer reads of the newest positions of each row. kept_layers_LW: float[layers, L,
    W], the keys and values of all positions, packed heads one after the other, keys before values. offsets,
    query_offsets: int64[B + 1], how the L positions and the M new ones fall to the rows of at most max_len positions.
    times_s: int64[L] and int64[M] seconds, as ``RelativeBias`` takes them. mask: without targets and contextual
    positions.

    Equal, up to rounding, to hstu_input, hstu_attention and hstu_output layer by layer. Pays for few new
    positions: the weights of a layer are read again for each. KernelUnavailableError where ``is_available`` is false,
    ValueError for shapes that do not fit.
    """
    if not takes(mask):
        raise ValueError("hstu_decode takes no targets and no contextual positions: go through the layers instead")
    is_short = x_MD.shape[0] <= _SHORT
    library = _library(x_MD.dtype, holds_interpreter=is_short) if x_MD.device.type == "cpu" else None
    if library is None:
        raise KernelUnavailableError("hstu_decode is for a CPU, and needs a C compiler: go through the layers instead")
    x_MD = x_MD.contiguous().clone()
    times_L, times_M = (times.contiguous() for times in times_s)
    num_new = _checked(x_MD, kept_layers_LW, layers, offsets, query_offsets, (times_L, times_M), form)
    time_weight = layers[0].time_weight if layers else None
    buckets = None if time_weight is None else bucket_from_s(time_weight.shape[0] - 1)
    sizes = (x_MD.shape[1], form.heads, form.attention_dim, form.hidden_dim, form.max_len)
    scratch_size = library.hstu_decode_scratch(*(ctypes.c_int64(size) for size in (*sizes, num_new)))
    scratch = torch.empty(scratch_size, dtype=x_MD.dtype)
    call = _Call(
        (_Layer * len(layers))(*(layer.pointers() for layer in layers)),
        *(_pointer(tensor) for tensor in (x_MD, kept_layers_LW, offsets, query_offsets, times_L, times_M, buckets)),
        scratch.data_ptr(),
        len(layers),
        offsets.shape[0] - 1,
        kept_layers_LW.shape[1],
        *sizes,
        form.gate_only,
        form.concat,
        *(mask.limit, mask.min_full_attn_len, mask.num_oldest_keys),
        form.alpha,
        form.eps,
    )
    library.hstu_decode_run(ctypes.byref(call))
    return x_MD


def _checked(
    x_MD: Tensor,
    kept_layers_LW: Tensor,
    layers: Sequence[LayerWeights],
    offsets: Tensor,
    query_offsets: Tensor,
    times_s: tuple[Tensor, Tensor],
    form: LayerForm,
) -> int:
    """The most new positions of a row; ValueError for what would make the C code read or write elsewhere."""
    if (
        kept_layers_LW.shape != (len(layers), times_s[0].shape[0], form.kept_width)
        or not kept_layers_LW.is_contiguous()
    ):
        raise ValueError(
            f"kept_layers_LW must be contiguous [{len(layers)}, {times_s[0].shape[0]}, {form.kept_width}], got"
            f" {tuple(kept_layers_LW.shape)}"
        )
    if times_s[1].shape[0] != x_MD.shape[0]:
        raise ValueError(f"times_s has {times_s[1].shape[0]} query times for {x_MD.shape[0]} new positions")
    for name, rows, num_values in (
        ("offsets", offsets, kept_layers_LW.shape[1]),
        ("query_offsets", query_offsets, x_MD.shape[0]),
    ):
        if rows.dtype != torch.int64 or rows.shape != offsets.shape or not rows.is_contiguous():
            raise ValueError(f"{name} must be contiguous int64[B + 1], got {rows.dtype} of shape {tuple(rows.shape)}")
        bounds = rows.tolist()
        if bounds[0] != 0 or bounds[-1] != num_values or bounds != sorted(bounds):
            raise ValueError(f"{name} must ascend from 0 to {num_values}")
    longest, num_new = (
        max((b - a for a, b in pairwise(rows.tolist())), default=0) for rows in (offsets, query_offsets)
    )
    tables = [layer.position_weight for layer in layers if layer.position_weight is not None]
    if longest > form.max_len or any(table.shape[0] != 2 * form.max_len - 1 for table in tables):
        raise ValueError(
            f"rows (the longest has {longest} positions) and position_weight must fit max_len {form.max_len}"
        )
    return num_new


def _pointer(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


def _library(dtype: torch.dtype, *, holds_interpreter: bool = False) -> ctypes.CDLL | None:
    defines = (f"REAL_BITS={torch.finfo(dtype).bits}",)
    library = native_library(_SOURCE, defines, holds_interpreter=holds_interpreter)
    if library is not None:
        library.hstu_decode_scratch.restype = ctypes.c_int64
    return library
