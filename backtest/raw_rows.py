"""Reads recorded files in bounded pieces, as they are: text tables, JSON lines and Parquet.

Cells of text tables and of JSON columns with mixed types come as text, so that a cell that is not what it should be is
found with its row. Rows are counted from 0, without the header.

Memory: one block of a text file and what it holds, or `_ROWS_PER_READ` rows of a Parquet file, and the bytes of one of
its row groups.
"""

from __future__ import annotations

import csv
import gzip
import io
import zipfile
import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from difflib import get_close_matches
from pathlib import Path
from typing import IO, Any, Final, Protocol

import msgspec
import polars as pl

from backtest.errors import RecordedStreamError
from stream.events import UNREADABLE

ROW: Final = "__row"
PART: Final = "__part"
"""Number of an event within its row, where a row holds several."""
ROWS_PER_CHUNK: Final = 250_000
_ROWS_PER_READ: Final = 8 * ROWS_PER_CHUNK
"""Of a Parquet file. A read passes over everything before it in its row group, and a file may be one row group: so the
fewer the better."""
BLOCK_BYTES: Final = 8 * 2**20
_LINE_BYTES_MAX: Final = 64 * 2**20
"""A text file without a line end in so many bytes is no table."""


@dataclass(frozen=True, slots=True)
class MalformedRow:
    """A row that is no row: broken JSON, too many cells, not UTF-8."""

    row: int
    text: str
    error: str


@dataclass(frozen=True, kw_only=True, slots=True)
class RawChunk:
    """Consecutive rows of one file."""

    frame: pl.DataFrame
    """The wanted columns, `ROW` (i64) and `PART` (i64)."""
    num_rows: int
    """Rows read, the malformed ones and those left out among them."""
    num_left_out: int = 0
    """Rows that are no interaction, such as an impression without a click."""
    malformed: list[MalformedRow] = field(default_factory=list)


class RowReader(Protocol):
    """One layout of files."""

    def chunks(self, path: Path, wanted: Sequence[str]) -> Iterator[RawChunk]:
        """All rows of a file in order; raises RecordedStreamError for a missing column or an unreadable file."""
        ...


@dataclass(frozen=True, kw_only=True, slots=True)
class TextReader:
    """A table in text: .csv, .tsv, .dat, also gzipped or alone in a .zip."""

    columns: tuple[str, ...] | None = None
    """Names of the columns; None: the first line has them."""
    separator: str = ","
    """Between cells, one or more characters."""
    is_quoted: bool = True
    """Whether cells may stand in double quotes."""
    member: str | None = None
    """Name of the file within a .zip; None: its only one."""

    def chunks(self, path: Path, wanted: Sequence[str]) -> Iterator[RawChunk]:
        """See RowReader."""
        num_rows = 0
        columns = self.columns
        for block in blocks(path, self.member, quote=self.is_quoted):
            content = block
            if columns is None:
                head, _, content = block.partition(b"\n")
                columns = self._header(path, head)
            require_columns(path, columns, wanted)
            if len(self.separator) > 1:
                content = content.replace(self.separator.encode(), b"\t")
            if content.strip():
                chunk = self._parse(content, columns, wanted, num_rows)
                num_rows += chunk.num_rows
                yield chunk

    @property
    def _single(self) -> str:
        """The separator once longer ones are replaced."""
        return self.separator if len(self.separator) == 1 else "\t"

    def _header(self, path: Path, line: bytes) -> tuple[str, ...]:
        try:
            cells = next(csv.reader([line.decode("utf-8-sig").strip("\r\n")], delimiter=self._single), [])
        except UnicodeDecodeError as error:
            raise RecordedStreamError(f"{path}: the first line is not UTF-8 ({error}); is it a text file?") from error
        names = tuple(cell.strip() for cell in cells)
        if len(set(names)) < len(names):
            twice = next(name for name in names if names.count(name) > 1)
            raise RecordedStreamError(f"{path}: the first line names column {twice!r} twice; name columns once")
        return names

    def _parse(self, content: bytes, columns: tuple[str, ...], wanted: Sequence[str], first: int) -> RawChunk:
        try:
            frame = pl.read_csv(
                content,
                has_header=False,
                new_columns=list(columns),
                schema=dict.fromkeys(columns, pl.String),
                separator=self._single,
                quote_char='"' if self.is_quoted else None,
            )
        except (pl.exceptions.PolarsError, UnicodeDecodeError):
            return self._parse_by_line(content, columns, wanted, first)
        frame = frame.select(wanted).with_row_index(ROW, first)
        return RawChunk(frame=_numbered(frame), num_rows=frame.height)

    def _parse_by_line(self, content: bytes, columns: tuple[str, ...], wanted: Sequence[str], first: int) -> RawChunk:
        """The same, row by row, to find those that are malformed."""
        text = content.decode("utf-8", "surrogateescape")
        places = [columns.index(name) for name in wanted]
        good: list[tuple[int, list[str | None]]] = []
        malformed = []
        num = 0
        rows = csv.reader(
            io.StringIO(text, newline=""),
            delimiter=self._single,
            quoting=csv.QUOTE_MINIMAL if self.is_quoted else csv.QUOTE_NONE,
        )
        for num, cells in enumerate(rows, 1):
            row = first + num - 1
            whole = self._single.join(cells)
            shown = whole.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
            if shown != whole:
                malformed.append(MalformedRow(row, shown, "not UTF-8"))
            elif len(cells) > len(columns):
                malformed.append(MalformedRow(row, shown, f"{len(cells)} cells where {len(columns)} belong"))
            else:
                good.append((row, [(cells[at] or None) if at < len(cells) else None for at in places]))
        frame = pl.DataFrame(
            {name: [cells[place] for _, cells in good] for place, name in enumerate(wanted)},
            schema=dict.fromkeys(wanted, pl.String),
        ).with_columns(pl.Series(ROW, [row for row, _ in good], pl.Int64))
        return RawChunk(frame=_numbered(frame), num_rows=num, malformed=malformed)


