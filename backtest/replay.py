"""Feeds a recorded stream to the log in event-time order, at an accelerated clock or as fast as the log takes it.

The order is that of event time; events of the same time keep their order in the file. The same file always gives the
same events: ids come from a column or from the row number, times are the recorded ones. Replaying a file twice
therefore changes nothing downstream: the second time every event is a duplicate.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Final

import numpy as np
import polars as pl
from numpy.typing import NDArray

from backtest.datasets import RecordedColumns
from backtest.errors import RecordedStreamError
from stream.clock import Clock
from stream.events import Event, encode_event
from stream.log import LogWriter, acknowledged

_ROW: Final = "__row"
_MS_PER_UNIT: Final = {"s": 1_000, "ms": 1}


@dataclass(frozen=True, kw_only=True, slots=True)
class ReplayConfig:
    """How a recorded stream is fed to the log."""

    action: str = "rating"
    """Action of every event."""

    speed: float | None = None
    """Seconds of event time per second; None: as fast as the log acknowledges."""

    surface_key: str = ""
    """Key of an event's context under which the file's surfaces are sent; needed where it has a column for them."""

    event_id_prefix: str = "replay"
    """Event ids are `<prefix>-<row>` when the file has no column for them: name what tells files apart."""

    in_flight_max: int = 10_000
    """Events sent but not acknowledged; bounds memory, and what a broker failure leaves in doubt."""

    chunk_max: int = 500
    """Events sent between two looks at the clock and at the request to stop."""

    tick_ms: float = 1.0
    """Shortest sleep (ms) until the next event is due. What falls due meanwhile goes out together: a longer tick
    follows the clock less finely, and wakes sender, broker and readers less often."""

    progress_interval_s: float = 2.0
    """Seconds between two reports of progress."""

    def __post_init__(self) -> None:
        if self.speed is not None and not self.speed > 0:
            raise ValueError(f"speed = {self.speed}: must be positive, such as 1000x, or max")
        if not 1.0 <= self.tick_ms <= 1_000.0:
            raise ValueError(
                f"tick_ms = {self.tick_ms}: must lie in 1..1000, the event loop's own resolution and a second"
            )
        if not 1 <= self.chunk_max <= self.in_flight_max:
            raise ValueError(f"chunk_max = {self.chunk_max}: must lie in 1..in_flight_max ({self.in_flight_max})")
        if not 1 <= len(self.event_id_prefix) <= 100:
            raise ValueError(
                f"event_id_prefix has {len(self.event_id_prefix)} characters: 1 to 100, since an event id holds 128"
            )


@dataclass(frozen=True, kw_only=True, slots=True)
class RecordedStream:
    """N events of a file in replay order: by event time, then by row."""

    user_id: list[int] | list[str]
    item_id: list[int] | list[str]
    event_time_ms: NDArray[np.int64]
    """[N], ascending, epoch milliseconds."""

    row: NDArray[np.int64]
    """[N], row number in the file, from 0."""

    value: list[float | None] | None
    """None when the file has no such column, or per event."""

    event_id: list[str] | None
    """None when the file has no such column."""

    surface: list[str | None] | None = None
    """None when the file has no such column, or per event."""

    def __len__(self) -> int:
        return len(self.row)

    def event(self, index: int, config: ReplayConfig) -> Event:
        """The event at a place of the replay order."""
        return Event(
            event_id=self.event_id[index] if self.event_id else f"{config.event_id_prefix}-{self.row[index]}",
            user_id=self.user_id[index],
            item_id=self.item_id[index],
            action=config.action,
            event_time=int(self.event_time_ms[index]),
            value=self.value[index] if self.value is not None else None,
            context=self._context(index, config.surface_key),
        )

    def _context(self, index: int, key: str) -> dict[str, str | int | float | bool | None] | None:
        surface = None if self.surface is None else self.surface[index]
        return None if surface is None else {key: surface}


@dataclass(frozen=True, slots=True)
class ReplayProgress:
    """How far a replay is."""

    num_sent: int
    num_events: int
    events_per_s: float
    """Since the last report."""

    event_time_ms: int
    """Event time reached."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ReplayReport:
    """What a replay did."""

    num_events: int
    """Events acknowledged by the log."""

    is_complete: bool
    """False when it was told to stop before the end."""

    duration_s: float
    events_per_s: float
    first_event_time_ms: int | None
    last_event_time_ms: int | None
    behind_max_s: float
    """How far the log was behind the accelerated clock at worst; 0 at full speed."""


def parse_speed(text: str) -> float | None:
    """`1000x` → 1000.0, `max` → None; raises ValueError for anything else."""
    if text == "max":
        return None
    try:
        speed = float(text.removesuffix("x"))
    except ValueError:
        speed = 0.0
    if not 0 < speed < float("inf"):
        raise ValueError(f"speed = {text}: write a positive number followed by x, such as 1000x, or max")
    return speed


