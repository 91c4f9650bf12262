"""How the CPU path cuts the scores of jagged rows into tiles: a function of the rows' lengths and the mask alone.

Shapes: L packed keys, M packed queries, H heads, W width, G rows of a group, m and n its longest rows of queries and
keys, X = G * H, R rows of one tile, p and s its queries and keys.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import lru_cache

import torch
from torch import Tensor

from kernels.hstu_attention.mask import AttentionMask
from kernels.hstu_attention.problem import AttentionProblem

SCORES_PER_TILE = 1 << 17
"""Scores of one tile: the arrays of a tile, half a MiB each in float32, stay in a core's caches."""
QUERIES_PER_TILE = 128
"""Fewer waste less of the block on the diagonal, more make larger matrix products."""
KEYS_PER_TILE_MIN = 64
"""With many heads a tile grows beyond SCORES_PER_TILE rather than see fewer keys at once."""
FILLED_SHARE_MIN = 0.9
"""A row joins a group if it fills this share of the group's longest row …"""
SIMILAR_LEN = 16
"""… or falls short of it by at most this many positions: short rows cost little when padded."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Side:
    """The queries or the keys of a group's rows among the packed ones.

    index_Gn: int64[G, n], packed position of each place; places behind a row's end repeat its last position, so that
    no other row is ever read. inside: int64, the places (flattened) before a row's end. positions: int64, their packed
    positions.
    """

    index_Gn: Tensor
    inside: Tensor
    positions: Tensor

    @staticmethod
    def of(starts_G: Tensor, lengths_G: Tensor) -> Side:
        """starts_G, lengths_G: int64[G], first packed position and length of each row."""
        places_n = torch.arange(int(lengths_G.max()))
        index_Gn = starts_G[:, None] + torch.minimum(places_n, lengths_G[:, None] - 1)
        inside = (places_n < lengths_G[:, None]).flatten().nonzero().flatten()
        return Side(index_Gn=index_Gn, inside=inside, positions=index_Gn.flatten()[inside])

    def take(self, packed: Tensor) -> Tensor:
        """[X, n, W] of packed [.., H, W], contiguous."""
        (G, n), (H, W) = self.index_Gn.shape, packed.shape[1:]
        taken = packed.index_select(0, self.index_Gn.flatten()).view(G, n, H, W)
        return taken.transpose(1, 2).reshape(G * H, n, W)

    def take_zero_padded(self, packed: Tensor) -> Tensor:
        """As ``take``, with zeros behind the end of each row."""
        (G, n), (H, W) = self.index_Gn.shape, packed.shape[1:]
        padded = packed.new_zeros(G * n, H, W)
        padded.index_copy_(0, self.inside, packed.index_select(0, self.positions))
        return padded.view(G, n, H, W).transpose(1, 2).reshape(G * H, n, W)

    def put(self, packed: Tensor, values_XnW: Tensor) -> None:
        """Store values at this group's positions of packed [.., H, W]."""
        (G, n), (H, W) = self.index_Gn.shape, packed.shape[1:]
        values = values_XnW.view(G, H, n, W).transpose(1, 2).reshape(G * n, H, W)
        packed.index_copy_(0, self.positions, values.index_select(0, self.inside).to(packed.dtype))


@dataclass(frozen=True, kw_only=True, slots=True)
class Tile:
    """A block of queries of some rows of a group, and a range of keys that some of them see.

    rows, queries, keys: slices of G, m and n. x: the rows' slice of X. shape: (x, p, s). num_pairs: R * p * s.
    first_pair: how many pairs the tiles before it in the plan have.
    """

    rows: slice
    queries: slice
    keys: slice
    x: slice
    shape: tuple[int, int, int]
    num_pairs: int
    first_pair: int

    @staticmethod
    def of(rows: slice, queries: slice, keys: slice, *, num_heads: int, first_pair: int) -> Tile:
        """The tile of these ranges, all heads of a row together."""
        x = slice(rows.start * num_heads, rows.stop * num_heads)
        shape = (x.stop - x.start, queries.stop - queries.start, keys.stop - keys.start)
        num_pairs = (rows.stop - rows.start) * shape[1] * shape[2]
        return Tile(rows=rows, queries=queries, keys=keys, x=x, shape=shape, num_pairs=num_pairs, first_pair=first_pair)


