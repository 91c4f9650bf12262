"""The rules of the label join: what an impression is open for, which interactions take its items, what is late. Pure.

An item of an impression is *taken* if the same user has an interaction with it at from ≤ time < until, the window. Its
label holds all that the user did with it in the window: it is made when the window is over, or as soon as nothing that
anybody predicts can change it (`Awaited`). The window starts when the items were shown. Times are event times; a
replayed stream's are historical, so there the impression's append time and the interactions' arrival times take their
place (a history does not keep append times, and both orders of arrival must come to the same labels).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Final, Literal

import numpy as np
from numpy.typing import NDArray

from feature_store.ids import numeric_id, stable_id
from feature_store.impressions import ItemActions, OpenImpression, UserWindows
from feature_store.interactions import Interactions, JaggedHistories
from stream.errors import MessageFormatError
from stream.log import Record
from stream.messages import Impression, Labels, decode_message

_LONGEST_MS: Final = 366 * 86_400_000
_LATEST_MS: Final = 2**53
"""Far enough below 2^63 for every sum of times here."""
ITEMS_PER_MESSAGE: Final = 1_000
"""Items in one message of `labels`: it says more of each than the impression, which may be as large as a record may."""


@dataclass(frozen=True, kw_only=True, slots=True)
class LabelConfig:
    """How impressions and what users did next become labels."""

    enabled: bool = True
    """Whether ingest joins `impressions` with interactions and writes `labels`."""
    window_ms: int = 1_800_000
    """An item counts as taken when the user interacts with it less than this long (ms) after it was shown."""
    allowed_lateness_ms: int = 300_000
    """How long after a window's end (ms) its items are labelled as not taken: the time that an interaction may need
    from the producer through ingest, a backlog of ingest included."""
    correction_ms: int = 21_600_000
    """For how long after that (ms) a late interaction still corrects a label. For as long again it is counted as too
    late, and then the impression, about 0.6 kB in the database, is removed; where the ranking head ranked, some 20
    bytes more for each item and task."""
    history_len: int = 256
    """Newest interactions of a user's window that are looked up when an impression arrives and when it is closed."""
    user_impressions_max: int = 1_000
    """Impressions held of one user; more are counted and not joined, so that a bot cannot fill the table."""
    indexed_users_max: int = 1_000_000
    """Users whose windows are held in memory (24 bytes each), so that only interactions that can matter cost a look
    into the database; with more users than this, all of them do."""
    poll_records: int = 200
    """Records of one poll; an update among them holds up to `ingest.max_batch_records` interactions."""
    batch_wait_ms: int = 200
    """Time between two polls (ms) while nothing is waiting: the delay of a label, against transactions per second."""

    def __post_init__(self) -> None:
        limits = {
            "window_ms": (1, _LONGEST_MS),
            "allowed_lateness_ms": (0, _LONGEST_MS),
            "correction_ms": (0, _LONGEST_MS),
            "history_len": (1, 100_000),
            "user_impressions_max": (1, 1_000_000),
            "indexed_users_max": (0, 100_000_000),
            "poll_records": (1, 10_000),
            "batch_wait_ms": (0, 60_000),
        }
        for name, (smallest, largest) in limits.items():
            if not smallest <= getattr(self, name) <= largest:
                raise ValueError(f"labels.{name} = {getattr(self, name)}: must lie in {smallest}..{largest}")

    def closing_ms(self, until_ms: int) -> int:
        """When an impression whose window ends at `until_ms` is closed."""
        return until_ms + self.allowed_lateness_ms

    def too_late_ms(self, until_ms: int) -> int:
        """An interaction announced after this corrects nothing any more."""
        return until_ms + self.allowed_lateness_ms + self.correction_ms

    def removal_ms(self, until_ms: int) -> int:
        """When an impression is removed."""
        return until_ms + self.allowed_lateness_ms + 2 * self.correction_ms


@dataclass(frozen=True, kw_only=True, slots=True)
class Awaited:
    """What the label of a taken item waits for, until its window is over. By default nothing: it is made at once."""

    action: int = 0
    """Bitmask of actions that are predicted."""
    value: bool = False
    """Whether a value is."""

    def is_met(self, known: ItemActions) -> bool:
        """Whether nothing that is still to come can change what is predicted."""
        return self.action & ~known.action == 0 and (known.has_value or not self.value)


