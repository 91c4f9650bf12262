"""The end of the demo: a user of new films likes a few classics, and both workers' answers change within seconds."""

from __future__ import annotations

import asyncio
import re
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import asdict, dataclass, field
from typing import Any, Final

import httpx

from backtest.datasets import Title
from feature_store.ids import event_keys
from feature_store.store import FeatureStore
from ops.demo.plan import DemoError
from ops.demo.watch import client_of, recommend
from serving.messages import Recommendation, rfc3339
from stream.events import Event

NUM_NEW: Final = 5
_HISTORY_MIN, _HISTORY_MAX = 20, 60
"""A history that says something, without filling the model's window."""
_RECENT_EVENTS: Final = 20_000
"""Who and what is current: this many events before the end."""
CLASSIC_BEFORE: Final = 2000
"""A taste that a person recognises at a glance in a list of titles: films from before this year."""
NUM_ASKED: Final = 50
NUM_SHOWN: Final = 10
_YEAR: Final = re.compile(r"\((\d{4})\)$")
_ASK_EVERY_S: Final = 0.05
_TIMEOUT_S: Final = 60.0
_SPACING_MS: Final = 60_000


@dataclass(frozen=True, slots=True)
class ListDiff:
    """How one ranked list became another."""

    entered: tuple[int, ...]
    """In the order of the new list."""

    left: tuple[int, ...]
    """In the order of the old list."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Seen:
    """One answer of one worker while the change was under way."""

    url: str
    after_s: float
    """Seconds since the events were sent."""

    version: int | None
    history_event_time: str | None


@dataclass(frozen=True, kw_only=True, slots=True)
class ChangeReport:
    """Before and after, with what made the difference and how long it took."""

    user_id: int
    new_item_ids: tuple[int, ...]
    before: tuple[int, ...]
    after: tuple[int, ...]
    """The best `NUM_SHOWN`."""

    classics_before: int
    classics_after: int
    """Classics among the best `NUM_ASKED`."""

    version_before: int
    version_after: int
    """First version that contains the new events."""

    weights_s: Mapping[str, float | None]
    """Worker → seconds from sending the events to its first answer with weights that learned from them."""

    history_s: Mapping[str, float | None]
    """Worker → seconds to its first answer that used the new history."""

    event_keys: tuple[int, ...] = field(repr=False)
    diff: ListDiff = field(default_factory=lambda: ListDiff((), ()))

    @property
    def seconds(self) -> float:
        """Until every worker answered with the new weights."""
        return max(seconds for seconds in self.weights_s.values() if seconds is not None)

    def to_dict(self, titles: Mapping[int, Title]) -> dict[str, Any]:
        """JSON-ready, with titles."""

        def named(item_ids: Sequence[int]) -> list[dict[str, Any]]:
            return [{"item_id": item_id, **asdict(title_of(titles, item_id))} for item_id in item_ids]

        return {
            "user_id": self.user_id,
            "classics_before": self.classics_before,
            "classics_after": self.classics_after,
            "of_recommended": NUM_ASKED,
            "new_events": named(self.new_item_ids),
            "before": named(self.before),
            "after": named(self.after),
            "entered": list(self.diff.entered),
            "left": list(self.diff.left),
            "version_before": self.version_before,
            "version_after": self.version_after,
            "seconds_to_new_weights": dict(self.weights_s),
            "seconds_to_new_history": dict(self.history_s),
            "seconds": self.seconds,
        }


def title_of(titles: Mapping[int, Title], item_id: int) -> Title:
    """The item's title, or its number in words."""
    return titles.get(item_id, Title(title=f"film {item_id}", genres=()))


def diff(before: Sequence[int], after: Sequence[int]) -> ListDiff:
    """What entered and what left."""
    old, new = set(before), set(after)
    return ListDiff(
        entered=tuple(item for item in after if item not in old),
        left=tuple(item for item in before if item not in new),
    )


def is_classic(titles: Mapping[int, Title], item_id: int) -> bool:
    """Whether the year in the title lies before `CLASSIC_BEFORE`."""
    year = _YEAR.search(title_of(titles, item_id).title)
    return year is not None and int(year[1]) < CLASSIC_BEFORE


def num_classics(titles: Mapping[int, Title], item_ids: Iterable[int]) -> int:
    """How many of them are classics."""
    return sum(is_classic(titles, item_id) for item_id in item_ids)


def choose_user(user_ids: Sequence[int], item_ids: Sequence[int], titles: Mapping[int, Title]) -> int:
    """The newest active user with a decent history and the fewest classics in it, given who rated what in order."""
    counts = Counter(user_ids)
    decent = {user_id for user_id, count in counts.items() if _HISTORY_MIN <= count <= _HISTORY_MAX}
    if not decent:
        return counts.most_common(1)[0][0]
    rated = zip(user_ids, item_ids, strict=True)
    classics = Counter(user for user, item in rated if user in decent and is_classic(titles, item))
    newest_first = [user for user in dict.fromkeys(reversed(user_ids[-_RECENT_EVENTS:])) if user in decent]
    return min(newest_first or sorted(decent), key=lambda user: classics[user])


