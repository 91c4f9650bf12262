"""From the records of `labels` to what one step of the ranking head learns from. Pure: no I/O, no clock.

A label must not be learned before the interactions that came before it: the history behind it would lack some of them,
and would hold others after a restart. So a label waits until the update log has been read as far as it went when the
label was read, and all that was read until then has been learned from.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from hashlib import blake2b
from typing import Final

import numpy as np
from numpy.typing import NDArray

from feature_store.ids import stable_id
from model.id_index import mix64
from online_trainer.labelled_items import LabelledItems
from stream.errors import MessageFormatError
from stream.log import Record
from stream.messages import Labels, decode_message, predictions_mismatch

_NEVER: Final = int(np.iinfo(np.int64).max)
_FLOAT32_MAX: Final = float(np.finfo(np.float32).max)
_FORGOTTEN_MAX: Final = 100_000
"""Users of whom it is remembered that they were forgotten, for labels that are still to be read."""


@dataclass(frozen=True, slots=True)
class LabelPosition:
    """Where to continue one partition of `labels`: the record to read first, and how many of its items are learned."""

    offset: int
    num_items: int = 0


@dataclass(frozen=True, kw_only=True, slots=True)
class LabelBatch:
    """Labelled items of one step, in the order of the records."""

    items: LabelledItems
    keys: NDArray[np.uint64]
    """[C] which label each is: of (request_id, item, outcome)."""
    is_late: NDArray[np.bool_]
    """[C] corrects an earlier label of the item."""
    positions: dict[int, LabelPosition]
    """After this batch, of the partitions that it touches."""
    served_CK: NDArray[np.float32] | None = None
    """[C, K] what the answer predicted of each task when it was shown (probabilities; a value in its own unit); NaN
    where it predicted nothing. None: these are labels without answers."""


@dataclass(slots=True)
class _Pending:
    partition: int
    offset: int
    labels: LabelledItems
    keys: NDArray[np.uint64]
    served_CK: NDArray[np.float32]
    is_late: bool
    num_taken: int
    read_at_ms: int
    ready_after: int | None = None
    """Interactions that must have been learned from before; None: it is not known yet."""


class LabelQueue:
    """Labels that were read and not yet learned from."""

    def __init__(
        self, positions: Mapping[int, LabelPosition], *, batch_items: int, tasks: tuple[str, ...] = ()
    ) -> None:
        """tasks: K tasks whose predictions at the impression are kept, where there are any."""
        self._positions, self._batch_items, self._tasks = dict(positions), batch_items, tasks
        self._pending: deque[_Pending] = deque()
        self._forgotten: dict[int, int] = {}
        self.num_pending = 0
        """Items."""
        self.num_unreadable = 0
        """Records that this program cannot read."""
        self.num_forgotten = 0
        """Items of users who were forgotten before they were learned from."""

    def add(self, record: Record, *, read_at_ms: int) -> None:
        """Queue one record. read_at_ms: when it was read, by the clock that `release` hears of."""
        try:
            labels = decode_message(Labels, record.value)
            items = _labelled_items(labels)
            served_CK = _served_predictions(labels, self._tasks)
        except (MessageFormatError, OverflowError):  # or a number that no column holds
            self.num_unreadable += 1
            return
        if record.timestamp_ms <= self._forgotten.get(int(items.user_id[0]), -1):
            self.num_forgotten += len(items)
            return
        at = self._positions.get(record.partition, LabelPosition(0))
        pending = _Pending(
            partition=record.partition,
            offset=record.offset,
            labels=items,
            keys=label_keys(labels.request_id, labels.outcome, items.item_id),
            served_CK=served_CK,
            is_late=labels.late,
            num_taken=at.num_items if at.offset == record.offset else 0,
            read_at_ms=read_at_ms,
        )
        self._pending.append(pending)
        self.num_pending += len(items) - pending.num_taken

    def release(self, read_up_to_ms: int, num_read: int) -> None:
        """The update log has been read as far as it went at this moment; so many interactions were read in all."""
        for pending in reversed(self._pending):
            if pending.ready_after is not None:
                return
            if pending.read_at_ms < read_up_to_ms:
                pending.ready_after = num_read

    def forget(self, user_ids: tuple[int, ...], announced_ms: int) -> None:
        """Learn nothing of what was said about these users up to then, be it queued or read later."""
        self._forgotten.update(dict.fromkeys(user_ids, announced_ms))
        while len(self._forgotten) > _FORGOTTEN_MAX:
            del self._forgotten[next(iter(self._forgotten))]
        kept = [pending for pending in self._pending if int(pending.labels.user_id[0]) not in user_ids]
        dropped = self.num_pending - sum(len(one.labels) - one.num_taken for one in kept)
        self.num_pending, self.num_forgotten = self.num_pending - dropped, self.num_forgotten + dropped
        self._pending = deque(kept)

    def is_due(self, num_learned: int) -> bool:
        """Whether there is something to learn from, so many interactions having been learned from."""
        return bool(self._pending) and _is_ready(self._pending[0], num_learned)

    def take(self, num_learned: int) -> LabelBatch | None:
        """What the next step learns from, within the budget; None: nothing is ready."""
        parts: list[LabelledItems] = []
        keys: list[NDArray[np.uint64]] = []
        is_late: list[NDArray[np.bool_]] = []
        served_CK: list[NDArray[np.float32]] = []
        positions: dict[int, LabelPosition] = {}
        room = self._batch_items
        while room and self.is_due(num_learned):
            head = self._pending[0]
            count = min(room, len(head.labels) - head.num_taken)
            part = slice(head.num_taken, head.num_taken + count)
            is_part = np.zeros(len(head.labels), np.bool_)
            is_part[part] = True
            parts.append(head.labels.take(is_part, max_items=len(head.labels)))
            keys.append(head.keys[part])
            is_late.append(np.full(count, head.is_late))
            served_CK.append(head.served_CK[part])
            head.num_taken, room = head.num_taken + count, room - count
            if head.num_taken == len(head.labels):
                self._pending.popleft()
                positions[head.partition] = LabelPosition(head.offset + 1)
            else:
                positions[head.partition] = LabelPosition(head.offset, head.num_taken)
        if not parts:
            return None
        self.num_pending -= self._batch_items - room
        return LabelBatch(
            items=LabelledItems.concat(parts),
            keys=np.concatenate(keys),
            is_late=np.concatenate(is_late),
            served_CK=np.concatenate(served_CK),
            positions=positions,
        )


def _is_ready(pending: _Pending, num_learned: int) -> bool:
    return pending.ready_after is not None and pending.ready_after <= num_learned


def _labelled_items(labels: Labels) -> LabelledItems:
    """One row; raises MessageFormatError where the lists do not fit together."""
    num_items, is_taken = len(labels.items), labels.outcome == "taken"
    if num_items == 0 or len(labels.actions) != (num_items if is_taken else 0):
        raise MessageFormatError(f"labels of {num_items} items with {len(labels.actions)} actions")
    if labels.values and len(labels.values) != len(labels.actions):
        raise MessageFormatError(f"labels of {len(labels.actions)} actions with {len(labels.values)} values")
    values = [np.nan if value is None else value for value in labels.values or [None] * num_items]
    if any(abs(value) > _FLOAT32_MAX for value in values):
        raise MessageFormatError("labels with a value that is no finite 32-bit number")
    known_before_ms = np.array([labels.shown_at_ms if labels.from_ms is None else labels.from_ms], np.int64)
    return LabelledItems(
        user_id=np.array([_number(labels.user_id)], np.int64),
        shown_at_ms=np.array([labels.shown_at_ms], np.int64),
        known_before_ms=known_before_ms,
        written_before_ms=known_before_ms,
        below_seq=np.array([_NEVER], np.int64),
        surface=np.array([labels.surface], np.uint8),
        offsets=np.array([0, num_items], np.int64),
        item_id=np.array([_number(item) for item in labels.items], np.int64),
        action=np.array(labels.actions or [0] * num_items, np.uint32),
        value=np.array(values if is_taken else [np.nan] * num_items, np.float32),
        is_measured=np.full(num_items, not labels.late),
    )


def _served_predictions(labels: Labels, tasks: tuple[str, ...]) -> NDArray[np.float32]:
    """float32[C, K]; NaN where nothing was predicted. Raises MessageFormatError where the lists do not fit together."""
    if (mismatch := predictions_mismatch(labels.predictions, len(labels.items))) is not None:
        raise MessageFormatError(f"labels {mismatch}")
    served_CK = np.full((len(labels.items), len(tasks)), np.nan, np.float32)
    for column, task in enumerate(tasks):
        if labels.predictions is not None and task in labels.predictions:
            told = [np.nan if said is None else said for said in labels.predictions[task]]
            with np.errstate(over="ignore"):  # a number beyond float32 is not finite, and counted as such
                served_CK[:, column] = np.array(told, np.float64)
    return served_CK


def _number(raw: int | str) -> int:
    return stable_id(raw) if isinstance(raw, str) else raw


def label_keys(request_id: str, outcome: str, item_ids: NDArray[np.int64]) -> NDArray[np.uint64]:
    """uint64[C]: 64-bit hashes of (request_id, item, outcome)."""
    base = blake2b(f"{outcome}\0{request_id}".encode(), digest_size=8).digest()
    return mix64(mix64(item_ids.astype(np.uint64)) ^ np.frombuffer(base, "<u8"))


class LearnedLabels:
    """The labels learned from last, at most `limit`: one that comes again is not learned from again."""

    def __init__(self, limit: int) -> None:
        self._in_order: deque[int] = deque(maxlen=limit)
        self._keys: set[int] = set()

    def are_new(self, keys: NDArray[np.uint64]) -> NDArray[np.bool_]:
        """bool[C]; of equal keys in the same call, the first."""
        is_new = np.zeros(len(keys), np.bool_)
        is_new[np.unique(keys, return_index=True)[1]] = True
        known = [key in self._keys for key in keys.tolist()]
        return is_new & ~np.array(known, np.bool_)

    def add(self, keys: NDArray[np.uint64]) -> None:
        """Remember new keys in place of the oldest."""
        for key in keys.tolist():
            if len(self._in_order) == self._in_order.maxlen:
                self._keys.discard(self._in_order[0])
            self._in_order.append(key)
            self._keys.add(key)

    def state(self) -> NDArray[np.int64]:
        """int64, oldest first; `load_state` reads it back."""
        return np.array(self._in_order, np.uint64).view(np.int64)

    def load_state(self, state: NDArray[np.int64]) -> None:
        """Continue from `state()`, with as many of the newest as the limit allows."""
        self._in_order.clear()
        self._keys.clear()
        self.add(state.view(np.uint64))
