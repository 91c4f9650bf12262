"""A recording: events of a log in the order in which they are replayed, in a folder, read in bounded pieces.

    <folder>/recording.json          what it is, where it came from, and what was refused: written last
    <folder>/events-000000.parquet   `user_id`, `item_id` (i64, or text), `normalising.EVENT_SCHEMA`, `surface`
    <folder>/refused.jsonl           refused rows with their reason, if they were asked for

Order: by event time; by arrival time where the log has one, so that late events come late. Equal times keep the order
of the rows.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, Literal

import msgspec
import numpy as np
import polars as pl
from numpy.typing import NDArray

from backtest.columns import IdKind
from backtest.errors import RecordedStreamError
from stream.events import UNREADABLE, Event

MANIFEST: Final = "recording.json"
REFUSED: Final = "refused.jsonl"
_VERSION: Final = 1


@dataclass(frozen=True, kw_only=True, slots=True)
class SourceFile:
    """A file that events came from."""

    path: str
    num_bytes: int
    sha256: str


@dataclass(frozen=True, kw_only=True, slots=True)
class RefusedRow:
    """An example of a refused row."""

    file: str
    row: int
    """In its file, from 0, the header not counted; of a topic: the offset."""
    column: str | None
    text: str
    """The cell, or the row where no cell is to blame."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Refusals:
    """Refused rows of one reason."""

    reason: str
    count: int
    examples: tuple[RefusedRow, ...]
    """The first ones."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RowOrder:
    """How far the rows of the files were from the order of their times."""

    num_back: int = 0
    """Rows whose time lies before that of an earlier row."""
    first_back: str | None = None
    """The first of them, as file and row."""
    back_ms_max: int = 0
    """The farthest that the time went back."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ImportReport:
    """What a log holds, and what is wrong with it."""

    num_rows: int
    num_events: int
    num_left_out: int
    """Rows that are no interaction by the rules of their format, such as impressions without a click."""
    refusals: tuple[Refusals, ...]
    order: RowOrder
    num_repeated: int
    """Events that equal an earlier one in user, item, time and action. They are kept."""
    first_ms: int | None
    last_ms: int | None
    num_users: int
    num_items: int
    actions: dict[str, int]
    """Action → events."""
    is_estimated: bool = False
    """Whether users or items are so many that their number is an estimate (backtest/distinct.py)."""

    @property
    def num_refused(self) -> int:
        """Rows refused, of all reasons."""
        return sum(one.count for one in self.refusals)


@dataclass(frozen=True, kw_only=True, slots=True)
class Part:
    """One file of a recording."""

    file: str
    num_events: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Manifest:
    """What `recording.json` says."""

    name: str
    """Prefix of the ids of events that have none of their own."""
    format: str
    mapping: dict[str, Any]
    """The `ColumnMapping` in effect, for the record."""
    sources: tuple[SourceFile, ...]
    user_ids: IdKind
    item_ids: IdKind
    order: Literal["event_time_ms", "arrival_ms"]
    parts: tuple[Part, ...]
    report: ImportReport
    version: int = _VERSION


@dataclass(frozen=True, kw_only=True, slots=True)
class EventBatch:
    """N consecutive events of a recording."""

    first: int
    """Number of the first of them in the recording, from 0."""
    user_id: NDArray[np.int64] | list[str]
    item_id: NDArray[np.int64] | list[str]
    event_time_ms: NDArray[np.int64]
    """i64[N], epoch milliseconds."""
    arrival_ms: NDArray[np.int64]
    """i64[N], when each reached the log: the event time where the log did not say."""
    action: list[str]
    value: NDArray[np.float64]
    """f64[N], NaN where there is none."""
    event_id: list[str]
    surface: list[str | None] | None = None
    """[N], where each happened; None: the log does not say."""

    def __len__(self) -> int:
        return len(self.event_time_ms)

    def events(self) -> list[Event]:
        """As producers would send them."""
        users, items, values = _listed(self.user_id), _listed(self.item_id), self.value.tolist()
        return [
            Event(
                event_id=event_id,
                user_id=user,
                item_id=item,
                action=action,
                event_time=time_ms,
                value=None if value != value else value,  # noqa: PLR0124 - NaN
            )
            for event_id, user, item, action, time_ms, value in zip(
                self.event_id, users, items, self.action, self.event_time_ms.tolist(), values, strict=True
            )
        ]


