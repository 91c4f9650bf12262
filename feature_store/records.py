"""The rows of the small tables, as values: items, published snapshots, who served them first, and the totals."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

IdKind = Literal["user", "item"]
"""What a hashed id names."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Item:
    """What is known about an item besides its interactions."""

    item_id: int
    title: str = ""
    text: str = ""
    categories: tuple[str, ...] = ()
    embedding: bytes | None = None
    """Content embedding as little-endian float32 bytes, or None."""
    available: bool = True
    """False: retired, must not be recommended."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PublishedSnapshot:
    """One snapshot that the trainer published; the files' manifest says the same."""

    model: str
    version: int
    kind: str
    """`anchor` or `delta`."""
    parent: int | None
    """The version a delta builds on; None for an anchor."""
    created_at_ms: int
    published_at_ms: int
    """When the pointer moved: the snapshot became loadable."""
    watermark_ms: int | None
    """Event-time watermark of what is inside; None before the first event."""
    lineage: Mapping[str, Any] = field(default_factory=dict)
    """Log identity, next source offset per partition, number and fingerprint of interactions inside."""
    event_age: Mapping[str, Any] = field(default_factory=dict)
    """Histogram of publish time − event time of the newly contained interactions."""
    append_age: Mapping[str, Any] = field(default_factory=dict)
    """The same, from broker append time."""
    metrics: Mapping[str, Any] = field(default_factory=dict)
    """Prequential metrics at publish."""
    traceparent: str | None = None
    steps: Sequence[Mapping[str, Any]] | None = None
    """The steps that learned what is newly inside, as `online_trainer.steps` writes them; None: not recorded."""


@dataclass(frozen=True, kw_only=True, slots=True)
class FirstServed:
    """When one replica first answered with one snapshot version."""

    model: str
    version: int
    replica: str
    at_ms: int
    swapped_at_ms: int | None = None
    """When its weights changed to this version, or to a later one at once; None: not recorded."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PublicationFloor:
    """How much of what was published has been removed from the store."""

    version: int = 0
    """From this version on, every row is there; below it, those of snapshots that were still stored. 0: all are."""
    newest_ms: int = 0
    """When the newest of the removed ones was made, epoch ms."""


@dataclass(frozen=True, kw_only=True, slots=True)
class StoredEvent:
    """One event as a history holds it."""

    user_id: int
    item_id: int
    event_time_ms: int
    action: int
    """Bitmask of the declared actions."""
    seq: int
    """Arrival number within the user."""
    arrival_ms: int
    num_later: int
    """Interactions of later event time that were there when it arrived: above 0, it was late."""
    is_expired: bool
    """Still stored, but retention shows it to no reader any more."""


@dataclass(frozen=True, slots=True)
class SourcePlace:
    """One place in a log: where a refused record was read."""

    topic: str
    partition: int
    offset: int


@dataclass(frozen=True, slots=True)
class LogPosition:
    """How far one partition of a log has been applied."""

    next_offset: int
    """The next offset to apply."""
    watermark_ms: int
    """The highest event time applied from it; 0 before the first."""


@dataclass(frozen=True, kw_only=True, slots=True)
class StoreTotals:
    """Counts over all histories, for comparing a store with the truth."""

    num_users: int
    """Users with at least one stored interaction."""
    num_interactions: int
    """Stored, including those that retention hides from readers but has not removed yet."""
    fingerprint: int
    """Σ event_key mod 2**64 over all stored interactions: equal sets give equal values, whatever the order."""
    num_removed: int = 0
    """Accepted interactions that retention or forgetting a user has removed again."""
    removed_fingerprint: int = 0
    """Σ event_key mod 2**64 over those."""

    @property
    def num_accepted(self) -> int:
        """Interactions ever accepted: stored or removed since."""
        return self.num_interactions + self.num_removed

    @property
    def accepted_fingerprint(self) -> int:
        """Σ event_key mod 2**64 over all interactions ever accepted."""
        return (self.fingerprint + self.removed_fingerprint) % 2**64


@dataclass(frozen=True, kw_only=True, slots=True)
class PruneSlice:
    """What one bounded step of a sweep over all users has done."""

    num_users: int
    """Users looked at."""
    num_chunks: int
    """Chunks removed, with everything in them."""
    num_interactions: int
    """Interactions removed."""
    next_after: int | None
    """Where to go on: give it to the next step. None: every user has been looked at."""


@dataclass(frozen=True, kw_only=True, slots=True)
class StoreStats:
    """How much is stored."""

    num_users: int
    num_interactions: int
    num_chunks: int
    num_bytes: int
    """Bytes of all chunks, without what the database adds."""
    positions: Mapping[str, Mapping[str, Mapping[int, int]]]
    """log_id → topic → partition → next offset to apply."""
    removed: Mapping[str, int]
    """Who removed (`LOG_ID/TOPIC/PARTITION` of the ingest worker, `prune`, `forget`) → how many interactions."""
    watermark_ms: int
    """The highest event time applied; 0 before the first."""
    horizon_ms: int | None
    """Interactions before this event time are part of no history; None: no age limit is set."""
    vectors: Mapping[str, Mapping[int, int]]
    """model → version of its upstream model → vectors of users, those kept for training included."""
    upstream_versions: Mapping[str, int]
    """model → version of its upstream model in effect; absent before the first."""


@dataclass(frozen=True, slots=True)
class Finding:
    """Something that is wrong in the store, and where: in whose history or vector, and in which chunk of it."""

    problem: str
    user_id: int | None = None
    chunk_no: int | None = None

    def sentence(self) -> str:
        """For a person."""
        if self.user_id is None:
            return self.problem
        chunk = "" if self.chunk_no is None else f" chunk {self.chunk_no}"
        return f"user {self.user_id}{chunk}: {self.problem}"


@dataclass(frozen=True, kw_only=True, slots=True)
class AuditTotals:
    """What a verification has looked at."""

    num_users: int
    num_chunks: int
    num_interactions: int
    num_positions: int
    num_vectors: int
