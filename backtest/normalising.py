"""Raw rows → events in headrace's own columns, and the rows that are none, with the reason. Pure.

Nothing is guessed: what a column of numbers counts is asked for when it was not said, and when what was said gives
dates that no log has, the unit that it looks like is named in the error.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Final

import polars as pl

from backtest.columns import ColumnMapping, IdKind, TimeUnit
from backtest.errors import RecordedStreamError
from backtest.raw_rows import PART, ROW

EVENT_SCHEMA: Final = {
    "row": pl.Int64,
    "part": pl.Int64,
    "event_time_ms": pl.Int64,
    "arrival_ms": pl.Int64,
    "action": pl.String,
    "value": pl.Float64,
    "event_id": pl.String,
}
"""Beside `user_id` and `item_id`, which are i64 or text; and, where the log has it, `surface`, text."""

REASONS: Final = {
    "malformed_row": "the row is no row of this layout",
    "missing_field": "a required cell is empty",
    "wrong_type": "a cell is not the integer, number, date or text of 1 to 256 characters that belongs there",
    "implausible_time": "the time lies before 1990 or after 2100: another unit, or a wrong clock",
    "non_finite_value": "the value is infinite or beyond a 32-bit floating-point number",
    "duplicate_id": "an earlier row has the same event id",
}
"""Reason code → what it means, for refused rows."""

_EARLIEST_MS: Final = 631_152_000_000  # 1990
_LATEST_MS: Final = 4_102_444_800_000  # 2100
_PER_MS: Final[dict[str, float]] = {"s": 1e-3, "ms": 1.0, "us": 1e3, "ns": 1e6}
_OFFSET: Final = r"(?i)(z|[+-]\d\d:?\d\d)$"
"""How a time ends that names its offset from UTC."""
_FLOAT32_MAX: Final = (2 - 2**-23) * 2.0**127


@dataclass(frozen=True, kw_only=True, slots=True)
class Kinds:
    """What the columns of a file hold, settled by its first rows and the mapping."""

    user: IdKind
    item: IdKind
    time_unit: TimeUnit
    """`text` for date-time columns, too."""


@dataclass(frozen=True, slots=True)
class Normalised:
    """What became of raw rows, in their order."""

    events: pl.DataFrame
    """`user_id`, `item_id`, `EVENT_SCHEMA` and, where the mapping has one, `surface`."""
    refused: pl.DataFrame
    """The raw rows that are no events, with `__reason` and `__column`."""


def settle(path: Path, frame: pl.DataFrame, mapping: ColumnMapping) -> Kinds:
    """What the columns hold, judged by the first rows; raises RecordedStreamError naming the option to give."""
    for name in mapping.wanted:
        if frame.schema[name].is_nested() or frame.schema[name] in {pl.Binary, pl.Object, pl.Duration, pl.Time}:
            raise RecordedStreamError(f"{path}: column {name} holds {frame.schema[name]}: give one of numbers or text")
    return Kinds(
        user=_id_kind(path, frame, mapping.user, mapping.user_ids, "user_ids"),
        item=_id_kind(path, frame, mapping.item, mapping.item_ids, "item_ids"),
        time_unit=_time_unit(path, frame[mapping.time], mapping),
    )


def normalise(frame: pl.DataFrame, mapping: ColumnMapping, kinds: Kinds) -> Normalised:
    """Judge every row; `frame` has the mapping's columns, `ROW` and `PART`."""
    schema = frame.schema
    checks: list[tuple[str, str, pl.Expr]] = []
    columns: list[pl.Expr] = [pl.col(ROW).alias("row"), pl.col(PART).alias("part")]
    for target, source, kind in (("user_id", mapping.user, kinds.user), ("item_id", mapping.item, kinds.item)):
        value = _id(source, schema[source], kind)
        checks += [("missing_field", source, pl.col(source).is_null()), ("wrong_type", source, _is_no_id(value, kind))]
        columns.append(value.alias(target))
    for target, named in (("event_time_ms", mapping.time), ("arrival_ms", mapping.arrival)):
        if named is None:
            columns.append(pl.lit(None, pl.Int64).alias(target))
            continue
        time = _time_ms(named, schema[named], kinds.time_unit, mapping.time_format)
        earliest = 0 if mapping.relative_time else _EARLIEST_MS
        checks += [
            ("missing_field", named, pl.col(named).is_null()),
            ("wrong_type", named, time.is_null()),
            ("implausible_time", named, ~time.is_between(earliest, _LATEST_MS)),
        ]
        columns.append(time.alias(target))
    columns.append(_action(mapping).alias("action"))
    columns.append(_value(mapping, schema, checks).alias("value"))
    columns.append(_event_id(mapping, checks).alias("event_id"))
    if mapping.surface is not None:
        columns.append(pl.col(mapping.surface).cast(pl.String).alias("surface"))
    verdict = pl.coalesce(
        *(pl.when(is_bad).then(pl.lit(f"{reason}\t{column}")) for reason, column, is_bad in checks),
        pl.lit(None, pl.String),
    )
    judged = frame.with_columns(verdict.alias("__verdict"))
    is_good = pl.col("__verdict").is_null()
    refused = judged.filter(~is_good).with_columns(
        pl.col("__verdict").str.split("\t").list.get(0).alias("__reason"),
        pl.col("__verdict").str.split("\t").list.get(1).alias("__column"),
    )
    return Normalised(judged.filter(is_good).select(columns), refused.drop("__verdict"))


