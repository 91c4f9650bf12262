"""HSTU attention on a CPU: tiles of scores that stay in the cache, computed again in the backward pass.

The sigmoid is taken from a hyperbolic tangent, an eighth of its time here: with h half the score and t = tanh(h),
silu is h + h·t and its derivative in h is (1 + t)(1 + h - h·t). So queries and bias tables enter halved.

Shapes: L packed keys, M packed queries, H heads, A query/key width, V value width, X rows of a group times heads, m
and n the group's longest rows of queries and keys, R rows of one tile, p and s its queries and keys.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from kernels.hstu_attention.bias import RelativeBias, bucket_steps_
from kernels.hstu_attention.problem import AttentionGradients, AttentionProblem
from kernels.hstu_attention.tiles import SCORES_PER_TILE, Group, Tile, plan


def forward(q_MHA: Tensor, k_LHA: Tensor, v_LHV: Tensor, problem: AttentionProblem) -> Tensor:
    """o_MHV of ``hstu_attention``."""
    out_MHV = v_LHV.new_empty(q_MHA.shape[0], *v_LHV.shape[1:])
    q_MHA, k_LHA, v_LHV = (_computable(x) for x in (q_MHA, k_LHA, v_LHV))
    scores = _Scores(problem, q_MHA)
    for group in scores.groups:
        q_XmA = group.queries.take(q_MHA).mul_(problem.alpha / 2)
        k_XnA, v_XnV = group.keys.take(k_LHA), group.keys.take(v_LHV)
        o_XmV = q_XmA.new_zeros(*q_XmA.shape[:2], v_XnV.shape[2])
        for tile in group.tiles:
            half_Xps = scores.half(group, tile, q_XmA, k_XnA)
            tanh_Xps = torch.tanh(half_Xps, out=scores.array("tanh", tile.shape))
            weight_Xps = scores.masked(group, tile, half_Xps.addcmul_(half_Xps, tanh_Xps))
            scores.add_product(o_XmV[tile.x, tile.queries], weight_Xps, v_XnV[tile.x, tile.keys])
        group.queries.put(out_MHV, o_XmV.div_(problem.max_len))
    return out_MHV


def backward(
    grad_MHV: Tensor, q_MHA: Tensor, k_LHA: Tensor, v_LHV: Tensor, problem: AttentionProblem
) -> AttentionGradients:
    """Gradients of ``forward`` for the upstream gradient grad_MHV."""
    found = _no_gradients(q_MHA, k_LHA, v_LHV, problem)
    grad_MHV, q_MHA, k_LHA, v_LHV = (_computable(x) for x in (grad_MHV, q_MHA, k_LHA, v_LHV))
    scores = _Scores(problem, q_MHA)
    for group in scores.groups:
        q_XmA = group.queries.take(q_MHA).mul_(problem.alpha / 2)
        k_XnA, v_XnV = group.keys.take(k_LHA), group.keys.take(v_LHV)
        do_XmV = group.queries.take_zero_padded(grad_MHV).div_(problem.max_len)
        dq_XmA, dk_XnA, dv_XnV = torch.zeros_like(q_XmA), torch.zeros_like(k_XnA), torch.zeros_like(v_XnV)
        for tile in group.tiles:
            x, queries, keys = tile.x, tile.queries, tile.keys
            half_Xps = scores.half(group, tile, q_XmA, k_XnA)
            tanh_Xps = torch.tanh(half_Xps, out=scores.array("tanh", tile.shape))
            weight_Xps = torch.addcmul(half_Xps, half_Xps, tanh_Xps, out=scores.array("weight", tile.shape))
            scores.masked(group, tile, weight_Xps)
            scores.add_product(dv_XnV[x, keys], weight_Xps.transpose(1, 2), do_XmV[x, queries])
            dhalf_Xps = torch.bmm(do_XmV[x, queries], v_XnV[x, keys].transpose(1, 2), out=weight_Xps)
            slope_Xps = half_Xps.addcmul_(half_Xps, tanh_Xps, value=-1)
            dhalf_Xps.addcmul_(dhalf_Xps, slope_Xps).addcmul_(dhalf_Xps, tanh_Xps)
            scores.masked(group, tile, dhalf_Xps)
            scores.add_product(dq_XmA[x, queries], dhalf_Xps, k_XnA[x, keys])
            scores.add_product(dk_XnA[x, keys], dhalf_Xps.transpose(1, 2), q_XmA[x, queries])
            scores.add_bias_gradients(group, tile, dhalf_Xps, found)
        group.queries.put(found.q_MHA, dq_XmA.mul_(problem.alpha / 2))
        group.keys.put(found.k_LHA, dk_XnA)
        group.keys.put(found.v_LHV, dv_XnV)
    found.position_weight.mul_(0.5)
    found.time_weight.mul_(0.5)
    return found


PAIRS_KEPT_MAX = 1 << 22
"""Pairs of query and key whose time buckets are kept from pass to pass: 16 MiB for each thread that computes."""


class _KeptBuckets(threading.local):
    """Time buckets of the pass before, the first PAIRS_KEPT_MAX of them.

    The layers of a model and their backward passes ask for the same ones. What they are made from is held, so that
    nothing else can come to stand at its address, and tensors count the times they are written to.
    """

    def __init__(self) -> None:
        self._made_from: tuple[tuple[Group, ...], RelativeBias, tuple[int, ...]] | None = None
        self._bucket = torch.empty(0, dtype=torch.int32)
        self._num_made = 0

    def start(self, groups: tuple[Group, ...], bias: RelativeBias) -> None:
        """Before the tiles of a pass are asked for, in the order of the plan."""
        times = (bias.timestamps_s_L, bias.query_timestamps_s_M)
        if any(t.is_inference() for t in times):  # those do not count
            self._made_from, self._num_made = None, 0
            return
        key = (*(part for t in times for part in (t.data_ptr(), t.stride(0), t._version)), bias.num_buckets)  # noqa: SLF001
        if self._made_from is None or self._made_from[0] is not groups or self._made_from[2] != key:
            self._made_from, self._num_made = (groups, bias, key), 0
            num_pairs = min(sum(tile.num_pairs for group in groups for tile in group.tiles), PAIRS_KEPT_MAX)
            if self._bucket.shape[0] < num_pairs:
                self._bucket = torch.empty(num_pairs, dtype=torch.int32)

    def of(self, tile: Tile, make: Callable[[Tensor], Tensor]) -> Tensor | None:
        """int32, flat: the buckets of a tile, which ``make`` writes the first time; None where they are not kept."""
        end = tile.first_pair + tile.num_pairs
        if self._made_from is None or end > self._bucket.shape[0]:
            return None
        bucket = self._bucket[tile.first_pair : end]
        if self._num_made <= tile.first_pair:
            make(bucket)
            self._num_made = end
        return bucket


_kept_buckets = _KeptBuckets()


class _Scores:
    """Scores of one pass, a tile at a time, in arrays that every tile uses again.

    Fresh arrays of this size would be mapped and faulted in, page by page, each time.
    """

    def __init__(self, problem: AttentionProblem, q_MHA: Tensor) -> None:
        self._problem = problem
        self._bias = None if problem.bias is None else _halved(problem.bias)
        self._num_heads, self._dtype = q_MHA.shape[1], q_MHA.dtype
        self._arrays: dict[str, Tensor] = {}
        self.groups = plan(problem, num_heads=self._num_heads)
        if problem.bias is not None:
            _kept_buckets.start(self.groups, problem.bias)

    def array(self, name: str, shape: tuple[int, int, int], dtype: torch.dtype | None = None) -> Tensor:
        """An array of this shape with arbitrary content: the same memory for the same name, made anew only to grow."""
        size = shape[0] * shape[1] * shape[2]
        held = self._arrays.get(name)
        if held is None or held.shape[0] < size:
            held = self._arrays[name] = torch.empty(max(size, SCORES_PER_TILE), dtype=dtype or self._dtype)
        return held[:size].view(shape)

    def half(self, group: Group, tile: Tile, q_XmA: Tensor, k_XnA: Tensor) -> Tensor:
        """[x, p, s]: products of halved queries, plus halved bias."""
        q_XpA, kT_XAs = q_XmA[tile.x, tile.queries], k_XnA[tile.x, tile.keys].transpose(1, 2)
        score_Xps = self.array("score", tile.shape)
        if self._bias is None:
            return torch.bmm(q_XpA, kT_XAs, out=score_Xps)
        if self._num_heads == 1:
            self._put_bias(group, tile, self._bias, score_Xps)
        else:
            bias_Rps = self.array("bias", self._rows_shape(tile))
            self._put_bias(group, tile, self._bias, bias_Rps)
            score_Xps.view(-1, self._num_heads, *tile.shape[1:]).copy_(bias_Rps[:, None])
        return score_Xps.baddbmm_(q_XpA, kT_XAs)

    def masked(self, group: Group, tile: Tile, tile_Xps: Tensor) -> Tensor:
        """The tile with exactly 0 where the query does not see the key; changed in place."""
        if group.shared and self._problem.mask.is_causal_only:
            diagonal = tile.queries.start - tile.keys.start
            if diagonal < tile.shape[2] - 1:
                tile_Xps[:, :, max(diagonal, 0) :].tril_(min(diagonal, 0))
            return tile_Xps
        visible_Rps = group.visible(tile, self._problem.mask)
        tile_Xps.view(-1, self._num_heads, *tile.shape[1:]).mul_(visible_Rps[:, None])
        return tile_Xps

    def add_product(self, sum_XpW: Tensor, left: Tensor, right: Tensor) -> None:
        """``sum += left @ right``, through a contiguous array: the batched product writes no other kind."""
        shape = (sum_XpW.shape[0], sum_XpW.shape[1], sum_XpW.shape[2])
        sum_XpW += torch.bmm(left, right, out=self.array("product", shape))

    def add_bias_gradients(self, group: Group, tile: Tile, dhalf_Xps: Tensor, found: AttentionGradients) -> None:
        """Add what a tile contributes to the gradients of both halved tables; after its ``half``."""
        if self._bias is None:
            return
        _, num_queries, num_keys = tile.shape
        dbias_Rps = dhalf_Xps
        if self._num_heads > 1:
            by_head = dhalf_Xps.view(-1, self._num_heads, num_queries, num_keys)
            dbias_Rps = torch.sum(by_head, 1, out=self.array("bias", self._rows_shape(tile)))
        _count(dbias_Rps, self._buckets(group, tile, self._bias), found.time_weight)
        if not group.shared:
            distance = group.distance_index(tile, self._problem.mask, self._problem.max_len)
            _count(dbias_Rps, distance, found.position_weight)
            return
        # Row r from below is shifted right by r: then every distance stands in one column.
        skewed = dbias_Rps.new_zeros(num_queries, num_queries + num_keys)
        skewed[:, :num_keys] = dbias_Rps.sum(0).flip(0)
        width = num_queries + num_keys - 1
        by_distance = skewed.view(-1)[: num_queries * width].view(num_queries, width).sum(0)
        found.position_weight[self._first_distance(tile) :][:width] += by_distance

    def _put_bias(self, group: Group, tile: Tile, bias: RelativeBias, out_Rps: Tensor) -> None:
        torch.index_select(bias.time_weight, 0, self._buckets(group, tile, bias), out=out_Rps.view(-1))
        if not group.shared:
            distance = group.distance_index(tile, self._problem.mask, self._problem.max_len)
            out_Rps.add_(bias.position_weight[distance])
            return
        _, num_queries, num_keys = tile.shape
        distances = bias.position_weight[self._first_distance(tile) :][: num_queries + num_keys - 1]
        out_Rps.add_(distances.unfold(0, num_keys, 1).flip(0))

    def _buckets(self, group: Group, tile: Tile, bias: RelativeBias) -> Tensor:
        """int32[R * p * s]: the bucket of every pair's gap in time, as ``time_bucket`` says."""

        def make(out: Tensor) -> Tensor:
            queries_s_Rp = bias.query_timestamps_s_M[group.queries.index_Gn[tile.rows, tile.queries]].double()
            keys_s_Rs = bias.timestamps_s_L[group.keys.index_Gn[tile.rows, tile.keys]].double()
            gap_Rps = self.array("gap", self._rows_shape(tile), torch.float64)
            torch.sub(queries_s_Rp[:, :, None], keys_s_Rs[:, None, :], out=gap_Rps)
            return out.copy_(bucket_steps_(gap_Rps, bias.num_buckets).view(-1))

        kept = _kept_buckets.of(tile, make)
        if kept is None:
            kept = make(self.array("bucket", self._rows_shape(tile), torch.int32).view(-1))
        return kept

    def _rows_shape(self, tile: Tile) -> tuple[int, int, int]:
        """(R, p, s)."""
        return tile.shape[0] // self._num_heads, tile.shape[1], tile.shape[2]

    def _first_distance(self, tile: Tile) -> int:
        """Index in the position table of the last query and the first key: the smallest of a shared tile."""
        distance: int = tile.keys.start - tile.queries.stop + self._problem.max_len
        return distance