@dataclass(frozen=True, kw_only=True, slots=True)
class ImpressionRules:
    """What an impression must be, beyond its schema, when its window starts, and what its labels wait for."""

    config: LabelConfig
    mode: str = "live"
    awaited: Awaited = Awaited()
    max_future_skew_ms: int = 300_000
    """How far ahead of the log's time `shown_at_ms` may lie (ms): one from far ahead would stay open for ever."""

    def read(self, record: Record) -> OpenImpression:
        """The impression of a record of `impressions`; raises MessageFormatError naming what is wrong."""
        shown = decode_message(Impression, record.value)
        if (mismatch := shown.mismatch()) is not None:
            raise MessageFormatError(f"an impression {mismatch}")
        if "\0" in shown.request_id:
            raise MessageFormatError("request_id holds a NUL character, which no database keeps")
        from_ms = record.timestamp_ms if self.mode == "replay" else shown.shown_at_ms
        ahead_ms = from_ms - record.timestamp_ms
        if ahead_ms > self.max_future_skew_ms:
            raise MessageFormatError(
                f"shown_at_ms lies {ahead_ms} ms ahead; events.max_future_skew_ms is {self.max_future_skew_ms}"
            )
        if not 0 <= from_ms < _LATEST_MS:
            raise MessageFormatError(f"{from_ms} ms is no time at which anything was shown")
        until_ms = from_ms + self.config.window_ms
        return OpenImpression(
            user_id=_number(shown.user_id),
            request_id=shown.request_id,
            from_ms=from_ms,
            until_ms=until_ms,
            due_ms=self.config.closing_ms(until_ms),
            item_ids=np.array([_number(item) for item in shown.items], np.int64),
            is_taken=np.zeros(len(shown.items), np.bool_),
            payload=record.value or b"",
        )

    def times_ms(self, interactions: Interactions | JaggedHistories) -> NDArray[np.int64]:
        """i64[N], the times that windows are compared with."""
        return interactions.arrival_ms if self.mode == "replay" else interactions.event_time_ms


def forgotten_by_tombstone(record: Record) -> int:
    """The user whose impressions a record without value takes back: its key. Raises MessageFormatError without one."""
    if not record.key:
        raise MessageFormatError("an impression without value needs the user id as key")
    text = record.key.decode("utf-8", "replace")
    number = numeric_id(text)
    return stable_id(text) if number is None else number


def _number(raw: int | str) -> int:
    return stable_id(raw) if isinstance(raw, str) else raw


@dataclass(frozen=True, kw_only=True, slots=True)
class Seen:
    """N interactions that may take items; i64 all but the values."""

    user_id: NDArray[np.int64]
    item_id: NDArray[np.int64]
    time_ms: NDArray[np.int64]
    """What windows are compared with."""
    event_time_ms: NDArray[np.int64]
    action: NDArray[np.int64]
    value: NDArray[np.float32]
    """NaN where there is none."""
    announced_ms: NDArray[np.int64]
    """When the log took the update that announced the interaction."""

    def __len__(self) -> int:
        return len(self.user_id)

    @staticmethod
    def concat(parts: Sequence[Seen]) -> Seen:
        """All rows of all parts."""
        empty = [np.empty(0, np.int64)]
        names = Seen.__dataclass_fields__
        return Seen(**{name: np.concatenate([getattr(part, name) for part in parts] or empty) for name in names})

    def by_user(self) -> Seen:
        """The same rows in order of users."""
        order = np.argsort(self.user_id, kind="stable")
        return Seen(**{name: getattr(self, name)[order] for name in Seen.__dataclass_fields__})

    def windows(self) -> UserWindows:
        """Of interactions in order of users: each user, and the times of the first and the last of them."""
        user_id, starts = np.unique(self.user_id, return_index=True)
        if len(user_id) == 0:
            return UserWindows(user_id=user_id, from_ms=user_id, until_ms=user_id)
        first_ms = np.minimum.reduceat(self.time_ms, starts)
        return UserWindows(user_id=user_id, from_ms=first_ms, until_ms=np.maximum.reduceat(self.time_ms, starts))


@dataclass(slots=True)
class Outcome:
    """Labels to be written, and what is counted once they are durable."""

    labels: list[Labels] = field(default_factory=list)
    counts: Counter[str] = field(default_factory=Counter)
    """Per outcome (`stream.labels.OUTCOMES`)."""
    num_opened: int = 0
    num_closed: int = 0

    def add_taken(self, impression: OpenImpression, known: Mapping[int, ItemActions]) -> None:
        """Label the items at these places with what was done with them; `late` once the impression is closed."""
        places = sorted(known)
        found = [known[place] for place in places]
        self._add(
            impression,
            places,
            "taken",
            actions=[one.action for one in found],
            event_times_ms=[one.first_ms for one in found],
            values=[one.value if one.has_value else None for one in found],
        )
        impression.is_taken[places] = True

    def add_not_taken(self, impression: OpenImpression, places: Sequence[int]) -> None:
        """Label the items at these places."""
        self._add(impression, places, "not_taken")

    def _add(
        self,
        impression: OpenImpression,
        places: Sequence[int],
        outcome: Literal["taken", "not_taken"],
        *,
        actions: Sequence[int] = (),
        event_times_ms: Sequence[int] = (),
        values: Sequence[float | None] = (),
    ) -> None:
        shown = decode_message(Impression, impression.payload)
        late = outcome == "taken" and impression.is_closed
        for start in range(0, len(places), ITEMS_PER_MESSAGE):
            rows = slice(start, start + ITEMS_PER_MESSAGE)
            part = places[rows]
            self.labels.append(
                Labels(
                    request_id=shown.request_id,
                    user_id=shown.user_id,
                    shown_at_ms=shown.shown_at_ms,
                    snapshot_version=shown.snapshot_version,
                    outcome=outcome,
                    late=late,
                    items=[shown.items[place] for place in part],
                    places=list(part),
                    scores=[shown.scores[place] for place in part],
                    actions=list(actions[rows]),
                    event_times_ms=list(event_times_ms[rows]),
                    values=list(values[rows]),
                    from_ms=impression.from_ms,
                    predictions=None
                    if shown.predictions is None
                    else {task: [said[place] for place in part] for task, said in shown.predictions.items()},
                    surface=shown.surface,
                )
            )
        self.counts["late" if late else outcome] += len(places)


