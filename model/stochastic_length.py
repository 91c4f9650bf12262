"""Stochastic length: in training, long histories are mostly read in part (HSTU, arXiv 2402.17152, section on SL).

With N the longest length and 1 < alpha <= 2, a history of n interactions is read

    whole                                              if n <= N^(alpha/2), else
    whole with probability N^alpha / n^2, and otherwise as floor(N^(alpha/2)) of its interactions,

so that attention over it costs O(N^alpha) in expectation. alpha = 2 reads everything. Serving always reads everything.

Shapes: B users, L positions, K kept positions, P supervised positions.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal, Protocol, get_args

import torch
from torch import Tensor

from kernels.jagged import position_index, row_index
from model.batch import HistoryBatch, Targets

Selection = Literal["recent", "feature_weighted", "uniform"]
"""Which interactions a shortened history keeps, in the paper's words.

recent: the newest ones (greedy).
uniform: drawn without replacement, each alike.
feature_weighted: drawn without replacement with weight 1 - f_i / sum_j f_j, where f_i = t_n - t_i is the age of
interaction i at the newest one. The paper's table names the feature f_i only. It reads as a preference for what is
recent: a weight that grew with the age would keep the oldest interactions, while the greedy rule, which keeps the
newest, does as well as uniform draws. The fraction of one interaction is small in a long history, so the preference
is a mild one: only an interaction much older than the average loses a noticeable part of its weight.
"""


@dataclass(frozen=True, kw_only=True, slots=True)
class StochasticLength:
    """How training shortens histories."""

    alpha: float
    """Exponent of the expected attention cost in the longest length: above 1, at most 2. The paper uses 1.6 to 1.8."""
    max_len: int
    """N: the longest length of a history."""
    selection: Selection = "feature_weighted"
    """Which interactions are kept. The paper's best of the three, by 0.2 to 0.4 % of normalised entropy."""

    def __post_init__(self) -> None:
        _check_rule(self.alpha, self.max_len)
        if self.selection not in get_args(Selection):
            raise ValueError(f"selection is {self.selection!r}; it must be one of {', '.join(get_args(Selection))}")


def short_len(*, alpha: float, max_len: int) -> int:
    """floor(N^(alpha/2)): how much of a shortened history is read.

    >>> short_len(alpha=1.6, max_len=4096)
    776
    """
    _check_rule(alpha, max_len)
    power = max_len ** (alpha / 2)
    # 1000^(4/3) is 10000 but comes out just below it: a whole number is not missed through rounding.
    return round(power) if abs(power - round(power)) < 1e-9 * power else int(power)


def whole_probability(lengths_B: Tensor, *, alpha: float, max_len: int) -> Tensor:
    """float64[B]: how likely each history is read whole."""
    longest_short = short_len(alpha=alpha, max_len=max_len)
    sampled_B = (float(max_len) ** alpha / lengths_B.double().clamp(min=1).square()).clamp(max=1)
    return torch.where(lengths_B <= longest_short, 1.0, sampled_B)


def sampled_lengths(lengths_B: Tensor, *, alpha: float, max_len: int, generator: torch.Generator) -> Tensor:
    """int64[B]: how many interactions of each history are read. lengths_B: int64[B].

    One number is drawn for each history, whatever its length, on the generator's device: with a generator on the CPU,
    histories on any device are shortened alike.
    """
    longest_short = short_len(alpha=alpha, max_len=max_len)
    drawn_B = torch.rand(lengths_B.shape, dtype=torch.float64, device=generator.device, generator=generator)
    drawn_B = drawn_B.to(lengths_B.device)
    whole = (lengths_B <= longest_short) | (drawn_B * lengths_B.double().square() < float(max_len) ** alpha)
    return torch.where(whole, lengths_B, longest_short)


class DrawsLengths(Protocol):
    """Draws how many interactions of each history are read, by another rule than ``sampled_lengths``."""

    def sampled_lengths(self, lengths_B: Tensor, *, generator: torch.Generator) -> Tensor:
        """int64[B] of int64[B]: each length as it is or ``short_len``."""
        ...