@dataclass(frozen=True, kw_only=True, slots=True)
class JsonReader:
    """One JSON object a line: .jsonl, .ndjson, .json, also gzipped."""

    def chunks(self, path: Path, wanted: Sequence[str]) -> Iterator[RawChunk]:
        """See RowReader. A field that no row of the first block has is a missing column."""
        num_rows = 0
        for block in blocks(path, None, quote=False):
            chunk, fields = _json_rows(block, wanted, num_rows)
            if not num_rows:
                require_columns(path, fields, wanted)
            num_rows += chunk.num_rows
            yield chunk


@dataclass(frozen=True, kw_only=True, slots=True)
class ParquetReader:
    """.parquet; only the wanted columns are read."""

    optional: tuple[str, ...] = ()
    """Wanted columns that a file may lack: then they are left out."""

    def chunks(self, path: Path, wanted: Sequence[str]) -> Iterator[RawChunk]:
        """See RowReader."""
        try:
            scan = pl.scan_parquet(path)
            names = scan.collect_schema().names()
            wanted = [name for name in wanted if name in names or name not in self.optional]
            require_columns(path, names, wanted)
            num_rows = scan.select(pl.len()).collect().item()
            for begin in range(0, num_rows, _ROWS_PER_READ):
                read = scan.select(wanted).slice(begin, _ROWS_PER_READ).collect()
                for first in range(0, read.height, ROWS_PER_CHUNK):
                    frame = read.slice(first, ROWS_PER_CHUNK).with_row_index(ROW, begin + first)
                    yield RawChunk(frame=_numbered(frame), num_rows=frame.height)
        except (OSError, pl.exceptions.PolarsError) as error:
            raise RecordedStreamError(f"{path} cannot be read: {str(error).splitlines()[0]}") from error


def require_columns(path: Path, present: Sequence[str], wanted: Sequence[str]) -> None:
    """Raise RecordedStreamError that names the first missing column and what it may have been meant for."""
    for name in wanted:
        if name not in present:
            near = get_close_matches(name, present, n=1)
            hint = f"did you mean {near[0]}?" if near else f"it has {', '.join(present)}"
            raise RecordedStreamError(f"{path} has no column {name}; {hint}")


def json_lines(content: bytes, kind: Any, first: int) -> tuple[list[tuple[int, Any]], list[MalformedRow], int]:
    """(row, decoded) of every line, those that do not decode as ``kind``, and how many there are but blank ones."""
    decoder: msgspec.json.Decoder[Any] = msgspec.json.Decoder(kind)
    try:
        decoded = decoder.decode_lines(content)
        return list(enumerate(decoded, first)), [], len(decoded)
    except UNREADABLE:
        good: list[tuple[int, Any]] = []
        malformed: list[MalformedRow] = []
        lines = [line for line in content.splitlines() if line.strip()]
        for row, line in enumerate(lines, first):
            try:
                good.append((row, decoder.decode(line)))
            except UNREADABLE as error:
                malformed.append(MalformedRow(row, line[:1000].decode("utf-8", "backslashreplace"), str(error)))
        return good, malformed, len(lines)


