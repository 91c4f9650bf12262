"""Dropout whose mask is a function of (seed, element), so that nobody has to store it.

Element e of a tensor, counted along its rows, is dropped if 16 bits of a hash of e are below a threshold. The hash is
three multiply and shift-xor rounds over 32 bits (constants of the "lowbias32" mixer found by C. Wellons' hash
prospector), keyed before the first and the second round; one hash serves the elements 2 i and 2 i + 1, its lower half
the even one. The Triton kernels compute the same numbers. The pattern repeats after 2**33 elements.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass

import torch
from torch import Tensor

from kernels.operators import operator

COUNTER, FIRST, SECOND = 0x9E3779B1, 0x7FEB352D, 0x846CA68B
"""Odd multipliers: of the counter (2**32 / golden ratio), and of the mixer's two rounds."""

NUM_LEVELS = 1 << 16
"""A probability is rounded to a multiple of 1 / NUM_LEVELS; the scale is that of the rounded one: no bias is left."""

BLOCK = 1 << 16
"""Hashes computed at a time on the CPU, few enough for the steps in between to stay in the L2 cache."""


@dataclass(frozen=True, kw_only=True, slots=True)
class DropoutKey:
    """What a mask depends on besides the element: two 32-bit keys (signed) and the dropped share of NUM_LEVELS."""

    first: int
    second: int
    threshold: int

    @staticmethod
    def of(dropout_p: float, seed: int) -> DropoutKey:
        """Both keys from one seed by splitmix64, so that neighbouring seeds have unrelated masks."""
        mixed = (seed + 0x9E3779B97F4A7C15) % 2**64
        mixed = ((mixed ^ (mixed >> 30)) * 0xBF58476D1CE4E5B9) % 2**64
        mixed = ((mixed ^ (mixed >> 27)) * 0x94D049BB133111EB) % 2**64
        mixed ^= mixed >> 31
        threshold = min(round(dropout_p * NUM_LEVELS), NUM_LEVELS - 1)
        return DropoutKey(first=_signed(mixed), second=_signed(mixed >> 32), threshold=threshold)

    @property
    def scale(self) -> float:
        """What the elements that stay are multiplied by."""
        return NUM_LEVELS / (NUM_LEVELS - self.threshold)


@operator("dropout_multiplier")
def dropout_multiplier(like: Tensor, dropout_p: float, seed: int) -> Tensor:
    """0 where an element of a tensor shaped like ``like`` is dropped, the scale where it stays; not differentiable.

    Returns a tensor of the shape, dtype and device of ``like``, whose values are not read. An operator, so that a
    compiled function takes any seed.
    """
    assert sys.byteorder == "little", "the two halves of a hash are read through a view as int16"
    key = DropoutKey.of(dropout_p, seed)
    num_hashes = (like.numel() + 1) // 2
    counter = torch.arange(min(BLOCK, num_hashes), dtype=torch.int32, device=like.device).mul_(_signed(COUNTER))
    hashes, shifted = torch.empty_like(counter), torch.empty_like(counter)
    multiplier = torch.empty(2 * num_hashes, dtype=like.dtype, device=like.device)
    for start in range(0, num_hashes, BLOCK):
        num = min(BLOCK, num_hashes - start)
        torch.add(counter[:num], _signed(start * COUNTER + key.first), out=hashes[:num])
        _mix(hashes[:num], shifted[:num], key.second)
        # Written as numbers straight away: a boolean mask in between costs as much again as the whole hash.
        part = multiplier[2 * start : 2 * (start + num)]
        torch.ge(hashes[:num].view(torch.int16), key.threshold - NUM_LEVELS // 2, out=part)
        part.mul_(key.scale)
    return multiplier[: like.numel()].view(like.shape)


@dropout_multiplier.register_fake
def _(like: Tensor, dropout_p: float, seed: int) -> Tensor:  # noqa: ARG001 - the operator's signature
    return like.new_empty(like.shape)


def _mix(hashes: Tensor, shifted: Tensor, key: int) -> None:
    """The rounds, in place; int32 wraps around as unsigned numbers do, and a mask makes its shifts logical."""
    for shift, multiplier in ((16, FIRST), (15, SECOND), (16, None)):
        torch.bitwise_right_shift(hashes, shift, out=shifted)
        hashes.bitwise_xor_(shifted.bitwise_and_((1 << (32 - shift)) - 1))
        if multiplier is not None:
            hashes.mul_(_signed(multiplier))
        if multiplier == FIRST:
            hashes.add_(key)


def _signed(number: int) -> int:
    """The int32 that has the lowest 32 bits of ``number``."""
    return (number + 2**31) % 2**32 - 2**31
