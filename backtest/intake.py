"""Takes the judged rows of a log in, piece by piece, and makes the parts of a recording of them, with a report.

Steps: 1. judge pieces of the log (`normalising`); 2. sort what is good into runs on disk and note a hash of each event;
3. find repeated ids; 4. merge the runs into parts. Memory: one run, whatever the length of the log.
"""

from __future__ import annotations

import json
from bisect import bisect_right
from collections import Counter
from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from types import TracebackType
from typing import Final, Literal

import numpy as np
import polars as pl
from numpy.typing import NDArray

from backtest.distinct import DistinctCount
from backtest.errors import RefusedRowsError
from backtest.external_sort import OrderKey, SortedRuns
from backtest.import_text import refused_text
from backtest.raw_rows import ROW, MalformedRow
from backtest.recording import REFUSED, ImportReport, Part, Refusals, RefusedRow, RowOrder
from backtest.repeats import RepeatFinder

OnError = Literal["stop", "skip", "dead-letter"]

_TEXT_MAX: Final = 200


@dataclass(frozen=True, kw_only=True, slots=True)
class ImportConfig:
    """How a log is imported."""

    on_error: OnError = "stop"
    """What a refused row does. stop: nothing is written. skip: it is counted and left out. dead-letter: it is left out
    and written to `refused.jsonl` with its reason."""
    rows_per_run: int = 1_000_000
    """Events sorted in memory at a time, and of a file of the recording: about 200 bytes each while they are sorted."""
    examples_max: int = 5
    """Refused rows of a reason that the report shows."""

    def __post_init__(self) -> None:
        if self.on_error not in {"stop", "skip", "dead-letter"}:
            raise ValueError(f"on_error = {self.on_error}: stop, skip or dead-letter")
        if not 1_000 <= self.rows_per_run <= 100_000_000:
            raise ValueError(f"rows_per_run = {self.rows_per_run}: must lie in 1,000..100,000,000")
        if not 0 <= self.examples_max <= 1_000:
            raise ValueError(f"examples_max = {self.examples_max}: must lie in 0..1,000")


@dataclass(frozen=True, slots=True)
class _Origin:
    """Where rows come from. first: number of the first of them over all files; first_row: its number in the file."""

    name: str
    first: int
    first_row: int


