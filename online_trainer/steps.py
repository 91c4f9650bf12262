"""Which steps learned what no snapshot contains yet: told by the snapshot that comes, a few bytes a step."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Final

from online_trainer.batching import MicroBatch
from online_trainer.ledger import Ledger

_KEPT_MAX: Final = 256
"""Entries of one snapshot. More steps than that, because publishing is held back, share entries: two steps one, ..."""


@dataclass(frozen=True, kw_only=True, slots=True)
class LearnedSteps:
    """One step, or neighbouring ones together."""

    first_step: int
    last_step: int
    at_ms: int
    """When the last of them was done."""
    positions: dict[int, int]
    """Partition → next source offset after them, of the partitions that they took from."""
    is_set_aside: bool = False
    """The batch of one of them was not learned from: it is kept aside (`headrace trainer inspect`)."""
    is_thinned: bool = False
    """One of them passed over some of what it took (trainer.lag_policy)."""

    @classmethod
    def of_batch(cls, batch: MicroBatch, ledger: Ledger, *, at_ms: int, is_set_aside: bool) -> LearnedSteps:
        """The step that has just taken a batch into the account."""
        taken = {
            partition: position.source_offset
            for (log_id, partition), position in batch.positions.items()
            if log_id == ledger.log_id
        }
        return cls(
            first_step=ledger.num_steps,
            last_step=ledger.num_steps,
            at_ms=at_ms,
            positions=taken,
            is_set_aside=is_set_aside,
            is_thinned=len(batch.thinned) > 0,
        )

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return asdict(self)

    @classmethod
    def of_dict(cls, stored: Mapping[str, Any]) -> LearnedSteps:
        """From `to_dict()`, also after it was JSON."""
        positions = {int(partition): int(offset) for partition, offset in stored["positions"].items()}
        return cls(**(dict(stored) | {"positions": positions}))

    def with_next(self, later: LearnedSteps) -> LearnedSteps:
        """These and the ones after them as one entry."""
        return LearnedSteps(
            first_step=self.first_step,
            last_step=later.last_step,
            at_ms=later.at_ms,
            positions=self.positions | later.positions,
            is_set_aside=self.is_set_aside or later.is_set_aside,
            is_thinned=self.is_thinned or later.is_thinned,
        )


def bounded(steps: Sequence[LearnedSteps]) -> tuple[LearnedSteps, ...]:
    """The same steps in at most `_KEPT_MAX` entries, the newest told apart longest."""
    kept = list(steps)
    while len(kept) > _KEPT_MAX:
        older, newer = kept[: _KEPT_MAX // 2 * 2], kept[_KEPT_MAX // 2 * 2 :]
        kept = [first.with_next(second) for first, second in zip(older[0::2], older[1::2], strict=True)] + newer
    return tuple(kept)
