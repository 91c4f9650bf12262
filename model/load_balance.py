"""Load-balanced stochastic length: every rank's step costs alike (ULTRA-HSTU, arXiv 2602.16986, section on LBSL).

Ranks that train together wait for the slowest of each step. Plain stochastic length makes steps uneven: which histories
a rank is given differs, and so do the draws of which of them are read whole. Here

1. during a warm-up, ranks draw as plain stochastic length does, and the mean load of a step over all ranks is
   estimated;
2. then each rank shifts the log-odds of its long histories by one number, so that the load it expects is the target,
   and draws so that the load it gets is close to that: one random number, laid over the histories in order of length,
   decides about all of them (systematic sampling): of histories of similar length the right number is read whole;
3. at fixed steps the ranks sum what they saw (all-reduce), which renews the target, and corrects a bias: a history in
   heavy company is read whole more rarely and one in light company more often, which need not cancel for each length.
   Corrections of the log-odds, one for each class of length, bring the share that is read whole back to the rule's.

So the chance of a history to be read whole is that of plain stochastic length on average over its company, whatever its
length. The paper prefers important histories among equals; none is preferred here.

Shapes: B histories of one rank's step, C classes of length.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

from model.config import LossConfig, ModelConfig
from model.flops import Segment, forward_flops, segments_of
from model.stochastic_length import sampled_lengths, short_len, whole_probability

AllReduce = Callable[[Tensor], None]
"""Sums a tensor over all ranks, in place: ``torch.distributed.all_reduce`` of a group."""

_NUM_CLASSES: Final = 16
_SHIFT_MAX: Final = 2.0
"""Of the log-odds: company changes a history's odds by a factor of 7 at most."""
_CORRECTION_MAX: Final = 2.0
_CORRECTION_GAIN: Final = 0.15
"""Below 1 - _MEMORY, so that a correction is not made again before what it did is known."""
_NUM_HALVINGS: Final = 24
_MEMORY: Final = 0.8
"""Weight of what was known at the exchange before, at each exchange."""


@dataclass(frozen=True, kw_only=True, slots=True)
class LoadModel:
    """What a history costs a step: linear in its length in the layers' matrices, up to quadratic in attention."""

    segments: tuple[Segment, ...]

    @classmethod
    def of(cls, config: ModelConfig, *, pair_cost: float = 0.0) -> LoadModel:
        """Of an encoder's layers. pair_cost: of a pair of positions, in that of a position; 0: as operations say."""
        segments = segments_of(config)
        return cls(segments=tuple(one.with_pair_cost(pair_cost) if pair_cost else one for one in segments))

    def loads(self, lengths_B: Tensor) -> Tensor:
        """float64[B]."""
        return forward_flops(self.segments, lengths_B)


