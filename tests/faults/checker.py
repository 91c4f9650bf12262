"""The queue checker: whatever happened during a run, does what is left account for every record exactly once?

It compares three lists: what was sent (`Truth`), what the log holds, and what ingest made of it. After Jepsen's queue
checker: acknowledged sends are in the log, valid distinct events of the log = the multiset of all histories, refused
records = the dead letters by distinct source position, and a reader of `history-updates` that drops by source offset
applies each stored interaction once.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final, NamedTuple

import numpy as np

from feature_store.ids import event_key, stable_id
from feature_store.interactions import Interactions
from feature_store.store import FeatureStore
from stream.dead_letters import DeadLetter
from stream.events import Event, EventRules
from stream.log import Record
from stream.messages import HistoryUpdate
from tests.faults.load import SURFACE_KEY, SURFACES, Truth

_RULES: Final = EventRules(surface_key=SURFACE_KEY, surfaces=SURFACES)
_SHOWN: Final = 5


class Row(NamedTuple):
    """One interaction as it is stored, without its arrival columns."""

    user_id: int
    event_time_ms: int
    event_key: int
    item_id: int
    action: int
    value: float
    surface: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Observed:
    """What is left after a run."""

    log: Sequence[Record]
    """Everything on `interactions`, in offset order per partition."""
    histories: Mapping[int, Sequence[tuple[Row, int]]]
    """Per user: the stored interactions in order, each with its arrival number."""
    num_stored: int
    """Interactions of all users, also of such that were never sent."""
    updates: Sequence[HistoryUpdate]
    """Everything on `history-updates`, in offset order per partition, repetitions included."""
    letters: Sequence[DeadLetter]
    """Everything on `dead-letters`, repetitions included."""
    positions: Mapping[int, int]
    sampled_positions: Sequence[Mapping[int, int]] = ()
    """What `positions` was at moments of the run, in order."""


@dataclass(slots=True)
class Verdict:
    """What the checker found."""

    num_accepted: int = 0
    num_refused: int = 0
    num_rows_sent_again: int = 0
    """Rows of `history-updates` that a reader drops: each is the trace of a batch that was tried again."""
    num_letters_sent_again: int = 0
    problems: list[str] = field(default_factory=list)

    def expect(self, what: str, found: Iterable[object]) -> None:
        """A problem, if there is anything in `found`."""
        wrong = list(found)
        if wrong:
            more = f" and {len(wrong) - _SHOWN} more" if len(wrong) > _SHOWN else ""
            self.problems.append(f"{len(wrong)} × {what}: {', '.join(map(repr, wrong[:_SHOWN]))}{more}")


def check(truth: Truth, observed: Observed) -> Verdict:
    """Compare; `problems` of the verdict is empty exactly if nothing was lost and nothing counted twice."""
    verdict = Verdict()
    events = _check_log(verdict, truth, observed.log)
    _check_histories(verdict, events, observed.histories)
    if observed.num_stored != sum(map(len, observed.histories.values())):
        verdict.problems.append(f"{observed.num_stored} interactions are stored, some of users nobody sent")
    _check_updates(verdict, observed)
    _check_letters(verdict, truth, observed)
    _check_positions(verdict, observed)
    return verdict


def row_of(event: Event) -> Row:
    """What of an event is stored."""
    user, item = (value if isinstance(value, int) else stable_id(value) for value in (event.user_id, event.item_id))
    return Row(
        user_id=user,
        event_time_ms=event.event_time_ms(),
        event_key=event_key(event.event_id),
        item_id=item,
        action=_RULES.action_bit(event.action),
        value=float(event.value or 0.0),
        surface=_RULES.surface_numbers().get((event.context or {}).get(SURFACE_KEY) or "", 0),
    )


def rows_of(interactions: Interactions) -> list[tuple[Row, int]]:
    """Interactions with their arrival numbers."""
    columns = [getattr(interactions, name).tolist() for name in Row._fields]
    rows = [Row(*values) for values in zip(*columns, strict=True)]
    return list(zip(rows, interactions.seq.tolist(), strict=True))


def read_histories(store: FeatureStore, truth: Truth) -> dict[int, list[tuple[Row, int]]]:
    """The stored histories of every user that was ever sent."""
    users = np.array(sorted({row_of(event).user_id for event in truth.valid.values()}), np.int64)
    stored = store.read(users, max_len=len(truth.valid) + 1_000)
    columns = [
        np.repeat(users, np.diff(stored.offsets)).tolist(),
        *(getattr(stored, name).tolist() for name in Row._fields[1:]),
    ]
    rows = list(zip((Row(*values) for values in zip(*columns, strict=True)), stored.seq.tolist(), strict=True))
    bounds = stored.offsets.tolist()
    return {user: rows[bounds[n] : bounds[n + 1]] for n, user in enumerate(users.tolist())}


def _check_log(verdict: Verdict, truth: Truth, log: Sequence[Record]) -> dict[str, Event]:
    """The valid events of the log by id: what ingest has to have stored."""
    values = [record.value or b"" for record in log]
    verdict.expect("acknowledged, but not in the log", truth.acknowledged - set(values))
    verdict.expect("in the log, but never sent", set(values) - truth.valid.keys() - truth.refused)
    events = {event.event_id: event for value in values if (event := truth.valid.get(value)) is not None}
    verdict.num_accepted = len(events)
    return events


def _check_histories(
    verdict: Verdict, events: Mapping[str, Event], histories: Mapping[int, Sequence[tuple[Row, int]]]
) -> None:
    expected = Counter(row_of(event) for event in events.values())
    stored = Counter(row for history in histories.values() for row, _ in history)
    verdict.expect("lost", (expected - stored).elements())
    verdict.expect("stored, but not valid, or stored twice", (stored - expected).elements())
    for user, history in histories.items():
        order = [(row.event_time_ms, row.event_key) for row, _ in history]
        if order != sorted(order):
            verdict.problems.append(f"the history of user {user} is out of order")
        if sorted(seq for _, seq in history) != list(range(len(history))):
            verdict.problems.append(f"the arrival numbers of user {user} are not 0 … {len(history) - 1}")


def _check_updates(verdict: Verdict, observed: Observed) -> None:
    """What a reader applies that drops by source offset is what is stored, each row once, with its arrival number."""
    applied: Counter[tuple[Row, int]] = Counter()
    last_offset: defaultdict[int, int] = defaultdict(lambda: -1)
    for update in observed.updates:
        fresh = update.above(last_offset[update.partition])
        verdict.num_rows_sent_again += len(update.offsets) - len(fresh.offsets)
        applied.update(rows_of(fresh.interactions))
        last_offset[update.partition] = max(last_offset[update.partition], update.last_offset)
    stored = Counter(pair for history in observed.histories.values() for pair in history)
    verdict.expect("stored, but a reader of history-updates lacks it", (stored - applied).elements())
    verdict.expect("applied by a reader of history-updates, but not stored so", (applied - stored).elements())


def _check_letters(verdict: Verdict, truth: Truth, observed: Observed) -> None:
    refused = {
        (record.partition, record.offset): record.value or b""
        for record in observed.log
        if (record.value or b"") in truth.refused
    }
    places = Counter((letter.source_partition, letter.source_offset) for letter in observed.letters)
    verdict.num_refused = len(refused)
    verdict.num_letters_sent_again = sum(places.values()) - len(places)
    verdict.expect("refused, but without a dead letter", refused.keys() - places.keys())
    verdict.expect("a dead letter of a record that is valid", places.keys() - refused.keys())
    verdict.expect(
        "a dead letter with other bytes",
        (
            letter.place
            for letter in observed.letters
            if refused.get((letter.source_partition, letter.source_offset), letter.value or b"")
            != (letter.value or b"")
        ),
    )


def _check_positions(verdict: Verdict, observed: Observed) -> None:
    ends: dict[int, int] = {}
    for record in observed.log:
        ends[record.partition] = max(ends.get(record.partition, 0), record.offset + 1)
    positions = {partition: position for partition, position in observed.positions.items() if position}
    if positions != ends:
        verdict.problems.append(f"the stored positions are {positions}, but the log ends at {ends}")
    before: dict[int, int] = {}
    for sample in observed.sampled_positions:
        for partition, position in sample.items():
            if position < before.get(partition, 0):
                verdict.problems.append(f"the position of {partition} went back: {before[partition]} → {position}")
            before[partition] = position
