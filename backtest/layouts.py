"""Readers for logs whose rows are not events yet: impressions to pick clicks from, sessions to take apart."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

import msgspec
import polars as pl

from backtest.errors import RecordedStreamError
from backtest.raw_rows import (
    PART,
    ROW,
    ParquetReader,
    RawChunk,
    TextReader,
    blocks,
    json_lines,
    text_column,
)


@dataclass(frozen=True, kw_only=True, slots=True)
class KuaiReader:
    """KuaiRand: a row is a video that was shown; one that was clicked or liked is an event, `action` says which."""

    def chunks(self, path: Path, wanted: Sequence[str]) -> Iterator[RawChunk]:
        """See RowReader."""
        cells = [*(name for name in wanted if name != "action"), "is_click", "is_like"]
        for chunk in TextReader().chunks(path, cells):
            liked, clicked = pl.col("is_like") == "1", pl.col("is_click") == "1"
            named = pl.when(liked).then(pl.lit("like")).when(clicked).then(pl.lit("click"))
            yield _keeping(chunk, chunk.frame.with_columns(named.alias("action")), pl.col("action").is_not_null())


_YAMBDA_ACTIONS: Final = {"listens": "listen", "likes": "like"}


@dataclass(frozen=True, kw_only=True, slots=True)
class YambdaReader:
    """Yambda's flat files. Times are seconds from an origin of the data set's own, in steps of five.

    `multi_event` names each event; the other files hold one kind. Dislikes, and likes and dislikes taken back, are left
    out: they are no interaction to be predicted.
    """

    def chunks(self, path: Path, wanted: Sequence[str]) -> Iterator[RawChunk]:
        """See RowReader."""
        for chunk in ParquetReader(optional=("event_type", "played_ratio_pct")).chunks(path, wanted):
            frame = chunk.frame
            if "event_type" not in frame.columns:
                if path.stem not in _YAMBDA_ACTIONS:
                    raise RecordedStreamError(f"{path} has no column event_type, and its name does not say the event")
                frame = frame.with_columns(pl.lit(_YAMBDA_ACTIONS[path.stem]).alias("event_type"))
            if "played_ratio_pct" not in frame.columns:
                frame = frame.with_columns(pl.lit(None, pl.Float64).alias("played_ratio_pct"))
            frame = frame.with_columns(pl.col("event_type").cast(pl.String))
            yield _keeping(chunk, frame, pl.col("event_type").is_in(list(_YAMBDA_ACTIONS.values())))


@dataclass(frozen=True, kw_only=True, slots=True)
class ImpressionReader:
    """MIND: a row is an impression, `N1-0 N2-1 …`: what was shown, and 1 for a click. Each click is an event.

    The history column has no times and says nothing that earlier impressions do not: it is not read.
    """

    def chunks(self, path: Path, wanted: Sequence[str]) -> Iterator[RawChunk]:
        """See RowReader."""
        columns = ("impression_id", "user_id", "time", "history", "impressions")
        reader = TextReader(columns=columns, separator="\t", is_quoted=False)
        cells = [*(name for name in wanted if name != "news_id"), "impressions"]
        for chunk in reader.chunks(path, cells):
            shown = pl.col("impressions").str.split(" ").list
            clicks = shown.eval(pl.element().filter(pl.element().str.ends_with("-1")).str.strip_suffix("-1"))
            # A row without impressions is refused for the missing cell; one without a click is left out.
            clicks = pl.coalesce(clicks, pl.concat_list(pl.lit(None, pl.String)))
            numbers = pl.int_ranges(clicks.list.len()).cast(pl.List(pl.Int64))
            frame = chunk.frame.with_columns(clicks.alias("news_id"), numbers.alias(PART)).drop("impressions")
            kept = _keeping(chunk, frame, pl.col("news_id").list.len() > 0)
            yield replace(kept, frame=kept.frame.explode("news_id", PART))


class _Occurrence(msgspec.Struct, gc=False):
    aid: int | str
    ts: int
    type: str


class _Session(msgspec.Struct):
    session: int | str
    events: list[_Occurrence]


@dataclass(frozen=True, kw_only=True, slots=True)
class SessionReader:
    """OTTO: a line is a session with its events, `{"session", "events": [{"aid", "ts", "type"}]}`."""

    def chunks(self, path: Path, wanted: Sequence[str]) -> Iterator[RawChunk]:  # noqa: ARG002 - all there are
        """See RowReader. A line with one event that is none is refused as a whole."""
        num_rows = 0
        for block in blocks(path, None, quote=False):
            sessions, malformed, num_lines = json_lines(block, _Session, num_rows)
            num_rows += num_lines
            each = [(row, part, one.session, event) for row, one in sessions for part, event in enumerate(one.events)]
            frame = pl.DataFrame(
                [
                    pl.Series(ROW, [row for row, _, _, _ in each], pl.Int64),
                    pl.Series(PART, [part for _, part, _, _ in each], pl.Int64),
                    text_column("session", [session for _, _, session, _ in each]),
                    text_column("aid", [event.aid for _, _, _, event in each]),
                    pl.Series("ts", [event.ts for _, _, _, event in each], pl.Int64),
                    pl.Series("type", [event.type for _, _, _, event in each], pl.String),
                ]
            )
            num_empty = sum(not one.events for _, one in sessions)
            yield RawChunk(frame=frame, num_rows=num_lines, num_left_out=num_empty, malformed=malformed)


def _keeping(chunk: RawChunk, frame: pl.DataFrame, is_event: pl.Expr) -> RawChunk:
    """The chunk with the rows of `frame` that are events; the others are counted as left out."""
    kept = frame.filter(is_event)
    return replace(chunk, frame=kept, num_left_out=chunk.num_left_out + frame.height - kept.height)