def choose_films(item_ids: Sequence[int], titles: Mapping[int, Title], known: AbstractSet[int]) -> tuple[int, ...]:
    """The currently most rated classics outside `known`; with too few of them, the most rated films.

    `item_ids`: what was rated, in event order.
    """
    popular = [item for item, _ in Counter(item_ids[-_RECENT_EVENTS:]).most_common() if item not in known]
    classics = [item for item in popular if is_classic(titles, item)]
    return tuple((classics if len(classics) >= NUM_NEW else popular)[:NUM_NEW])


def new_events(user_id: int, item_ids: Sequence[int], *, after_ms: int, prefix: str) -> list[Event]:
    """Top ratings, a minute apart, beginning a minute after the end of the stream."""
    return [
        Event(
            event_id=f"{prefix}-new-{place}",
            user_id=user_id,
            item_id=item_id,
            action="rating",
            event_time=after_ms + (place + 1) * _SPACING_MS,
            value=10.0,
        )
        for place, item_id in enumerate(item_ids)
    ]


@dataclass(frozen=True, kw_only=True, slots=True)
class ChangeParts:
    """What the change needs to know."""

    client: httpx.AsyncClient
    urls: Sequence[str]
    store: FeatureStore
    user_ids: Sequence[int]
    item_ids: Sequence[int]
    """Who rated what, in event order."""

    ends_ms: int
    """Event time of the last of them."""

    titles: Mapping[int, Title]
    num_interactions: int
    """Interactions that everybody has learned from by now."""


async def show_change(parts: ChangeParts) -> ChangeReport:
    """Ask, send the events, and ask both workers until they answer with weights that learned from them.

    Raises DemoError when that does not happen in time, ClientError when a worker does not answer.
    """
    user_id = choose_user(parts.user_ids, parts.item_ids, parts.titles)
    before = await recommend(parts.client, parts.urls[0], user_id, NUM_ASKED)
    if before.fallback or before.snapshot_version is None:
        raise DemoError(f"user {user_id} got recommendations by popularity, not by the model, at the end of the stream")
    seen = {item for user, item in zip(parts.user_ids, parts.item_ids, strict=True) if user == user_id}
    shown = _item_ids(before)[:NUM_SHOWN]
    chosen = choose_films(parts.item_ids, parts.titles, seen | set(shown))
    events = new_events(user_id, chosen, after_ms=parts.ends_ms, prefix="demo")
    learned = _Learned(before.snapshot_version, parts.num_interactions + len(events))
    await client_of(parts.client, parts.urls[0]).send_events(events)
    answers: list[Seen] = []
    last = await asyncio.gather(*(_ask_until(parts, url, user_id, learned, answers) for url in parts.urls))
    version, newest_time = learned.version, rfc3339(events[-1].event_time_ms())
    assert version is not None, "a worker has answered with it"
    after = _item_ids(last[0])
    return ChangeReport(
        user_id=user_id,
        new_item_ids=chosen,
        before=tuple(shown),
        after=tuple(after[:NUM_SHOWN]),
        classics_before=num_classics(parts.titles, _item_ids(before)),
        classics_after=num_classics(parts.titles, after),
        diff=diff(shown, after[:NUM_SHOWN]),
        version_before=before.snapshot_version,
        version_after=version,
        weights_s={url: first_s(answers, url, lambda one: (one.version or 0) >= version) for url in parts.urls},
        history_s={url: first_s(answers, url, lambda one: one.history_event_time == newest_time) for url in parts.urls},
        event_keys=tuple(event_keys(event.event_id for event in events).tolist()),
    )


async def _ask_until(
    parts: ChangeParts, url: str, user_id: int, learned: _Learned, answers: list[Seen]
) -> Recommendation:
    """Ask one worker until it answers with weights that have learned from the new events."""
    while (elapsed_s := time.monotonic() - learned.started_s) < _TIMEOUT_S:
        answer = await recommend(parts.client, url, user_id, NUM_ASKED)
        answers.append(
            Seen(
                url=url,
                after_s=time.monotonic() - learned.started_s,
                version=answer.snapshot_version,
                history_event_time=answer.history_event_time,
            )
        )
        if answer.snapshot_version is not None and answer.snapshot_version > learned.version_before:
            await asyncio.to_thread(learned.look, parts.store)
            if learned.version is not None and answer.snapshot_version >= learned.version:
                return answer
        await asyncio.sleep(_ASK_EVERY_S)
    raise DemoError(f"{url} did not answer with weights that contain the new events within {elapsed_s:.0f} s")


def _item_ids(answer: Recommendation) -> list[int]:
    """Recommended items, best first; the demo's are numbers."""
    return [int(item.item_id) for item in answer.items]


class _Learned:
    """Which published version is the first that contains the new events, by its lineage."""

    def __init__(self, version_before: int, num_interactions: int) -> None:
        self.version_before = version_before
        self.started_s = time.monotonic()
        self.version: int | None = None
        self._num_interactions = num_interactions

    def look(self, store: FeatureStore) -> None:
        """Look into the store unless it is known. Blocking."""
        if self.version is None:
            published = store.published_snapshots("default", self.version_before)
            containing = (one for one in published if one.lineage["num_interactions"] >= self._num_interactions)
            self.version = next((one.version for one in containing), None)


def first_s(answers: Sequence[Seen], url: str, holds: Callable[[Seen], bool]) -> float | None:
    """When a worker's answers first had a property; None if none had."""
    return next((one.after_s for one in answers if one.url == url and holds(one)), None)