def read_recorded(path: Path, columns: RecordedColumns, *, limit: int | None = None) -> RecordedStream:
    """Read a .parquet or .csv file into replay order; of that order, the first `limit` events.

    The whole file is held in memory (about 200 bytes an event). Raises RecordedStreamError.
    """
    frame = _read_columns(path, columns)
    for name in (columns.user, columns.item):
        frame = _with_ids(path, frame, name)
    if columns.event_id is not None:
        frame = frame.with_columns(pl.col(columns.event_id).cast(pl.String))
    frame = frame.with_columns(_time_ms(path, frame[columns.time], columns.time_unit).alias(columns.time))
    required = [columns.user, columns.item, columns.time, *([columns.event_id] if columns.event_id else [])]
    for name in required:
        _refuse_nulls(path, frame, name)
    # A stable sort: events of one millisecond keep the order of their rows.
    frame = frame.sort(columns.time, maintain_order=True)
    if limit is not None:
        frame = frame.head(limit)
    return RecordedStream(
        user_id=frame[columns.user].to_list(),
        item_id=frame[columns.item].to_list(),
        event_time_ms=frame[columns.time].to_numpy(),
        row=frame[_ROW].to_numpy().astype(np.int64),
        value=_values(path, frame, columns.value) if columns.value is not None else None,
        event_id=frame[columns.event_id].to_list() if columns.event_id is not None else None,
        surface=frame[columns.surface].cast(pl.String).to_list() if columns.surface is not None else None,
    )


async def replay(
    recorded: RecordedStream,
    writer: LogWriter,
    topic: str,
    config: ReplayConfig,
    *,
    clock: Clock,
    stopping: asyncio.Event | None = None,
    on_progress: Callable[[ReplayProgress], None] = lambda _: None,
) -> ReplayReport:
    """Send every event to `topic`, keyed by user, and return when the log has acknowledged them all.

    With `stopping` set, what was sent is still waited for and the report says `is_complete=False`.
    Raises LogUnavailableError.
    """
    stopping = stopping or asyncio.Event()
    pace = _Pace(recorded, config, clock)
    in_flight: deque[Awaitable[object]] = deque()
    start_s = reported_s = clock.monotonic_s()
    num_sent = num_reported = 0
    while num_sent < len(recorded) and not stopping.is_set():
        num_due = pace.num_due(num_sent)
        if num_due == 0:
            await _sleep(max(pace.wait_s(num_sent), config.tick_ms / 1000), stopping)
        for index in range(num_sent, num_sent + num_due):
            event = recorded.event(index, config)
            in_flight.append(await writer.send(topic, encode_event(event), key=str(event.user_id).encode()))
        num_sent += num_due
        # Wait for the oldest only: the log keeps working on the rest.
        await _settle(in_flight, config.in_flight_max - config.chunk_max)
        now_s = clock.monotonic_s()
        if num_sent > num_reported and now_s - reported_s >= config.progress_interval_s:
            rate = (num_sent - num_reported) / (now_s - reported_s)
            on_progress(ReplayProgress(num_sent, len(recorded), rate, int(recorded.event_time_ms[num_sent - 1])))
            reported_s, num_reported = now_s, num_sent
    await _settle(in_flight, 0)
    duration_s = clock.monotonic_s() - start_s
    return ReplayReport(
        num_events=num_sent,
        is_complete=num_sent == len(recorded),
        duration_s=round(duration_s, 3),
        events_per_s=round(num_sent / duration_s, 1) if duration_s > 0 else 0.0,
        first_event_time_ms=int(recorded.event_time_ms[0]) if num_sent else None,
        last_event_time_ms=int(recorded.event_time_ms[num_sent - 1]) if num_sent else None,
        behind_max_s=round(pace.behind_max_s, 3),
    )


class _Pace:
    """Which events are due: the first at once, each later one when the accelerated clock reaches its time."""

    def __init__(self, recorded: RecordedStream, config: ReplayConfig, clock: Clock) -> None:
        self._times_ms = recorded.event_time_ms
        self._config = config
        self._clock = clock
        self._start_s = clock.monotonic_s()
        self.behind_max_s = 0.0

    def num_due(self, num_sent: int) -> int:
        """How many events after the first `num_sent` may go now, at most `chunk_max`."""
        num_left = len(self._times_ms) - num_sent
        if self._config.speed is None:
            return min(num_left, self._config.chunk_max)
        # How long ago the next event was due is how far the replay is behind.
        self.behind_max_s = max(self.behind_max_s, -self.wait_s(num_sent))
        reached_ms = self._times_ms[0] + (self._clock.monotonic_s() - self._start_s) * 1000 * self._config.speed
        num_reached = int(np.searchsorted(self._times_ms, reached_ms, side="right"))
        return min(max(num_reached - num_sent, 0), self._config.chunk_max)

    def wait_s(self, num_sent: int) -> float:
        """Seconds until the next event is due; negative when it was due before now."""
        if self._config.speed is None:
            return 0.0
        since_first_s = float(self._times_ms[num_sent] - self._times_ms[0]) / 1000
        return self._start_s + since_first_s / self._config.speed - self._clock.monotonic_s()


