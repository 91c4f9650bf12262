"""`headrace backtest`: from a log to a recording, and from a run to its report, by the command line."""

from __future__ import annotations

import json
from pathlib import Path

import polars as pl

from backtest.recording import Recording
from ops.local_broker import LocalBroker
from tests.backtest.made_run import make_run
from tests.ops.command_line import Headrace, assert_refused


def _log(tmp_path: Path, *rows: str) -> str:
    path = tmp_path / "clicks.csv"
    path.write_text("\n".join(["visitor,article,ts", *rows]) + "\n", encoding="utf-8")
    return str(path)


COLUMNS = ("--user-col", "visitor", "--item-col", "article", "--time-col", "ts")


def test_formats_are_listed(headrace: Headrace) -> None:
    ran = headrace("backtest", "formats")
    assert ran.returncode == 0
    assert [line.split()[0] for line in ran.stdout.splitlines()][:4] == ["parquet", "csv", "jsonl", "movielens"]


def test_a_log_is_imported_and_the_report_says_what_it_holds(headrace: Headrace, tmp_path: Path) -> None:
    log = _log(tmp_path, "1,10,1362062308", "2,20,1362062307")
    ran = headrace(
        "backtest", "import", "csv", log, *COLUMNS, "--time-unit", "s", "--action", "read", "--out", "clicks"
    )
    assert ran.returncode == 0, ran.stderr
    assert "2 rows: 2 events" in ran.stdout
    assert 'not declared: read; a run needs [events] actions = ["rating", ' in ran.stdout
    assert "not in order of time: 1 rows lie before an earlier row, first clicks.csv, row 1" in ran.stdout
    recording = Recording.open(Path("clicks"))
    assert recording.manifest.name == "clicks"
    assert [batch.user_id.tolist() for batch in recording.batches(9)] == [[2, 1]]  # type: ignore[union-attr]


def test_validating_writes_nothing_and_its_exit_status_says_whether_rows_are_refused(
    headrace: Headrace, tmp_path: Path
) -> None:
    good = headrace("backtest", "validate", "csv", _log(tmp_path, "1,10,1362062308"), *COLUMNS, "--time-unit", "s")
    assert good.returncode == 0
    log = _log(tmp_path, "1,10,1362062308", ",10,1362062308")
    bad = headrace("backtest", "validate", "csv", log, *COLUMNS, "--time-unit", "s", "--json")
    assert bad.returncode == 1
    (refusal,) = json.loads(bad.stdout)["refusals"]
    assert (refusal["reason"], refusal["examples"][0]["row"]) == ("missing_field", 1)
    assert [path.name for path in tmp_path.iterdir()] == ["clicks.csv"]


def test_a_unit_that_was_not_said_is_asked_for(headrace: Headrace, tmp_path: Path) -> None:
    ran = headrace("backtest", "import", "csv", _log(tmp_path, "1,10,1362062308"), *COLUMNS)
    assert_refused(ran, "what does column ts count?", "give time_unit = s")


def test_refused_rows_stop_an_import_or_are_set_aside(headrace: Headrace, tmp_path: Path) -> None:
    log = _log(tmp_path, "1,10,1362062308", ",10,1362062308")
    options = ("backtest", "import", "csv", log, *COLUMNS, "--time-unit", "s")
    stopped = headrace(*options)
    assert stopped.returncode == 2
    assert "clicks.csv, row 1, column visitor" in stopped.stderr
    assert not Path("recording").exists()
    aside = headrace(*options, "--on-error", "dead-letter")
    assert aside.returncode == 0
    assert len(Path("recording/refused.jsonl").read_text().splitlines()) == 1


def test_a_topic_is_recorded_from_a_time_on(headrace: Headrace, tmp_path: Path, fresh_broker: LocalBroker) -> None:
    servers = {"HEADRACE_LOG__BOOTSTRAP_SERVERS": fresh_broker.bootstrap_servers}
    log = _log(tmp_path, "1,10,1362062308", "2,20,1362062307")
    sent = headrace("replay", log, *COLUMNS, "--time-unit", "s", "--action", "click", **servers)
    assert sent.returncode == 0, sent.stderr
    ran = headrace("backtest", "import-topic", "--out", "live", "--from", "2020-01-01T00:00:00Z", **servers)
    assert ran.returncode == 0, ran.stderr
    assert "2 rows: 2 events" in ran.stdout
    assert len(Recording.open(Path("live"))) == 2
    assert_refused(headrace("backtest", "import-topic", "--from", "yesterday", **servers), "write RFC 3339")
    assert_refused(headrace("backtest", "import-topic", "--from", "2999-01-01T00:00:00Z", **servers), "holds no record")


def test_a_run_is_reported_and_its_findings_printed(headrace: Headrace, tmp_path: Path) -> None:
    make_run(tmp_path / "run", num_queries=800)
    ran = headrace("backtest", "report", "run", "--resamples", "200", "--reference", "popularity")
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.startswith("Decayed popularity reaches NDCG@20 0.")
    assert Path("run/report/report.html").is_file()
    assert pl.read_parquet("run/report/arms.parquet").height
    assert_refused(headrace("backtest", "report", "run", "--reference", "oracle"), "reference = oracle")
    assert_refused(headrace("backtest", "report", "nowhere"), "nowhere holds no run")


def test_two_runs_are_compared(headrace: Headrace, tmp_path: Path) -> None:
    make_run(tmp_path / "a", num_queries=800)
    make_run(tmp_path / "b", num_queries=800, lift=0.05)
    ran = headrace("backtest", "compare", "a", "b", "--resamples", "200", "--metric", "hr_at_20")
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.startswith("HR@20, the same 800 queries, paired")
    assert "B is better" in ran.stdout
    as_json = headrace("backtest", "compare", "a", "b", "--resamples", "200", "--json")
    assert json.loads(as_json.stdout)["is_paired"] is True
    assert_refused(headrace("backtest", "compare", "a", "b", "--resamples", "1"), "num_resamples = 1")
