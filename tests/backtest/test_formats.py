"""Published data sets are read from their own files: columns, units and what counts as an interaction."""

from __future__ import annotations

import gzip
import json
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import polars as pl
import pytest

from backtest.errors import RecordedStreamError
from backtest.formats import FORMATS, files_of
from backtest.importing import import_files
from backtest.intake import ImportConfig
from backtest.recording import Recording

Event = tuple[Any, Any, int, str, float | None]
"""user, item, time in ms, action, value."""


@dataclass(frozen=True)
class Sample:
    """A file as the data set has them, made up, and the events it stands for, in order of time."""

    format: str
    file: str
    content: str | Callable[[Path], None]
    events: list[Event]
    num_left_out: int = 0

    def write(self, folder: Path) -> Path:
        path = folder / self.file
        if not isinstance(self.content, str):
            self.content(path)
        elif path.suffix == ".gz":
            path.write_bytes(gzip.compress(self.content.encode()))
        elif path.suffix == ".zip":
            with zipfile.ZipFile(path, "w") as archive:
                archive.writestr("ml-x/README.txt", "made up")
                archive.writestr("ml-x/ratings.csv", self.content)
        else:
            path.write_text(self.content, encoding="utf-8")
        return path


def _yambda(columns: dict[str, list[Any]]) -> Callable[[Path], None]:
    return lambda path: pl.DataFrame(columns).cast({"uid": pl.UInt32, "timestamp": pl.UInt32}).write_parquet(path)


KUAIRAND_HEADER = (
    "user_id,video_id,date,hourmin,time_ms,is_click,is_like,is_follow,is_comment,is_forward,is_hate,long_view,"
    "play_time_ms,duration_ms,profile_stay_time,comment_stay_time,is_profile_enter,is_rand,tab"
)
AMAZON_2018 = {"overall": 5.0, "verified": True, "reviewerID": "A1", "asin": "B01", "unixReviewTime": 1362062307}
AMAZON_2023 = {
    "rating": 4.0,
    "asin": "B9",
    "parent_asin": "B1",
    "user_id": "AE",
    "timestamp": 1588687728923,
    "images": [],
}

SAMPLES = [
    Sample(
        "movielens", "u.data", "196\t242\t3\t881250949\n186\t302\t4\t881250948\n",
        [(186, 302, 881250948000, "rating", 4.0), (196, 242, 881250949000, "rating", 3.0)],
    ),
    Sample(
        "movielens", "ratings.dat", "1::1193::5::978300760\n1::661::3.5::978302109\n",
        [(1, 1193, 978300760000, "rating", 5.0), (1, 661, 978302109000, "rating", 3.5)],
    ),
    Sample(
        "movielens", "ratings.csv", "userId,movieId,rating,timestamp\n1,17,4.0,944249077\n",
        [(1, 17, 944249077000, "rating", 4.0)],
    ),
    Sample(
        "movielens", "ml-x.zip", "userId,movieId,rating,timestamp\n1,17,4.0,944249077\n",
        [(1, 17, 944249077000, "rating", 4.0)],
    ),
    Sample(
        "movietweetings", "ratings.dat", "1::0114508::8::1381006850\n",
        [(1, 114508, 1381006850000, "rating", 8.0)],
    ),
    Sample(
        "amazon-2018", "All_Beauty_5.json.gz", json.dumps(AMAZON_2018) + "\n",
        [("A1", "B01", 1362062307000, "rating", 5.0)],
    ),
    Sample(
        "amazon-2018", "All_Beauty.csv", "0143026860,A1V6B6TNIC10QE,1.0,1424304000\n",
        [("A1V6B6TNIC10QE", "0143026860", 1424304000000, "rating", 1.0)],
    ),
    Sample(
        "amazon-2023", "All_Beauty.jsonl", json.dumps(AMAZON_2023) + "\n",
        [("AE", "B1", 1588687728923, "rating", 4.0)],
    ),
    Sample(
        "amazon-2023", "Software.csv.gz", "user_id,parent_asin,rating,timestamp\nAE,B1,5.0,1588687728923\n",
        [("AE", "B1", 1588687728923, "rating", 5.0)],
    ),
    Sample(
        "kuairand", "log_standard_4_08_to_4_21_1k.csv",
        f"{KUAIRAND_HEADER}\n"
        "0,10,20220411,1900,1649675512388,0,0,0,0,0,0,0,1385,209900,0,0,0,0,1\n"
        "0,20,20220411,1900,1649675512389,1,0,0,0,0,0,1,20500,65400,0,0,0,0,1\n"
        "0,30,20220411,1900,1649675512390,1,1,0,0,0,0,1,0,65400,0,0,0,0,1\n",
        [(0, 20, 1649675512389, "click", 20.5), (0, 30, 1649675512390, "like", 0.0)],
        num_left_out=1,
    ),
    Sample(
        "yambda", "multi_event.parquet",
        _yambda({
            "uid": [100, 100, 200], "timestamp": [39420, 39425, 5], "item_id": [8326270, 1441281, 7],
            "is_organic": [0, 1, 1], "event_type": ["listen", "unlike", "like"],
            "played_ratio_pct": [100, None, None], "track_length_seconds": [170, None, None],
        }),
        [(200, 7, 5000, "like", None), (100, 8326270, 39420000, "listen", 100.0)],
        num_left_out=1,
    ),
    Sample(
        "yambda", "likes.parquet",
        _yambda({"uid": [100], "timestamp": [10], "item_id": [7], "is_organic": [1]}),
        [(100, 7, 10000, "like", None)],
    ),
    Sample(
        "otto", "train.jsonl",
        '{"session": 0, "events": [{"aid": 1517085, "ts": 1659304800025, "type": "clicks"}, '
        '{"aid": 1563459, "ts": 1659304904511, "type": "carts"}]}\n'
        '{"session": 1, "events": []}\n'
        '{"session": 2, "events": [{"aid": 5, "ts": 1659304800025, "type": "orders"}]}\n',
        [
            (0, 1517085, 1659304800025, "click", None),
            (2, 5, 1659304800025, "purchase", None),
            (0, 1563459, 1659304904511, "cart", None),
        ],
        num_left_out=1,
    ),
    Sample(
        "retailrocket", "events.csv",
        "timestamp,visitorid,event,itemid,transactionid\n"
        "1433221332117,257597,view,355908,\n"
        "1433221078505,158090,addtocart,10572,\n"
        "1433221078506,158090,transaction,10572,4000\n",
        [
            (158090, 10572, 1433221078505, "cart", None),
            (158090, 10572, 1433221078506, "purchase", None),
            (257597, 355908, 1433221332117, "view", None),
        ],
    ),
    Sample(
        "mind", "behaviors.tsv",
        "1\tU13740\t11/11/2019 9:05:58 AM\tN55189 N42782\tN55689-1 N35729-0 N9-1\n"
        "2\tU91836\t11/12/2019 6:11:30 PM\t\tN20678-0\n"
        "3\tU1\t11/12/2019 12:00:00 AM\tN1\tN2-1\n",
        [
            ("U13740", "N55689", 1573463158000, "click", None),
            ("U13740", "N9", 1573463158000, "click", None),
            ("U1", "N2", 1573516800000, "click", None),
        ],
        num_left_out=1,
    ),
]  # fmt: skip


