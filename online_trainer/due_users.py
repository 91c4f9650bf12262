"""Whose vector is to be computed anew, when, and how far the update log may be called done meanwhile. Pure.

A user becomes due a debounce after the first high-value event that its vector does not know. What is due is *taken*,
and is *done* once its vector is stored; until then the log counts as done only up to the event that asked for it, so
that after a crash everything that was waiting is asked for again.
"""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final

import numpy as np

from stream.messages import HistoryUpdate

_AGES_MAX: Final = 64
"""Events of one waiting user whose times are remembered for freshness; of more, the first so many stand for all."""


@dataclass(slots=True)
class DueUser:
    """A user who waits, and what for."""

    user_id: int
    due_s: float
    """When (monotonic) its vector may be computed."""
    below_seq: int = 0
    """Its vector must know the arrivals with smaller numbers."""
    offsets: dict[int, int] = field(default_factory=dict)
    """Partition of `history-updates` → offset of the first message that asked for it."""
    event_time_ms: list[int] = field(default_factory=list)
    append_ms: list[int] = field(default_factory=list)
    """Of the events that asked, in their order."""

    def merge(self, other: DueUser) -> None:
        """Wait for what another waits for, too."""
        self.due_s, self.below_seq = min(self.due_s, other.due_s), max(self.below_seq, other.below_seq)
        for partition, offset in other.offsets.items():
            self.offsets[partition] = min(offset, self.offsets.get(partition, offset))
        self.event_time_ms = (self.event_time_ms + other.event_time_ms)[:_AGES_MAX]
        self.append_ms = (self.append_ms + other.append_ms)[:_AGES_MAX]


