"""What is stored of a model, and what is to be said of each version."""

from __future__ import annotations

from dataclasses import asdict, dataclass

from model.errors import SnapshotCorruptError, SnapshotFormatError, SnapshotMissingError
from model.manifest import Manifest
from model.rejection import Rejection, read_rejections
from model.retention import ReplicaLease, read_leases
from model.snapshot import list_versions, read_candidate, read_manifest, read_pin, read_pointer
from model.storage import SnapshotRoot, open_storage

DAMAGED = (SnapshotCorruptError, SnapshotFormatError, SnapshotMissingError)
"""What makes a version that is there no use."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SnapshotListing:
    """What is stored of one model. damaged: versions whose manifest cannot be used, and why."""

    place: str
    manifests: list[Manifest]
    damaged: dict[int, str]
    current: int | None
    pinned: int | None
    candidate: int | None
    rejections: list[Rejection]
    leases: list[ReplicaLease]

    def marks(self, version: int) -> list[str]:
        """What there is to say of a version: who serves it, whether workers stay there, who turned it away."""
        pointers = (("current", self.current), ("pinned", self.pinned), ("candidate", self.candidate))
        marks = [name for name, pointed_at in pointers if pointed_at == version]
        runs = sorted(lease.replica for lease in self.leases if lease.version == version)
        marks += [f"run by {', '.join(runs)}"] if runs else []
        loads = sorted(lease.replica for lease in self.leases if lease.loading == version)
        marks += [f"being loaded by {', '.join(loads)}"] if loads else []
        return marks + [f"rejected by {one.replica}: {one.guard}" for one in self.rejections if one.version == version]

    def to_dict(self) -> dict[str, object]:
        """JSON-ready."""
        versions = [
            {
                "version": one.version,
                "kind": one.kind,
                "parent": one.parent,
                "row_precision": one.row_precision,
                "bytes": num_bytes(one),
                "created_at_ms": one.created_at_ms,
                "items": one.num_items,
                "interactions": one.lineage.num_interactions,
                "metrics": one.metrics,
                "marks": self.marks(one.version),
            }
            for one in self.manifests
        ]
        return {
            "versions": versions,
            "damaged": {str(version): why for version, why in self.damaged.items()},
            "current": self.current,
            "pinned": self.pinned,
            "candidate": self.candidate,
            "rejected": [asdict(one) for one in self.rejections],
            "replicas": [asdict(lease) for lease in self.leases],
        }


def read_snapshots(root: SnapshotRoot, model: str) -> SnapshotListing:
    """Look at every manifest. Raises SnapshotError or OSError if the storage cannot be read."""
    storage = open_storage(root)
    pointers = [read(storage, model) for read in (read_pointer, read_pin, read_candidate)]
    manifests, damaged = [], {}
    for version in list_versions(storage, model):
        try:
            manifests.append(read_manifest(storage, model, version))
        except DAMAGED as error:
            damaged[version] = str(error)
    current, pinned, candidate = (None if pointer is None else pointer.version for pointer in pointers)
    return SnapshotListing(
        place=storage.place(model),
        manifests=manifests,
        damaged=damaged,
        current=current,
        pinned=pinned,
        candidate=candidate,
        rejections=read_rejections(storage, model),
        leases=read_leases(storage, model),
    )


def num_bytes(manifest: Manifest) -> int:
    """Of all files of a snapshot but its manifest."""
    return sum(file.size for file in manifest.files.values())
