"""Softmax attention in a latent space, over jagged rows: every head reads the same keys, which are the values as well.

What multi-head latent attention becomes when its up-projections are absorbed into those around it (LLaTTE, arXiv
2601.20083): multi-query attention with one head of keys of width C. Queries are the last positions of each row, so that
a layer can drop the older ones (pyramidal trimming) or answer behind keys that it kept. torch's fused attention does
the work; rows of similar length are only put side by side.

Shapes: M packed queries, L packed keys, B rows, H heads, C latent width, G rows of a group, m and n its longest rows.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from kernels.jagged import check_offsets, check_offsets_shape
from kernels.softmax_attention import FILLED_SHARE_MIN, SIMILAR_LEN


def latent_attention(
    q_MHC: Tensor,
    kv_LC: Tensor,
    *,
    query_offsets: Tensor,
    key_offsets: Tensor,
    scale: float,
    num_targets_B: Tensor | None = None,
) -> Tensor:
    """o_MHC: ``o[i, h] = sum over j seen by i of softmax_j(scale * q[i, h] . kv[j]) * kv[j]`` in each row.

    The queries of a row are its last positions. A query sees all keys up to its own; the last ``num_targets_B`` of a
    row (int64[B]), its targets, see what comes before all of them and themselves, never each other. q: float[M, H, C],
    kv: float[L, C], same dtype and device. Offsets: int64[B + 1]. Differentiable. ValueError for wrong shapes or
    offsets, or more queries than keys in a row. Reads the offsets, so synchronises a CUDA device.
    """
    _check(q_MHC, kv_LC, query_offsets, key_offsets)
    num_heads = q_MHC.shape[1]
    outputs: list[Tensor] = [q_MHC[:0]]
    places: list[Tensor] = [query_offsets[:0]]
    for group in _groups(query_offsets, key_offsets, num_targets_B):
        q_GHmC = q_MHC[group.query_Gm].transpose(1, 2)
        kv_GHnC = kv_LC[group.key_Gn][:, None].expand(-1, num_heads, -1, -1)
        o_GHmC = functional.scaled_dot_product_attention(
            q_GHmC,
            kv_GHnC,
            kv_GHnC,
            attn_mask=None if group.seen_Gmn is None else group.seen_Gmn[:, None],
            is_causal=group.seen_Gmn is None,
            scale=scale,
        )
        outputs.append(o_GHmC.transpose(1, 2)[group.inside_Gm])
        places.append(group.query_Gm[group.inside_Gm])
    return torch.empty_like(q_MHC).index_copy(0, torch.cat(places), torch.cat(outputs))


@dataclass(frozen=True, slots=True)
class _Group:
    """query_Gm, key_Gn: int64, packed positions. inside_Gm: bool, where a query is of the row. seen_Gmn: bool[G, m, n];
    None: query i sees keys up to i.
    """

    query_Gm: Tensor
    key_Gn: Tensor
    inside_Gm: Tensor
    seen_Gmn: Tensor | None


def _groups(query_offsets: Tensor, key_offsets: Tensor, num_targets_B: Tensor | None) -> Iterator[_Group]:
    """Rows that have queries, those with most keys first."""
    num_queries_B, num_keys_B = query_offsets.diff(), key_offsets.diff()
    sorted_B = num_keys_B.argsort(descending=True, stable=True)
    order_B = sorted_B[num_queries_B[sorted_B] > 0]
    lengths = num_keys_B[order_B].tolist()
    first = 0
    while first < len(lengths):
        shortest = min(lengths[first] * FILLED_SHARE_MIN, lengths[first] - SIMILAR_LEN)
        end = next((i for i in range(first, len(lengths)) if lengths[i] < shortest), len(lengths))
        rows_G = order_B[first:end]
        yield _group(
            (query_offsets[rows_G], num_queries_B[rows_G]),
            (key_offsets[rows_G], num_keys_B[rows_G]),
            None if num_targets_B is None else num_targets_B[rows_G],
        )
        first = end


def _group(queries: tuple[Tensor, Tensor], keys: tuple[Tensor, Tensor], num_targets_G: Tensor | None) -> _Group:
    """queries, keys: first packed position and number of each row."""
    (query_start_G, num_queries_G), (key_start_G, num_keys_G) = queries, keys
    place_m = torch.arange(int(num_queries_G.max()), device=query_start_G.device)
    place_n = torch.arange(int(num_keys_G[0]), device=query_start_G.device)
    # Places behind the end of a row repeat its last position: nothing else is read, and no query is without a key.
    query_Gm = torch.minimum(place_m, num_queries_G[:, None] - 1)
    key_Gn = torch.minimum(place_n, num_keys_G[:, None] - 1)
    return _Group(
        query_Gm=query_start_G[:, None] + query_Gm,
        key_Gn=key_start_G[:, None] + key_Gn,
        inside_Gm=place_m < num_queries_G[:, None],
        seen_Gmn=_seen(query_Gm + (num_keys_G - num_queries_G)[:, None], place_n, num_keys_G, num_targets_G)
        if num_targets_G is not None or bool((num_queries_G != num_keys_G).any())
        # Places behind a row's end come after all of it, where a causal query does not look.
        else None,
    )


def _seen(at_Gm: Tensor, place_n: Tensor, num_keys_G: Tensor, num_targets_G: Tensor | None) -> Tensor:
    """bool[G, m, n]. at_Gm: where among the keys of its row a query stands."""
    if num_targets_G is None:
        return place_n <= at_Gm[:, :, None]
    before_targets_Gn = place_n < (num_keys_G - num_targets_G)[:, None]
    seen_Gmn: Tensor = (place_n <= at_Gm[:, :, None]) & before_targets_Gn[:, None]
    return seen_Gmn | (place_n == at_Gm[:, :, None])


def _check(q_MHC: Tensor, kv_LC: Tensor, query_offsets: Tensor, key_offsets: Tensor) -> None:
    if q_MHC.dim() != 3 or kv_LC.dim() != 2 or q_MHC.shape[2] != kv_LC.shape[1]:
        raise ValueError(f"q must be [M, H, C] and kv [L, C], got {tuple(q_MHC.shape)} and {tuple(kv_LC.shape)}")
    for offsets, values in ((query_offsets, q_MHC), (key_offsets, kv_LC)):
        check_offsets_shape(offsets, values)
        check_offsets(offsets, num_values=values.shape[0], max_len=values.shape[0])
    if query_offsets.shape != key_offsets.shape:
        raise ValueError(f"{query_offsets.shape[0] - 1} rows of queries and {key_offsets.shape[0] - 1} rows of keys")
    if bool((query_offsets.diff() > key_offsets.diff()).any()):
        raise ValueError("a row has more queries than keys; the queries of a row are its last keys")