def _import(format_name: str, path: Path) -> Recording:
    files = files_of(format_name, [path])
    return import_files(files, path.parent / "recording", ImportConfig(), name="log")


@pytest.mark.parametrize("sample", SAMPLES, ids=lambda sample: f"{sample.format}-{sample.file}")
def test_a_published_format_is_read_from_its_own_file(tmp_path: Path, sample: Sample) -> None:
    recording = _import(sample.format, sample.write(tmp_path))
    events = [event for batch in recording.batches(2) for event in batch.events()]
    found = [(event.user_id, event.item_id, event.event_time, event.action, event.value) for event in events]
    assert found == sample.events
    assert len({event.event_id for event in events}) == len(events)
    assert recording.manifest.report.num_left_out == sample.num_left_out


@pytest.mark.parametrize("sample", SAMPLES, ids=lambda sample: f"{sample.format}-{sample.file}")
def test_a_folder_stands_for_the_files_that_its_format_knows(tmp_path: Path, sample: Sample) -> None:
    folder = tmp_path / "data"
    folder.mkdir()
    sample.write(folder)
    (folder / "notes.xyz").write_text("not data")
    assert len(_import(sample.format, folder)) == len(sample.events)


def test_every_format_has_a_sample() -> None:
    assert {sample.format for sample in SAMPLES} | {"parquet", "csv", "jsonl"} == set(FORMATS)


def test_rows_are_counted_over_all_files_so_that_no_two_events_share_an_id(tmp_path: Path) -> None:
    folder = tmp_path / "logs"
    folder.mkdir()
    for day in ("4_08", "4_22"):
        (folder / f"log_standard_{day}.csv").write_text(
            f"{KUAIRAND_HEADER}\n0,20,20220411,1900,1649675512389,1,0,0,0,0,0,1,20500,65400,0,0,0,0,1\n"
        )
    (batch,) = _import("kuairand", folder).batches(10)
    assert batch.event_id == ["log-0", "log-1"]


def test_what_does_not_belong_to_a_format_is_refused_with_what_does(tmp_path: Path) -> None:
    path = tmp_path / "movies.dat"
    path.write_text("1::Toy Story (1995)::Animation\n")
    with pytest.raises(RecordedStreamError, match=r"movielens is read from u\.data, ratings\.dat, ratings\.csv"):
        files_of("movielens", [path])
    with pytest.raises(RecordedStreamError, match="holds no file of the format otto"):
        files_of("otto", [tmp_path])
    with pytest.raises(RecordedStreamError, match="there is no such file"):
        files_of("otto", [tmp_path / "train.jsonl"])
    with pytest.raises(ValueError, match=r"format = netflix: one of parquet, csv"):
        files_of("netflix", [])


def test_times_of_a_format_that_are_not_its_unit_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "train.jsonl"
    path.write_text('{"session": 0, "events": [{"aid": 1, "ts": 1659304800, "type": "clicks"}]}\n')
    with pytest.raises(RecordedStreamError, match="said to count ms, but then 1659304800 is 1970-01-20"):
        _import("otto", path)


def test_an_impression_without_a_list_is_refused_for_it(tmp_path: Path) -> None:
    path = tmp_path / "behaviors.tsv"
    path.write_text("1\tU1\t11/11/2019 9:05:58 AM\tN1\tN2-1\n2\tU2\t11/11/2019 9:05:59 AM\tN1\n")
    with pytest.raises(RecordedStreamError, match="1 × missing_field.*\n.*row 1, column news_id"):
        _import("mind", path)


def test_the_stream_that_ships_is_imported_without_naming_a_file(tmp_path: Path) -> None:
    recording = import_files(files_of("movietweetings", []), tmp_path / "recording", ImportConfig(), name="log")
    report = recording.manifest.report
    assert (report.num_events, report.num_users, report.num_items) == (141_695, 21_081, 12_611)