def _id_kind(path: Path, frame: pl.DataFrame, name: str, said: IdKind | None, option: str) -> IdKind:
    dtype = frame.schema[name]
    if dtype.is_integer():
        return said or "integer"
    if dtype not in (pl.String, pl.Null) and dtype != pl.Categorical and not isinstance(dtype, pl.Enum):
        raise RecordedStreamError(
            f"{path}: column {name} holds {dtype}; ids are integers or text (convert the column, or give another one)"
        )
    if said:
        return said
    cells = frame[name].drop_nulls().cast(pl.String)
    if len(cells) and cells.str.contains(r"^\d+$").all() and not cells.str.contains(r"^0\d").any():
        return "integer"
    if len(cells) and cells.str.contains(r"^\d+$").mean() > 0.5:  # type: ignore[operator]  # of booleans
        odd = cells.filter(~cells.str.contains(r"^\d+$") | cells.str.contains(r"^0\d"))[0]
        raise RecordedStreamError(
            f"{path}: most ids in column {name} are integers, but one is {odd!r}: give {option} = text, or "
            f"{option} = integer to have such rows refused (and 007 read as 7)"
        )
    return "text"


def _time_unit(path: Path, times: pl.Series, mapping: ColumnMapping) -> TimeUnit:
    """The unit, where it is said or beyond doubt; otherwise the question."""
    if isinstance(times.dtype, pl.Datetime) or times.dtype == pl.Date:
        return "text"
    known = times.drop_nulls()
    numbers = known.cast(pl.Float64, strict=False).drop_nulls()
    numbers = numbers.filter(numbers.is_finite())
    are_numbers = times.dtype.is_numeric() or len(numbers) > len(known) / 2
    unit = mapping.time_unit
    if unit == "text" or (unit is None and not are_numbers):
        if mapping.time_format is None and len(known) and not known.cast(pl.String).str.contains(_OFFSET).any():
            raise RecordedStreamError(
                f"{path}: column {times.name} holds {known[0]!r}, which names no offset from UTC: give time_format "
                "(such as %Y-%m-%d %H:%M:%S) if it is UTC"
            )
        return "text"
    if not are_numbers and len(known):
        raise RecordedStreamError(
            f"{path}: column {times.name} holds {known[0]!r}, which is no number of {unit}: give time_unit = text"
        )
    if not len(numbers):
        return unit or "text"
    middle = float(numbers.median())  # type: ignore[arg-type]  # of numbers
    likely = _likely_unit(middle)
    if unit is None:
        raise RecordedStreamError(_question(path, times.name, middle, likely))
    if not mapping.relative_time and unit != likely:
        read_as = _date(middle / _PER_MS[unit])
        better = f"; as {likely} it is {_date(middle / _PER_MS[likely])}: give time_unit = {likely}" if likely else ""
        raise RecordedStreamError(
            f"{path}: column {times.name} is said to count {unit}, but then {middle:.0f} is {read_as}{better}. If the "
            "times count from an origin of their own, give relative_time"
        )
    return unit


def _question(path: Path, name: str, middle: float, likely: TimeUnit | None) -> str:
    if likely is None:
        readings = ", ".join(f"as {unit} {_date(middle / per_ms)}" for unit, per_ms in _PER_MS.items())
        return (
            f"{path}: what does column {name} count? {middle:.0f} is {readings}: none is a date between 1990 and 2100. "
            "Give time_unit, and relative_time if the times count from an origin of their own"
        )
    return (
        f"{path}: what does column {name} count? {middle:.0f} looks like {likely}, which makes it "
        f"{_date(middle / _PER_MS[likely])}: if that is right, give time_unit = {likely}"
    )


