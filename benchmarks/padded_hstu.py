"""The yardstick of bench_model: HSTU and its loss as most public code writes them, padded and eager.

Every row is padded to the longest place there is; scores, biases and their time buckets are [B, N, N] tensors that
autograd keeps. The loss is taken at positions that exist, and gathers the negatives of each into [L, C, D]; items are
normalised before they are gathered, which is cheaper than what most code does. It computes what model/hstu.py does,
with the same parameters.

Shapes: B users, N = max_len places, L positions that exist, D width, H heads, A query/key width, V value width,
C negatives.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from benchmarks.leave_one_out import NextItemModel, Windows
from model.hstu import HSTU, HSTULayer
from model.initial import NORM_EPS

COLLISION_LOGIT = -5e4


def padded_loss(model: NextItemModel, batch: Windows, negative_rows_LC: Tensor, *, dropout: bool = False) -> Tensor:
    """The scalar that ``sampled_softmax_loss`` gives for the same batch and negatives (dropout aside)."""
    config = model.config
    num_places = config.max_len
    lengths_B = batch.offsets.diff()
    inside_BN = torch.arange(num_places) < lengths_B[:, None]
    rows_BN = padded(batch.rows_L, inside_BN)
    times_BN, query_times_BN = padded(batch.times_s_L, inside_BN), padded(batch.query_times_s_L, inside_BN)
    x_BND = functional.embedding(rows_BN, model.item_weight) * config.embedding_dim**0.5
    assert isinstance(model.encoder, HSTU)
    x_BND = x_BND + model.encoder.input.position_embedding
    x_BND = functional.dropout(x_BND, config.input_dropout, training=dropout) * inside_BN[:, :, None]
    causal_NN = torch.ones(num_places, num_places).tril()
    for layer in model.encoder.layers:
        assert isinstance(layer, HSTULayer)
        x_BND = padded_layer(layer, x_BND, times_BN, query_times_BN, causal_NN, dropout=dropout)
    u_LD = functional.normalize(x_BND[inside_BN], dim=-1, eps=NORM_EPS)
    unit_VD = model.unit_items()
    positive_L1 = (u_LD * functional.embedding(batch.target_rows_L, unit_VD)).sum(-1, keepdim=True)
    negative_LC = (functional.embedding(negative_rows_LC, unit_VD) @ u_LD[:, :, None])[:, :, 0]
    negative_LC = torch.where(negative_rows_LC == batch.target_rows_L[:, None], COLLISION_LOGIT, negative_LC)
    logits_LC1 = torch.cat([positive_L1, negative_LC], dim=-1) / config.temperature
    return -functional.log_softmax(logits_LC1, dim=-1)[:, 0].mean()


def padded_layer(
    layer: HSTULayer, x_BND: Tensor, times_BN: Tensor, query_times_BN: Tensor, causal_NN: Tensor, *, dropout: bool
) -> Tensor:
    config = layer.config
    num_rows, num_places, _ = x_BND.shape
    normed_BND = functional.layer_norm(x_BND, x_BND.shape[-1:], eps=NORM_EPS)
    u_BNG, v_BNG, q_BNE, k_BNE = torch.split(functional.silu(normed_BND @ layer.uvqk), layer.split_sizes, dim=-1)
    q_BNHA = q_BNE.view(num_rows, num_places, config.num_heads, config.attention_dim)
    k_BNHA = k_BNE.view(num_rows, num_places, config.num_heads, config.attention_dim)
    v_BNHV = v_BNG.view(num_rows, num_places, config.num_heads, config.hidden_dim)
    score_BHNN = torch.einsum("bnha,bmha->bhnm", q_BNHA, k_BNHA)
    if layer.has_relative_bias:
        score_BHNN = score_BHNN + relative_bias(layer, times_BN, query_times_BN)[:, None]
    weight_BHNN = functional.silu(score_BHNN) / num_places * causal_NN
    o_BNG = torch.einsum("bhnm,bmhv->bnhv", weight_BHNN, v_BNHV).reshape(num_rows, num_places, -1)
    gated_BNG = u_BNG * functional.layer_norm(o_BNG, o_BNG.shape[-1:], eps=NORM_EPS)
    gated_BNG = functional.dropout(gated_BNG, config.linear_dropout, training=dropout)
    return x_BND + gated_BNG @ layer.output_weight + layer.output_bias


def relative_bias(layer: HSTULayer, times_BN: Tensor, query_times_BN: Tensor) -> Tensor:
    """[B, N, N]."""
    num_places = times_BN.shape[1]
    place_N = torch.arange(num_places)
    position_NN = layer.position_weight[place_N[None, :] - place_N[:, None] + num_places - 1]
    gap_BNN = (query_times_BN[:, :, None] - times_BN[:, None, :]).abs().clamp(min=1)
    bucket_BNN = (gap_BNN.log() / 0.301).long().clamp(max=layer.config.num_time_buckets)
    return position_NN + layer.time_weight[bucket_BNN]


def padded(packed: Tensor, inside_BN: Tensor) -> Tensor:
    """[B, N, ...] of packed [L, ...], zeros behind the end of each row."""
    out = packed.new_zeros(*inside_BN.shape, *packed.shape[1:])
    out[inside_BN] = packed
    return out
