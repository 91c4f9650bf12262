"""HSTU attention in plain PyTorch, padded and differentiated by autograd: the truth, and the form most code has.

Shapes: L packed keys, M packed queries, B rows, H heads, A query/key width, V value width, N = max_len, n the longest
row of keys, m the longest row of queries.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from kernels.hstu_attention.bias import RelativeBias, time_bucket
from kernels.hstu_attention.mask import AttentionMask
from kernels.jagged import position_index, row_index


def hstu_attention_reference(
    q_MHA: Tensor,
    k_LHA: Tensor,
    v_LHV: Tensor,
    offsets: Tensor,
    *,
    max_len: int,
    alpha: float,
    bias: RelativeBias | None,
    mask: AttentionMask,
    query_offsets: Tensor,
) -> Tensor:
    """o_MHV of ``hstu_attention``; makes B * H * m * n scores."""
    if q_MHA.shape[0] == 0:
        return torch.cat([q_MHA.sum() * 0 + k_LHA.sum() * 0 + v_LHV * 0])[:0]
    lengths_B, num_queries_B = offsets.diff(), query_offsets.diff()
    n, m = int(lengths_B.max()), int(num_queries_B.max())
    k_BHnA, v_BHnV = (_padded(x, offsets, n).transpose(1, 2) for x in (k_LHA, v_LHV))
    q_BHmA = _padded(q_MHA, query_offsets, m).transpose(1, 2)
    key_index_Bn = torch.arange(n, device=offsets.device).expand(len(lengths_B), n)
    query_index_Bm = torch.arange(m, device=offsets.device) + (lengths_B - num_queries_B)[:, None]
    query_index_Bm = torch.minimum(query_index_Bm, lengths_B[:, None] - 1)  # what is padded repeats the last query
    score_BHmn = (q_BHmA @ k_BHnA.transpose(2, 3)) * alpha
    num_targets_B = mask.num_targets_in(lengths_B)
    if bias is not None:
        end_B = mask.history_end(lengths_B, num_targets_B)
        query_place_Bm = mask.places(query_index_Bm, end_B)
        distance_Bmn = mask.places(key_index_Bn, end_B)[:, None, :] - query_place_Bm[:, :, None]
        keys_s_Bn = _padded(bias.timestamps_s_L, offsets, n)
        queries_s_Bm = _padded(bias.query_timestamps_s_M, query_offsets, m)
        bucket_Bmn = time_bucket(queries_s_Bm[:, :, None] - keys_s_Bn[:, None, :], bias.num_buckets)
        bias_Bmn = bias.position_weight[distance_Bmn + (max_len - 1)] + bias.time_weight[bucket_Bmn.long()]
        score_BHmn = score_BHmn + bias_Bmn[:, None]
    # The mask comes after the activation: silu(-inf) is NaN, and a masked score must weigh exactly 0.
    visible_Bmn = mask.visible(query_index_Bm, key_index_Bn, lengths_B, num_targets_B)
    weight_BHmn = functional.silu(score_BHmn) / max_len * visible_Bmn[:, None]
    o_BmHV = (weight_BHmn @ v_BHnV).transpose(1, 2)
    return o_BmHV[row_index(query_offsets, q_MHA.shape[0]), position_index(query_offsets, q_MHA.shape[0])]


def _padded(values: Tensor, offsets: Tensor, longest: int) -> Tensor:
    """[B, longest, ...], zero behind the end of each row."""
    padded = values.new_zeros(offsets.shape[0] - 1, longest, *values.shape[1:])
    index = row_index(offsets, values.shape[0]), position_index(offsets, values.shape[0])
    return padded.index_put(index, values)