def _likely_unit(number: float) -> TimeUnit | None:
    """The one unit in which a number is a date between 1990 and 2100: they do not overlap."""
    units: tuple[TimeUnit, ...] = ("s", "ms", "us", "ns")
    return next((unit for unit in units if _EARLIEST_MS <= number / _PER_MS[unit] <= _LATEST_MS), None)


def _date(epoch_ms: float) -> str:
    try:
        when = datetime(1970, 1, 1, tzinfo=UTC) + timedelta(milliseconds=epoch_ms)
    except OverflowError:
        return "beyond the calendar"
    return f"{when:%Y-%m-%d %H:%M:%S}"


def _id(name: str, dtype: pl.DataType, kind: IdKind) -> pl.Expr:
    column = pl.col(name)
    if kind == "text":
        return column.cast(pl.String)
    return column.cast(pl.Int64, strict=False) if dtype.is_integer() else _integer(column.cast(pl.String))


def _integer(text: pl.Expr) -> pl.Expr:
    return text.str.strip_chars().str.to_integer(strict=False)


def _is_no_id(value: pl.Expr, kind: IdKind) -> pl.Expr:
    if kind == "integer":
        return value.is_null() | (value < 0)
    return ~value.str.len_chars().is_between(1, 256)


def _time_ms(name: str, dtype: pl.DataType, unit: TimeUnit, written: str | None) -> pl.Expr:
    """Epoch milliseconds, i64; null where the cell is no time."""
    column = pl.col(name)
    if isinstance(dtype, pl.Datetime) or dtype == pl.Date:
        return column.cast(pl.Datetime("ms")).dt.epoch("ms")
    if unit == "text":
        text = column.cast(pl.String)
        if written is None:
            parsed = text.str.to_datetime(time_unit="ms", time_zone="UTC", strict=False).dt.epoch("ms")
            return pl.when(text.str.contains(_OFFSET)).then(parsed)
        parsed = text.str.to_datetime(written, time_unit="ms", strict=False)
        return parsed.dt.replace_time_zone(None).dt.epoch("ms") if "%z" not in written else parsed.dt.epoch("ms")
    whole = column if dtype.is_integer() else _integer(column.cast(pl.String))
    in_ms = whole.cast(pl.Int64, strict=False)
    # What would overflow is implausible anyway: null, hence a wrong type.
    in_ms = in_ms * 1000 if unit == "s" else in_ms // int(_PER_MS[unit])
    in_ms = pl.when(whole.cast(pl.Int64, strict=False).abs() < 2**53).then(in_ms) if unit == "s" else in_ms
    if dtype.is_integer():
        return in_ms
    exact = (column.cast(pl.Float64, strict=False) / _PER_MS[unit]).round()
    exact = pl.when(exact.is_finite() & (exact.abs() < 2**62)).then(exact).cast(pl.Int64, strict=False)
    return exact if dtype.is_float() else pl.coalesce(in_ms, exact)


def _action(mapping: ColumnMapping) -> pl.Expr:
    if mapping.action is None:
        return pl.lit(mapping.default_action)
    named = pl.col(mapping.action).cast(pl.String)
    if mapping.actions:
        named = named.replace(dict(mapping.actions))
    return named.fill_null(mapping.default_action)


def _value(mapping: ColumnMapping, schema: pl.Schema, checks: list[tuple[str, str, pl.Expr]]) -> pl.Expr:
    """float64, null where there is none or it is no number (NaN)."""
    name = mapping.value
    if name is None:
        return pl.lit(None, pl.Float64)
    number = pl.col(name).cast(pl.Float64, strict=False)
    if not schema[name].is_numeric():
        checks.append(("wrong_type", name, number.is_null() & pl.col(name).is_not_null()))
    scaled = number.fill_nan(None) * mapping.value_scale
    checks.append(("non_finite_value", name, scaled.abs() > _FLOAT32_MAX))
    return scaled


def _event_id(mapping: ColumnMapping, checks: list[tuple[str, str, pl.Expr]]) -> pl.Expr:
    name = mapping.event_id
    if name is None:
        return pl.lit(None, pl.String)
    text = pl.col(name).cast(pl.String)
    checks.append(("missing_field", name, pl.col(name).is_null()))
    checks.append(("wrong_type", name, ~text.str.len_chars().is_between(1, 128)))
    return text
