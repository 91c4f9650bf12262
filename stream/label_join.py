"""Step 4 of the label join: what one batch does to the open impressions, inside the caller's transaction."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Final

import numpy as np
from numpy.typing import NDArray

from feature_store.errors import ChunkCorruptError
from feature_store.impressions import OpenImpression, OpenImpressions
from feature_store.interactions import JaggedHistories
from feature_store.store import FeatureStore
from stream.dead_letters import MESSAGE_REASON
from stream.errors import MessageFormatError
from stream.events import Refusal
from stream.label_rules import ImpressionRules, Outcome, Seen, close, forgotten_by_tombstone, take
from stream.log import PartitionId, Record
from stream.messages import HistoryUpdate, Topics
from stream.window_index import WindowIndex

logger = logging.getLogger(__name__)

DUE_PER_BATCH: Final = 500
"""Impressions closed or removed in one transaction; the next one follows at once while more are due."""


@dataclass(frozen=True, kw_only=True, slots=True)
class LabelBatch:
    """One poll of `impressions` and `history-updates`, decoded."""

    shown: list[OpenImpression]
    refused: list[tuple[Record, Refusal]]
    seen: Seen
    """Interactions that may take an item, in order of users."""
    forgotten: set[int]
    """Users of whom nothing may be kept."""
    num_unreadable: int
    """Updates that this version cannot read."""
    next_offsets: dict[PartitionId, int]
    """Where the partitions that the poll brought records of are to be read next."""
    read_up_to_ms: int | None
    """A moment: what the log held then is in this batch or an earlier one. None: more is waiting."""

    @property
    def concerns_labels(self) -> bool:
        """Whether it can change anything besides positions."""
        return bool(self.shown or self.refused or self.num_unreadable or self.forgotten or len(self.seen))


def decode_batch(
    records: Sequence[Record],
    rules: ImpressionRules,
    index: WindowIndex,
    *,
    topics: Topics,
    log_id: str,
    read_up_to_ms: int | None,
) -> LabelBatch:
    """Decode records of both topics, in any order of partitions; `index` learns of the impressions among them.

    Of the interactions, only those stay that may lie in a window of their user: by column, whatever their number.
    """
    shown: list[OpenImpression] = []
    refused: list[tuple[Record, Refusal]] = []
    updates: list[tuple[Record, HistoryUpdate]] = []
    forgotten: set[int] = set()
    num_unreadable = 0
    for record in records:
        try:
            if record.topic == topics.history_updates:
                updates.append((record, HistoryUpdate.decode(record.value)))
            elif record.value:
                shown.append(rules.read(record))
            else:
                forgotten.add(forgotten_by_tombstone(record))
        except MessageFormatError as error:
            if record.topic == topics.history_updates:
                # A dead letter of it would help nobody: it is ours, and lies in the log for whoever can read it.
                num_unreadable += 1
                logger.warning("update %d/%d is not joined: %s", record.partition, record.offset, error)
            else:
                refused.append((record, Refusal(MESSAGE_REASON, None, str(error))))
    index.add(shown)
    parts = []
    for record, update in updates:
        forgotten.update(update.forgotten)
        # What another log brought has been joined under its name.
        if update.log_id == log_id and len(update.interactions):
            parts.append(_seen(record, update, rules, index))
    return LabelBatch(
        shown=shown,
        refused=refused,
        seen=Seen.concat(parts).by_user(),
        forgotten=forgotten,
        num_unreadable=num_unreadable,
        next_offsets={(record.topic, record.partition): record.offset + 1 for record in records},
        read_up_to_ms=read_up_to_ms,
    )


def _seen(record: Record, update: HistoryUpdate, rules: ImpressionRules, index: WindowIndex) -> Seen:
    times_ms = rules.times_ms(update.interactions)
    rows = np.flatnonzero(index.may_take(update.interactions.user_id, times_ms))
    interactions = update.interactions.take(rows)
    return Seen(
        user_id=interactions.user_id,
        item_id=interactions.item_id,
        time_ms=times_ms[rows],
        event_time_ms=interactions.event_time_ms,
        action=interactions.action.astype(np.int64),
        value=interactions.value,
        announced_ms=np.full(len(rows), record.timestamp_ms),
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class LabelJoin:
    """The join on one transaction's impressions."""

    impressions: OpenImpressions
    store: FeatureStore
    rules: ImpressionRules
    outcome: Outcome

    def apply(self, batch: LabelBatch) -> None:
        """Open what was shown and take what was interacted with; forget whom the batch says to forget.

        The topics have no common order, so a user who is forgotten and comes back within one batch is forgotten whole.
        """
        self.outcome.counts["malformed"] += len(batch.refused) + batch.num_unreadable
        if batch.forgotten:
            self.impressions.forget(np.array(sorted(batch.forgotten), np.int64))
        self._open([impression for impression in batch.shown if impression.user_id not in batch.forgotten])
        if len(batch.seen):
            users = batch.seen.windows()
            found = self.impressions.overlapping(users.user_id, users.from_ms, users.until_ms)
            self.impressions.save(take(found, batch.seen, self.rules, self.outcome))

    def close_due(self, now_ms: int) -> bool:
        """Close and remove what is due at `now_ms`, as far as one batch goes; whether it may be more."""
        due = self.impressions.due(now_ms, DUE_PER_BATCH)
        self.impressions.remove([impression for impression in due if impression.is_closed])
        closing = [impression for impression in due if not impression.is_closed]
        # Once more from the histories. An update is announced before its interactions can be read: if one was polled
        # before its impression was, and stored after the histories were looked at, only this look finds it.
        take(closing, self._stored(closing), self.rules, self.outcome)
        for impression in closing:
            close(impression, self.rules.config, self.outcome)
        self.impressions.save(closing)
        return len(due) == DUE_PER_BATCH

    def _open(self, shown: list[OpenImpression]) -> None:
        """Store impressions that are not known, with what their users have done since."""
        if not shown:
            return
        known = self.impressions.request_ids(np.array([impression.user_id for impression in shown], np.int64))
        new: list[OpenImpression] = []
        for impression in shown:
            request_ids = known.setdefault(impression.user_id, set())
            if impression.request_id in request_ids:
                self.outcome.counts["duplicate_impression"] += 1
            elif len(request_ids) >= self.rules.config.user_impressions_max:
                self.outcome.counts["over_limit"] += 1
            else:
                request_ids.add(impression.request_id)
                # A copy: the batch must be as it was if the transaction fails and is tried again.
                new.append(replace(impression, is_taken=impression.is_taken.copy(), pending={}))
        take(new, self._stored(new), self.rules, self.outcome)
        self.impressions.add(new)
        self.outcome.num_opened += len(new)

    def _stored(self, impressions: Sequence[OpenImpression]) -> Seen:
        """What the users did in the windows of impressions, in order of users; once per impression."""
        if not impressions:
            return Seen.concat([])
        rows = sorted((impression.user_id, impression.until_ms) for impression in impressions)
        users, until_ms = np.array(rows, np.int64).T
        histories = self._read(np.ascontiguousarray(users), np.ascontiguousarray(until_ms))
        return Seen(
            user_id=np.repeat(histories.user_ids, histories.lengths()),
            item_id=histories.item_id,
            time_ms=self.rules.times_ms(histories),
            event_time_ms=histories.event_time_ms,
            action=histories.action.astype(np.int64),
            value=histories.value,
            announced_ms=histories.arrival_ms,
        )

    def _read(self, users: NDArray[np.int64], until_ms: NDArray[np.int64]) -> JaggedHistories:
        # In a replay windows are of arrival times, about which event times say nothing.
        is_replay = self.rules.mode == "replay"
        while True:
            try:
                return self.store.read(
                    users, max_len=self.rules.config.history_len, before_ms=None if is_replay else until_ms
                )
            except ChunkCorruptError as error:
                # One damaged history must not stop the labels of all: its user's come from updates alone.
                logger.error("labels of user %d without the history: %s", error.user_id, error)  # noqa: TRY400
                is_sound = users != error.user_id
                users, until_ms = users[is_sound], until_ms[is_sound]