@dataclass(frozen=True, kw_only=True, slots=True)
class BalanceRule:
    """How lengths are drawn."""

    alpha: float
    max_len: int
    load: LoadModel
    warm_up_steps: int = 50
    """Steps drawn by plain stochastic length while the target is estimated."""
    exchange_every: int = 20
    """Steps between two exchanges of what ranks saw."""

    def __post_init__(self) -> None:
        short_len(alpha=self.alpha, max_len=self.max_len)
        for name in ("warm_up_steps", "exchange_every"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be 1 step or more")


class LengthBalancer:
    """Draws the lengths of one rank's steps. A function of the lengths, the generator's states and the other ranks.

    all_reduce: None where there is one rank: then its own steps cost alike. Otherwise every rank must call
    ``sampled_lengths`` equally often, also for a step without histories.
    """

    @classmethod
    def of(cls, config: ModelConfig, loss: LossConfig) -> LengthBalancer | None:
        """What the settings of a trainer that is alone ask for; None: nothing is balanced."""
        if not loss.stochastic_length_balance:
            return None
        if config.transducers or config.kind not in ("hstu", "ultra_hstu"):
            raise ValueError(
                "stochastic_length_balance needs model.kind hstu or ultra_hstu without transducers, whose cost by"
                " length is known: set it to false"
            )
        load = LoadModel.of(config, pair_cost=loss.stochastic_length_pair_cost)
        return cls(BalanceRule(alpha=loss.stochastic_length_alpha, max_len=config.max_len, load=load))

    def __init__(self, rule: BalanceRule, *, all_reduce: AllReduce | None = None) -> None:
        self.rule = rule
        self._all_reduce = all_reduce
        self._short = short_len(alpha=rule.alpha, max_len=rule.max_len)
        steps = torch.linspace(0, 1, _NUM_CLASSES + 1, dtype=torch.float64)[1:-1]
        self._bounds = self._short * (rule.max_len / self._short) ** steps
        self._num_steps = 0
        # Expected load, steps; per class long histories, their chances by plain stochastic length, and as shifted.
        self._since_exchange = torch.zeros(2 + 3 * _NUM_CLASSES, dtype=torch.float64)
        self._known = torch.zeros_like(self._since_exchange)
        self._correction_C = torch.zeros(_NUM_CLASSES, dtype=torch.float64)

    @property
    def target_load(self) -> float | None:
        """What a step is to cost, None before the first exchange."""
        return float(self._known[0] / self._known[1]) if self._known[1] > 0 else None

    def sampled_lengths(self, lengths_B: Tensor, *, generator: torch.Generator) -> Tensor:
        """int64[B]: how many interactions of each history are read in this step; counts the step."""
        rule, lengths_B = self.rule, lengths_B.cpu()
        long_B = lengths_B > self._short
        long_lengths = lengths_B[long_B]
        plain = whole_probability(long_lengths, alpha=rule.alpha, max_len=rule.max_len)
        base = float(rule.load.loads(lengths_B.clamp(max=self._short)).sum())
        short = torch.full_like(long_lengths, self._short)
        extra = rule.load.loads(long_lengths) - rule.load.loads(short)
        classes = torch.bucketize(long_lengths.double(), self._bounds)
        target, chance = self.target_load, plain
        if target is not None:
            # In the warm-up too, where it is only counted: corrections are known once it is in force.
            chance = _shifted(torch.logit(plain) + self._correction_C[classes], extra, target - base)
        if target is not None and self._num_steps >= rule.warm_up_steps:
            read = torch.where(_drawn_systematically(chance, long_lengths, generator), long_lengths, short)
            found_B = lengths_B.clone()
            found_B[long_B] = read
        else:
            found_B = sampled_lengths(lengths_B, alpha=rule.alpha, max_len=rule.max_len, generator=generator)
        self._count(base + float(plain @ extra), classes, plain, chance)
        return found_B

    def _count(self, expected_load: float, classes: Tensor, plain: Tensor, chance: Tensor) -> None:
        seen = self._since_exchange
        seen[0] += expected_load
        seen[1] += 1
        for sums_C, summed in zip(seen[2:].view(3, _NUM_CLASSES), (torch.ones_like(plain), plain, chance), strict=True):
            sums_C.index_add_(0, classes, summed)
        self._num_steps += 1
        if self._num_steps % self.rule.exchange_every == 0 or self._num_steps == self.rule.warm_up_steps:
            self._exchange()

    def _exchange(self) -> None:
        if self._all_reduce is not None:
            self._all_reduce(self._since_exchange)
        self._known = _MEMORY * self._known + self._since_exchange
        self._since_exchange = torch.zeros_like(self._since_exchange)
        num_C, plain_C, chance_C = self._known[2:].view(3, _NUM_CLASSES)
        seen_C = num_C > 1e-6
        odds_C = torch.logit(plain_C / num_C, eps=1e-6) - torch.logit(chance_C / num_C, eps=1e-6)
        step_C = torch.where(seen_C, _CORRECTION_GAIN * odds_C, 0.0)
        self._correction_C = (self._correction_C + step_C).clamp(-_CORRECTION_MAX, _CORRECTION_MAX)

    def state(self) -> dict[str, Tensor]:
        """For ``load_state``: copies."""
        return {
            "num_steps": torch.tensor([self._num_steps]),
            "since_exchange": self._since_exchange.clone(),
            "known": self._known.clone(),
            "correction": self._correction_C.clone(),
        }

    def load_state(self, state: dict[str, Tensor]) -> None:
        """Continue from a ``state``; an empty one starts anew."""
        if not state:
            return
        self._num_steps = int(state["num_steps"])
        self._since_exchange = state["since_exchange"].clone()
        self._known, self._correction_C = state["known"].clone(), state["correction"].clone()


def _shifted(log_odds: Tensor, extra: Tensor, wanted: float) -> Tensor:
    """float64: chances with one shift of all log-odds, so that ``chances @ extra`` is as close to wanted as may be."""
    low, high = -_SHIFT_MAX, _SHIFT_MAX
    for _ in range(_NUM_HALVINGS):
        middle = (low + high) / 2
        if float(torch.sigmoid(log_odds + middle) @ extra) > wanted:
            high = middle
        else:
            low = middle
    return torch.sigmoid(log_odds + (low + high) / 2)


def _drawn_systematically(chance: Tensor, lengths: Tensor, generator: torch.Generator) -> Tensor:
    """bool: each true with its chance; among neighbours in length, as many as their chances add up to."""
    start = torch.rand((), dtype=torch.float64, generator=generator)
    order = lengths.argsort(stable=True)
    bounds = torch.cat([start[None], start + chance[order].cumsum(0)]).floor()
    drawn = torch.empty(len(chance), dtype=torch.bool)
    drawn[order] = bounds[1:] > bounds[:-1]
    return drawn


__all__ = ["AllReduce", "BalanceRule", "LengthBalancer", "LoadModel"]