def text_column(name: str, cells: Sequence[Any]) -> pl.Series:
    """Cells of JSON: integers, numbers or text if all of them are, otherwise as text."""
    kinds = {type(cell) for cell in cells} - {type(None)}
    if kinds <= {int}:
        try:
            return pl.Series(name, cells, pl.Int64)
        except (OverflowError, TypeError):
            pass  # beyond 64 bits: as text, refused where a number belongs
    elif kinds <= {int, float}:
        return pl.Series(name, cells, pl.Float64)
    return pl.Series(name, [None if cell is None else str(cell) for cell in cells], pl.String)


def _json_rows(block: bytes, wanted: Sequence[str], first: int) -> tuple[RawChunk, list[str]]:
    """The chunk, and the fields that some row has."""
    cell = int | float | str | bool | None
    attributes = [f"c{place}" for place in range(len(wanted))]
    kind = msgspec.defstruct(
        "Row",
        [(attribute, cell, None) for attribute in attributes],
        rename=dict(zip(attributes, wanted, strict=True)),
    )
    good, malformed, num_rows = json_lines(block, kind, first)
    columns = [
        text_column(name, [getattr(row, attribute) for _, row in good])
        for attribute, name in zip(attributes, wanted, strict=True)
    ]
    fields = [column.name for column in columns if column.null_count() < len(column)]
    if good and len(fields) < len(wanted):
        fields += [name for name in _fields_of(block) if name not in fields]
    frame = pl.DataFrame([*columns, pl.Series(ROW, [row for row, _ in good], pl.Int64)])
    return RawChunk(frame=_numbered(frame), num_rows=num_rows, malformed=malformed), fields or list(wanted)


def _fields_of(block: bytes) -> list[str]:
    """The fields of the first line that is an object, for a message."""
    for line in block.splitlines():
        try:
            found = msgspec.json.decode(line)
        except UNREADABLE:
            continue
        if isinstance(found, Mapping):
            return list(found)
    return []


def _numbered(frame: pl.DataFrame) -> pl.DataFrame:
    return frame.with_columns(pl.col(ROW).cast(pl.Int64), pl.lit(0, pl.Int64).alias(PART))


@contextmanager
def _opened(path: Path, member: str | None) -> Iterator[IO[bytes] | gzip.GzipFile]:
    if path.suffix == ".gz":
        with gzip.open(path, "rb") as file:
            yield file
    elif path.suffix == ".zip":
        with zipfile.ZipFile(path) as archive:
            inside = [name for name in archive.namelist() if not name.endswith("/")]
            found = [name for name in inside if member is None or Path(name).name == member]
            if len(found) != 1:
                wanted = f"a file {member}" if member else "exactly one file"
                raise RecordedStreamError(f"{path} must hold {wanted}; it holds {', '.join(inside[:10])}")
            with archive.open(found[0]) as file:
                yield file
    else:
        with path.open("rb") as file:
            yield file


def blocks(path: Path, member: str | None, *, quote: bool) -> Iterator[bytes]:
    """The file in pieces that end where a row ends. With `quote`, a line end between quotes ends none."""
    rest = b""
    try:
        with _opened(path, member) as file:
            while piece := file.read(BLOCK_BYTES):
                block = rest + piece
                cut = _last_row_end(block, quote=quote)
                if not cut and len(block) > _LINE_BYTES_MAX:
                    raise RecordedStreamError(
                        f"{path}: a row is longer than {_LINE_BYTES_MAX:,} bytes; is it text, and is each quote closed?"
                    )
                rest = block[cut:]
                if cut:
                    yield block[:cut]
    except (OSError, EOFError, zlib.error, zipfile.BadZipFile) as error:
        raise RecordedStreamError(f"{path} cannot be read: {error}") from error
    if rest:
        yield rest


def _last_row_end(block: bytes, *, quote: bool) -> int:
    """Length of the part that ends with a line end outside quotes; 0 if there is none."""
    end = block.rfind(b"\n") + 1
    while quote and end and block.count(b'"', 0, end) % 2:
        end = block.rfind(b"\n", 0, end - 1) + 1
    return end
