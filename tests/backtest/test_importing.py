"""A log becomes a recording in order of time, whole and checked; what is wrong with it is said with its row."""

from __future__ import annotations

import gzip
import json
import resource
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest

from backtest.errors import RecordedStreamError, RefusedRowsError
from backtest.formats import files_of
from backtest.importing import import_files, validate_files
from backtest.intake import ImportConfig
from backtest.recording import MANIFEST, Recording
from backtest.sources import SourceConfig, open_source

T0 = 1_362_062_307
"""2013-02-28 14:38:27 UTC, in seconds."""


def _import(
    path: Path, format_name: str = "csv", *, on_error: Any = "stop", rows: int = 1_000, **columns: Any
) -> Recording:
    files = files_of(format_name, [path], **{"time_unit": "s", **columns})
    config = ImportConfig(on_error=on_error, rows_per_run=rows)
    return import_files(files, path.with_name("recording"), config, name="log")


def _csv(tmp_path: Path, *rows: str, header: str = "user_id,item_id,event_time") -> Path:
    path = tmp_path / "log.csv"
    path.write_text("\n".join([header, *rows]) + "\n", encoding="utf-8")
    return path


def _users(recording: Recording) -> list[Any]:
    return [user for batch in recording.batches(2) for user in batch.user_id]


def test_events_come_in_order_of_time_and_equal_times_in_order_of_rows(tmp_path: Path) -> None:
    recording = _import(_csv(tmp_path, f"1,10,{T0 + 5}", f"2,20,{T0}", f"3,30,{T0 + 5}", f"4,40,{T0}"))
    (batch,) = recording.batches(10)
    assert batch.user_id == pytest.approx([2, 4, 1, 3])
    assert batch.event_time_ms.tolist() == [T0 * 1000, T0 * 1000, (T0 + 5) * 1000, (T0 + 5) * 1000]
    assert batch.event_id == ["log-1", "log-3", "log-0", "log-2"]


@pytest.mark.parametrize("seed", range(6))
def test_a_log_of_many_runs_is_sorted_as_in_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seed: int) -> None:
    monkeypatch.setattr("backtest.raw_rows.ROWS_PER_CHUNK", 700)
    rng = np.random.default_rng(seed)
    num_rows, num_times = int(rng.integers(3_000, 9_000)), int(rng.choice([1, 40, 10**6]))
    times = rng.integers(T0, T0 + num_times, num_rows)
    path = tmp_path / "log.parquet"
    rows = np.arange(num_rows)
    pl.DataFrame({"user_id": rows, "item_id": rows, "event_time": times}).write_parquet(path)
    recording = _import(path, "parquet")
    assert len(recording.manifest.parts) > 1
    assert max(part.num_events for part in recording.manifest.parts) < 3_000
    size, start, end = (int(n) for n in rng.integers([1, 0, 2_000], [3_000, 1_000, num_rows]))
    expected = np.lexsort((rows, times))[start:end]
    batches = list(recording.batches(size, start=start, end=end))
    assert np.concatenate([batch.user_id for batch in batches]).tolist() == expected.tolist()
    assert {len(batch) for batch in batches[:-1]} <= {size}
    assert [batch.first for batch in batches] == list(range(start, end, size))


@pytest.mark.parametrize("name", ["log.parquet", "log.csv", "log.csv.gz", "log.jsonl", "log.jsonl.gz"])
def test_every_generic_format_gives_the_same_events(tmp_path: Path, name: str) -> None:
    frame = pl.DataFrame(
        {
            "user_id": [7, 8, 9],
            "item_id": ["a,b", 'say "x"', "c"],
            "event_time": [T0, T0 + 2, T0 + 1],
            "stars": [4.5, None, 3.0],
        }
    )
    path = tmp_path / name
    content = {"parquet": b"", "csv": frame.write_csv().encode(), "jsonl": frame.write_ndjson().encode()}
    kind = name.split(".")[1]
    if kind == "parquet":
        frame.write_parquet(path)
    else:
        path.write_bytes(gzip.compress(content[kind]) if name.endswith(".gz") else content[kind])
    (batch,) = _import(path, kind, value="stars").batches(10)
    assert batch.user_id == pytest.approx([7, 9, 8])
    assert batch.item_id == ["a,b", "c", 'say "x"']
    assert [event.value for event in batch.events()] == [4.5, 3.0, None]


