"""`headrace trace`: looks one event up in histories, log, published snapshots and first answers."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Final

from feature_store.ids import event_key
from feature_store.records import PublishedSnapshot, SourcePlace, StoredEvent
from feature_store.store import FeatureStore
from model.errors import SnapshotError
from model.retention import ReplicaLease, valid_leases
from model.storage import SnapshotStorage
from ops.event_path import (
    EventPath,
    Hop,
    HopState,
    RefusedEvent,
    SentEvent,
    Traced,
    arrival_hops,
    contains,
    hops_of,
    not_remembered,
    replica_hops,
)
from ops.readable import utc_time
from stream.clock import Clock
from stream.errors import LogResetError, LogUnavailableError, MessageFormatError
from stream.event_search import Announced, find_announced, find_refused, find_sent
from stream.log import EventLog, Record, record_at
from stream.tracing import trace_id_of

_CLOCKS_APART_MS: Final = 60_000
"""How far the clocks of broker, ingest and trainer may be apart: what comes next is looked for from so much before."""
_UPDATE_STAMPED_BEFORE_MS: Final = (2_000, 600_000)
"""An update bears the time of the ingest worker that noted the arrival, a little later; or that of a broker whose clock
is behind. The second is tried when the first finds nothing: it reads more."""
_SNAPSHOTS_PER_READ: Final = 100
_LOG_PROBLEMS: Final = (LogUnavailableError, LogResetError, MessageFormatError)


@dataclass(frozen=True, kw_only=True, slots=True)
class LookupParts:
    """Where to look."""

    store: FeatureStore
    log: EventLog
    snapshots: SnapshotStorage
    model: str
    clock: Clock
    replica_timeout_ms: int
    """A replica whose lease is older than this is not running."""
    say: Callable[[str], None]
    """Hears that something is going to take long."""
    quiet_ms: int = 500
    """How long a poll of the log waits before it counts as empty."""


@dataclass(frozen=True, slots=True)
class _Found:
    snapshot: PublishedSnapshot | None
    may_be_later: bool = False
    """It contains the event, and so may one before it that the store does not know any more."""


@dataclass(slots=True)
class _Lookup:
    parts: LookupParts
    event_id: str
    notes: list[str] = field(default_factory=list)

    async def stored(self, event: StoredEvent) -> EventPath:
        """The path of an event that a history holds."""
        place = None
        try:
            place = await self._place_of(event)
        except _LOG_PROBLEMS as error:
            self.notes.append(f"the log cannot be read: {error}")
        hops = await self._hops(place) if place is not None else await self._hops_without_place(event)
        names = await asyncio.to_thread(self.parts.store.names, "user", [event.user_id])
        return EventPath(
            event_id=self.event_id,
            user_id=event.user_id,
            user_name=names.get(event.user_id),
            item_id=event.item_id,
            event_time_ms=event.event_time_ms,
            seq=event.seq,
            num_later=event.num_later,
            standing="expired" if event.is_expired else "stored",
            hops=tuple(hops),
        )

    async def _place_of(self, event: StoredEvent) -> Announced | None:
        """Where `history-updates` told of it; after a crash it may have been told twice, and the second was stored."""

        def is_same(one: Announced) -> bool:
            return (one.user_id, one.event_time_ms) == (event.user_id, event.event_time_ms)

        for before_ms in _UPDATE_STAMPED_BEFORE_MS:
            told = await find_announced(
                self.parts.log,
                event_key(self.event_id),
                since_ms=event.arrival_ms - before_ms,
                is_it=lambda one: is_same(one) and one.arrival_ms == event.arrival_ms,
                quiet_ms=self.parts.quiet_ms,
            )
            if found := next((one for one in reversed(told) if is_same(one)), None):
                return found
        return None

    async def _hops(self, place: Announced) -> list[Hop]:
        try:
            record = await record_at(
                self.parts.log,
                self.parts.log.topics.interactions,
                place.partition,
                place.offset,
                quiet_ms=self.parts.quiet_ms,
            )
        except _LOG_PROBLEMS as error:
            self.notes.append(f"the producer's record cannot be read: {error}")
            record = None
        found = await asyncio.to_thread(self._containing_or_newest, place)
        snapshot, trace_id = found.snapshot, None if record is None else trace_id_of(record.headers)
        if found.may_be_later:
            assert snapshot is not None
            return [*arrival_hops(place, trace_id), not_remembered(snapshot)]
        hops = hops_of(place, snapshot, trace_id)
        if snapshot is not None and contains(snapshot, place):
            version = snapshot.version
            answers = await asyncio.to_thread(self.parts.store.first_answers, self.parts.model, version)
            hops += replica_hops(place, version, answers, await asyncio.to_thread(self._leases))
        return hops

    def _containing_or_newest(self, place: Announced) -> _Found:
        """The first snapshot that contains the event, else the newest since it arrived. Blocking."""
        since_ms = place.arrival_ms - _CLOCKS_APART_MS
        floor = self.parts.store.publication_floor(self.parts.model)
        # An earlier one may have contained it, and is not known any more, until one is seen that does not.
        may_be_later = floor.version > 0 and floor.newest_ms >= since_ms
        newest: PublishedSnapshot | None = None
        while True:
            read = self.parts.store.published_snapshots(
                self.parts.model,
                max(0, floor.version - 1) if newest is None else newest.version,
                created_from_ms=since_ms,
                limit=_SNAPSHOTS_PER_READ,
            )
            for snapshot in read:
                if contains(snapshot, place):
                    return _Found(snapshot, may_be_later)
                may_be_later = False
            if not read:
                return _Found(newest)
            newest = read[-1]

    def _leases(self) -> list[ReplicaLease]:
        """Of the replicas that run. Blocking."""
        since_ms = self.parts.clock.now_ms() - self.parts.replica_timeout_ms
        try:
            return valid_leases(self.parts.snapshots, self.parts.model, since_ms=since_ms)
        except (SnapshotError, OSError) as error:
            self.notes.append(f"which replicas run is not known: {error}")
            return []

    async def _hops_without_place(self, event: StoredEvent) -> list[Hop]:
        """Of an event whose place in the log is not known (any more): nobody can say which snapshot has it."""
        read = await asyncio.to_thread(
            lambda: self.parts.store.published_snapshots(self.parts.model, created_from_ms=event.arrival_ms, limit=1)
        )
        since = f"; version {read[0].version} is the first made after it arrived" if read else ""
        arrived = Hop(
            name="stored",
            state=HopState.REACHED,
            what=f"arrival {event.seq} of its user",
            at_ms=event.arrival_ms,
            event_age_ms=event.arrival_ms - event.event_time_ms,
        )
        gone = f"history-updates does not tell (any more) where in the log it is{since}"
        return [arrived, Hop(name="published", state=HopState.UNKNOWN, what=gone)]

    async def not_stored(self, since_ms: int) -> Traced:
        """What log and dead letters know of an event that no history holds."""
        log, quiet_ms = self.parts.log, self.parts.quiet_ms
        self.parts.say(f"no history holds the event: searching dead letters, and the log since {utc_time(since_ms)}")
        letters = await find_refused(log, self.event_id, quiet_ms=quiet_ms)
        places = [SourcePlace(one.source_topic, one.source_partition, one.source_offset) for one in letters]
        sent_back = await asyncio.to_thread(self.parts.store.redriven_among, log.log_id, places)
        refused = tuple(
            RefusedEvent(
                place=letter.place,
                reason=letter.reason,
                error=letter.error,
                source=f"{letter.source_topic} {letter.source_partition}:{letter.source_offset}",
                refused_at_ms=letter.refused_at_ms,
                is_sent_back=place in sent_back,
            )
            for letter, place in zip(letters, places, strict=True)
        )
        told = await find_announced(
            log, event_key(self.event_id), since_ms=since_ms, is_it=lambda _one: False, quiet_ms=quiet_ms
        )
        paths = tuple([await self._removed(one) for one in told])
        known = {(one.partition, one.offset) for one in told}
        known |= {(place.partition, place.offset) for place in places}
        records = await find_sent(log, self.event_id, since_ms=since_ms, quiet_ms=quiet_ms)
        sent = tuple([await self._sent(one) for one in records if (one.partition, one.offset) not in known])
        return Traced(event_id=self.event_id, paths=paths, refused=refused, sent=sent, notes=tuple(self.notes))

    async def _removed(self, place: Announced) -> EventPath:
        return EventPath(
            event_id=self.event_id,
            user_id=place.user_id,
            user_name=None,
            item_id=place.item_id,
            event_time_ms=place.event_time_ms,
            seq=place.seq,
            num_later=None,
            standing="removed" if place.forgotten_ms is None else "forgotten",
            hops=tuple(await self._hops(place)),
        )

    async def _sent(self, record: Record) -> SentEvent:
        log = self.parts.log
        positions = await asyncio.to_thread(self.parts.store.positions, log.log_id, log.topics.interactions)
        position = positions.get(record.partition, 0)
        if record.offset >= position:
            what = f"not ingested yet: the stored position is {position}, {record.offset - position + 1:,} to go"
        else:
            what = "ingested and not accepted: by store.max_history or store.max_age_ms it had expired when it came"
        return SentEvent(
            place=f"interactions {record.partition}:{record.offset}",
            append_ms=record.timestamp_ms,
            trace_id=trace_id_of(record.headers),
            what=what,
        )


async def look_up(parts: LookupParts, event_id: str, user_ids: list[int] | None, *, since_ms: int) -> Traced:
    """Everything that is known about an event id.

    Args:
        parts: where to look.
        event_id: as producers send it.
        user_ids: only histories of these users are searched; None: all.
        since_ms: how far back (epoch ms) the log is searched for an event that no history holds.

    Raises StoreUnavailableError, ChunkCorruptError; and, for an event that no history holds, LogUnavailableError.
    """
    lookup = _Lookup(parts, event_id)
    stored = await asyncio.to_thread(parts.store.find_event, event_key(event_id), user_ids)
    if not stored:
        return await lookup.not_stored(since_ms)
    paths = tuple([await lookup.stored(one) for one in stored])
    return replace(Traced(event_id=event_id, paths=paths), notes=tuple(dict.fromkeys(lookup.notes)))