@dataclass(frozen=True, kw_only=True, slots=True)
class Group:
    """Rows of similar length, computed together.

    lengths_G, num_queries_G, num_targets_G, end_G: int64[G], end_G the place of the targets. shared: what a query sees,
    and the distances, are the same for all rows.
    """

    queries: Side
    keys: Side
    lengths_G: Tensor
    num_queries_G: Tensor
    num_targets_G: Tensor
    end_G: Tensor
    shared: bool
    tiles: tuple[Tile, ...]

    def query_index(self, tile: Tile) -> Tensor:
        """int64[R, p]: index in its row of every query of a tile."""
        places_p = torch.arange(tile.queries.start, tile.queries.stop)
        lengths_R1, num_queries_R1 = self.lengths_G[tile.rows, None], self.num_queries_G[tile.rows, None]
        return torch.minimum(places_p + (lengths_R1 - num_queries_R1), lengths_R1 - 1)

    def visible(self, tile: Tile, mask: AttentionMask) -> Tensor:
        """bool[R or 1, p, s]: which keys each query of a tile sees."""
        keys_1s = torch.arange(tile.keys.start, tile.keys.stop)[None]
        rows = slice(1) if self.shared else tile.rows
        index_Rp = self.query_index(tile)
        if self.shared:
            index_Rp = torch.arange(tile.queries.start, tile.queries.stop)[None]
        return mask.visible(index_Rp, keys_1s, self.lengths_G[rows], self.num_targets_G[rows])

    def distance_index(self, tile: Tile, mask: AttentionMask, max_len: int) -> Tensor:
        """int64[R, p, s]: index of every pair of a tile in the position table."""
        end_R = self.end_G[tile.rows]
        key_index_Rs = torch.arange(tile.keys.start, tile.keys.stop).expand(len(end_R), -1)
        key_Rs, query_Rp = mask.places(key_index_Rs, end_R), mask.places(self.query_index(tile), end_R)
        return key_Rs[:, None, :] - query_Rp[:, :, None] + (max_len - 1)


def plan(problem: AttentionProblem, *, num_heads: int) -> tuple[Group, ...]:
    """All rows that have queries, longest first; the layers of a pass, and its backward pass, share one plan."""
    mask = problem.mask
    return _plan(
        tuple(problem.offsets.tolist()),
        None if problem.all_are_queries else tuple(problem.query_offsets.tolist()),
        None if mask.num_targets_B is None else tuple(mask.num_targets_B.tolist()),
        (mask.contextual_len, mask.max_attn_len, mask.min_full_attn_len, mask.num_oldest_keys),
        num_heads,
        (SCORES_PER_TILE, QUERIES_PER_TILE, KEYS_PER_TILE_MIN),
    )


@lru_cache(maxsize=8)
def _plan(
    offsets: tuple[int, ...],
    query_offsets: tuple[int, ...] | None,
    num_targets: tuple[int, ...] | None,
    limits: tuple[int, int | None, int, int],
    num_heads: int,
    sizes: tuple[int, int, int],  # noqa: ARG001 - part of the key: a plan is made with the sizes of its time
) -> tuple[Group, ...]:
    mask = AttentionMask(
        num_targets_B=None if num_targets is None else torch.tensor(num_targets),
        contextual_len=limits[0],
        max_attn_len=limits[1],
        min_full_attn_len=limits[2],
        num_oldest_keys=limits[3],
    )
    starts_B, lengths_B = _starts_and_lengths(offsets)
    query_starts_B, num_queries_B = _starts_and_lengths(offsets if query_offsets is None else query_offsets)
    num_targets_B = mask.num_targets_in(lengths_B)
    shared = query_offsets is None and num_targets is None and mask.contextual_len == 0 and mask.min_full_attn_len == 0
    order_B = torch.argsort(lengths_B, descending=True, stable=True)
    order_B = order_B[num_queries_B[order_B] > 0]
    found, num_pairs = [], 0
    for rows_G in _of_similar_length(order_B, lengths_B[order_B].tolist()):
        group = Group(
            queries=Side.of(query_starts_B[rows_G], num_queries_B[rows_G]),
            keys=Side.of(starts_B[rows_G], lengths_B[rows_G]),
            lengths_G=lengths_B[rows_G],
            num_queries_G=num_queries_B[rows_G],
            num_targets_G=num_targets_B[rows_G],
            end_G=mask.history_end(lengths_B[rows_G], num_targets_B[rows_G]),
            shared=shared,
            tiles=(),
        )
        group = replace(group, tiles=tuple(_tiles(group, mask, num_heads, first_pair=num_pairs)))
        num_pairs += sum(tile.num_pairs for tile in group.tiles)
        found.append(group)
    return tuple(found)