class DueUsers:
    """Users who wait for their vectors, in the order in which they become due."""

    def __init__(self, *, action_mask: int, debounce_ms: int) -> None:
        self._mask, self._debounce_s = np.uint32(action_mask), debounce_ms / 1000
        self._waiting: dict[int, DueUser] = {}
        self._taken: dict[int, DueUser] = {}
        self._order: list[tuple[float, int, int]] = []
        """Heap of (due_s, number, user): first come, first served; it counts while the user waits with that due_s."""
        self._numbers = itertools.count()
        self._offsets: dict[int, list[tuple[int, int]]] = {}
        """Partition → heap of (offset, user); an entry counts while the user waits, or is taken, with that offset."""
        self._next: dict[int, int] = {}
        """Partition → next offset to read."""
        self._ended: dict[int, dict[int, int]] = {}
        """Partition → user → offset of the message, not read yet, that ends what is announced of the user before."""
        self.num_asked = 0
        """High-value events read."""

    @property
    def num_waiting(self) -> int:
        """Users who wait, and those taken."""
        return len(self._waiting) + len(self._taken)

    def begin(self, positions: Mapping[int, int]) -> None:
        """Nothing waits; each partition is read on from its position."""
        self._waiting, self._taken, self._order, self._offsets, self._ended = {}, {}, [], {}, {}
        self._next = dict(positions)

    def add(self, partition: int, offset: int, update: HistoryUpdate, *, now_s: float, now_ms: int) -> None:
        """Note what one message of `history-updates` announces; those read before are nothing new."""
        if offset < self._next.get(partition, 0):
            return
        self._next[partition] = offset + 1
        new = update.interactions
        is_asking = (new.action & self._mask) != 0
        if ended := self._ended.get(partition):
            is_asking &= ~np.isin(new.user_id, list(ended))
            self._ended[partition] = {user: before for user, before in ended.items() if before > offset}
        rows = np.flatnonzero(is_asking)
        self.num_asked += len(rows)
        for user_id, seq, event_time_ms, append_ms in zip(
            new.user_id[rows].tolist(),
            new.seq[rows].tolist(),
            new.event_time_ms[rows].tolist(),
            update.append_ms[rows].tolist(),
            strict=True,
        ):
            # What has waited in the log, while this daemon was away, has waited enough.
            waited_s = min(max((now_ms - append_ms) / 1000, 0), self._debounce_s)
            one = DueUser(
                user_id=user_id,
                due_s=now_s + self._debounce_s - waited_s,
                below_seq=seq + 1,
                offsets={partition: offset},
                event_time_ms=[event_time_ms],
                append_ms=[append_ms],
            )
            self._wait(one)
        self.forget(update.forgotten)

    def _wait(self, one: DueUser) -> None:
        known = self._waiting.get(one.user_id)
        if known is None:
            self._waiting[one.user_id] = known = one
        else:
            before_s, before = known.due_s, dict(known.offsets)
            known.merge(one)
            if (known.due_s, known.offsets) == (before_s, before):
                return
        heapq.heappush(self._order, (known.due_s, next(self._numbers), known.user_id))
        for partition, offset in known.offsets.items():
            heapq.heappush(self._offsets.setdefault(partition, []), (offset, known.user_id))

    def forget(self, user_ids: Iterable[int]) -> None:
        """These users wait for nothing any more."""
        for user_id in user_ids:
            self._waiting.pop(user_id, None)
            self._taken.pop(user_id, None)

    def forget_ahead(self, partition: int, user_ids: Iterable[int], before: int) -> None:
        """What messages below offset `before` announce of these users asks for nothing: they are forgotten there.

        Their histories are gone, or new ones with smaller arrival numbers, which would be waited for in vain.
        """
        self._ended.setdefault(partition, {}).update(dict.fromkeys(user_ids, before))

    def first_due_s(self) -> float | None:
        """When the first who waits becomes due; None when nobody waits."""
        while self._order:
            due_s, _, user_id = self._order[0]
            one = self._waiting.get(user_id)
            if one is not None and one.due_s == due_s:
                return due_s
            heapq.heappop(self._order)
        return None

    def oldest_append_ms(self) -> int | None:
        """Append time of what waits for longest, as far as order of being due tells; None when nobody waits."""
        if self.first_due_s() is not None:
            return min(self._waiting[self._order[0][-1]].append_ms)
        return min((min(one.append_ms) for one in self._taken.values()), default=None)

    def take(self, now_s: float, max_users: int) -> list[DueUser]:
        """Those who are due, the first due first; they count as waiting until `done` or `put_back`."""
        assert not self._taken, "what was taken before is done or put back"
        taken: list[DueUser] = []
        while len(taken) < max_users and (due_s := self.first_due_s()) is not None and due_s <= now_s:
            user_id = heapq.heappop(self._order)[-1]
            one = self._taken[user_id] = self._waiting.pop(user_id)
            taken.append(one)
        return taken

    def done(self, users: Sequence[DueUser]) -> None:
        """The vectors of these users are stored, or need not be."""
        for one in users:
            self._taken.pop(one.user_id, None)

    def put_back(self) -> None:
        """What was taken waits again."""
        taken, self._taken = self._taken, {}
        for one in taken.values():
            self._wait(one)

    def positions(self, done: Sequence[DueUser] = ()) -> dict[int, int]:
        """Partition → offset below which nobody waits for anything, were these users done."""
        are_done = {one.user_id for one in done}
        return {partition: self._position(partition, are_done) for partition in self._next}

    def _position(self, partition: int, are_done: set[int]) -> int:
        heap, passed = self._offsets.get(partition, []), []
        position = self._next[partition]
        while heap:
            offset, user_id = heap[0]
            of_waiting, of_taken = self._waiting.get(user_id), self._taken.get(user_id)
            if of_waiting is not None and of_waiting.offsets.get(partition) == offset:
                position = offset
                break
            if of_taken is not None and of_taken.offsets.get(partition) == offset:
                if user_id not in are_done:
                    position = offset
                    break
                passed.append(heap[0])
            heapq.heappop(heap)
        for entry in passed:  # they count again should the store turn out to be away
            heapq.heappush(heap, entry)
        return position
