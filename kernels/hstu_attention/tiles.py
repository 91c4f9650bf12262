"""How the CPU path cuts the scores of jagged rows into tiles.

Shapes: L packed keys, M packed queries, H heads, W width, G rows of a group, m and n its longest rows of queries and
keys, X = G * H, R rows of one tile, p and s its queries and keys.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from kernels.hstu_attention.bias import RelativeBias, bucket_steps_
from kernels.hstu_attention.problem import AttentionGradients, AttentionProblem

SCORES_PER_TILE = 1 << 16
"""Scores of one tile: the four arrays a tile needs, 1 MiB in float32, stay in a core's second-level cache."""
QUERIES_PER_TILE = 128
"""Fewer waste less of the block on the diagonal, more make larger matrix products."""
KEYS_PER_TILE_MIN = 64
"""With many heads a tile grows beyond SCORES_PER_TILE rather than see fewer keys at once."""
FILLED_SHARE_MIN = 0.9
"""A row joins a group if it fills this share of the group's longest row …"""
SIMILAR_LEN = 16
"""… or falls short of it by at most this many positions: short rows cost little when padded."""


class Workspace:
    """Arrays reused by every tile: fresh large ones would be mapped and faulted in, page by page, each time."""

    def __init__(self) -> None:
        self._arrays: dict[str, Tensor] = {}

    def take(self, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """An array of this shape with arbitrary content: the same memory for the same name, made anew only to grow."""
        size = torch.Size(shape).numel()
        array = self._arrays.get(name)
        if array is None or array.shape[0] < size:
            array = self._arrays[name] = torch.empty(max(size, SCORES_PER_TILE), dtype=dtype)
        return array[:size].view(shape)


@dataclass(frozen=True, kw_only=True, slots=True)
class _Side:
    """The queries or the keys of a group's rows among the packed ones.

    index_Gn: int64[G, n], packed position of each place; places behind a row's end repeat its last position, so that
    no other row is ever read. inside: int64, the places (flattened) before a row's end.
    """

    index_Gn: Tensor
    inside: Tensor

    @staticmethod
    def of(starts_G: Tensor, lengths_G: Tensor, longest: int) -> _Side:
        places_n = torch.arange(longest)
        index_Gn = starts_G[:, None] + torch.minimum(places_n, lengths_G[:, None] - 1)
        return _Side(index_Gn=index_Gn, inside=(places_n < lengths_G[:, None]).flatten().nonzero().flatten())

    def take(self, packed: Tensor) -> Tensor:
        """[X, n, W] of packed [.., H, W], contiguous."""
        (G, n), (H, W) = self.index_Gn.shape, packed.shape[1:]
        taken = packed.index_select(0, self.index_Gn.flatten()).view(G, n, H, W)
        return taken.transpose(1, 2).reshape(G * H, n, W)

    def take_zero_padded(self, packed: Tensor) -> Tensor:
        """As ``take``, with zeros behind the end of each row."""
        (G, n), (H, W) = self.index_Gn.shape, packed.shape[1:]
        padded = packed.new_zeros(G * n, H, W)
        positions = self.index_Gn.flatten().index_select(0, self.inside)
        padded.index_copy_(0, self.inside, packed.index_select(0, positions))
        return padded.view(G, n, H, W).transpose(1, 2).reshape(G * H, n, W)

    def put(self, packed: Tensor, values_XnW: Tensor) -> None:
        """Store values at this group's positions of packed [.., H, W]."""
        (G, n), (H, W) = self.index_Gn.shape, packed.shape[1:]
        values = values_XnW.view(G, H, n, W).transpose(1, 2).reshape(G * n, H, W)
        positions = self.index_Gn.flatten().index_select(0, self.inside)
        packed.index_copy_(0, positions, values.index_select(0, self.inside).to(packed.dtype))


@dataclass(frozen=True, kw_only=True)
class Group:
    """Rows of similar length, computed together.

    lengths_G, num_queries_G, num_targets_G: int64[G]. dtype: of the scores. shared: the mask is the same for all rows.
    """

    problem: AttentionProblem
    workspace: Workspace
    queries: _Side
    keys: _Side
    lengths_G: Tensor
    num_queries_G: Tensor
    num_targets_G: Tensor
    num_heads: int
    dtype: torch.dtype
    shared: bool

    @cached_property
    def end_G(self) -> Tensor:
        """int64[G]: the place of the targets."""
        return self.problem.mask.history_end(self.lengths_G, self.num_targets_G)

    def tiles(self) -> Iterator[Tile]:
        """Every range of keys that some query of some rows sees, each once."""
        num_rows, longest = self.queries.index_Gn.shape
        for first in range(0, longest, QUERIES_PER_TILE):
            queries = slice(first, min(first + QUERIES_PER_TILE, longest))
            num_queries = queries.stop - first
            keys_max = max(KEYS_PER_TILE_MIN, SCORES_PER_TILE // (num_queries * self.num_heads))
            for whole in self._key_ranges(queries):
                for low in range(whole.start, whole.stop, keys_max):
                    keys = slice(low, min(low + keys_max, whole.stop))
                    at_once = max(1, SCORES_PER_TILE // (num_queries * self.num_heads * (keys.stop - low)))
                    for row in range(0, num_rows, at_once):
                        rows = slice(row, min(row + at_once, num_rows))
                        yield Tile(group=self, rows=rows, queries=queries, keys=keys)

    def _key_ranges(self, queries: slice) -> list[slice]:
        """Key indices that may be seen by these queries of any row: a superset of the mask, in disjoint ranges."""
        mask = self.problem.mask
        cached_G = self.lengths_G - self.num_queries_G
        first_G, last_G = cached_G + queries.start, cached_G + queries.stop - 1
        longest = self.keys.index_Gn.shape[1]
        stop = min(int(last_G.max()) + 1, longest)
        if mask.contextual_len and int(first_G.min()) < mask.contextual_len:
            return [slice(0, longest)]
        if mask.max_attn_len == 0:
            return [slice(0, stop)]
        place_G = mask.places(first_G[:, None], self.end_G)[:, 0]
        low_G = place_G - mask.max_attn_len + max(mask.contextual_len - 1, 0)
        if mask.min_full_attn_len:
            last_place_G = mask.places(last_G[:, None], self.end_G)[:, 0]
            low_G = torch.where(last_place_G >= self.end_G - mask.min_full_attn_len, 0, low_G)
        low = max(int(low_G.min()), 0)
        oldest = min(mask.num_oldest_keys, stop)
        return [slice(0, oldest), slice(low, stop)] if 0 < oldest < low else [slice(0 if oldest else low, stop)]


@dataclass(frozen=True, kw_only=True)
class Tile:
    """Scores of some queries and keys (indices within the row) of some rows of a group."""

    group: Group
    rows: slice
    queries: slice
    keys: slice

    @property
    def x(self) -> slice:
        """The rows' places along X."""
        return slice(self.rows.start * self.group.num_heads, self.rows.stop * self.group.num_heads)

    @property
    def shape(self) -> tuple[int, int, int]:
        """(x, p, s)."""
        return (
            self.x.stop - self.x.start,
            self.queries.stop - self.queries.start,
            self.keys.stop - self.keys.start,
        )

    def array(self, name: str) -> Tensor:
        """[x, p, s] of the workspace, with arbitrary content."""
        return self.group.workspace.take(name, self.shape, self.group.dtype)

    def half_scores(self, q_XmA: Tensor, k_XnA: Tensor) -> Tensor:
        """[x, p, s] of the workspace: products of halved queries, plus halved bias."""
        q_XpA, kT_XAs = q_XmA[self.x, self.queries], k_XnA[self.x, self.keys].transpose(1, 2)
        score_Xps = self.array("score")
        bias = self.group.problem.bias
        if bias is None:
            return torch.bmm(q_XpA, kT_XAs, out=score_Xps)
        if self.group.num_heads == 1:
            return self._put_bias(bias, score_Xps).baddbmm_(q_XpA, kT_XAs)
        bias_Rps = self._put_bias(bias, self.group.workspace.take("bias", self._bias_shape, self.group.dtype))
        score_Xps.view(-1, self.group.num_heads, *self.shape[1:]).copy_(bias_Rps[:, None])
        return score_Xps.baddbmm_(q_XpA, kT_XAs)

    def add_product(self, sum_XpW: Tensor, left: Tensor, right: Tensor) -> None:
        """``sum += left @ right``, through a contiguous array: the batched product writes no other kind."""
        shape = (sum_XpW.shape[0], sum_XpW.shape[1], sum_XpW.shape[2])
        sum_XpW += torch.bmm(left, right, out=self.group.workspace.take("product", shape, self.group.dtype))

    def masked(self, tile_Xps: Tensor) -> Tensor:
        """The tile with exactly 0 where the query does not see the key; changed in place."""
        if self.group.problem.mask.is_causal_only and self.group.shared:
            diagonal = self.queries.start - self.keys.start
            if diagonal < tile_Xps.shape[2] - 1:
                tile_Xps[:, :, max(diagonal, 0) :].tril_(min(diagonal, 0))
            return tile_Xps
        visible_Rps = self._visible
        tile_Xps.view(-1, self.group.num_heads, *tile_Xps.shape[1:]).mul_(visible_Rps[:, None])
        return tile_Xps

    @cached_property
    def _query_index_Rp(self) -> Tensor:
        places_p = torch.arange(self.queries.start, self.queries.stop)
        lengths_G, num_queries_G = self.group.lengths_G[self.rows], self.group.num_queries_G[self.rows]
        return torch.minimum(places_p + (lengths_G - num_queries_G)[:, None], lengths_G[:, None] - 1)

    @cached_property
    def _visible(self) -> Tensor:
        """bool[R or 1, p, s]."""
        group = self.group
        keys_1s = torch.arange(self.keys.start, self.keys.stop)[None]
        if group.shared:
            places_1p = torch.arange(self.queries.start, self.queries.stop)[None]
            longest_1 = group.lengths_G[:1]
            return group.problem.mask.visible(places_1p, keys_1s, longest_1, torch.zeros_like(longest_1))
        return group.problem.mask.visible(
            self._query_index_Rp, keys_1s, group.lengths_G[self.rows], group.num_targets_G[self.rows]
        )

    @property
    def _bias_shape(self) -> tuple[int, int, int]:
        """(R, p, s)."""
        return (self.rows.stop - self.rows.start, *self.shape[1:])

    def _put_bias(self, bias: RelativeBias, out_Rps: Tensor) -> Tensor:
        torch.index_select(bias.time_weight, 0, self._buckets.view(-1), out=out_Rps.view(-1))
        if not self.group.shared:
            return out_Rps.add_(bias.position_weight[self._distance_index])
        _, num_queries, num_keys = self.shape
        windows_ps = bias.position_weight[self._first_distance :][: num_queries + num_keys - 1].unfold(0, num_keys, 1)
        return out_Rps.add_(windows_ps.flip(0))

    @property
    def _first_distance(self) -> int:
        """Index in the position table of the last query and the first key: the smallest of a shared tile."""
        last_query: int = self.queries.stop - 1
        first_key: int = self.keys.start
        return first_key - last_query + self.group.problem.max_len - 1

    @cached_property
    def _distance_index(self) -> Tensor:
        """int64[R, p, s]: index in the position table."""
        group, mask = self.group, self.group.problem.mask
        end_R = group.end_G[self.rows]
        key_index_Rs = torch.arange(self.keys.start, self.keys.stop).expand(len(end_R), -1)
        key_Rs, query_Rp = mask.places(key_index_Rs, end_R), mask.places(self._query_index_Rp, end_R)
        return key_Rs[:, None, :] - query_Rp[:, :, None] + (group.problem.max_len - 1)

    @cached_property
    def _buckets(self) -> Tensor:
        """int32[R, p, s]: the bucket of every pair's gap in time, as ``time_bucket`` says."""
        bias, group = self.group.problem.bias, self.group
        assert bias is not None
        queries_s_Rp = bias.query_timestamps_s_M[group.queries.index_Gn[self.rows, self.queries]].double()
        keys_s_Rs = bias.timestamps_s_L[group.keys.index_Gn[self.rows, self.keys]].double()
        gap_Rps = group.workspace.take("gap", self._bias_shape, torch.float64)
        torch.sub(queries_s_Rp[:, :, None], keys_s_Rs[:, None, :], out=gap_Rps)
        bucket_Rps = group.workspace.take("bucket", self._bias_shape, torch.int32)
        return bucket_Rps.copy_(bucket_steps_(gap_Rps, bias.num_buckets))

    def add_bias_gradients(self, dscore_Xps: Tensor, found: AttentionGradients) -> None:
        """Add what this tile contributes to the gradients of both tables."""
        if self.group.problem.bias is None:
            return
        num_queries, num_keys = dscore_Xps.shape[1:]
        dbias_Rps = dscore_Xps.view(-1, self.group.num_heads, num_queries, num_keys)
        if self.group.num_heads == 1:
            dbias_Rps = dbias_Rps[:, 0]
        else:
            bias_Rps = self.group.workspace.take("bias", self._bias_shape, self.group.dtype)
            dbias_Rps = torch.sum(dbias_Rps, 1, out=bias_Rps)
        _count(dbias_Rps, self._buckets, found.time_weight)
        if not self.group.shared:
            _count(dbias_Rps, self._distance_index, found.position_weight)
            return
        # Row r from below is shifted right by r: then every distance stands in one column.
        skewed = dbias_Rps.new_zeros(num_queries, num_queries + num_keys)
        skewed[:, :num_keys] = dbias_Rps.sum(0).flip(0)
        width = num_queries + num_keys - 1
        by_distance = skewed.view(-1)[: num_queries * width].view(num_queries, width).sum(0)
        found.position_weight[self._first_distance :][:width] += by_distance


def _count(values: Tensor, index: Tensor, table_K: Tensor) -> None:
    """``table_K[index] += values``: one counting pass, far faster than a scatter-add into a tiny table."""
    table_K += torch.bincount(index.flatten(), weights=values.flatten(), minlength=table_K.shape[0])


def groups(problem: AttentionProblem, *, num_heads: int, dtype: torch.dtype) -> Iterator[Group]:
    """All rows that have queries, longest first."""
    lengths_B, num_queries_B = problem.offsets.diff(), problem.query_offsets.diff()
    mask = problem.mask
    num_targets_B = mask.num_targets_in(lengths_B)
    order_B = torch.argsort(lengths_B, descending=True, stable=True)
    order_B = order_B[num_queries_B[order_B] > 0]
    shared = problem.all_are_queries and mask.num_targets_B is None
    shared = shared and mask.contextual_len == 0 and mask.min_full_attn_len == 0
    workspace = Workspace()
    sorted_lengths = lengths_B[order_B].tolist()
    first = 0
    while first < len(sorted_lengths):
        longest = sorted_lengths[first]
        shortest = min(longest * FILLED_SHARE_MIN, longest - SIMILAR_LEN)
        end = next((i for i in range(first, len(sorted_lengths)) if sorted_lengths[i] < shortest), len(sorted_lengths))
        rows_G = order_B[first:end]
        lengths_G, num_queries_G = lengths_B[rows_G], num_queries_B[rows_G]
        yield Group(
            problem=problem,
            workspace=workspace,
            queries=_Side.of(problem.query_offsets[rows_G], num_queries_G, int(num_queries_G.max())),
            keys=_Side.of(problem.offsets[rows_G], lengths_G, longest),
            lengths_G=lengths_G,
            num_queries_G=num_queries_G,
            num_targets_G=num_targets_B[rows_G],
            num_heads=num_heads,
            dtype=dtype,
            shared=shared,
        )
        first = end
