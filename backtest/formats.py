"""The layouts of logs that can be imported: which files belong, how they are read, what their columns mean.

Facts about published data sets were checked against their own documentation; what is not an interaction is left out
and counted. Times that name no zone are taken as UTC.
"""

from __future__ import annotations

import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Final

from backtest.columns import ColumnMapping
from backtest.datasets import movietweetings
from backtest.errors import RecordedStreamError
from backtest.importing import LogFiles
from backtest.layouts import ImpressionReader, KuaiReader, SessionReader, YambdaReader
from backtest.raw_rows import JsonReader, ParquetReader, RowReader, TextReader


@dataclass(frozen=True, kw_only=True, slots=True)
class Layout:
    """How files of certain names are read."""

    names: tuple[str, ...]
    """Patterns of file names, as `Path.match` takes them; .gz may follow. In a .zip: of the one file read there."""
    reader: RowReader
    mapping: ColumnMapping


@dataclass(frozen=True, kw_only=True, slots=True)
class Format:
    """A data set's own files, or files of one's own."""

    name: str
    summary: str
    layouts: tuple[Layout, ...]
    takes_columns: bool = False
    """Whether the columns are the user's to name; else the format fixes them."""
    default_paths: Callable[[], tuple[Path, ...]] = field(default=tuple)
    """What is read when no file is named."""


_RATINGS: Final = ("user_id", "item_id", "rating", "timestamp")
_RATING: Final = ColumnMapping(
    user="user_id",
    item="item_id",
    time="timestamp",
    time_unit="s",
    value="rating",
    user_ids="integer",
    item_ids="integer",
)
_AMAZON_2023: Final = ColumnMapping(
    user="user_id",
    item="parent_asin",
    time="timestamp",
    time_unit="ms",
    value="rating",
    user_ids="text",
    item_ids="text",
)
_AMAZON_2018: Final = ColumnMapping(
    user="reviewerID",
    item="asin",
    time="unixReviewTime",
    time_unit="s",
    value="overall",
    user_ids="text",
    item_ids="text",
)

_ALL: Final = (
    Format(
        name="parquet",
        summary="Parquet files of your own",
        layouts=(Layout(names=("*.parquet",), reader=ParquetReader(), mapping=ColumnMapping()),),
        takes_columns=True,
    ),
    Format(
        name="csv",
        summary="tables in text of your own: .csv, .tsv (tabs), the first line names the columns",
        layouts=(
            Layout(names=("*.csv",), reader=TextReader(), mapping=ColumnMapping()),
            Layout(names=("*.tsv",), reader=TextReader(separator="\t"), mapping=ColumnMapping()),
        ),
        takes_columns=True,
    ),
    Format(
        name="jsonl",
        summary="one JSON object a line, of your own",
        layouts=(Layout(names=("*.jsonl", "*.ndjson", "*.json"), reader=JsonReader(), mapping=ColumnMapping()),),
        takes_columns=True,
    ),
    Format(
        name="movielens",
        summary="MovieLens 100K (u.data), 1M and 10M (ratings.dat), 20M, 25M, 32M (ratings.csv); folder or .zip",
        layouts=(
            Layout(names=("u.data",), reader=TextReader(columns=_RATINGS, separator="\t"), mapping=_RATING),
            Layout(names=("ratings.dat",), reader=TextReader(columns=_RATINGS, separator="::"), mapping=_RATING),
            Layout(
                names=("ratings.csv",),
                reader=TextReader(),
                mapping=replace(_RATING, user="userId", item="movieId"),
            ),
        ),
    ),
    Format(
        name="movietweetings",
        summary="MovieTweetings (ratings.dat); without a file, the part that ships with headrace",
        layouts=(
            Layout(names=("ratings.dat",), reader=TextReader(columns=_RATINGS, separator="::"), mapping=_RATING),
            Layout(names=("interactions.parquet",), reader=ParquetReader(), mapping=_RATING),
        ),
        default_paths=lambda: (movietweetings().interactions,),
    ),
    Format(
        name="amazon-2018",
        summary="Amazon reviews 2018: reviews (.json) and ratings only (.csv: item, user, rating, time)",
        layouts=(
            Layout(names=("*.json", "*.jsonl"), reader=JsonReader(), mapping=_AMAZON_2018),
            Layout(
                names=("*.csv",),
                reader=TextReader(columns=("asin", "reviewerID", "overall", "unixReviewTime")),
                mapping=_AMAZON_2018,
            ),
        ),
    ),
    Format(
        name="amazon-2023",
        summary="Amazon reviews 2023: reviews (.jsonl) and ratings only (.csv with a header); items are parent_asin",
        layouts=(
            Layout(names=("*.jsonl", "*.json"), reader=JsonReader(), mapping=_AMAZON_2023),
            Layout(names=("*.csv",), reader=TextReader(), mapping=_AMAZON_2023),
        ),
    ),
    Format(
        name="kuairand",
        summary="KuaiRand logs (log_*.csv): clicks and likes; impressions without a click are left out",
        layouts=(
            Layout(
                names=("log_*.csv",),
                reader=KuaiReader(),
                mapping=ColumnMapping(
                    user="user_id",
                    item="video_id",
                    time="time_ms",
                    time_unit="ms",
                    value="play_time_ms",
                    value_scale=0.001,
                    action="action",
                    user_ids="integer",
                    item_ids="integer",
                ),
            ),
        ),
    ),
    Format(
        name="yambda",
        summary="Yambda flat (listens, likes or multi_event .parquet): listens and likes; the rest is left out",
        layouts=(
            Layout(
                names=("listens.parquet", "likes.parquet", "multi_event.parquet"),
                reader=YambdaReader(),
                mapping=ColumnMapping(
                    user="uid",
                    item="item_id",
                    time="timestamp",
                    time_unit="s",
                    relative_time=True,
                    value="played_ratio_pct",
                    action="event_type",
                    user_ids="integer",
                    item_ids="integer",
                ),
            ),
        ),
    ),
    Format(
        name="otto",
        summary="OTTO sessions (.jsonl): clicks, carts and orders; a session stands for its user",
        layouts=(
            Layout(
                names=("*.jsonl",),
                reader=SessionReader(),
                mapping=ColumnMapping(
                    user="session",
                    item="aid",
                    time="ts",
                    time_unit="ms",
                    action="type",
                    user_ids="integer",
                    item_ids="integer",
                    actions={"clicks": "click", "carts": "cart", "orders": "purchase"},
                ),
            ),
        ),
    ),
    Format(
        name="retailrocket",
        summary="RetailRocket (events.csv): views, additions to the cart, transactions",
        layouts=(
            Layout(
                names=("events.csv",),
                reader=TextReader(member="events.csv"),
                mapping=ColumnMapping(
                    user="visitorid",
                    item="itemid",
                    time="timestamp",
                    time_unit="ms",
                    action="event",
                    user_ids="integer",
                    item_ids="integer",
                    actions={"addtocart": "cart", "transaction": "purchase"},
                ),
            ),
        ),
    ),
    Format(
        name="mind",
        summary="MIND (behaviors.tsv): what was clicked of each impression; the rest of it is left out",
        layouts=(
            Layout(
                names=("behaviors.tsv",),
                reader=ImpressionReader(),
                mapping=ColumnMapping(
                    user="user_id",
                    item="news_id",
                    time="time",
                    time_unit="text",
                    time_format="%m/%d/%Y %I:%M:%S %p",
                    default_action="click",
                    user_ids="text",
                    item_ids="text",
                ),
            ),
        ),
    ),
)

