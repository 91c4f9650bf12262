"""The data sets that ship with headrace: where they are and what their columns mean."""

from __future__ import annotations

import gzip
from dataclasses import dataclass
from pathlib import Path

from backtest.errors import DatasetMissingError

_DATA = Path(__file__).parent / "data"


@dataclass(frozen=True, kw_only=True, slots=True)
class RecordedColumns:
    """Which column of a recorded file holds what."""

    user: str
    """User id: integer ≥ 0, or text."""

    item: str
    """Item id: integer ≥ 0, or text."""

    time: str
    """Event time, in `time_unit`."""

    time_unit: str = "ms"
    """`s` or `ms` since the epoch, or `rfc3339` for text and date-time columns."""

    value: str | None = None
    """Optional number that comes with the event: a rating, watch seconds."""

    surface: str | None = None
    """Where it happened, as text or whole number: sent under `ReplayConfig.surface_key`."""

    event_id: str | None = None
    """Identity of an event; without it the row number in the file is the identity."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Dataset:
    """A recorded stream that ships with headrace."""

    name: str
    interactions: Path
    """Parquet file, one row an event. Its order is not promised to be event-time order."""

    columns: RecordedColumns
    action: str
    """What each event stands for."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Title:
    """What a person recognises an item by."""

    title: str
    genres: tuple[str, ...]


def movietweetings() -> Dataset:
    """141,695 movie ratings of 2013 in tweet order; raises DatasetMissingError when the file is not installed."""
    return Dataset(
        name="movietweetings",
        interactions=_existing(_DATA / "movietweetings" / "interactions.parquet"),
        columns=RecordedColumns(user="user_id", item="item_id", time="timestamp", time_unit="s", value="rating"),
        action="rating",
    )


def movietweetings_titles() -> dict[int, Title]:
    """Title and genres of each movie, by item id (IMDb number)."""
    path = _existing(_DATA / "movietweetings" / "movies.dat.gz")
    titles: dict[int, Title] = {}
    with gzip.open(path, "rt", encoding="utf-8") as lines:
        for line in lines:
            item_id, title, genres = line.rstrip("\n").split("::")
            titles[int(item_id)] = Title(title=title, genres=tuple(genre for genre in genres.split("|") if genre))
    return titles


def _existing(path: Path) -> Path:
    if not path.is_file():
        raise DatasetMissingError(f"{path} is missing: install headrace again from a complete copy of the repository")
    return path
