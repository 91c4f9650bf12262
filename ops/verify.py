"""`headrace verify`: whether every accepted interaction is in the newest weights exactly once.

The feature store sums the event keys of all histories, and of what retention and forgetting have removed from them; a
snapshot's lineage carries the same sum over what was learned. Once the trainer has caught up, the sums are equal
exactly if the sets are.
"""

from __future__ import annotations

from dataclasses import dataclass

from feature_store.records import StoreTotals
from feature_store.store import FeatureStore
from model.manifest import Lineage
from model.snapshot import list_versions, read_manifest
from model.storage import SnapshotRoot


@dataclass(frozen=True, kw_only=True, slots=True)
class Account:
    """What was accepted, and what the newest snapshot has learned from."""

    stored: StoreTotals
    version: int | None
    learned: Lineage

    @property
    def is_caught_up(self) -> bool:
        """Whether the snapshot has seen everything that the store has accepted."""
        return self.learned.num_interactions >= self.stored.num_accepted

    @property
    def is_equal(self) -> bool:
        """Whether the learned set is the accepted set."""
        return (self.learned.num_interactions, self.learned.fingerprint) == (
            self.stored.num_accepted,
            self.stored.accepted_fingerprint,
        )

    def sentence(self) -> str:
        """The finding, for a person."""
        accepted, learned = f"{self.stored.num_accepted:,} stored", self.learned.num_interactions
        if self.stored.num_removed:
            accepted = f"{self.stored.num_accepted:,} accepted ({self.stored.num_removed:,} removed since)"
        if self.is_equal:
            if self.learned.num_thinned:
                return (
                    f"version {self.version} has taken each of the {accepted} interactions exactly once, and learned "
                    f"from all but {self.learned.num_thinned:,}, passed over because the stream outran the trainer "
                    "(trainer.lag_policy)"
                )
            return f"version {self.version} has learned from each of the {accepted} interactions exactly once"
        if not self.is_caught_up:
            newest = "no snapshot is published" if self.version is None else f"version {self.version}"
            return f"{newest}: {learned:,} of {accepted} interactions are learned; the trainer is not done"
        return (
            f"version {self.version} has learned from {learned:,} interactions, which are not the {accepted} ones: "
            "that is a fault"
        )


def take_account(store: FeatureStore, snapshot_root: SnapshotRoot, model: str) -> Account:
    """Compare the store with the newest snapshot. Reads every chunk, checking its checksum.

    Raises ChunkCorruptError, SnapshotError or StoreUnavailableError.
    """
    version = max(list_versions(snapshot_root, model), default=None)
    learned = Lineage() if version is None else read_manifest(snapshot_root, model, version).lineage
    return Account(
        stored=store.totals(),
        version=version,
        learned=learned,
    )
