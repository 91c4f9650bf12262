"""Where a backtest's events come from: a recording, or files that are made into one first."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields
from pathlib import Path

from backtest.columns import ColumnMapping
from backtest.formats import files_of
from backtest.importing import import_files
from backtest.intake import ImportConfig, OnError
from backtest.recording import MANIFEST, Recording


@dataclass(frozen=True, kw_only=True, slots=True)
class SourceConfig:
    """The log of a backtest."""

    format: str = "parquet"
    """`recording` for what `headrace backtest import` made, or a format of `headrace backtest formats`."""
    paths: tuple[str, ...] = ()
    """The recording's folder, or files and folders of the format; relative to where the command runs."""
    user: str | None = None
    """Column of the user id; for parquet, csv and jsonl. None: `user_id`."""
    item: str | None = None
    """Column of the item id. None: `item_id`."""
    time: str | None = None
    """Column of the event time. None: `event_time`."""
    time_unit: str | None = None
    """s, ms, us, ns or text; see `headrace backtest import`."""
    time_format: str | None = None
    """How times are written, as strptime takes it. None: RFC 3339."""
    relative_time: bool | None = None
    """Times count from an origin of their own."""
    arrival: str | None = None
    """Column of the arrival time: the order of the replay, with late events."""
    value: str | None = None
    """Column of a rating, watch seconds or the like."""
    surface: str | None = None
    """Column of where it happened: what producers send under `events.surface_key`."""
    event_id: str | None = None
    """Column of the event id. None: the row number."""
    action: str | None = None
    """Column of the action."""
    default_action: str | None = None
    """Action of events without one. None: the format's, or `rating`."""
    user_ids: str | None = None
    """integer or text. None: as the file types them."""
    item_ids: str | None = None
    """integer or text. None: as the file types them."""
    on_error: OnError = "stop"
    """What a refused row does: stop, skip or dead-letter."""
    rows_per_run: int = 1_000_000
    """Events sorted in memory at a time, at about 200 bytes each."""

    def columns(self) -> dict[str, object]:
        """What was said of the columns, by the field of ColumnMapping; None where nothing was."""
        return {one.name: getattr(self, one.name, None) for one in fields(ColumnMapping)}


def open_source(config: SourceConfig, cache: Path, *, say: Callable[[str], None] = lambda _: None) -> Recording:
    """The recording, made in the folder `cache` unless one of the same files (name, size, time) is there.

    Raises RecordedStreamError for what is wrong with the files, ValueError for the options.
    """
    paths = [Path(path) for path in config.paths]
    if config.format == "recording":
        if len(paths) != 1:
            raise ValueError(f"source.paths names {len(paths)} recordings: name one")
        return Recording.open(paths[0])
    files = files_of(config.format, paths, **config.columns())
    stamps = [(str(path.resolve()), path.stat().st_size, path.stat().st_mtime_ns) for f in files for path in f.paths]
    said = json.dumps([asdict(config), stamps], sort_keys=True)
    out = cache / hashlib.sha256(said.encode()).hexdigest()[:16]
    if (out / MANIFEST).is_file():
        return Recording.open(out)
    say(f"importing {', '.join(str(path) for one in files for path in one.paths)}")
    name = files[0].paths[0].name.split(".")[0][:64] or "log"
    return import_files(files, out, ImportConfig(on_error=config.on_error, rows_per_run=config.rows_per_run), name=name)