def _starts_and_lengths(offsets: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    bounds = torch.tensor(offsets)
    return bounds[:-1], bounds.diff()


def _of_similar_length(order_B: Tensor, lengths: list[int]) -> Iterator[Tensor]:
    first = 0
    while first < len(lengths):
        shortest = min(lengths[first] * FILLED_SHARE_MIN, lengths[first] - SIMILAR_LEN)
        end = next((i for i in range(first, len(lengths)) if lengths[i] < shortest), len(lengths))
        yield order_B[first:end]
        first = end


def _tiles(group: Group, mask: AttentionMask, num_heads: int, *, first_pair: int) -> Iterator[Tile]:
    """Every range of keys that some query of some rows sees, each once."""
    num_rows, longest = group.queries.index_Gn.shape
    for first in range(0, longest, QUERIES_PER_TILE):
        queries = slice(first, min(first + QUERIES_PER_TILE, longest))
        scores_per_key = (queries.stop - first) * num_heads
        keys_max = max(KEYS_PER_TILE_MIN, SCORES_PER_TILE // scores_per_key)
        for seen in _key_ranges(group, queries, mask):
            for low in range(seen.start, seen.stop, keys_max):
                keys = slice(low, min(low + keys_max, seen.stop))
                at_once = max(1, SCORES_PER_TILE // (scores_per_key * (keys.stop - low)))
                for row in range(0, num_rows, at_once):
                    rows = slice(row, min(row + at_once, num_rows))
                    tile = Tile.of(rows, queries, keys, num_heads=num_heads, first_pair=first_pair)
                    first_pair += tile.num_pairs
                    yield tile


def _key_ranges(group: Group, queries: slice, mask: AttentionMask) -> list[slice]:
    """Key indices that may be seen by these queries of any row: a superset of the mask, in disjoint ranges."""
    reaches = group.num_queries_G > queries.start
    lengths_G, num_queries_G, end_G = group.lengths_G[reaches], group.num_queries_G[reaches], group.end_G[reaches]
    history_G = lengths_G - group.num_targets_G[reaches]
    first_G = lengths_G - num_queries_G + queries.start
    last_G = torch.minimum(first_G + (queries.stop - queries.start), lengths_G) - 1
    seen_to = int(torch.minimum(last_G + 1, history_G).max())
    low = 0
    if mask.max_attn_len is not None:
        low_G = mask.places(first_G[:, None], end_G)[:, 0] - mask.max_attn_len + max(mask.contextual_len - 1, 0)
        if mask.min_full_attn_len:
            last_place_G = mask.places(last_G[:, None], end_G)[:, 0]
            low_G = torch.where(last_place_G >= end_G - mask.min_full_attn_len, 0, low_G)
        low = max(int(low_G.min()), 0)
    ranges = [slice(0, min(mask.num_oldest_keys, low)), slice(low, seen_to)]
    if mask.contextual_len and int(first_G.min()) < mask.contextual_len:
        ranges = [slice(0, int(history_G.max()))]
    if bool((last_G >= history_G).any()):  # targets see themselves
        own_G = torch.maximum(first_G, history_G)[last_G >= history_G]
        ranges.append(slice(int(own_G.min()), int(last_G.max()) + 1))
    return _merged(ranges)


def _merged(ranges: list[slice]) -> list[slice]:
    """The same keys in disjoint ranges, none of them empty."""
    found: list[slice] = []
    for each in sorted((each for each in ranges if each.start < each.stop), key=lambda each: each.start):
        if found and each.start <= found[-1].stop:
            found[-1] = slice(found[-1].start, max(found[-1].stop, each.stop))
        else:
            found.append(each)
    return found