def _count(values: Tensor, index: Tensor, table_K: Tensor) -> None:
    """``table_K[index] += values``: one counting pass, far faster than a scatter-add into a tiny table."""
    table_K += torch.bincount(index.flatten(), weights=values.flatten(), minlength=table_K.shape[0])


def _computable(x: Tensor) -> Tensor:
    """Half precision is summed in single, as every other implementation does."""
    return x if x.dtype in (torch.float32, torch.float64) else x.float()


def _halved(bias: RelativeBias) -> RelativeBias:
    return replace(
        bias,
        position_weight=_computable(bias.position_weight) * 0.5,
        time_weight=_computable(bias.time_weight) * 0.5,
    )


def _no_gradients(q_MHA: Tensor, k_LHA: Tensor, v_LHV: Tensor, problem: AttentionProblem) -> AttentionGradients:
    """Zeros: rows without queries are in no group, and the tables are added to."""
    bias = problem.bias
    return AttentionGradients(
        q_MHA=torch.empty_like(q_MHA, memory_format=torch.contiguous_format),
        k_LHA=torch.zeros_like(k_LHA, memory_format=torch.contiguous_format),
        v_LHV=torch.zeros_like(v_LHV, memory_format=torch.contiguous_format),
        position_weight=q_MHA.new_empty(0) if bias is None else torch.zeros_like(bias.position_weight),
        time_weight=q_MHA.new_empty(0) if bias is None else torch.zeros_like(bias.time_weight),
    )
