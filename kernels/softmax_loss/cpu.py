"""Softmax losses on the CPU, their gradients formed in the same pass; README.md says what that brings.

Shapes: P supervised positions, p of them in a chunk, V catalogue rows, C negatives, C1 = C + 1 with the target in
column 0, D width, E = D + 1: item rows widened by their offset, query rows by a one.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn import functional

from kernels.softmax_loss.formed import FormedSoftmax, LogitSummary, without_gradients
from kernels.softmax_loss.reference import accumulation_dtype

ENTRIES_PER_CHUNK = 1 << 19
"""Sampled logits (p * C1) at once: 4,000 positions of 128 negatives, about 16 MiB of temporaries."""
POSITIONS_PER_CHUNK = 256
"""Positions of ``form_full_softmax`` whose V logits exist at once."""
LOG_PROBABILITY_MIN = -60.0
"""Candidates less likely than e^-60 get a gradient of exactly 0: denormal ones make the sums 3 times as slow."""


@torch.no_grad()
def form_sampled_softmax(
    u_PD: Tensor,
    item_VD: Tensor,
    target_rows_P: Tensor,
    negative_rows_PC: Tensor,
    *,
    scale: Tensor,
    offset_V: Tensor | None = None,
    weights_P: Tensor | None = None,
    with_gradients: bool = True,
) -> FormedSoftmax:
    """``sampled_softmax_loss`` with negatives of each position's own, nowhere gathering [P, C, D].

    A chunk's logits are the entries of u . item at the sampled places (a sampled dense-dense product); both gradients
    are weighted sums of rows (embedding bags), that of the items after its entries are sorted by item.
    ValueError for a row number outside the catalogue.
    """
    total = _Totals(u_PD, item_VD, offset_V, scale, weights_P, with_gradients=with_gradients)
    query_PE, item_VE = total.widened()
    for part in parts(u_PD.shape[0], _sampled_chunk(negative_rows_PC.shape[1] + 1, item_VD.shape[0])):
        rows_pC1 = _chunk_rows(target_rows_P[part], negative_rows_PC[part], item_VD.shape[0])
        logits_pC1 = _sampled_logits(query_PE[part], item_VE, rows_pC1)
        logits_pC1[:, 1:].masked_fill_(rows_pC1[:, 1:] == rows_pC1[:, :1], -torch.inf)
        log_softmax_pC1 = torch.log_softmax(logits_pC1, 1)
        torch.neg(log_softmax_pC1[:, 0], out=total.loss_P[part])
        if with_gradients:
            grad_pC1 = _gradient(log_softmax_pC1, total.weights_P[part, None])
            total.query_PE[part] = functional.embedding_bag(rows_pC1, item_VE, per_sample_weights=grad_pC1, mode="sum")
            total.item_VE += _sum_by_item(rows_pC1, grad_pC1, query_PE[part], item_VD.shape[0])
    return total.formed()


@torch.no_grad()
def form_shared_softmax(  # noqa: PLR0913 - one argument per tensor of the formula
    u_PD: Tensor,
    item_VD: Tensor,
    target_rows_P: Tensor,
    negative_rows_C: Tensor,
    *,
    scale: Tensor,
    offset_V: Tensor | None = None,
    log_q_C: Tensor | None = None,
    log_q_target_P: Tensor | None = None,
    weights_P: Tensor | None = None,
    with_gradients: bool = True,
) -> FormedSoftmax:
    """``sampled_softmax_loss`` with negatives shared by all positions: matrix products over their C rows."""
    total = _Totals(u_PD, item_VD, offset_V, scale, weights_P, with_gradients=with_gradients)
    query_PE, item_VE = total.widened()
    negative_CE = item_VE[negative_rows_C]
    grad_CE = torch.zeros_like(negative_CE)
    for part in parts(u_PD.shape[0], max(1, ENTRIES_PER_CHUNK // (negative_rows_C.shape[0] + 1))):
        target_pE = item_VE[target_rows_P[part]]
        target_p = (query_PE[part] * target_pE).sum(1)
        logits_pC = query_PE[part] @ negative_CE.T
        if log_q_C is not None:
            logits_pC -= log_q_C
        if log_q_target_P is not None:
            target_p -= log_q_target_P[part]
        logits_pC.masked_fill_(negative_rows_C == target_rows_P[part, None], -torch.inf)
        log_softmax_pC1 = torch.cat([target_p[:, None], logits_pC], 1).log_softmax(1)
        torch.neg(log_softmax_pC1[:, 0], out=total.loss_P[part])
        if with_gradients:
            grad_pC1 = _gradient(log_softmax_pC1, total.weights_P[part, None])
            total.query_PE[part] = torch.addmm(grad_pC1[:, :1] * target_pE, grad_pC1[:, 1:], negative_CE)
            total.item_VE.index_add_(0, target_rows_P[part], grad_pC1[:, :1] * query_PE[part])
            grad_CE.addmm_(grad_pC1[:, 1:].T, query_PE[part])
    if with_gradients:
        total.item_VE.index_add_(0, negative_rows_C, grad_CE)
    return total.formed()


@torch.no_grad()
def form_full_softmax(
    u_PD: Tensor,
    item_VD: Tensor,
    target_rows_P: Tensor,
    *,
    scale: Tensor,
    offset_V: Tensor | None = None,
    weights_P: Tensor | None = None,
    with_gradients: bool = True,
) -> FormedSoftmax:
    """``full_softmax_loss`` and its gradients, never more than POSITIONS_PER_CHUNK x V logits at once; any device."""
    total = _Totals(u_PD, item_VD, offset_V, scale, weights_P, with_gradients=with_gradients, widen=False)
    query_PD, item_VD = total.scaled()
    for part in parts(u_PD.shape[0], POSITIONS_PER_CHUNK):
        probability_pV, summary = softmax_(total.logits(query_PD[part], item_VD), target_rows_P[part])
        total.loss_P[part] = summary.loss_P
        if with_gradients:
            weight_p1 = total.weights_P[part, None]
            grad_pV = probability_pV.mul_(weight_p1)
            grad_pV.scatter_add_(1, target_rows_P[part, None], -weight_p1)
            total.query_PE[part] = grad_pV @ item_VD
            total.item_VE.addmm_(grad_pV.T, query_PD[part])
            total.add_offset_gradient(grad_pV)
    return total.formed()


def softmax_(logits_pV: Tensor, target_rows_p: Tensor) -> tuple[Tensor, LogitSummary]:
    """The probabilities, which take the place of the logits, and what is kept of those."""
    target_p = logits_pV.gather(1, target_rows_p[:, None])[:, 0]
    top_p = logits_pV.amax(1)
    # In place: torch writes a row only after it has read it. One fused pass, a third of sub, exp, sum and mul.
    probability_pV = torch.softmax(logits_pV, 1, out=logits_pV)
    log_sum_p = top_p - probability_pV.amax(1).log()  # the largest is e^top / sum, at least 1 / V
    return probability_pV, LogitSummary(log_sum_P=log_sum_p, target_P=target_p, top_P=top_p)


class _Totals:
    """Losses and gradients while they are summed, in the accumulation dtype.

    widen: where a logit is formed entry by entry, the offset of an item counts as one more dimension of it (and 1 as
    that of every query), so that it costs no passes of its own; without offsets E is D. Products over the whole
    catalogue take the offset as what they add to instead: a width of 2^n + 1 would slow them.
    """

    def __init__(
        self,
        u_PD: Tensor,
        item_VD: Tensor,
        offset_V: Tensor | None,
        scale: Tensor,
        weights_P: Tensor | None,
        *,
        with_gradients: bool,
        widen: bool = True,
    ) -> None:
        dtype, num_positions = accumulation_dtype(u_PD), u_PD.shape[0]
        self._u_PD, self._item_VD, self._scale = u_PD, item_VD, scale
        self._offset_V = None if offset_V is None else offset_V.to(dtype)
        self._offset_dtype = dtype if offset_V is None else offset_V.dtype
        self._widen = widen and offset_V is not None
        self._with_gradients = with_gradients
        if weights_P is None:
            weights_P = u_PD.new_full((num_positions,), 1 / max(num_positions, 1), dtype=dtype)
        self.weights_P = weights_P.to(dtype)
        self.loss_P = u_PD.new_zeros(num_positions, dtype=dtype)
        width = u_PD.shape[1] + self._widen
        if with_gradients:
            self.query_PE = u_PD.new_empty(num_positions, width, dtype=dtype)
            self.item_VE = u_PD.new_zeros(item_VD.shape[0], width, dtype=dtype)
            self._offset_grad_V = u_PD.new_zeros(0 if offset_V is None else item_VD.shape[0], dtype=dtype)

    def scaled(self) -> tuple[Tensor, Tensor]:
        """query_PD = scale * u, and item_VD."""
        dtype = self.weights_P.dtype
        return self._u_PD.to(dtype) * self._scale.to(dtype), self._item_VD.to(dtype).contiguous()

    def widened(self) -> tuple[Tensor, Tensor]:
        """query_PE = (scale * u, 1) and item_VE = (item, offset)."""
        query_PD, item_VD = self.scaled()
        if self._offset_V is None:
            return query_PD, item_VD
        ones_P1 = query_PD.new_ones(query_PD.shape[0], 1)
        return torch.cat([query_PD, ones_P1], 1), torch.cat([item_VD, self._offset_V[:, None]], 1)

    def logits(self, query_pD: Tensor, item_VD: Tensor) -> Tensor:
        """[p, V] of queries and items that are not widened."""
        return query_pD @ item_VD.T if self._offset_V is None else torch.addmm(self._offset_V, query_pD, item_VD.T)

    def add_offset_gradient(self, grad_pV: Tensor) -> None:
        """Add the gradient of the logits of some positions, where the items are not widened."""
        if self._offset_V is not None:
            self._offset_grad_V += grad_pV.sum(0)

    def formed(self) -> FormedSoftmax:
        loss = (self.weights_P * self.loss_P).sum()
        if not self._with_gradients:
            return without_gradients(loss, self.loss_P)
        width = self._u_PD.shape[1]
        by_item_PD = self.query_PE[:, :width]
        offset_V = self.item_VE[:, width] if self._widen else self._offset_grad_V
        return FormedSoftmax(
            loss=loss,
            loss_P=self.loss_P,
            u_PD=(by_item_PD * self._scale.to(by_item_PD.dtype)).to(self._u_PD.dtype),
            item_VD=self.item_VE[:, :width].to(self._item_VD.dtype).contiguous(),
            offset_V=offset_V.to(self._offset_dtype).contiguous(),
            scale=(by_item_PD * self._u_PD).sum().to(self._scale.dtype),
        )


def parts(num_positions: int, positions_per_chunk: int) -> Iterator[slice]:
    """Slices of so many positions at most, in order."""
    for start in range(0, num_positions, positions_per_chunk):
        yield slice(start, min(start + positions_per_chunk, num_positions))


def _sampled_chunk(num_candidates: int, num_items: int) -> int:
    """Positions per chunk, few enough that an item row and a position of the chunk fit into 31 bits (_sum_by_item)."""
    return max(1, min(ENTRIES_PER_CHUNK // num_candidates, 1 << (31 - num_items.bit_length())))


def _chunk_rows(target_rows_p: Tensor, negative_rows_pC: Tensor, num_items: int) -> Tensor:
    """int32[p, C1]: the target, then the negatives."""
    num_positions, num_negatives = negative_rows_pC.shape
    rows_pC1 = torch.empty(num_positions, num_negatives + 1, dtype=torch.int32)
    rows_pC1[:, 0], rows_pC1[:, 1:] = target_rows_p, negative_rows_pC
    low, high = rows_pC1.aminmax()
    if low < 0 or high >= num_items:  # the sparse product below would read foreign memory
        raise ValueError(f"target or negative rows run from {low} to {high}; item_VD has {num_items} rows")
    return rows_pC1


def _sampled_logits(query_pE: Tensor, item_VE: Tensor, rows_pC1: Tensor) -> Tensor:
    """float[p, C1]: query . item at the sampled places; a place sampled twice is an entry twice."""
    num_positions, num_candidates = rows_pC1.shape
    num_entries, num_items = rows_pC1.numel(), item_VE.shape[0]
    if num_candidates * 4 > num_items:  # so dense a product is faster whole (and no sparse one may hold more entries)
        return (query_pE @ item_VE.T).gather(1, rows_pC1.to(torch.int64))
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Sparse CSR tensor support is in beta", UserWarning)
        places = torch.sparse_csr_tensor(
            torch.arange(0, num_entries + 1, num_candidates, dtype=torch.int32),
            rows_pC1.view(-1),
            query_pE.new_zeros(num_entries),
            (num_positions, num_items),
            check_invariants=False,  # columns neither ascend nor differ, which the product does not need
        )
        torch.sparse.sampled_addmm(places, query_pE, item_VE.T, beta=0.0, out=places)  # in place: no copy of the rows
    return places.values().view_as(rows_pC1)


def _gradient(log_softmax_pC1: Tensor, weight_p1: Tensor) -> Tensor:
    """float[p, C1], in place: weight * (softmax - one at the target)."""
    grad_pC1 = torch.threshold_(log_softmax_pC1, LOG_PROBABILITY_MIN, -torch.inf).exp_()
    grad_pC1[:, 0] -= 1
    return grad_pC1.mul_(weight_p1)


def _sum_by_item(rows_pC1: Tensor, grad_pC1: Tensor, query_pE: Tensor, num_items: int) -> Tensor:
    """float[V, E]: for each item the sum of grad * query over its entries, in a fixed order."""
    if grad_pC1.dtype != torch.float32:
        rows, order = rows_pC1.view(-1).sort(stable=True)
        positions = torch.div(order, rows_pC1.shape[1], rounding_mode="floor")
        starts_V = torch.searchsorted(rows, torch.arange(num_items, dtype=rows.dtype))
        return functional.embedding_bag(
            positions, query_pE, starts_V, per_sample_weights=grad_pC1.view(-1)[order], mode="sum"
        )
    # An entry is one 64-bit key: item, position, and the bits of its gradient in the lower half. Sorting keys moves the
    # gradients along, which is 5 times as fast as an argsort followed by gathers; numpy sorts with vector instructions.
    num_positions = rows_pC1.shape[0]
    position_bits = (num_positions - 1).bit_length()
    halves = torch.empty(*rows_pC1.shape, 2, dtype=torch.int32)
    halves[..., 0] = grad_pC1.view(torch.int32)
    torch.add(rows_pC1 << position_bits, torch.arange(num_positions, dtype=torch.int32)[:, None], out=halves[..., 1])
    keys = halves.view(-1).view(torch.int64)
    keys.numpy().sort()
    starts_V = torch.searchsorted(keys, torch.arange(num_items) << (32 + position_bits), out_int32=True)
    positions = halves.view(-1, 2)[:, 1] & ((1 << position_bits) - 1)
    grads = keys.to(torch.int32).view(torch.float32)
    return functional.embedding_bag(positions, query_pE, starts_V, per_sample_weights=grads, mode="sum")