def test_a_quoted_cell_may_hold_line_ends_wherever_the_file_is_cut(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("backtest.raw_rows.BLOCK_BYTES", 16)
    path = _csv(tmp_path, *[f'{n},"it\nem {n}",{T0 + n}' for n in range(20)])
    recording = _import(path)
    assert [item for batch in recording.batches(7) for item in batch.item_id] == [f"it\nem {n}" for n in range(20)]
    assert recording.manifest.report.num_rows == 20


@pytest.mark.parametrize(
    ("unit", "times", "expected_ms"),
    [
        ("s", [f"{T0}", f"{T0 + 1}.25"], [T0 * 1000, T0 * 1000 + 1250]),
        ("ms", [f"{T0}123", f"{T0}124"], [T0 * 1000 + 123, T0 * 1000 + 124]),
        ("us", [f"{T0}123999", f"{T0}124000"], [T0 * 1000 + 123, T0 * 1000 + 124]),
        ("ns", [f"{T0}123999999", f"{T0}124000000"], [T0 * 1000 + 123, T0 * 1000 + 124]),
        ("text", ["2013-02-28T14:38:27Z", "2013-02-28T15:38:27.5+01:00"], [T0 * 1000, T0 * 1000 + 500]),
        (None, ["2013-02-28T14:38:27Z", "2013-02-28T15:38:27.5+01:00"], [T0 * 1000, T0 * 1000 + 500]),
    ],
)
def test_times_of_every_unit_become_milliseconds(
    tmp_path: Path, unit: str | None, times: list[str], expected_ms: list[int]
) -> None:
    (batch,) = _import(_csv(tmp_path, *(f"1,1,{time}" for time in times)), time_unit=unit).batches(10)
    assert batch.event_time_ms.tolist() == expected_ms


@pytest.mark.parametrize(
    ("unit", "time", "words"),
    [
        (None, T0, ["looks like s", "2013-02-28 14:38:27", "give time_unit = s"]),
        (None, T0 * 1000, ["looks like ms", "give time_unit = ms"]),
        (None, T0 * 10**6, ["looks like us", "give time_unit = us"]),
        (None, 12, ["none is a date between 1990 and 2100", "relative_time"]),
        ("ms", T0, ["said to count ms", "1970-01-16", "give time_unit = s"]),
        ("s", T0 * 1000, ["said to count s", "give time_unit = ms"]),
        ("ms", "2013-02-28T14:38:27Z", ["no number of ms", "give time_unit = text"]),
    ],
)
def test_a_unit_is_asked_for_and_never_guessed(
    tmp_path: Path, unit: str | None, time: object, words: list[str]
) -> None:
    with pytest.raises(RecordedStreamError) as refused:
        _import(_csv(tmp_path, f"1,1,{time}"), time_unit=unit)
    assert not [word for word in words if word not in str(refused.value)], refused.value


@pytest.mark.parametrize("time", ["2013-02-28", "2013-02-28 14:38:27"])
def test_a_written_time_without_an_offset_is_asked_about(tmp_path: Path, time: str) -> None:
    path = _csv(tmp_path, f"1,1,{time}")
    with pytest.raises(RecordedStreamError, match="names no offset from UTC: give time_format"):
        _import(path, time_unit=None)
    written = "%Y-%m-%d" if len(time) == 10 else "%Y-%m-%d %H:%M:%S"
    (batch,) = _import(path, time_unit=None, time_format=written).batches(9)
    assert batch.event_time_ms.tolist() == [1_362_009_600_000 if len(time) == 10 else T0 * 1000]
    mixed = _csv(tmp_path, "1,1,2013-02-28T14:38:27Z", f"1,1,{time}")
    report = validate_files(files_of("csv", [mixed]), ImportConfig())
    assert [(one.reason, one.examples[0].row) for one in report.refusals] == [("wrong_type", 1)]


@pytest.mark.parametrize("odd", [[[1]], [{"a": 1}], [b"x"]], ids=["list", "struct", "bytes"])
@pytest.mark.parametrize("place", ["user_id", "item_id", "event_time", "value", "action", "id"])
def test_a_column_of_another_kind_is_refused_by_name(tmp_path: Path, odd: list[Any], place: str) -> None:
    columns = {"user_id": [1], "item_id": [1], "event_time": [T0], "value": [1.0], "action": ["view"], "id": ["e"]}
    path = tmp_path / "log.parquet"
    pl.DataFrame({**columns, place: odd}).write_parquet(path)
    with pytest.raises(RecordedStreamError, match=f"column {place} holds .*: give one of numbers or text"):
        _import(path, "parquet", value="value", action="action", event_id="id")


def test_a_time_that_is_no_number_is_refused_by_its_row(tmp_path: Path) -> None:
    path = tmp_path / "log.parquet"
    times = [float("nan"), float(T0), float("inf"), T0 + 0.5]
    pl.DataFrame({"user_id": [1, 2, 3, 4], "item_id": [1] * 4, "event_time": times}).write_parquet(path)
    recording = _import(path, "parquet", on_error="skip")
    assert _users(recording) == [2, 4]
    assert [example.row for one in recording.manifest.report.refusals for example in one.examples] == [0, 2]


@pytest.mark.parametrize("damage", ["cut", "flipped", "other"])
def test_a_damaged_archive_is_refused_by_name(tmp_path: Path, damage: str) -> None:
    path = tmp_path / "log.csv.gz"
    rows = "".join(f"{n},{n * n},{T0 + n}\n" for n in range(5_000))
    whole = gzip.compress(f"user_id,item_id,event_time\n{rows}".encode())
    half = len(whole) // 2
    flipped = whole[:half] + bytes(255 - byte for byte in whole[half : half + 64]) + whole[half + 64 :]
    path.write_bytes({"cut": whole[:half], "flipped": flipped, "other": b"no archive"}[damage])
    with pytest.raises(RecordedStreamError, match=r"log\.csv\.gz"):
        _import(path)
    assert not (tmp_path / "recording").exists()


def test_times_from_an_origin_of_their_own_are_taken_as_they_are(tmp_path: Path) -> None:
    (batch,) = _import(_csv(tmp_path, "1,1,0", "1,2,5"), relative_time=True).batches(10)
    assert batch.event_time_ms.tolist() == [0, 5000]


BAD_ROWS = [
    (f",1,{T0}", "missing_field", "user_id"),
    ("1,1,", "missing_field", "event_time"),
    (f"x,1,{T0}", "wrong_type", "user_id"),
    (f"-1,1,{T0}", "wrong_type", "user_id"),
    ("1,1,soon", "wrong_type", "event_time"),
    ("1,1,13", "implausible_time", "event_time"),
    (f"1,1,{T0},9", "malformed_row", None),
]


@pytest.mark.parametrize(("row", "reason", "column"), BAD_ROWS)
@pytest.mark.parametrize("on_error", ["stop", "skip", "dead-letter"])
def test_a_bad_row_stops_is_skipped_or_is_set_aside_with_its_number(
    tmp_path: Path, row: str, reason: str, column: str | None, on_error: str
) -> None:
    path = _csv(tmp_path, f"1,1,{T0}", row, f"2,1,{T0 + 1}")
    if on_error == "stop":
        with pytest.raises(RefusedRowsError, match=f"1 × {reason}.*\n.*log.csv, row 1"):
            _import(path, user_ids="integer")
        assert not (tmp_path / "recording").exists()
        return
    recording = _import(path, on_error=on_error, user_ids="integer")
    assert _users(recording) == [1, 2]
    report = recording.manifest.report
    assert (report.num_rows, report.num_events, report.num_refused) == (3, 2, 1)
    (refusal,) = report.refusals
    assert (refusal.reason, refusal.count) == (reason, 1)
    assert [(example.file, example.row, example.column) for example in refusal.examples] == [("log.csv", 1, column)]
    letters = recording.folder / "refused.jsonl"
    assert letters.exists() == (on_error == "dead-letter")
    if on_error == "dead-letter":
        (letter,) = [json.loads(line) for line in letters.read_text(encoding="utf-8").splitlines()]
        assert (letter["file"], letter["row"], letter["reason"]) == ("log.csv", 1, reason)
        cells: dict[str, str | None] = dict.fromkeys(("user_id", "item_id", "event_time"))
        cells |= {name: cell or None for name, cell in zip(cells, row.split(","), strict=False)}
        assert letter["record"] == (row if reason == "malformed_row" else cells)


def test_every_refused_row_is_counted_and_only_the_first_are_shown(tmp_path: Path) -> None:
    path = _csv(tmp_path, *(f"{'x' if n % 2 else n},1,{T0 + n}" for n in range(100)))
    report = validate_files(files_of("csv", [path], time_unit="s", user_ids="integer"), ImportConfig(examples_max=3))
    (refusal,) = report.refusals
    assert (report.num_events, refusal.count) == (50, 50)
    assert [example.row for example in refusal.examples] == [1, 3, 5]


def test_ids_that_are_mostly_integers_are_asked_about(tmp_path: Path) -> None:
    path = _csv(tmp_path, *(f"{user},1,{T0}" for user in [1, 2, 3, "x4"]))
    with pytest.raises(
        RecordedStreamError, match=r"most ids in column user_id are integers, but one is 'x4': give user_ids"
    ):
        _import(path)
    assert _users(_import(path, user_ids="text")) == ["1", "2", "3", "x4"]


def test_a_repeated_event_id_is_refused_but_for_its_first_row(tmp_path: Path) -> None:
    rows = [f"{n},1,{T0 - n},e{n % 3}" for n in range(7)]
    path = _csv(tmp_path, *rows, header="user_id,item_id,event_time,id")
    with pytest.raises(RefusedRowsError, match=r"4 × duplicate_id.*\n.*row 3: 'e0'"):
        _import(path, event_id="id")
    recording = _import(path, event_id="id", on_error="dead-letter")
    assert sorted(_users(recording)) == [0, 1, 2]
    assert len(recording) == 3
    letters = [json.loads(line) for line in (recording.folder / "refused.jsonl").read_text().splitlines()]
    assert [letter["row"] for letter in letters] == [3, 4, 5, 6]


def test_repeated_events_without_ids_are_kept_and_counted(tmp_path: Path) -> None:
    recording = _import(_csv(tmp_path, f"1,1,{T0}", f"1,1,{T0}", f"1,2,{T0}"))
    assert (len(recording), recording.manifest.report.num_repeated) == (3, 1)


def test_a_clock_that_goes_back_is_reported_with_its_row(tmp_path: Path) -> None:
    report = _import(_csv(tmp_path, f"1,1,{T0}", f"1,2,{T0 + 60}", f"1,3,{T0 + 30}", f"1,4,{T0 + 59}")).manifest.report
    assert (report.order.num_back, report.order.first_back, report.order.back_ms_max) == (2, "log.csv, row 2", 30_000)


def test_a_log_with_arrival_times_is_replayed_as_it_arrived(tmp_path: Path) -> None:
    path = _csv(tmp_path, f"1,1,{T0},{T0 + 9}", f"2,1,{T0 + 5},{T0 + 6}", header="user_id,item_id,event_time,arrived")
    (batch,) = _import(path, arrival="arrived").batches(10)
    assert batch.user_id == pytest.approx([2, 1])
    assert batch.arrival_ms.tolist() == [(T0 + 6) * 1000, (T0 + 9) * 1000]


@pytest.mark.parametrize("content", ["", "user_id,item_id,event_time\n"])
def test_an_empty_log_is_refused(tmp_path: Path, content: str) -> None:
    path = tmp_path / "log.csv"
    path.write_text(content, encoding="utf-8")
    with pytest.raises(RecordedStreamError, match="the log is empty"):
        _import(path)


@pytest.mark.parametrize(
    ("format_name", "header"), [("csv", "userid,item_id,event_time"), ("jsonl", None), ("parquet", None)]
)
def test_a_missing_column_is_named_with_what_it_may_be(tmp_path: Path, format_name: str, header: str | None) -> None:
    if header:
        path = _csv(tmp_path, f"1,1,{T0}", header=header)
    else:
        path = tmp_path / f"log.{format_name}"
        frame = pl.DataFrame({"userid": [1], "item_id": [1], "event_time": [T0]})
        (frame.write_ndjson if format_name == "jsonl" else frame.write_parquet)(path)
    with pytest.raises(RecordedStreamError, match=r"has no column user_id; did you mean userid\?"):
        _import(path, format_name)


def test_broken_json_is_refused_line_by_line(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    good = {"user_id": 1, "item_id": "a", "event_time": T0}
    lines = [
        json.dumps(good),
        '{"user_id": 1',
        json.dumps({**good, "user_id": [1]}),
        json.dumps(good)[:-1] + ', "more": ' + "[" * 10_000 + "]" * 10_000 + "}",
        json.dumps({**good, "user_id": 2}),
    ]
    path.write_text("\n".join(lines), encoding="utf-8")
    recording = _import(path, "jsonl", on_error="skip")
    assert _users(recording) == [1, 2]
    assert [example.row for one in recording.manifest.report.refusals for example in one.examples] == [1, 2, 3]


def test_an_import_that_fails_leaves_the_recording_that_was_there(tmp_path: Path) -> None:
    _import(_csv(tmp_path, f"1,1,{T0}"))
    with pytest.raises(RefusedRowsError):
        _import(_csv(tmp_path, "1,1,13", f"1,1,{T0}", f"1,1,{T0}"))
    assert _users(Recording.open(tmp_path / "recording")) == [1]
    assert not list(tmp_path.glob(".*"))


def test_a_full_disk_is_said_in_one_sentence_and_leaves_nothing(tmp_path: Path) -> None:
    rows = [f"{user},1,{T0 + user}" for user in range(800)]
    log, (soft, hard) = _csv(tmp_path, *rows), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2_048, hard))
    try:
        with pytest.raises(RecordedStreamError, match="recording cannot be written"):
            _import(log)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert [path.name for path in tmp_path.iterdir()] == ["log.csv"]