def kept_positions(
    rule: StochasticLength,
    offsets: Tensor,
    timestamps_L: Tensor,
    *,
    generator: torch.Generator,
    always_L: Tensor | None = None,
    lengths: DrawsLengths | None = None,
) -> Tensor:
    """int64[K]: the packed positions to read, ascending.

    offsets: int64[B + 1]. timestamps_L: int64[L], ascending in each row, any unit. always_L: bool[L], positions that
    are kept whatever the draw; they take the place of others, and a row with more of them than it should have is
    longer. The newest position of a row is always kept. lengths: None draws each history's by itself. A function of the
    arguments and the generator's state.
    """
    rows_L = row_index(offsets, timestamps_L.shape[0])
    if lengths is None:
        lengths_B = sampled_lengths(offsets.diff(), alpha=rule.alpha, max_len=rule.max_len, generator=generator)
    else:
        lengths_B = lengths.sampled_lengths(offsets.diff(), generator=generator).to(offsets.device)
    newest_L = torch.zeros_like(timestamps_L, dtype=torch.bool)
    newest_L[offsets[1:][offsets.diff() > 0] - 1] = True
    always_L = newest_L if always_L is None else newest_L | always_L
    key_L = _selection_key(rule.selection, offsets, timestamps_L, generator).masked_fill(always_L, -torch.inf)
    # Two stable sorts order by (row, key): a position's rank in its row is then its place.
    order_L = key_L.argsort(stable=True)
    order_L = order_L[rows_L[order_L].argsort(stable=True)]
    chosen_L = torch.empty_like(always_L)
    chosen_L[order_L] = position_index(offsets, timestamps_L.shape[0]) < lengths_B[rows_L]
    return (chosen_L | always_L).nonzero().flatten()


def _selection_key(selection: Selection, offsets: Tensor, timestamps_L: Tensor, generator: torch.Generator) -> Tensor:
    """float64[L]: a row keeps the positions whose keys are smallest."""
    num_positions = timestamps_L.shape[0]
    if selection == "recent":
        return -position_index(offsets, num_positions).double()
    drawn_L = torch.empty(num_positions, dtype=torch.float64, device=generator.device)
    drawn_L = drawn_L.exponential_(generator=generator).to(offsets.device)
    if selection == "uniform":
        return drawn_L
    # The smallest of exponential(1) draws over their weights are a weighted draw without replacement (Efraimidis and
    # Spirakis). A weight of 0 is only that of the older of two interactions; it is drawn last.
    return drawn_L / _recency_weight(offsets, timestamps_L).clamp_min_(1e-300)


def _recency_weight(offsets: Tensor, timestamps_L: Tensor) -> Tensor:
    """float64[L]: 1 - f_i / sum_j f_j of each row, with f the age at the row's newest interaction."""
    rows_L = row_index(offsets, timestamps_L.shape[0])
    age_L = (timestamps_L[offsets[1:][rows_L] - 1] - timestamps_L).double()
    total_B = torch.segment_reduce(age_L, "sum", offsets=offsets, axis=0)
    return 1 - age_L / total_B.clamp_min(1)[rows_L]


def shortened(
    batch: HistoryBatch,
    targets: Targets,
    rule: StochasticLength,
    *,
    generator: torch.Generator,
    lengths: DrawsLengths | None = None,
) -> tuple[HistoryBatch, Targets]:
    """The batch with long histories shortened, and the same targets at their new positions.

    Supervised positions are always kept. A kept position keeps its query time, the moment its prediction is for: the
    next interaction may be gone, but it still happened then.
    """
    always_L = torch.zeros(batch.num_positions, dtype=torch.bool, device=batch.offsets.device)
    always_L[targets.positions_P] = True
    kept_K = kept_positions(
        rule, batch.offsets, batch.timestamps_ms_L, generator=generator, always_L=always_L, lengths=lengths
    )
    return batch.take(kept_K), replace(targets, positions_P=torch.searchsorted(kept_K, targets.positions_P))


def _check_rule(alpha: float, max_len: int) -> None:
    if not 1 < alpha <= 2:
        raise ValueError(f"alpha is {alpha}; it must be above 1 and at most 2")
    if max_len < 1:
        raise ValueError(f"max_len is {max_len}; it must be 1 or more interactions")


__all__ = [
    "DrawsLengths",
    "Selection",
    "StochasticLength",
    "kept_positions",
    "sampled_lengths",
    "short_len",
    "shortened",
    "whole_probability",
]
