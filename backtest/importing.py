"""Makes a recording of the files of a log, whatever their size, or says what is wrong with them."""

from __future__ import annotations

import hashlib
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Final

import polars as pl

from backtest.columns import ColumnMapping
from backtest.errors import RecordedStreamError
from backtest.external_sort import OrderKey
from backtest.import_text import refused_text
from backtest.intake import ImportConfig, Intake
from backtest.normalising import Kinds, normalise, settle
from backtest.raw_rows import RowReader
from backtest.recording import ImportReport, Manifest, Recording, SourceFile, write_manifest

SCRATCH: Final = "scratch"


@dataclass(frozen=True, kw_only=True, slots=True)
class LogFiles:
    """Files of one layout, in the order in which their rows are counted."""

    format: str
    paths: tuple[Path, ...]
    reader: RowReader
    mapping: ColumnMapping


def import_files(files: Sequence[LogFiles], out: Path, config: ImportConfig, *, name: str) -> Recording:
    """Make the recording `out` of files; an existing one is replaced once the new one is whole.

    Raises RecordedStreamError with nothing changed: for a file that cannot be read or says what is wrong with it, and
    for refused rows when they mean to stop.
    """
    key = _key(files)
    with made_aside(out) as folder, Intake(folder, folder / SCRATCH, config, key=key) as intake:
        _read_into(intake, files)
        manifest = finish(
            intake,
            folder,
            name=name,
            format_name=files[0].format,
            mapping=asdict(files[0].mapping),
            sources=[_source_file(path) for one in files for path in one.paths],
            order=key,
        )
    return Recording(out, manifest)


@contextmanager
def made_aside(out: Path) -> Iterator[Path]:
    """A new folder that takes the place of `out`, which is a recording or not there, if the block succeeds."""
    if out.exists():
        Recording.open(out)  # replace nothing but a recording
    unfinished = out.with_name(f".{out.name}.unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    try:
        (unfinished / SCRATCH).mkdir(parents=True)
        yield unfinished
        shutil.rmtree(unfinished / SCRATCH)
        if out.exists():
            shutil.rmtree(out)
        unfinished.replace(out)
    except (OSError, pl.exceptions.PolarsError) as error:  # polars tells of a full disk by an error of its own
        raise RecordedStreamError(f"{out} cannot be written: {error}") from error
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def finish(
    intake: Intake,
    folder: Path,
    *,
    name: str,
    format_name: str,
    mapping: dict[str, Any],
    sources: Sequence[SourceFile],
    order: OrderKey,
) -> Manifest:
    """Write parts and manifest of what was taken in. Raises RecordedStreamError if no event is left."""
    report = intake.report()
    if not report.num_events:
        raise RecordedStreamError(
            f"{name}: none of {report.num_rows:,} rows is an event. "
            + (refused_text(report.refusals) if report.refusals else "All were left out: no interactions")
        )
    parts = intake.write_parts()
    schema = pl.read_parquet_schema(folder / parts[0].file)
    manifest = Manifest(
        name=name,
        format=format_name,
        mapping=mapping,
        sources=tuple(sources),
        user_ids="text" if schema["user_id"] == pl.String else "integer",
        item_ids="text" if schema["item_id"] == pl.String else "integer",
        order=order,
        parts=tuple(parts),
        report=report,
    )
    write_manifest(folder, manifest)
    return manifest


def validate_files(files: Sequence[LogFiles], config: ImportConfig) -> ImportReport:
    """What is in the files and what is wrong with them; needs temporary disk space for all events."""
    with tempfile.TemporaryDirectory(prefix="headrace-") as scratch:
        folder = Path(scratch)
        with Intake(folder, folder, replace(config, on_error="skip"), key=_key(files)) as intake:
            _read_into(intake, files)
            return intake.report()


def _key(files: Sequence[LogFiles]) -> OrderKey:
    return "arrival_ms" if all(one.mapping.arrival for one in files) else "event_time_ms"


def _read_into(intake: Intake, files: Sequence[LogFiles]) -> None:
    kinds: Kinds | None = None
    for one in files:
        for path in one.paths:
            intake.start_file(path.name)
            for chunk in one.reader.chunks(path, one.mapping.wanted):
                intake.refuse_malformed(chunk.malformed)
                if kinds is None and chunk.frame.height:
                    kinds = settle(path, chunk.frame, one.mapping)
                if kinds is not None:
                    normalised = normalise(chunk.frame, one.mapping, kinds)
                    intake.refuse(normalised.refused, one.mapping.wanted)
                    intake.take(normalised.events)
                intake.end_piece(chunk.num_rows, num_left_out=chunk.num_left_out)
    if intake.num_rows == 0:
        named = ", ".join(str(path) for one in files for path in one.paths)
        raise RecordedStreamError(f"{named}: the log is empty, it has no rows")


def _source_file(path: Path) -> SourceFile:
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return SourceFile(path=str(path), num_bytes=path.stat().st_size, sha256=digest)
