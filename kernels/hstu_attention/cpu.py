"""HSTU attention on a CPU: tiles of scores that stay in the cache, computed again in the backward pass.

The sigmoid is taken from a hyperbolic tangent, an eighth of its time here: with h half the score and t = tanh(h),
silu is h + h·t and its derivative in h is (1 + t)(1 + h - h·t). So queries and bias tables enter halved.

Shapes: L packed keys, M packed queries, H heads, A query/key width, V value width, X rows of a group times heads, m
and n the group's longest rows of queries and keys, p and s queries and keys of one tile.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from kernels.hstu_attention.problem import AttentionGradients, AttentionProblem
from kernels.hstu_attention.tiles import groups


def forward(q_MHA: Tensor, k_LHA: Tensor, v_LHV: Tensor, problem: AttentionProblem) -> Tensor:
    """o_MHV of ``hstu_attention``."""
    out_MHV = v_LHV.new_empty(q_MHA.shape[0], *v_LHV.shape[1:])
    q_MHA, k_LHA, v_LHV = (_computable(x) for x in (q_MHA, k_LHA, v_LHV))
    problem = _halved(problem)
    for group in groups(problem, num_heads=q_MHA.shape[1], dtype=q_MHA.dtype):
        q_XmA = group.queries.take(q_MHA).mul_(problem.alpha / 2)
        k_XnA, v_XnV = group.keys.take(k_LHA), group.keys.take(v_LHV)
        o_XmV = q_XmA.new_zeros(*q_XmA.shape[:2], v_XnV.shape[2])
        for tile in group.tiles():
            half_Xps = tile.half_scores(q_XmA, k_XnA)
            tanh_Xps = torch.tanh(half_Xps, out=tile.array("tanh"))
            weight_Xps = tile.masked(half_Xps.addcmul_(half_Xps, tanh_Xps))
            tile.add_product(o_XmV[tile.x, tile.queries], weight_Xps, v_XnV[tile.x, tile.keys])
        group.queries.put(out_MHV, o_XmV.div_(problem.max_len))
    return out_MHV


def backward(
    grad_MHV: Tensor, q_MHA: Tensor, k_LHA: Tensor, v_LHV: Tensor, problem: AttentionProblem
) -> AttentionGradients:
    """Gradients of ``forward`` for the upstream gradient grad_MHV."""
    found = _no_gradients(q_MHA, k_LHA, v_LHV, problem)
    grad_MHV, q_MHA, k_LHA, v_LHV = (_computable(x) for x in (grad_MHV, q_MHA, k_LHA, v_LHV))
    problem = _halved(problem)
    for group in groups(problem, num_heads=q_MHA.shape[1], dtype=q_MHA.dtype):
        q_XmA = group.queries.take(q_MHA).mul_(problem.alpha / 2)
        k_XnA, v_XnV = group.keys.take(k_LHA), group.keys.take(v_LHV)
        do_XmV = group.queries.take_zero_padded(grad_MHV).div_(problem.max_len)
        dq_XmA, dk_XnA, dv_XnV = torch.zeros_like(q_XmA), torch.zeros_like(k_XnA), torch.zeros_like(v_XnV)
        for tile in group.tiles():
            x, queries, keys = tile.x, tile.queries, tile.keys
            half_Xps = tile.half_scores(q_XmA, k_XnA)
            tanh_Xps = torch.tanh(half_Xps, out=tile.array("tanh"))
            weight_Xps = tile.masked(torch.addcmul(half_Xps, half_Xps, tanh_Xps, out=tile.array("weight")))
            tile.add_product(dv_XnV[x, keys], weight_Xps.transpose(1, 2), do_XmV[x, queries])
            dhalf_Xps = torch.bmm(do_XmV[x, queries], v_XnV[x, keys].transpose(1, 2), out=weight_Xps)
            slope_Xps = half_Xps.addcmul_(half_Xps, tanh_Xps, value=-1)
            dhalf_Xps.addcmul_(dhalf_Xps, slope_Xps).addcmul_(dhalf_Xps, tanh_Xps)
            tile.masked(dhalf_Xps)
            tile.add_product(dq_XmA[x, queries], dhalf_Xps, k_XnA[x, keys])
            tile.add_product(dk_XnA[x, keys], dhalf_Xps.transpose(1, 2), q_XmA[x, queries])
            tile.add_bias_gradients(dhalf_Xps, found)
        group.queries.put(found.q_MHA, dq_XmA.mul_(problem.alpha / 2))
        group.keys.put(found.k_LHA, dk_XnA)
        group.keys.put(found.v_LHV, dv_XnV)
    found.position_weight.mul_(0.5)
    found.time_weight.mul_(0.5)
    return found


def _computable(x: Tensor) -> Tensor:
    """Half precision is summed in single, as every other implementation does."""
    return x if x.dtype in (torch.float32, torch.float64) else x.float()


def _halved(problem: AttentionProblem) -> AttentionProblem:
    bias = problem.bias
    if bias is None:
        return problem
    halves = {name: _computable(getattr(bias, name)) * 0.5 for name in ("position_weight", "time_weight")}
    return replace(problem, bias=replace(bias, **halves))


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
