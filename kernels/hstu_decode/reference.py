"""All layers of HSTU for the newest positions of cached histories, in plain PyTorch, layer by layer."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from kernels.hstu_attention import CAUSAL, AttentionMask, RelativeBias
from kernels.hstu_attention.reference import hstu_attention_reference
from kernels.hstu_decode.ops import LayerForm, LayerWeights
from kernels.hstu_input.reference import hstu_input_reference
from kernels.hstu_output.reference import hstu_output_reference


def hstu_decode_reference(
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
    """The truth ``hstu_decode`` is tested against; arguments as there."""
    gate, keys = form.heads * form.hidden_dim, form.heads * form.attention_dim
    last_B, num_new_B = offsets[1:], query_offsets.diff()
    new_M = torch.cat([torch.arange(int(end - new), int(end)) for end, new in zip(last_B, num_new_B, strict=True)])
    for kept_LW, layer in zip(kept_layers_LW, layers, strict=True):
        input_norm, output_norm = layer.input_norm or (None, None), layer.output_norm or (None, None)
        entered = hstu_input_reference(
            x_MD,
            layer.uvqk_DE,
            bias_E=None,
            norm_weight_D=input_norm[0],
            norm_bias_D=input_norm[1],
            eps=form.eps,
            split_sizes=[gate, gate, keys, keys],
            activate="u" if form.gate_only else "uvqk",
        )
        kept_LW[new_M] = torch.cat([entered.k_LA, entered.v_LG], 1)
        bias = None
        if layer.position_weight is not None and layer.time_weight is not None:
            bias = RelativeBias(
                position_weight=layer.position_weight,
                time_weight=layer.time_weight,
                timestamps_s_L=times_s[0],
                query_timestamps_s_M=times_s[1],
            )
        attended_MHV = hstu_attention_reference(
            entered.q_LA.view(-1, form.heads, form.attention_dim),
            kept_LW[:, :keys].reshape(-1, form.heads, form.attention_dim),
            kept_LW[:, keys:].reshape(-1, form.heads, form.hidden_dim),
            offsets,
            max_len=form.max_len,
            alpha=form.alpha,
            bias=bias,
            mask=mask,
            query_offsets=query_offsets,
        )
        x_MD = hstu_output_reference(
            attended_MHV.flatten(1),
            entered.u_LG,
            x_MD,
            layer.output_WD,
            bias_D=layer.output_bias_D,
            norm_weight_G=output_norm[0],
            norm_bias_G=output_norm[1],
            num_groups=1,
            eps=form.eps,
            concat=form.concat,
            dropout_p=0.0,
            seed=None,
        )
    return x_MD
