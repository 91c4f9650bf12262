"""The account of what has been learned: enough to prove that nothing was lost and nothing was learned twice."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any, Final

import numpy as np

from model.manifest import Lineage
from online_trainer.batching import MicroBatch, PartitionPosition

_MODULUS: Final = 2**64


@dataclass(slots=True)
class Ledger:
    """Counts and positions after the last step; part of every checkpoint, and of every manifest as lineage."""

    log_id: str
    positions: dict[int, PartitionPosition] = field(default_factory=dict)
    """Per source partition: where to continue."""
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
    num_quarantined: int = 0
    """... in batches whose loss was not finite: weights stayed as they were."""
    num_steps: int = 0
    watermark_ms: int = 0

    def record(self, batch: MicroBatch) -> None:
        """Take a finished step's batch into the account."""
        self.positions.update(batch.positions)
        self.num_interactions += len(batch.interactions)
        keys = int(np.add.reduce(batch.interactions.event_key, dtype=np.uint64))
        self.fingerprint = (self.fingerprint + keys) % _MODULUS
        self.num_steps += 1
        self.watermark_ms = max(self.watermark_ms, int(batch.interactions.event_time_ms.max()))

    def lineage(self) -> Lineage:
        """Which events are inside, as manifests state it."""
        return Lineage(
            log_id=self.log_id,
            positions={partition: position.source_offset for partition, position in sorted(self.positions.items())},
            num_interactions=self.num_interactions,
            fingerprint=self.fingerprint,
        )

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready form."""
        stored = asdict(self)
        stored["positions"] = {str(p): asdict(position) for p, position in self.positions.items()}
        stored["fingerprint"] = str(self.fingerprint)
        return stored

    @classmethod
    def from_dict(cls, stored: dict[str, Any]) -> Ledger:
        """Read `to_dict`'s form."""
        positions = {int(p): PartitionPosition(**position) for p, position in stored["positions"].items()}
        return cls(**(stored | {"positions": positions, "fingerprint": int(stored["fingerprint"])}))
