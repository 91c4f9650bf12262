"""A small world for the label join: a store, a log in memory, a clock; answers are shown and users act."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import msgspec
import numpy as np

from feature_store.ids import event_key
from feature_store.interactions import Interactions
from feature_store.store import FeatureStore
from stream.clock import ManualClock
from stream.label_rules import Awaited, ImpressionRules, LabelConfig
from stream.labels import LabelJoiner
from stream.log import Record
from stream.memory_log import MemoryLog
from stream.messages import HistoryUpdate, Impression, Labels, encode_message

NOW_MS = 1_700_000_000_000
CONFIG = LabelConfig(window_ms=1_000, allowed_lateness_ms=100, correction_ms=5_000)

AT_ONCE = Awaited()


@dataclass
class World:
    """Times are ms after NOW_MS."""

    store: FeatureStore
    clock: ManualClock = field(default_factory=lambda: ManualClock(NOW_MS))
    config: LabelConfig = CONFIG
    mode: str = "live"
    awaited: Awaited = AT_ONCE
    log: MemoryLog = field(init=False)
    num_events: int = 0

    def __post_init__(self) -> None:
        self.log = MemoryLog(self.clock, num_partitions=2)

    @property
    def now(self) -> int:
        return self.clock.now_ms() - NOW_MS

    def joiner(self, log: MemoryLog | None = None) -> LabelJoiner:
        rules = ImpressionRules(config=self.config, mode=self.mode, awaited=self.awaited)
        return LabelJoiner(log=log or self.log, store=self.store, clock=self.clock, rules=rules)

    def show(self, request_id: str, user: int | str, items: list[Any], at: int | None = None, **changes: Any) -> None:
        """An answer is shown and its impression lies in the log."""
        given: dict[str, Any] = {
            "request_id": request_id,
            "user_id": user,
            "items": items,
            "scores": [1.0 - place / 10 for place in range(len(items))],
            "snapshot_version": 3,
            "shown_at_ms": NOW_MS + (self.now if at is None else at),
        }
        self.append_impression(encode_message(Impression(**(given | changes))), key=str(user).encode())

    def append_impression(self, value: bytes | None, key: bytes | None = b"k") -> Record:
        return self.log.append(self.log.topics.impressions, None, key, value, ())

    def act(self, user: int, item: int, at: int | None = None, action: int = 1, value: float = np.nan) -> None:
        """A user acts: announced, and stored at once."""
        interactions = self.interaction(user, item, self.now if at is None else at, action=action, value=value)
        self.announce(interactions)
        self.keep(interactions)

    def interaction(self, user: int, item: int, at: int, action: int = 1, value: float = np.nan) -> Interactions:
        self.num_events += 1
        return Interactions(
            user_id=np.array([user], np.int64),
            item_id=np.array([item], np.int64),
            event_time_ms=np.array([NOW_MS + at], np.int64),
            action=np.array([action], np.uint32),
            value=np.array([value], np.float32),
            event_key=np.array([event_key(f"e{self.num_events}")], np.uint64),
            seq=np.zeros(1, np.uint32),
            arrival_ms=np.array([self.clock.now_ms()], np.int64),
        )

    def announce(self, interactions: Interactions, *, forgotten: tuple[int, ...] = (), log_id: str = "") -> None:
        partition = int(interactions.user_id[0]) % 2 if len(interactions) else 0
        update = HistoryUpdate(
            log_id=log_id or self.log.log_id,
            partition=partition,
            first_offset=self.num_events,
            last_offset=self.num_events,
            watermark_ms=0,
            offsets=np.full(len(interactions), self.num_events),
            append_ms=np.full(len(interactions), self.clock.now_ms()),
            interactions=interactions,
            forgotten=forgotten,
        )
        self.log.append(self.log.topics.history_updates, partition, None, update.encode(), ())

    def keep(self, interactions: Interactions) -> None:
        with self.store.transaction() as transaction:
            transaction.append(interactions)

    def messages(self) -> list[Labels]:
        """Everything on `labels`."""
        records = self.log.records((self.log.topics.labels, 0))
        return [msgspec.json.decode(record.value or b"", type=Labels) for record in records]

    def labels(self) -> list[tuple[str, Any, str]]:
        """(request, item, outcome) in the order of the log; a late one is `late`."""
        return [
            (message.request_id, item, "late" if message.late else message.outcome)
            for message in self.messages()
            for item in message.items
        ]

    def stored_positions(self) -> Mapping[str, Mapping[int, int]]:
        return self.store.stats().positions.get(self.log.log_id, {})


async def run(joiner: LabelJoiner) -> None:
    """Join all that is there."""
    while await joiner.step():
        pass
