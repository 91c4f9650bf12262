"""The account of what has been learned: enough to prove that nothing was lost and nothing was learned twice."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any, Final

import numpy as np

from model.manifest import Lineage
from online_trainer.batching import MicroBatch, PartitionPosition, SourcePartition

_MODULUS: Final = 2**64


@dataclass(slots=True)
class Ledger:
    """Counts and positions after the last step; part of every checkpoint, and of every manifest as lineage."""

    log_id: str
    positions: dict[SourcePartition, PartitionPosition] = field(default_factory=dict)
    """Where to continue, per source partition of this log; and of the one before, whose last updates may still come."""
    num_interactions: int = 0
    """Interactions taken from the stream, in steps that are done."""
    fingerprint: int = 0
    """Sum of their event keys modulo 2^64: equal to the feature store's exactly if the sets are equal."""
    num_supervised: int = 0
    """Of them, predicted and learned from."""
    num_first: int = 0
    """... without an earlier interaction to predict them from."""
    num_out_of_reach: int = 0
    """... too late to be predicted: older than the newest max_len of their user."""
    num_unlisted: int = 0
    """... of items without a row in the model: items.min_interactions and items.admission_probability."""
    num_weightless: int = 0
    """... of actions that count nothing: loss.action_weights."""
    num_quarantined: int = 0
    """... in batches whose loss was not finite: weights stayed as they were."""
    num_forgotten: int = 0
    """... whose users were forgotten before they were learned from."""
    num_thinned: int = 0
    """... passed over because the stream outran the trainer: trainer.lag_policy."""
    num_large_steps: int = 0
    """Steps of more than trainer.batch_interactions, for the same reason."""
    num_replayed: int = 0
    """Older interactions learned from once more (trainer.replay_share); none of the counts above has them."""
    num_cold: int = 0
    """Items that got a row before their first interaction, because of their content."""
    num_items_retired: int = 0
    """Items that lost their rows."""
    num_steps: int = 0
    watermark_ms: int = 0

    def record(self, batch: MicroBatch) -> None:
        """Take a finished step's batch into the account."""
        self.positions.update(batch.positions)
        for taken in (batch.interactions, batch.thinned, batch.dropped):
            self.num_interactions += len(taken)
            keys = int(np.add.reduce(taken.event_key, dtype=np.uint64))
            self.fingerprint = (self.fingerprint + keys) % _MODULUS
        self.num_forgotten += len(batch.dropped)
        self.num_thinned += len(batch.thinned)
        self.num_large_steps += batch.is_large
        self.num_steps += 1
        self.watermark_ms = int(batch.taken().event_time_ms.max(initial=self.watermark_ms))

    def lineage(self) -> Lineage:
        """Which events are inside, as manifests state it."""
        return Lineage(
            log_id=self.log_id,
            positions={partition: position.source_offset for partition, position in self.of_log(self.log_id).items()},
            num_interactions=self.num_interactions,
            fingerprint=self.fingerprint,
            num_thinned=self.num_thinned,
        )

    def of_log(self, log_id: str) -> dict[int, PartitionPosition]:
        """Partition → where to continue in one log."""
        return {partition: self.positions[of, partition] for of, partition in sorted(self.positions) if of == log_id}

    def continue_with(self, log_id: str) -> None:
        """Go on with a log of this name: positions are kept of it and of the one so far."""
        self.positions = {source: at for source, at in self.positions.items() if source[0] in {log_id, self.log_id}}
        self.log_id = log_id

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready form."""
        stored = asdict(self)
        stored["positions"] = _stored(self.of_log(self.log_id))
        stored["earlier_positions"] = {
            log_id: _stored(self.of_log(log_id)) for log_id, _ in self.positions if log_id != self.log_id
        }
        stored["fingerprint"] = str(self.fingerprint)
        return stored

    @classmethod
    def from_dict(cls, stored: dict[str, Any]) -> Ledger:
        """Read `to_dict`'s form."""
        rest = dict(stored)
        logs = rest.pop("earlier_positions", {}) | {stored["log_id"]: stored["positions"]}
        positions = {
            (log_id, int(partition)): PartitionPosition(**position)
            for log_id, of_log in logs.items()
            for partition, position in of_log.items()
        }
        return cls(**(rest | {"positions": positions, "fingerprint": int(stored["fingerprint"])}))


def _stored(positions: dict[int, PartitionPosition]) -> dict[str, dict[str, int]]:
    return {str(partition): asdict(position) for partition, position in positions.items()}
