"""The stream's part of a backtest: the live commit protocol on a log in memory, fed with columns.

What a producer sends is JSON, and decoding it is most of ingest's work. A recorded log is in columns already and was
checked when it was imported, so it enters where decoding ends: as the `DecodedBatch` that `stream.batch.decode_batch`
makes of the same events (a test compares the two). Everything after that is what runs live.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import cast

import numpy as np
from numpy.typing import NDArray

from backtest.event_columns import EventColumns
from feature_store.interactions import Interactions
from feature_store.store import FeatureStore
from stream.batch import DecodedBatch
from stream.clock import ManualClock
from stream.commit import Committer, IngestCounts
from stream.events import EventDecoder, EventRules, Refusal, encode_event
from stream.log import RecordBatch
from stream.memory_log import MemoryLog
from stream.messages import HistoryUpdate

PARTITION = 0


class IngestStage:
    """Commits events to the store, and gives the updates that this announces. One partition, so order is one."""

    def __init__(self, store: FeatureStore, rules: EventRules) -> None:
        self._clock = ManualClock()
        self._log = MemoryLog(self._clock)
        self._rules, self._decoder = rules, EventDecoder(rules)
        self._reader = self._log.reader()
        self._committer = Committer(
            store=store,
            writer=self._log.writer(),
            topics=self._log.topics,
            log_id=self._log.log_id,
            decoder=self._decoder,
            clock=self._clock,
            mode="replay",
        )
        self.num_committed = 0
        """Events given so far: the next one's offset in the log."""

    @property
    def log_id(self) -> str:
        """Name of the log in memory."""
        return self._log.log_id

    @property
    def counts(self) -> IngestCounts:
        """What became of the events."""
        return self._committer.counts

    async def start(self) -> None:
        """Make the topics and read updates from their start."""
        await self._log.create_topics()
        await self._reader.assign({(self._log.topics.history_updates, PARTITION): "earliest"})

    def close(self) -> None:
        """End the thread that speaks SQL."""
        self._committer.close()

    async def commit(self, events: EventColumns) -> list[tuple[int, HistoryUpdate]]:
        """One poll, in order of arrival, through the commit protocol; updates with their offsets in the update log."""
        self._clock.advance(max(0, int(events.arrival_ms.max()) - self._clock.now_ms()))
        await self._committer.commit_all([self._decoded(events)])
        self.num_committed += len(events)
        topic = self._log.topics.history_updates
        updates = []
        while records := await self._reader.poll(timeout_ms=0, max_records=1_000):
            updates += [(record.offset, HistoryUpdate.decode(record.value)) for record in records]
            self._log.delete_before((topic, PARTITION), records[-1].offset + 1)
        return updates

    def _decoded(self, events: EventColumns) -> DecodedBatch:
        """What decoding the events' records gives; their offsets follow those of before."""
        offsets = self.num_committed + np.arange(len(events))
        bits, refused = self._judged(events)
        rows = np.flatnonzero(~np.isin(np.arange(len(events)), list(refused)))
        source = RecordBatch(
            topic=self._log.topics.interactions,
            partition=PARTITION,
            offsets=offsets,
            timestamps_ms=events.arrival_ms,
            keys=[None] * len(events),
            values=cast("list[bytes | None]", _Encoded(events, self._rules.surface_key)),
            headers=[()] * len(events),
        )
        kept = events.take(rows)
        return DecodedBatch(
            partition=PARTITION,
            first_offset=int(offsets[0]),
            last_offset=int(offsets[-1]),
            interactions=Interactions(
                user_id=kept.user_id,
                item_id=kept.item_id,
                event_time_ms=kept.event_time_ms,
                action=bits[rows],
                value=kept.value,
                event_key=kept.event_key,
                seq=np.zeros(len(rows), np.uint32),
                arrival_ms=kept.arrival_ms,
                surface=self._surfaces(kept),
            ),
            offsets=offsets[rows],
            append_ms=kept.arrival_ms,
            refused=[(source.record(row), refusal) for row, refusal in sorted(refused.items())],
            user_names=_present(events.user_texts, kept.user_id),
            item_names=_present(events.item_texts, kept.item_id),
            source=source,
        )

    def _surfaces(self, events: EventColumns) -> NDArray[np.uint8]:
        if not self._rules.surface_key:
            return np.zeros(len(events), np.uint8)
        number_of = self._decoder.surface_numbers.get
        return np.array([number_of(text, 0) for text in events.surface.tolist()], np.uint8)

    def _judged(self, events: EventColumns) -> tuple[NDArray[np.uint32], dict[int, Refusal]]:
        """Action bits, and why some rows are refused: by the live rules, each as of its own arrival."""
        bit_of = self._decoder.action_bits.get
        bits = np.array([bit_of(name, 0) for name in events.action.tolist()], np.uint32)
        ahead_ms = events.event_time_ms - events.arrival_ms
        is_suspect = (bits == 0) | (ahead_ms > self._rules.max_future_skew_ms) | (events.event_time_ms < 0)
        refused: dict[int, Refusal] = {}
        for row in np.flatnonzero(is_suspect).tolist():
            refusal = self._decoder.judge(events.as_event(row), int(events.arrival_ms[row]))
            if refusal is not None:
                refused[row] = refusal
        return bits, refused


class _Encoded(Sequence[bytes | None]):
    """The events' records, made when somebody looks at them: those of dead letters, and all after a hash collision."""

    def __init__(self, events: EventColumns, surface_key: str) -> None:
        self._events, self._surface_key = events, surface_key

    def __len__(self) -> int:
        return len(self._events)

    def __getitem__(self, row: int) -> bytes:  # type: ignore[override]
        return encode_event(self._events.as_event(row, self._surface_key))

    def __iter__(self) -> Iterator[bytes]:
        return (self[row] for row in range(len(self)))


def _present(texts: object, ids: NDArray[np.int64]) -> dict[int, str]:
    known = cast("dict[int, str]", texts)
    if not known:
        return {}
    return {number: known[number] for number in np.unique(ids).tolist() if number in known}
