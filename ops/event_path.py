"""The path of one event: hop by hop, when, how old by then, and in which trace. `ops.event_lookup` finds the facts.

What has not been reached says why; what cannot be known says that, and never looks like an answer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from enum import StrEnum
from typing import Any

from feature_store.records import FirstServed, PublishedSnapshot
from model.retention import ReplicaLease
from ops.readable import duration, readable, utc_time
from stream.event_search import Announced
from stream.tracing import trace_id_of


class HopState(StrEnum):
    """Whether an event has come to a hop."""

    REACHED = "reached"
    WAITING = "waiting"
    UNKNOWN = "unknown"
    SET_ASIDE = "set aside"
    """Taken from the stream and not learned from: its batch would have done harm."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Hop:
    """One hop of one event. Ages are in ms; None: it has not come there, or nobody noted when."""

    name: str
    """`appended`, `stored`, `learned`, `published`, `swapped` or `answered`."""
    state: HopState
    what: str
    """Where or with what; of a hop that was not reached, why."""
    at_ms: int | None = None
    append_age_ms: int | None = None
    event_age_ms: int | None = None
    replica: str | None = None
    trace_id: str | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class EventPath:
    """One event as it was stored, and how far it has come."""

    event_id: str
    user_id: int
    user_name: str | None
    """The text behind a hashed user id; None for a number."""
    item_id: int
    event_time_ms: int
    seq: int
    """Arrival number within the user."""
    num_later: int | None
    """Later interactions of the user that were there when it arrived; None: it is not stored any more."""
    standing: str
    """`stored`, `expired`, `forgotten` or `removed`."""
    hops: tuple[Hop, ...]

    @property
    def is_complete(self) -> bool:
        """Whether an answer was computed with weights that know it, and no running replica has older ones."""
        answered = [hop for hop in self.hops if hop.name == "answered" and hop.state is HopState.REACHED]
        return bool(answered) and not any(
            hop.state is HopState.WAITING for hop in self.hops if hop.name in {"published", "swapped"}
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class RefusedEvent:
    """One dead letter of the event."""

    place: str
    """As `headrace dlq show` takes it."""
    reason: str
    error: str
    source: str
    refused_at_ms: int
    is_sent_back: bool


@dataclass(frozen=True, kw_only=True, slots=True)
class SentEvent:
    """One record of the event that a producer sent, where no history holds it."""

    place: str
    append_ms: int
    trace_id: str | None
    what: str
    """What became of it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Traced:
    """Everything that is known about one event id."""

    event_id: str
    paths: tuple[EventPath, ...] = ()
    """One; more where the id was used for several events."""
    refused: tuple[RefusedEvent, ...] = ()
    sent: tuple[SentEvent, ...] = ()
    notes: tuple[str, ...] = ()
    """What could not be looked at, and why."""

    @property
    def is_complete(self) -> bool:
        """Whether it was found, and each of its events has come to an answer."""
        return bool(self.paths) and all(path.is_complete for path in self.paths)

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return {"is_complete": self.is_complete, **asdict(self)}


def arrival_hops(place: Announced, sent_trace_id: str | None) -> list[Hop]:
    """The hops of the event at `place` until a history has it."""
    source = f"interactions {place.partition}:{place.offset}"
    return [
        _reached(place, "appended", place.append_ms, source, trace_id=sent_trace_id),
        _reached(
            place,
            "stored",
            place.announced_ms,
            f"arrival {place.seq} of its user, history-updates {place.partition}:{place.update_offset}",
            trace_id=trace_id_of(place.headers),
        ),
    ]


def hops_of(place: Announced, snapshot: PublishedSnapshot | None, sent_trace_id: str | None) -> list[Hop]:
    """The hops of the event at `place` up to the first snapshot that contains it, or as far as it has come.

    `snapshot`: that one; if there is none yet, the newest; None if nothing was published since it arrived.
    """
    hops = arrival_hops(place, sent_trace_id)
    if snapshot is None or not contains(snapshot, place):
        return [*hops, *_not_published(place, snapshot)]
    what = f"version {snapshot.version}, {snapshot.kind}"
    trace_id = None if snapshot.traceparent is None else _trace_id(snapshot.traceparent)
    published = _reached(place, "published", snapshot.published_at_ms, what, trace_id=trace_id)
    return [*hops, _learned(place, snapshot), published]


def _not_published(place: Announced, newest: PublishedSnapshot | None) -> list[Hop]:
    waits_for = "no snapshot has been published since it arrived"
    if newest is not None and newest.lineage.get("log_id") == place.log_id:
        ends = f"{place.partition}:{_end(newest.lineage, place.partition)}"
        waits_for = f"version {newest.version}, the newest, ends before interactions {ends}"
    elif newest is not None and newest.created_at_ms >= place.arrival_ms:
        # What is left of a log is learned under the name of the next, whose positions tell nothing of it.
        what = f"version {newest.version}, the newest, tells positions of another log"
        return [Hop(name="published", state=HopState.UNKNOWN, what=what)]
    return [_waiting("learned", "which step learned it, a snapshot tells"), _waiting("published", waits_for)]


def not_remembered(snapshot: PublishedSnapshot) -> Hop:
    """Where the store has forgotten what came before `snapshot`, which contains the event."""
    what = f"in version {snapshot.version} or one before it, of which nothing is known any more"
    return Hop(name="published", state=HopState.UNKNOWN, what=f"{what} (trainer.keep_publications_d)")


def contains(snapshot: PublishedSnapshot, place: Announced) -> bool:
    """Whether the event at a place of the log is inside a snapshot."""
    lineage = snapshot.lineage
    return lineage.get("log_id") == place.log_id and _end(lineage, place.partition) > place.offset


def _end(positions_of: Any, partition: int) -> int:
    """Next offset of a partition, in a lineage or a step as JSON has them."""
    return int(positions_of.get("positions", {}).get(str(partition), 0))


def _learned(place: Announced, containing: PublishedSnapshot) -> Hop:
    steps = containing.steps
    if steps is None:
        what = f"version {containing.version} was published by a program that did not note its steps"
        return Hop(name="learned", state=HopState.UNKNOWN, what=what)
    step = next((step for step in steps if _end(step, place.partition) > place.offset), None)
    if step is None:
        # The weights of before a crash had it; the ones of now learned it again, in steps that nobody published.
        what = f"in no step that version {containing.version} tells of"
        return Hop(name="learned", state=HopState.UNKNOWN, what=what)
    first, last = step["first_step"], step["last_step"]
    what = f"step {first}" if first == last else f"in steps {first} to {last}"
    if step.get("is_set_aside"):
        what += ", whose batch is set aside" if first == last else ", of which the batch of one is set aside"
        what += " (headrace trainer inspect)"
    hop = _reached(place, "learned", step["at_ms"], what)
    if step.get("is_set_aside"):
        return replace(hop, state=HopState.SET_ASIDE)
    if step.get("is_thinned"):
        return replace(hop, state=HopState.UNKNOWN, what=f"{what}, unless it was passed over (trainer.lag_policy)")
    if place.forgotten_ms is not None and place.forgotten_ms <= step["at_ms"]:
        return replace(hop, state=HopState.UNKNOWN, what=f"{what}, unless its user had been forgotten before it")
    return hop


def replica_hops(
    place: Announced, version: int, answers: Sequence[FirstServed], leases: Sequence[ReplicaLease]
) -> list[Hop]:
    """Swap and first answer of each replica, the first to answer first; then the running ones that have not."""
    hops = []
    for answer in sorted(answers, key=lambda one: (one.at_ms, one.replica)):
        what = f"version {answer.version}"
        if answer.swapped_at_ms is None:
            hops.append(Hop(name="swapped", state=HopState.UNKNOWN, what="not noted", replica=answer.replica))
        else:
            hops.append(_reached(place, "swapped", answer.swapped_at_ms, what, replica=answer.replica))
        hops.append(_reached(place, "answered", answer.at_ms, what, replica=answer.replica))
    known = {answer.replica for answer in answers}
    for lease in sorted(leases, key=lambda one: one.replica):
        if lease.replica in known:
            continue
        if (lease.version or 0) >= version:
            what = f"it runs version {lease.version} and has answered no request with it yet"
            hops.append(Hop(name="answered", state=HopState.WAITING, what=what, replica=lease.replica))
        else:
            what = "it runs no version" if lease.version is None else f"it runs version {lease.version}"
            hops.append(Hop(name="swapped", state=HopState.WAITING, what=what, replica=lease.replica))
    if not hops:
        hops.append(_waiting("answered", "no replica has answered with it, and none is running"))
    return hops


def _reached(place: Announced, name: str, at_ms: int, what: str, **fields: Any) -> Hop:
    return Hop(
        name=name,
        state=HopState.REACHED,
        what=what,
        at_ms=at_ms,
        append_age_ms=at_ms - place.append_ms,
        event_age_ms=at_ms - place.event_time_ms,
        **fields,
    )


def _waiting(name: str, what: str) -> Hop:
    return Hop(name=name, state=HopState.WAITING, what=what)


def _trace_id(traceparent: str) -> str | None:
    return trace_id_of([("traceparent", traceparent.encode())])


def text_of(traced: Traced) -> str:
    """For a person at a terminal."""
    lines: list[str] = []
    for path in traced.paths:
        lines += [_heading(path), *_table([_cells(hop) for hop in path.hops])]
    for letter in traced.refused:
        back = "; sent back since" if letter.is_sent_back else ""
        lines.append(
            f"refused at {utc_time(letter.refused_at_ms)}: {letter.reason}, {readable(letter.error)} "
            f"(from {letter.source}; headrace dlq show {letter.place}){back}"
        )
    for sent in traced.sent:
        trace = f", trace {sent.trace_id}" if sent.trace_id else ""
        lines.append(f"sent to {sent.place} at {utc_time(sent.append_ms)}{trace}: {sent.what}")
    return "\n".join(lines)


def _heading(path: EventPath) -> str:
    user = str(path.user_id) if path.user_name is None else readable(path.user_name)
    words = f"event {readable(path.event_id)}: user {user}, item {path.item_id}, at {utc_time(path.event_time_ms)}"
    if path.num_later:
        words += f"; late: {path.num_later} later ones were there"
    return words if path.standing == "stored" else f"{words}; {path.standing} since"


_HOP_NUMBERS = {"stored": "F1 ", "learned": "F2 ", "published": "F3 ", "answered": "F4 "}


def _cells(hop: Hop) -> tuple[str, ...]:
    when = hop.state.value if hop.at_ms is None else utc_time(hop.at_ms)
    if hop.at_ms is not None and hop.state is not HopState.REACHED:
        when = f"{when} ({hop.state.value})"
    ages = tuple("" if age is None else duration(age) for age in (hop.append_age_ms, hop.event_age_ms))
    what = hop.what if hop.replica is None else f"{readable(hop.replica)}: {hop.what}"
    name = f"{_HOP_NUMBERS.get(hop.name, '   ')}{hop.name}"
    return (name, when, *ages, f"{what}, trace {hop.trace_id}" if hop.trace_id else what)


def _table(rows: Sequence[tuple[str, ...]]) -> list[str]:
    header = ("   hop", "when (UTC)", "since append", "since event", "what")
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    return [
        "  " + "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in (header, *rows)
    ]
