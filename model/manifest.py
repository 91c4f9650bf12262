"""What a snapshot says about itself: its place in the chain, its files, and exactly which events are inside."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass, field, fields
from typing import Any, Literal

from model.config import ROW_PRECISIONS, RowPrecision
from model.errors import SnapshotFormatError
from model.small_records import read_record

FORMAT_VERSION = 1
"""Raised when a reader of the older format could misread the newer one."""

SnapshotKind = Literal["anchor", "delta"]


@dataclass(frozen=True, kw_only=True, slots=True)
class FileEntry:
    """Size in bytes and sha256 in hex of one file of a snapshot."""

    size: int
    sha256: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Lineage:
    """Exactly which interactions the weights have learned from.

    positions: next source offset per partition of the log ``log_id``. num_interactions and fingerprint (sum of the
    64-bit event keys, modulo 2**64) count what was taken from the stream, for comparison with the store; of these,
    num_thinned were passed over instead of learned from, because the stream outran the trainer. num_labels: what the
    ranking head has learned from.
    """

    log_id: str = ""
    positions: dict[int, int] = field(default_factory=dict)
    num_interactions: int = 0
    fingerprint: int = 0
    num_thinned: int = 0
    num_labels: int = 0


@dataclass(frozen=True, kw_only=True, slots=True)
class Manifest:
    """The content of manifest.json; ``files`` is filled in by the writer.

    version: ascending from 1. parent: the version a delta applies to, None for an anchor. parent_hash: that
    version's ``content_hash``, None in deltas of programs that did not tell. row_precision: of item embeddings in
    rows.safetensors; a delta has its parent's. created_at_ms, watermark_ms: epoch
    milliseconds of publishing, and the event time learned up to. event_age, append_age: histograms of the ages of
    the events newly inside, as stream.freshness writes them. metrics: prequential, at the time of publishing.
    traceparent: W3C trace context of the publishing span. steps: which steps learned what is newly inside, as
    online_trainer.steps writes them; None in snapshots of programs that did not tell.
    """

    model: str
    version: int
    kind: SnapshotKind
    parent: int | None
    parent_hash: str | None = None
    config_hash: str
    model_config: dict[str, Any]
    num_items: int
    created_at_ms: int
    watermark_ms: int
    lineage: Lineage = field(default_factory=Lineage)
    event_age: dict[str, Any] = field(default_factory=dict)
    append_age: dict[str, Any] = field(default_factory=dict)
    metrics: dict[str, float] = field(default_factory=dict)
    row_precision: RowPrecision = "float32"
    traceparent: str | None = None
    steps: list[dict[str, Any]] | None = None
    files: dict[str, FileEntry] = field(default_factory=dict)
    format_version: int = FORMAT_VERSION

    def __post_init__(self) -> None:
        if self.kind not in ("anchor", "delta"):
            raise ValueError(f"kind is {self.kind!r}; it must be anchor or delta")
        if self.row_precision not in ROW_PRECISIONS:
            raise ValueError(f"row_precision is {self.row_precision!r}; it must be one of {', '.join(ROW_PRECISIONS)}")
        if self.version < 1:
            raise ValueError(f"version is {self.version}; versions start at 1")
        if (self.kind == "anchor") != (self.parent is None):
            raise ValueError(f"a {self.kind} has parent {self.parent}; exactly deltas have one")
        if self.parent_hash is not None and self.parent is None:
            raise ValueError("an anchor has a parent_hash; exactly deltas may have one")
        if self.parent is not None and not 0 < self.parent < self.version:
            raise ValueError(f"parent is {self.parent}; it must be below version {self.version}")

    def content_hash(self) -> str:
        """sha256 in hex of what the weights are: version, files, and what a delta builds on, down to its anchor.

        Two publishers may give the same number to different weights; they do not come to the same hash.
        """
        told = {
            "model": self.model,
            "version": self.version,
            "config_hash": self.config_hash,
            "parent": self.parent,
            "parent_hash": self.parent_hash,
            "files": {name: asdict(entry) for name, entry in self.files.items()},
        }
        return hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()

    def builds_on(self, version: int | None, content_hash: str | None) -> bool:
        """Whether it is a delta on this version of this content.

        By the number alone where one of the two hashes is not known: deltas published before there was a hash.
        """
        if self.parent is None or self.parent != version:
            return False
        return self.parent_hash is None or content_hash is None or self.parent_hash == content_hash

    def encode(self) -> bytes:
        """Indented JSON, readable without this program."""
        content = asdict(self)
        # JSON readers elsewhere hold numbers as doubles; 64 bits need a string.
        content["lineage"]["fingerprint"] = str(self.lineage.fingerprint)
        return (json.dumps(content, indent=1, sort_keys=True) + "\n").encode()

    @staticmethod
    def decode(content: bytes) -> Manifest:
        """The manifest in ``content``; SnapshotFormatError if it is of another format version or structure."""
        try:
            raw = json.loads(content)
            found = raw.get("format_version")
            if found != FORMAT_VERSION:
                raise SnapshotFormatError(
                    f"manifest has format version {found}; this program reads {FORMAT_VERSION}: update it or re-publish"
                )
            lineage = raw.pop("lineage")
            files = raw.pop("files")
            return Manifest(
                lineage=Lineage(
                    log_id=lineage["log_id"],
                    positions={int(p): int(o) for p, o in lineage["positions"].items()},
                    num_interactions=int(lineage["num_interactions"]),
                    fingerprint=int(lineage["fingerprint"]),
                    num_labels=int(lineage.get("num_labels", 0)),  # likewise, before there was a ranking head
                    num_thinned=int(lineage.get("num_thinned", 0)),  # snapshots of before there was thinning
                ),
                files={name: FileEntry(**entry) for name, entry in files.items()},
                **{name: value for name, value in raw.items() if name in {f.name for f in fields(Manifest)}},
            )
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise SnapshotFormatError(f"manifest cannot be read: {error!r}") from error


@dataclass(frozen=True, kw_only=True, slots=True)
class SnapshotPointer:
    """The content of current.json: the newest snapshot to use. path is relative to the root."""

    model: str
    version: int
    kind: SnapshotKind
    parent: int | None
    path: str
    created_at_ms: int

    def __post_init__(self) -> None:
        if self.version < 1:
            raise ValueError(f"version is {self.version}; versions start at 1")

    def encode(self) -> bytes:
        """JSON."""
        return (json.dumps(asdict(self), sort_keys=True) + "\n").encode()

    @staticmethod
    def decode(content: bytes) -> SnapshotPointer:
        """The pointer in ``content``; ValueError if it is none."""
        return read_record(SnapshotPointer, content)