def test_an_import_never_replaces_a_folder_that_is_no_recording(tmp_path: Path) -> None:
    (tmp_path / "recording").mkdir()
    (tmp_path / "recording" / "thesis.txt").write_text("mine")
    with pytest.raises(RecordedStreamError, match="is no recording"):
        _import(_csv(tmp_path, f"1,1,{T0}"))
    assert (tmp_path / "recording" / "thesis.txt").read_text() == "mine"


def test_a_recording_that_lost_a_part_is_refused(tmp_path: Path) -> None:
    recording = _import(_csv(tmp_path, f"1,1,{T0}"))
    (recording.folder / recording.manifest.parts[0].file).unlink()
    with pytest.raises(RecordedStreamError, match="cannot be read"):
        list(Recording.open(recording.folder).batches(1))
    (recording.folder / MANIFEST).unlink()
    with pytest.raises(RecordedStreamError, match="headrace backtest import"):
        Recording.open(recording.folder)


def test_the_same_files_are_imported_once(tmp_path: Path) -> None:
    path = _csv(tmp_path, f"1,1,{T0}")
    config = SourceConfig(format="csv", paths=(str(path),), time_unit="s")
    said: list[str] = []
    first = open_source(config, tmp_path / "cache", say=said.append)
    again = open_source(config, tmp_path / "cache", say=said.append)
    assert (first.folder, len(said)) == (again.folder, 1)
    _csv(tmp_path, f"1,1,{T0}", f"2,2,{T0}")
    assert len(open_source(config, tmp_path / "cache", say=said.append)) == 2


def test_lineage_names_every_file_and_its_content(tmp_path: Path) -> None:
    path = _csv(tmp_path, f"1,1,{T0}")
    (source,) = _import(path).manifest.sources
    assert source.path == str(path)
    assert source.num_bytes == path.stat().st_size
    assert len(source.sha256) == 64


def test_a_column_of_surfaces_is_kept_as_text(tmp_path: Path) -> None:
    path = tmp_path / "log.csv"
    path.write_text("user_id,item_id,event_time,page\n1,2,1500000000,home\n2,3,1500000001,\n3,4,1500000002,7\n")
    files = files_of("csv", [path], time_unit="s", surface="page")
    recording = import_files(files, tmp_path / "recording", ImportConfig(), name="log")
    assert [one.surface for one in recording.batches(10)] == [["home", None, "7"]]


def test_columns_of_a_known_format_are_not_the_users_to_name(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="the format movielens knows its columns"):
        files_of("movielens", [tmp_path], user="who")
