"""`headrace snapshots`: what is stored and whether it is whole, for a person and as JSON."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass

from model.errors import SnapshotParentError
from model.listing import DAMAGED, SnapshotListing, num_bytes, read_snapshots
from model.manifest import Manifest
from model.snapshot import chain, list_versions, load_snapshot, read_candidate, read_manifest, read_pin, read_pointer
from model.storage import SnapshotRoot, SnapshotStorage, open_storage
from online_trainer.gate import HeldEpisode, read_held
from ops.readable import utc_time
from stream.freshness import AgeHistogram

_METRIC = "window.ndcg_at_20"


@dataclass(frozen=True, kw_only=True, slots=True)
class Listing:
    """What is stored of one model, and what its trainer held back."""

    stored: SnapshotListing
    held: list[HeldEpisode]

    def to_text(self, *, now_ms: int) -> str:
        """A table, oldest first, and what was held back."""
        lines = [self._row(manifest, now_ms) for manifest in self.stored.manifests]
        if not lines:
            return "\n".join([f"nothing is published in {self.stored.place}", *self._held_lines()])
        header = ("version", "kind", "parent", "bytes", "age", "items", "interactions", "ndcg@20", "popular", "")
        rows = [header, *lines]
        widths = [max(len(row[column]) for row in rows) for column in range(len(header))]
        table = [
            "  ".join(f"{cell:<{width}}" if n in {1, 9} else f"{cell:>{width}}" for n, (cell, width) in enumerate(row))
            for row in ([*zip(each, widths, strict=True)] for each in rows)
        ]
        damaged = [f"version {version} is damaged: {why}" for version, why in self.stored.damaged.items()]
        return "\n".join([*(line.rstrip() for line in table), *damaged, *self._held_lines()])

    def _row(self, manifest: Manifest, now_ms: int) -> tuple[str, ...]:
        metrics = manifest.metrics
        return (
            str(manifest.version),
            manifest.kind,
            "-" if manifest.parent is None else str(manifest.parent),
            f"{num_bytes(manifest):,}",
            age_text(now_ms - manifest.created_at_ms),
            f"{manifest.num_items:,}",
            f"{manifest.lineage.num_interactions:,}",
            *(
                f"{metrics[key]:.4f}" if (key := f"{arm}.{_METRIC}") in metrics else "-"
                for arm in ("model", "popularity")
            ),
            "; ".join(self.stored.marks(manifest.version)),
        )

    def _held_lines(self) -> list[str]:
        return [
            f"held back {utc_time(one.since_ms)} to {utc_time(one.last_ms)}, {one.num_attempts} times: {one.sentence}"
            + (
                f"; not published since, version {one.version} is due"
                if one.ended_by is None
                else f"; ended by version {one.ended_by}"
            )
            for one in self.held
        ]

    def to_json(self) -> str:
        """Everything that `to_text` is made of."""
        return json.dumps(self.stored.to_dict() | {"held": [asdict(one) for one in self.held]}, indent=1)


def read_listing(root: SnapshotRoot, model: str) -> Listing:
    """Look at every manifest. Raises SnapshotError or OSError if the storage cannot be read."""
    storage = open_storage(root)
    return Listing(stored=read_snapshots(storage, model), held=read_held(storage, model))


@dataclass(frozen=True, kw_only=True, slots=True)
class Checked:
    """What `verify_snapshots` has read, and what is wrong."""

    num_versions: int
    num_bytes: int
    findings: list[str]

    @property
    def is_whole(self) -> bool:
        """Whether nothing is wrong."""
        return not self.findings

    def to_text(self) -> str:
        """Each finding on a line, then the verdict."""
        verdict = "nothing is wrong" if self.is_whole else f"{len(self.findings)} findings"
        return "\n".join([*self.findings, f"{self.num_versions} versions, {self.num_bytes:,} bytes: {verdict}"])

    def to_dict(self) -> dict[str, object]:
        """JSON-ready."""
        return {"versions": self.num_versions, "bytes": self.num_bytes, "findings": self.findings}


def verify_snapshots(root: SnapshotRoot, model: str, version: int | None) -> Checked:
    """Read every version, or one and what it builds on; also whether each can be loaded from an anchor.

    Raises SnapshotStorageError or OSError if the storage cannot be read.
    """
    storage, findings, total = open_storage(root), [], 0
    if version is None:
        versions = list_versions(storage, model)
        findings += _wrong_pointers(storage, model)
    else:
        versions = []
        try:
            versions = chain(storage, model, have=None, want=version)
        except (*DAMAGED, SnapshotParentError) as error:
            findings.append(f"version {version}: {error}")
    for one in versions:
        try:
            total += num_bytes(load_snapshot(storage, model, one).manifest)
            chain(storage, model, have=None, want=one)
        except (*DAMAGED, SnapshotParentError) as error:
            findings.append(f"version {one}: {error}")
    return Checked(num_versions=len(versions), num_bytes=total, findings=findings)


def _wrong_pointers(storage: SnapshotStorage, model: str) -> list[str]:
    findings = []
    for name, read in (("pointer", read_pointer), ("pin", read_pin), ("candidate", read_candidate)):
        try:
            found = read(storage, model)
            if found is not None:
                read_manifest(storage, model, found.version)
        except DAMAGED as error:
            findings.append(f"{name}: {error}")
    return findings


def manifest_text(manifest: Manifest) -> str:
    """A manifest as lines of name and value."""
    lineage = manifest.lineage
    parent = "" if manifest.parent is None else f" on version {manifest.parent}"
    lines = [
        ("version", f"{manifest.version}, {manifest.kind}{parent}"),
        ("model", f"{manifest.model}, configuration {manifest.config_hash[:12]}, {manifest.num_items:,} items"),
        ("created", utc_time(manifest.created_at_ms)),
        ("watermark", utc_time(manifest.watermark_ms)),
        (
            "learned",
            f"{lineage.num_interactions:,} interactions, fingerprint {lineage.fingerprint}"
            + (f", {lineage.num_labels:,} labels by the ranking head" if lineage.num_labels else ""),
        ),
        (
            "log",
            f"{lineage.log_id!r}, next offsets {' '.join(f'{p}:{o}' for p, o in sorted(lineage.positions.items()))}",
        ),
        *((f"file {name}", f"{file.size:,} bytes, sha256 {file.sha256}") for name, file in manifest.files.items()),
        *((f"age {start}", _ages_text(ages)) for start, ages in _ages(manifest)),
        *((name, f"{value:.6g}") for name, value in sorted(manifest.metrics.items())),
        ("trace", manifest.traceparent or "-"),
    ]
    width = max(len(name) for name, _ in lines)
    return "\n".join(f"{name:<{width}}  {value}" for name, value in lines)


def _ages(manifest: Manifest) -> list[tuple[str, dict[str, object]]]:
    found = (("of events", manifest.event_age), ("of records", manifest.append_age))
    return [(start, ages) for start, ages in found if ages]


def _ages_text(stored: dict[str, object]) -> str:
    ages = AgeHistogram.from_dict(stored)
    quantiles = [ages.quantile_ms(q) for q in (0.5, 0.99)]
    texts = ["-" if value is None else age_text(round(value)) for value in quantiles]
    return f"{ages.count:,} newly inside, p50 {texts[0]}, p99 {texts[1]}"


def age_text(age_ms: int) -> str:
    """A duration in the unit that suits it."""
    for unit, limit_ms, unit_ms in (("ms", 1_000, 1), ("s", 120_000, 1_000), ("min", 7_200_000, 60_000)):
        if abs(age_ms) < limit_ms:
            return f"{age_ms / unit_ms:.0f} {unit}"
    return f"{age_ms / 3_600_000:.0f} h" if age_ms < 172_800_000 else f"{age_ms / 86_400_000:.0f} d"