FORMATS: Final[Mapping[str, Format]] = {one.name: one for one in _ALL}


def files_of(format_name: str, paths: Sequence[Path], **columns: Any) -> list[LogFiles]:
    """The files to read, grouped by layout; a folder stands for the files in it that the format knows.

    columns: fields of ColumnMapping that the user said; None leaves the format's. Raises RecordedStreamError for a file
    that does not belong, ValueError for what cannot be said of this format.
    """
    if format_name not in FORMATS:
        raise ValueError(f"format = {format_name}: one of {', '.join(FORMATS)}")
    chosen = FORMATS[format_name]
    said = {name: value for name, value in columns.items() if value is not None}
    fixed = sorted(set(said) & {"user", "item", "time", "time_unit", "value", "event_id", "user_ids", "item_ids"})
    if fixed and not chosen.takes_columns:
        raise ValueError(f"{', '.join(fixed)}: the format {format_name} knows its columns; use parquet, csv or jsonl")
    grouped: dict[int, list[Path]] = {}
    for path in paths or chosen.default_paths():
        for number, file in _recognised(chosen, path):
            grouped.setdefault(number, []).append(file)
    if not grouped:
        raise RecordedStreamError(f"{format_name}: name the files to read ({chosen.summary})")
    return [
        LogFiles(
            format=format_name,
            paths=tuple(files),
            reader=_within(chosen.layouts[number], files),
            mapping=replace(chosen.layouts[number].mapping, **said),
        )
        for number, files in grouped.items()
    ]


def _recognised(chosen: Format, path: Path) -> Iterator[tuple[int, Path]]:
    """(number of the layout, file)."""
    if path.is_dir():
        found = [(number, file) for file in sorted(path.iterdir()) if (number := _layout_of(chosen, file)) is not None]
        if not found:
            patterns = ", ".join(name for layout in chosen.layouts for name in layout.names)
            raise RecordedStreamError(f"{path} holds no file of the format {chosen.name} ({patterns})")
        yield from found
        return
    if not path.is_file():
        raise RecordedStreamError(f"{path}: there is no such file")
    number = _layout_of(chosen, path)
    if number is None:
        patterns = ", ".join(name for layout in chosen.layouts for name in layout.names)
        raise RecordedStreamError(f"{path}: the format {chosen.name} is read from {patterns}, also gzipped")
    yield number, path


def _layout_of(chosen: Format, file: Path) -> int | None:
    names = [file.name.removesuffix(".gz")]
    if file.suffix == ".zip" and zipfile.is_zipfile(file):
        with zipfile.ZipFile(file) as archive:
            names = [Path(name).name for name in archive.namelist()]
    for number, layout in enumerate(chosen.layouts):
        if any(Path(name).match(pattern) for name in names for pattern in layout.names):
            return number
    return None


def _within(layout: Layout, files: Sequence[Path]) -> RowReader:
    """The layout's reader; of an archive it takes the file that the layout names."""
    reader = layout.reader
    if isinstance(reader, TextReader) and any(file.suffix == ".zip" for file in files):
        return replace(reader, member=layout.names[0] if "*" not in layout.names[0] else None)
    return reader
