"""Sorts events by time with bounded memory: sorted runs on disk, then ranges of time merged one after the other."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Final, Literal, NamedTuple

import polars as pl

OrderKey = Literal["event_time_ms", "arrival_ms"]

_SAMPLES_PER_RUN: Final = 200
_ROWS_PER_GROUP: Final = 32_768
"""Of a run's row groups: what a range of the merge may read too much of each run."""


class _Place(NamedTuple):
    """Where an event belongs. Rows settle ties, so a range ends anywhere, even where all times are equal."""

    time_ms: int
    row: int


class SortedRuns:
    """Frames with the columns `key`, `row` and `part` → the same rows sorted by these, in frames of bounded size.

    Memory: `rows_per_run` rows. Disk: all of them once.
    """

    def __init__(self, folder: Path, *, key: OrderKey, rows_per_run: int) -> None:
        self._folder, self._key, self._rows_per_run = folder, key, rows_per_run
        self._waiting: list[pl.DataFrame] = []
        self._num_waiting = 0
        self._runs: list[Path] = []

    def add(self, frame: pl.DataFrame) -> None:
        """Take rows."""
        self._waiting.append(frame)
        self._num_waiting += frame.height
        if self._num_waiting >= self._rows_per_run:
            self._write()

    def _write(self) -> None:
        if self._num_waiting:
            run = self._folder / f"run-{len(self._runs):06d}.parquet"
            frame = pl.concat(self._waiting).sort(self._key, "row", "part")
            frame.write_parquet(run, row_group_size=_ROWS_PER_GROUP, compression="lz4")
            self._runs.append(run)
            self._waiting, self._num_waiting = [], 0

    def scan(self) -> pl.LazyFrame | None:
        """All rows, in no order; None if there are none."""
        self._write()
        return pl.scan_parquet(self._runs) if self._runs else None

    def merged(self, *, are_in_order: bool) -> Iterator[pl.DataFrame]:
        """All rows in order, about `rows_per_run` a frame. are_in_order: no row ever came after a later one."""
        self._write()
        if are_in_order:
            for run in self._runs:
                yield pl.read_parquet(run)
            return
        ends = [self._ends(run) for run in self._runs]
        cuts = self._cuts()
        for low, high in zip([None, *cuts], [*cuts, None], strict=True):
            overlapping = [
                self._between(run, low, high)
                for run, (first, last) in zip(self._runs, ends, strict=True)
                if (low is None or last >= low) and (high is None or first < high)
            ]
            if overlapping:
                yield pl.concat(overlapping).collect().sort(self._key, "row", "part")

    def _between(self, run: Path, low: _Place | None, high: _Place | None) -> pl.LazyFrame:
        """Rows from `low` up to, and not including, `high`. Most row groups are passed over by their statistics."""
        rows = pl.scan_parquet(run)
        time, row = pl.col(self._key), pl.col("row")
        if low is not None:
            rows = rows.filter(time >= low.time_ms, (time > low.time_ms) | (row >= low.row))
        if high is not None:
            rows = rows.filter(time <= high.time_ms, (time < high.time_ms) | (row < high.row))
        return rows

    def _ends(self, run: Path) -> tuple[_Place, _Place]:
        rows = pl.scan_parquet(run).select(self._key, "row")
        return _Place(*rows.first().collect().row(0)), _Place(*rows.last().collect().row(0))

    def _cuts(self) -> list[_Place]:
        """Where to cut so that a range holds about as much as a run, estimated from samples of each."""
        every = max(self._rows_per_run // _SAMPLES_PER_RUN, 1)
        sampled = [pl.scan_parquet(run).select(self._key, "row").gather_every(every).collect() for run in self._runs]
        places = pl.concat(sampled).sort(self._key, "row").gather_every(_SAMPLES_PER_RUN)
        return [_Place(*place) for place in places.iter_rows()][1:]
