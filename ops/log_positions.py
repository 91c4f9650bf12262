"""Where ingest stands in `interactions`, and how it goes on after the log has lost records."""

from __future__ import annotations

import asyncio
import json
from dataclasses import dataclass

from feature_store.store import FeatureStore
from ops.errors import OpsError
from stream.log import EventLog, reading
from stream.log_bounds import LogBounds, Standing, Verdict


@dataclass(frozen=True, kw_only=True, slots=True)
class LogStatus:
    """Every partition of `interactions`: what is stored of it, and what the log holds."""

    log_id: str
    """The name that positions are kept under now."""
    standings: tuple[Standing, ...]
    unread: frozenset[int]
    """Partitions that nothing was applied from yet: their position is the log's start."""

    @property
    def is_whole(self) -> bool:
        """Whether no partition has lost anything."""
        return all(one.verdict is Verdict.WHOLE for one in self.standings)

    def rows(self) -> list[dict[str, object]]:
        """JSON-ready, one row a partition."""
        return [
            {
                "partition": one.partition,
                "position": None if one.partition in self.unread else one.position,
                "start": one.bounds.start,
                "end": one.bounds.end,
                "lag": one.lag,
                "verdict": one.verdict.value,
            }
            for one in self.standings
        ]

    def to_json(self) -> str:
        """Everything, as one JSON object."""
        return json.dumps({"log_id": self.log_id, "partitions": self.rows()}, indent=2)

    def to_text(self) -> str:
        """A table."""
        table = [list(self.rows()[0]), *([self._cell(cell) for cell in row.values()] for row in self.rows())]
        widths = [max(map(len, column)) for column in zip(*table, strict=True)]
        lines = ["  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in table]
        return "\n".join([f"log {self.log_id!r}, topic {self.standings[0].topic}", *lines])

    @staticmethod
    def _cell(value: object) -> str:
        return "-" if value is None else str(value)


async def read_status(log: EventLog, store: FeatureStore) -> LogStatus:
    """Compare the stored positions with the log; raises LogUnavailableError or StoreUnavailableError."""
    topic = log.topics.interactions
    log_id = await asyncio.to_thread(store.current_log_id, log.log_id)
    positions = await asyncio.to_thread(store.positions, log_id, topic)
    async with reading(log) as reader:
        bounds = await reader.bounds(topic)
    return LogStatus(
        log_id=log_id,
        standings=tuple(
            Standing(topic=topic, partition=n, position=positions.get(n, one.start), bounds=one)
            for n, one in sorted(bounds.items())
        ),
        unread=frozenset(bounds) - {n for n, position in positions.items() if position},
    )


async def accept_truncated(log: EventLog, store: FeatureStore, *, is_dry_run: bool) -> list[str]:
    """Give up what retention deleted before it was read; what that means, a sentence per partition.

    Positions move forward to the log's start. The same for `history-updates`: a trainer that had not read up to its
    start goes on there. Raises OpsError when the log was reset.
    """
    status = await read_status(log, store)
    if any(one.verdict is Verdict.RESET for one in status.standings):
        raise OpsError("the log was reset: moving positions forward would skip what it holds; see --reset")
    sentences = [
        f"{one.topic}/{one.partition}: {one.num_truncated:,} events, offsets {one.position} to {one.bounds.start - 1}, "
        f"are given up; ingest goes on at offset {one.bounds.start}"
        for one in status.standings
        if one.verdict is Verdict.TRUNCATED
    ]
    async with reading(log) as reader:
        updates = await reader.bounds(log.topics.history_updates)
    sentences += [
        f"{log.topics.history_updates}/{n}: begins at offset {one.start}; a trainer that has not read as far learns "
        "nothing of what was before"
        for n, one in sorted(updates.items())
        if one.start
    ]
    if not is_dry_run:
        await asyncio.to_thread(_move_forward, status, store, log.topics.history_updates, updates)
    return sentences


def _move_forward(status: LogStatus, store: FeatureStore, topic: str, updates: dict[int, LogBounds]) -> None:
    wanted = [(one.topic, one.partition, one.bounds.start) for one in status.standings if one.num_truncated]
    wanted += [(topic, partition, one.start) for partition, one in sorted(updates.items()) if one.start]
    with store.transaction() as transaction:
        for name, partition, start in wanted:
            if transaction.lock_position(status.log_id, name, partition).next_offset < start:
                transaction.set_position(status.log_id, name, partition, start)


async def accept_reset(log: EventLog, store: FeatureStore, *, is_dry_run: bool) -> list[str]:
    """Go on with a log that was made anew; what that means, a sentence per partition.

    Positions are kept under a new name from now on: offsets of the log before mean nothing here. If no partition of
    `interactions` was reset they stay what they are (then it is `history-updates` that was made anew); else every
    partition is read from its start, since a partition that has grown past its old position does not show it.
    """
    status = await read_status(log, store)
    was_reset = any(one.verdict is Verdict.RESET for one in status.standings)
    starts = {one.partition: one.bounds.start if was_reset else one.position for one in status.standings}
    sentences = [
        f"{one.topic}/{one.partition}: ingest goes on at offset {starts[one.partition]}, "
        f"{one.bounds.end - starts[one.partition]:,} records before the end"
        for one in status.standings
    ]
    if not was_reset:
        sentences.insert(0, f"no partition of {log.topics.interactions} was reset: positions stay what they are")
    sentences.append("the trainer reads history-updates from its start, and skips what it has learned already")
    if not is_dry_run:
        log_id = await asyncio.to_thread(_begin_generation, log, store, starts)
        sentences.append(f"the log {log.log_id!r} is known as {log_id!r} from now on: restart ingest and trainer")
    return sentences


def _begin_generation(log: EventLog, store: FeatureStore, starts: dict[int, int]) -> str:
    with store.transaction() as transaction:
        log_id = transaction.next_log_id(log.log_id)
        for partition, start in starts.items():
            transaction.lock_position(log_id, log.topics.interactions, partition)
            transaction.set_position(log_id, log.topics.interactions, partition, start)
    return log_id