def take(
    impressions: Iterable[OpenImpression], seen: Seen, rules: ImpressionRules, outcome: Outcome
) -> list[OpenImpression]:
    """Note what interactions did with the items, and label those whose labels need not wait; returns what changed.

    A label that was written stays as it is, whatever else is heard of its item. `seen` is in order of users.
    """
    changed: list[OpenImpression] = []
    for impression in impressions:
        start = int(np.searchsorted(seen.user_id, impression.user_id, side="left"))
        rows = slice(start, int(np.searchsorted(seen.user_id, impression.user_id, side="right")))
        times = seen.time_ms[rows]
        is_inside = (times >= impression.from_ms) & (times < impression.until_ms)
        inside = np.flatnonzero(is_inside) + start
        is_new = np.isin(impression.item_ids, seen.item_id[inside]) & ~impression.is_taken
        if not is_new.any():
            continue
        rows_of = {
            place: inside[seen.item_id[inside] == impression.item_ids[place]]
            for place in np.flatnonzero(is_new).tolist()
        }
        take_open = _correct if impression.is_closed else _note
        if take_open(impression, rows_of, seen, rules, outcome):
            changed.append(impression)
    return changed


def _note(
    impression: OpenImpression,
    rows_of: Mapping[int, NDArray[np.int64]],
    seen: Seen,
    rules: ImpressionRules,
    outcome: Outcome,
) -> bool:
    """Of an open impression, given the rows of `seen` about each place; whether it changed."""
    known = {place: _actions(seen, rows) for place, rows in rows_of.items()}
    known |= {
        place: impression.pending[place].joined(one) for place, one in known.items() if place in impression.pending
    }
    decided = {place: one for place, one in known.items() if rules.awaited.is_met(one)}
    pending = {place: one for place, one in (impression.pending | known).items() if place not in decided}
    if decided:
        outcome.add_taken(impression, decided)
    elif _encoding(pending) == _encoding(impression.pending):
        return False
    impression.pending = pending
    return True


def _encoding(pending: Mapping[int, ItemActions]) -> list[tuple[int, str]]:
    """To be compared: NaN is not equal to itself."""
    return sorted((place, repr(one)) for place, one in pending.items())


def _correct(
    impression: OpenImpression,
    rows_of: Mapping[int, NDArray[np.int64]],
    seen: Seen,
    rules: ImpressionRules,
    outcome: Outcome,
) -> bool:
    """Of a closed impression: these items were labelled as not taken. Its labels wait for nothing any more."""
    too_late_ms = rules.config.too_late_ms(impression.until_ms)
    in_time = {place: rows for place, rows in rows_of.items() if seen.announced_ms[rows].min() <= too_late_ms}
    if in_time:
        outcome.add_taken(impression, {place: _actions(seen, rows) for place, rows in in_time.items()})
    outcome.counts["too_late"] += len(rows_of) - len(in_time)
    impression.is_taken[list(rows_of)] = True
    return True


def _actions(seen: Seen, rows: NDArray[np.int64]) -> ItemActions:
    """What these rows of `seen`, at least one, say of an item."""
    valued = rows[np.isfinite(seen.value[rows])]
    known = ItemActions(
        action=int(np.bitwise_or.reduce(seen.action[rows])), first_ms=int(seen.event_time_ms[rows].min())
    )
    if len(valued) == 0:
        return known
    last = int(valued[np.lexsort((seen.value[valued], seen.event_time_ms[valued]))[-1]])
    return replace(known, value=float(seen.value[last]), value_ms=int(seen.event_time_ms[last]))


def close(impression: OpenImpression, config: LabelConfig, outcome: Outcome) -> None:
    """Label what waits with what is known, and what nobody took as not taken; keep the impression for corrections."""
    if impression.pending:
        outcome.add_taken(impression, impression.pending)
        impression.pending = {}
    places = np.flatnonzero(~impression.is_taken).tolist()
    if places:
        outcome.add_not_taken(impression, places)
    outcome.num_closed += 1
    impression.is_closed = True
    impression.due_ms = config.removal_ms(impression.until_ms)