class Intake(AbstractContextManager["Intake"]):
    """Events in the order of the log. `scratch`: an empty folder for what is in the works."""

    def __init__(self, folder: Path, scratch: Path, config: ImportConfig, *, key: OrderKey) -> None:
        self._folder, self._config, self._key = folder, config, key
        self._letters = (folder / REFUSED).open("w", encoding="utf-8") if config.on_error == "dead-letter" else None
        self._runs = SortedRuns(scratch, key=key, rows_per_run=config.rows_per_run)
        self._repeats = RepeatFinder(scratch)
        self._files: list[_Origin] = []
        self._counts: Counter[str] = Counter()
        self._examples: dict[str, list[RefusedRow]] = {}
        self._actions: Counter[str] = Counter()
        self._order, self._newest = RowOrder(), -(2**63)
        self._users, self._items = DistinctCount(), DistinctCount()
        self._num_left_out = 0
        self._next_row = 0
        """Number of the next row over all files."""
        self.num_rows = 0
        """Rows read so far, of all files."""

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._repeats.__exit__(kind, error, trace)
        if self._letters is not None:
            self._letters.close()

    def start_file(self, name: str, *, first_row: int = 0) -> None:
        """What comes next is of another file, or further on in one; its rows are counted from `first_row` there."""
        self._files.append(_Origin(name, self._next_row, first_row))

    def end_piece(self, num_rows: int, *, num_left_out: int = 0, num_numbers: int | None = None) -> None:
        """A piece of so many rows is done with; num_numbers: how many numbers they span, if some belong to no row.

        Raises RefusedRowsError if one was refused and that means to stop.
        """
        self.num_rows += num_rows
        self._next_row += num_rows if num_numbers is None else num_numbers
        self._num_left_out += num_left_out
        self._stop_if_refused()

    def _stop_if_refused(self) -> None:
        if self._counts and self._config.on_error == "stop":
            raise RefusedRowsError(refused_text(self._refusals()))

    def refuse_malformed(self, rows: Iterable[MalformedRow]) -> None:
        """Rows that are no rows."""
        for one in rows:
            self._refuse("malformed_row", one.row, None, f"{one.text[:_TEXT_MAX]} ({one.error})", one.text)

    def refuse(self, refused: pl.DataFrame, columns: Sequence[str]) -> None:
        """Raw rows of `columns`, with `ROW`, `__reason` and `__column`."""
        if self._letters is None and refused.height:
            # Counting needs no step in Python a row; only the examples do.
            shown = refused.group_by("__reason", maintain_order=True).head(self._config.examples_max)
            counted = Counter(dict(refused["__reason"].value_counts().iter_rows()))
            counted.subtract(shown["__reason"])
            self._counts.update(counted)
            refused = shown
        for row in refused.iter_rows(named=True):
            cells = {name: row[name] for name in columns if name in row}
            cell = row[row["__column"]]
            self._refuse(row["__reason"], row[ROW], row["__column"], "" if cell is None else str(cell), cells)

    def _refuse(
        self, reason: str, row: int, column: str | None, text: str, record: object, *, file: str | None = None
    ) -> None:
        self._counts[reason] += 1
        file = file or self._files[-1].name
        examples = self._examples.setdefault(reason, [])
        if len(examples) < self._config.examples_max:
            examples.append(RefusedRow(file=file, row=row, column=column, text=text[:_TEXT_MAX]))
        if self._letters is not None:
            letter = {"file": file, "row": row, "reason": reason, "column": column, "record": record}
            self._letters.write(json.dumps(letter, ensure_ascii=False, default=str) + "\n")

    def take(self, events: pl.DataFrame) -> None:
        """Events of consecutive rows of the current file (`Normalised.events`)."""
        if events.height:
            origin = self._files[-1]
            events = events.with_columns(pl.col("row") + (origin.first - origin.first_row))
            self._observe_order(events)
            self._repeats.add(events)
            self._users.add(events["user_id"])
            self._items.add(events["item_id"])
            self._actions.update(dict(events["action"].value_counts().iter_rows()))
            self._runs.add(events)

    def _observe_order(self, events: pl.DataFrame) -> None:
        times = events[self._key].to_numpy()
        before = np.maximum.accumulate(np.concatenate([[self._newest], times]))
        self._newest = int(before[-1])
        back = np.flatnonzero(times < before[:-1])
        if len(back):
            file, row = self._place(int(events["row"][int(back[0])]))
            self._order = RowOrder(
                num_back=self._order.num_back + len(back),
                first_back=self._order.first_back or f"{file}, row {row}",
                back_ms_max=max(self._order.back_ms_max, int((before[:-1] - times)[back].max())),
            )

    def _place(self, row: int) -> tuple[str, int]:
        """File, and row in it, of a row counted over all files."""
        origin = self._files[bisect_right(self._files, row, key=lambda origin: origin.first) - 1]
        return origin.name, row - origin.first + origin.first_row

    @cached_property
    def _repeated_rows(self) -> NDArray[np.int64]:
        return self._repeats.rows()

    def report(self) -> ImportReport:
        """What was taken and refused. Refuses repeated event ids, so it comes once, after the last piece."""
        runs = self._runs.scan()
        repeated = self._repeated_rows
        if self._repeats.has_ids and runs is not None and len(repeated):
            self._refuse_duplicates(runs, repeated)
        facts = _facts(runs) if runs is not None else {}
        return ImportReport(
            num_rows=self.num_rows,
            num_events=facts.get("num_events", 0) - (len(repeated) if self._repeats.has_ids else 0),
            num_left_out=self._num_left_out,
            refusals=self._refusals(),
            order=self._order,
            num_repeated=0 if self._repeats.has_ids else len(repeated),
            first_ms=facts.get("first_ms"),
            last_ms=facts.get("last_ms"),
            num_users=self._users.count,
            num_items=self._items.count,
            is_estimated=not (self._users.is_exact and self._items.is_exact),
            actions=dict(sorted(self._actions.items())),
        )

    def _refuse_duplicates(self, runs: pl.LazyFrame, rows: NDArray[np.int64]) -> None:
        """Refuse the later ones of events with the same id."""
        shown = rows if self._letters is not None else rows[: self._config.examples_max]
        self._counts["duplicate_id"] += len(rows) - len(shown)
        events = runs.filter(pl.col("row").is_in(pl.Series(shown).implode())).sort("row").collect()
        for event in events.iter_rows(named=True):
            file, row = self._place(event["row"])
            self._refuse("duplicate_id", row, None, event["event_id"], event, file=file)
        self._stop_if_refused()

    def _refusals(self) -> tuple[Refusals, ...]:
        return tuple(
            Refusals(reason=reason, count=count, examples=tuple(self._examples.get(reason, ())))
            for reason, count in sorted(self._counts.items())
        )

    def write_parts(self) -> list[Part]:
        """The events in order, in files of the folder."""
        dropped = self._repeated_rows if self._repeats.has_ids else self._repeated_rows[:0]
        parts: list[Part] = []
        for frame in self._runs.merged(are_in_order=not self._order.num_back):
            kept = frame.filter(~np.isin(frame["row"].to_numpy(), dropped)) if len(dropped) else frame
            if kept.height:
                file = f"events-{len(parts):06d}.parquet"
                kept.write_parquet(self._folder / file, compression="zstd")
                parts.append(Part(file=file, num_events=kept.height))
        return parts


def _facts(runs: pl.LazyFrame) -> dict[str, int]:
    times = pl.col("event_time_ms")
    facts = runs.select(
        pl.len().alias("num_events"),
        times.min().alias("first_ms"),
        times.max().alias("last_ms"),
    )
    return facts.collect(engine="streaming").row(0, named=True)
