"""Whether a log still holds what is to be read next, and exactly what is missing if it does not. Pure.

A log can lose records in two ways. Retention deletes from its start: what had not been read by then is *truncated*. Or
the topic is made anew, or its last records are lost: then the log is *reset*, and its offsets mean other records than
the stored position thinks. Both are refused until an operator accepts the loss with `headrace log accept`. A log that
was made anew and has grown past the stored position looks like any other: offsets alone cannot tell.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from stream.errors import LogResetError, LogUnavailableError


@dataclass(frozen=True, slots=True)
class LogBounds:
    """What one partition holds: the offsets from `start` up to, and not including, `end`."""

    start: int
    end: int


class Verdict(StrEnum):
    """What a position and the bounds of its partition say together."""

    WHOLE = "whole"
    TRUNCATED = "truncated"
    RESET = "reset"


@dataclass(frozen=True, kw_only=True, slots=True)
class Standing:
    """Where a reader stands in a partition, and what the log holds of it."""

    topic: str
    partition: int
    position: int
    """Next offset to read."""
    bounds: LogBounds

    @property
    def verdict(self) -> Verdict:
        """Whether the log holds everything from the position on."""
        if self.position > self.bounds.end:
            return Verdict.RESET
        return Verdict.TRUNCATED if self.position < self.bounds.start else Verdict.WHOLE

    @property
    def lag(self) -> int:
        """Records that can still be read, as far as offsets tell."""
        return max(0, self.bounds.end - max(self.position, self.bounds.start))

    @property
    def num_truncated(self) -> int:
        """Offsets that were deleted before they were read."""
        return max(0, self.bounds.start - self.position) if self.verdict is Verdict.TRUNCATED else 0

    def refuse_loss(self) -> None:
        """Raise LogResetError unless the log is whole."""
        if self.verdict is Verdict.RESET:
            raise was_reset(self.topic, self.partition, self.position, end=self.bounds.end)
        if self.verdict is Verdict.TRUNCATED:
            raise was_truncated(self.topic, self.partition, self.position, start=self.bounds.start)


def no_such_partition(topic: str, partition: int) -> LogUnavailableError:
    """What to raise when a record is to go to a partition that its topic does not have."""
    return LogUnavailableError(
        f"topic {topic!r} has no partition {partition}: history-updates needs as many partitions as interactions; add "
        "the missing ones and restart its readers"
    )


def was_truncated(topic: str, partition: int, position: int, *, start: int) -> LogResetError:
    """What to raise when records from `position` up to the log's start were deleted before they were read."""
    return LogResetError(
        f"{topic}/{partition} was truncated: offset {position} is to be read next, but the log begins at offset "
        f"{start}: {start - position:,} records, offsets {position} to {start - 1}, were deleted unread, "
        "and nothing after them was applied. To give them up and go on, run `headrace log accept --truncated`",
        (topic, partition),
    )


def was_reset(
    topic: str, partition: int, position: int, *, end: int | None = None, first: int | None = None
) -> LogResetError:
    """What to raise when the log cannot be the one that `position` was stored for.

    Either it ends before the position (`end`), or it answers a read from there with an earlier record (`first`).
    """
    if end is not None:
        found = (
            f"but the log ends at offset {end}: {position - end:,} records that were applied, offsets {end} to "
            f"{position - 1}, are no longer in it"
        )
    else:
        found = f"but the log answers with offset {first}"
    return LogResetError(
        f"{topic}/{partition} was reset: offset {position} is to be read next, {found}, and what it held from offset "
        f"{position} on was never read; nothing was applied since. If the topic was recreated, run "
        "`headrace log accept --reset` to go on from its start; if it was not, records were lost upstream",
        (topic, partition),
    )
