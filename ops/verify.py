"""`headrace verify`: whether every stored interaction is in the newest weights exactly once.

The feature store sums the event keys of all histories; a snapshot's lineage carries the same sum over what was learned.
Once the trainer has caught up, the sums are equal exactly if the sets are.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from feature_store.records import StoreTotals
from feature_store.store import FeatureStore
from model.manifest import Lineage
from model.snapshot import read_manifest, read_pointer


@dataclass(frozen=True, kw_only=True, slots=True)
class Account:
    """What is stored, and what the newest snapshot has learned from."""

    stored: StoreTotals
    version: int | None
    learned: Lineage

    @property
    def is_caught_up(self) -> bool:
        """Whether the snapshot has seen everything that the store holds."""
        return self.learned.num_interactions >= self.stored.num_interactions

    @property
    def is_equal(self) -> bool:
        """Whether the learned set is the stored set."""
        return (self.learned.num_interactions, self.learned.fingerprint) == (
            self.stored.num_interactions,
            self.stored.fingerprint,
        )

    def sentence(self) -> str:
        """The finding, for a person."""
        stored, learned = self.stored.num_interactions, self.learned.num_interactions
        if self.is_equal:
            return f"version {self.version} has learned from each of the {stored:,} stored interactions exactly once"
        if not self.is_caught_up:
            newest = "no snapshot is published" if self.version is None else f"version {self.version}"
            return f"{newest}: {learned:,} of {stored:,} stored interactions are learned; the trainer is not done"
        return (
            f"version {self.version} has learned from {learned:,} interactions and {stored:,} are stored, but they are "
            "not the same ones (a forgotten user's are still in the weights; anything else is a fault)"
        )


def take_account(store: FeatureStore, snapshot_root: Path, model: str) -> Account:
    """Compare the store with the newest snapshot. Reads every chunk, checking its checksum.

    Raises ChunkCorruptError, SnapshotError or StoreUnavailableError.
    """
    pointer = read_pointer(snapshot_root, model)
    learned = Lineage() if pointer is None else read_manifest(snapshot_root, model, pointer.version).lineage
    return Account(
        stored=store.totals(),
        version=None if pointer is None else pointer.version,
        learned=learned,
    )