async def _settle(in_flight: deque[Awaitable[object]], num_left: int) -> None:
    """Wait until at most `num_left` sends are unacknowledged."""
    if len(in_flight) > num_left:
        await acknowledged([in_flight.popleft() for _ in range(len(in_flight) - num_left)])


async def _sleep(duration_s: float, stopping: asyncio.Event) -> None:
    """Sleep, or return as soon as `stopping` is set."""
    try:
        await asyncio.wait_for(stopping.wait(), duration_s)
    except TimeoutError:
        return


def _read_columns(path: Path, columns: RecordedColumns) -> pl.DataFrame:
    """The named columns, and the row number."""
    named = (columns.user, columns.item, columns.time, columns.value, columns.event_id, columns.surface)
    wanted = [name for name in named if name]
    try:
        if path.suffix == ".parquet":
            frame = pl.read_parquet(path)
        elif path.suffix == ".csv":
            # Infer from every row: an id that first looks like a number may turn out to be text.
            frame = pl.read_csv(path, infer_schema_length=None)
        else:
            raise RecordedStreamError(f"{path}: a recorded stream is a .parquet or a .csv file")
    except (OSError, pl.exceptions.PolarsError) as error:
        raise RecordedStreamError(f"{path} cannot be read: {str(error).splitlines()[0]}") from error
    for name in wanted:
        if name not in frame.columns:
            near = get_close_matches(name, frame.columns, n=1)
            hint = f"did you mean {near[0]}?" if near else f"it has {', '.join(frame.columns)}"
            raise RecordedStreamError(f"{path} has no column {name}; {hint}")
    return frame.select(list(dict.fromkeys(wanted))).with_row_index(_ROW)


def _with_ids(path: Path, frame: pl.DataFrame, name: str) -> pl.DataFrame:
    kind = frame.schema[name]
    if kind.is_integer():
        negative = frame.filter(pl.col(name) < 0)
        if negative.height:
            raise RecordedStreamError(
                f"{path}: column {name} is negative in row {negative[_ROW][0]} ({negative[name][0]}); "
                "integer ids start at 0, or use text"
            )
        return frame
    if kind in (pl.String, pl.Categorical) or isinstance(kind, pl.Enum):
        return frame.with_columns(pl.col(name).cast(pl.String))
    raise RecordedStreamError(f"{path}: column {name} holds {kind}; ids are integers or text")


def _time_ms(path: Path, times: pl.Series, unit: str) -> pl.Series:
    """Epoch milliseconds, int64."""
    if unit == "rfc3339":
        return _calendar_ms(path, times)
    if not times.dtype.is_numeric():
        raise RecordedStreamError(
            f"{path}: column {times.name} holds {times.dtype}, not a number; is its time unit rfc3339?"
        )
    if times.dtype.is_float():
        bad = int((~times.is_finite()).fill_null(value=False).sum())
        if bad:
            raise RecordedStreamError(f"{path}: column {times.name} is not finite in {bad} rows")
        return (times * _MS_PER_UNIT[unit]).round().cast(pl.Int64)
    return times.cast(pl.Int64) * _MS_PER_UNIT[unit]


def _calendar_ms(path: Path, times: pl.Series) -> pl.Series:
    if times.dtype == pl.String:
        parsed = times.str.to_datetime(time_unit="ms", time_zone="UTC", strict=False)
        failed = (parsed.is_null() & times.is_not_null()).arg_true()
        if len(failed):
            row = int(failed[0])
            raise RecordedStreamError(
                f"{path}: column {times.name}, row {row}: {times[row]!r} is not RFC 3339 with an offset, "
                "such as 2013-02-28T14:38:27Z"
            )
        return parsed.dt.epoch("ms")
    if isinstance(times.dtype, pl.Datetime):
        # A date-time without a zone is taken as UTC.
        return times.dt.epoch("ms")
    raise RecordedStreamError(f"{path}: column {times.name} holds {times.dtype}; rfc3339 needs text or date-times")


def _values(path: Path, frame: pl.DataFrame, name: str) -> list[float | None]:
    kind = frame.schema[name]
    if not kind.is_numeric():
        raise RecordedStreamError(f"{path}: column {name} holds {kind}; a value is a number")
    values = frame[name].cast(pl.Float64)
    # JSON has no NaN: an event whose value is not a number has none.
    return values.set(~values.is_finite().fill_null(value=True), None).to_list()


def _refuse_nulls(path: Path, frame: pl.DataFrame, name: str) -> None:
    missing = frame.filter(pl.col(name).is_null())
    if missing.height:
        raise RecordedStreamError(
            f"{path}: column {name} is empty in {missing.height} rows, first row {missing[_ROW][0]}"
        )