@dataclass(frozen=True, slots=True)
class Recording:
    """A finished recording. Reads no more than one part at a time."""

    folder: Path
    manifest: Manifest = field(repr=False)

    @staticmethod
    def open(folder: Path) -> Recording:
        """Raises RecordedStreamError if there is none, it is unfinished, or of another version."""
        path = folder / MANIFEST
        try:
            manifest = msgspec.json.decode(path.read_bytes(), type=Manifest)
        except FileNotFoundError:
            raise RecordedStreamError(
                f"{folder} is no recording (it has no {MANIFEST}): make one with `headrace backtest import`"
            ) from None
        except (OSError, *UNREADABLE) as error:
            raise RecordedStreamError(f"{path} cannot be read: {error}") from error
        if manifest.version != _VERSION:
            raise RecordedStreamError(
                f"{folder} is a recording of version {manifest.version}, and this is {_VERSION}: import the log again"
            )
        return Recording(folder, manifest)

    def __len__(self) -> int:
        return self.manifest.report.num_events

    def batches(self, size: int, *, start: int = 0, end: int | None = None) -> Iterator[EventBatch]:
        """Events `start` … `end` - 1 in order, `size` at a time, the last batch as large as what is left.

        Where the batches end does not depend on the parts. Raises RecordedStreamError for a damaged part.
        """
        end = len(self) if end is None else min(end, len(self))
        waiting: list[pl.DataFrame] = []
        num_waiting, first = 0, start
        for frame in self._frames(start, end):
            waiting.append(frame)
            num_waiting += frame.height
            if num_waiting < size:
                continue
            joined = pl.concat(waiting)
            whole = num_waiting // size * size
            for place in range(0, whole, size):
                yield self._batch(joined.slice(place, size), first)
                first += size
            waiting, num_waiting = [joined.slice(whole)], num_waiting - whole
        if num_waiting:
            yield self._batch(pl.concat(waiting), first)

    def _frames(self, start: int, end: int) -> Iterator[pl.DataFrame]:
        begin = 0
        for part in self.manifest.parts:
            low, high = max(start - begin, 0), min(end - begin, part.num_events)
            begin += part.num_events
            if low >= high:
                continue
            path = self.folder / part.file
            try:
                frame = pl.read_parquet(path)
            except (OSError, pl.exceptions.PolarsError) as error:
                raise RecordedStreamError(f"{path} cannot be read: {str(error).splitlines()[0]}") from error
            if frame.height != part.num_events:
                raise RecordedStreamError(f"{path} holds {frame.height} events, not {part.num_events}: import again")
            yield frame.slice(low, high - low)

    def _batch(self, frame: pl.DataFrame, first: int) -> EventBatch:
        made_up = pl.format(self.manifest.name + "-{}", "row")
        numbered = pl.when(pl.col("part") > 0).then(pl.format("{}-{}", made_up, "part")).otherwise(made_up)
        times_ms = frame["event_time_ms"]
        return EventBatch(
            first=first,
            user_id=_ids(frame["user_id"]),
            item_id=_ids(frame["item_id"]),
            event_time_ms=times_ms.to_numpy(),
            arrival_ms=frame["arrival_ms"].fill_null(times_ms).to_numpy(),
            action=frame["action"].to_list(),
            value=frame["value"].fill_null(float("nan")).to_numpy(),
            event_id=frame.select(pl.coalesce("event_id", numbered)).to_series().to_list(),
            surface=frame["surface"].to_list() if "surface" in frame.columns else None,
        )


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Make a folder a recording: the last thing written, in one step."""
    unfinished = folder / f"{MANIFEST}.unfinished"
    unfinished.write_text(json.dumps(dataclasses.asdict(manifest), indent=1, default=_plain) + "\n", encoding="utf-8")
    unfinished.replace(folder / MANIFEST)


def _plain(value: object) -> object:
    if isinstance(value, Mapping):
        return dict(value)
    raise TypeError(f"{type(value)} is not JSON")


def _ids(column: pl.Series) -> NDArray[np.int64] | list[str]:
    return column.to_list() if column.dtype == pl.String else column.to_numpy()


def _listed(ids: NDArray[np.int64] | list[str]) -> list[int] | list[str]:
    return ids if isinstance(ids, list) else ids.tolist()
