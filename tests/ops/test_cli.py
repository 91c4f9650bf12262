"""The command line as a person meets it: one sentence for each mistake, exit status 2, no traceback."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

from backtest.datasets import movietweetings
from ops.local_broker import LocalBroker
from ops.ports import free_port
from ops.settings import SECTIONS
from tests.ops.command_line import Headrace, assert_refused

REPLAY = ("--user-col", "user_id", "--item-col", "item_id", "--time-col", "timestamp", "--time-unit", "s")


def _environment(**added: str) -> dict[str, str]:
    ours = {name: value for name, value in os.environ.items() if not name.startswith("HEADRACE_")}
    return {**ours, "PYTHONPATH": str(Path(__file__).parents[2]), **added}


def test_without_a_command_it_lists_the_commands(headrace: Headrace) -> None:
    ran = headrace("--help")
    assert ran.returncode == 0
    for command in (
        "config",
        "migrate",
        "broker",
        "ingest",
        "train",
        "serve",
        "up",
        "replay",
        "simulate",
        "demo",
        "version",
        "dlq",
    ):
        assert f"\n  {command} " in ran.stdout


def test_config_show_says_where_each_value_came_from(headrace: Headrace, tmp_path: Path) -> None:
    (tmp_path / "headrace.toml").write_text("[log]\nnum_partitions = 2\n")
    ran = headrace("config", "show", "--json", HEADRACE_LOG__LOG_ID="blue", HEADRACE_LOG__SASL_PASSWORD="sesame")
    shown = json.loads(ran.stdout)
    assert shown["log.num_partitions"] == {"value": 2, "origin": "headrace.toml [log]"}
    assert shown["log.log_id"] == {"value": "blue", "origin": "HEADRACE_LOG__LOG_ID"}
    assert shown["log.sasl_password"] == {"value": "***", "origin": "HEADRACE_LOG__SASL_PASSWORD"}
    assert shown["headrace.mode"] == {"value": "live", "origin": "default"}
    assert {key.partition(".")[0] for key in shown} == {section.table for section in SECTIONS}


def test_config_show_for_people_has_one_line_a_setting(headrace: Headrace) -> None:
    ran = headrace("config", "show", HEADRACE_LOG__LOG_ID="blue")
    assert 'log.log_id = "blue"' in ran.stdout
    assert "# HEADRACE_LOG__LOG_ID" in ran.stdout


def test_config_template_can_be_used_as_the_file(headrace: Headrace, tmp_path: Path) -> None:
    template = headrace("config", "template").stdout
    (tmp_path / "mine.toml").write_text(template)
    ran = headrace("config", "show", "--config", "mine.toml")
    assert ran.returncode == 0, ran.stderr


def test_a_wrong_setting_is_one_sentence(headrace: Headrace) -> None:
    assert_refused(headrace("config", "show", HEADRACE_LOG__LOGID="x"), "HEADRACE_LOG__LOGID", "did you mean log_id?")
    assert_refused(headrace("ingest", HEADRACE_LOG__NUM_PARTITIONS="0"), "log.num_partitions = 0")
    assert_refused(headrace("train", "--config", "nowhere.toml"), "nowhere.toml does not exist")


def test_migrate_builds_the_database_and_check_confirms_it(headrace: Headrace, tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path}/data/headrace.db"
    assert_refused(headrace("migrate", "--check", HEADRACE_STORE__URL=url))
    ran = headrace("migrate", HEADRACE_STORE__URL=url)
    assert (ran.returncode, ran.stderr) == (0, "")
    assert "schema revision" in ran.stdout
    assert headrace("migrate", HEADRACE_STORE__URL=url).returncode == 0
    assert headrace("migrate", "--check", HEADRACE_STORE__URL=url).returncode == 0


def test_a_daemon_on_a_database_without_schema_says_how_to_build_it(tmp_path: Path) -> None:
    settings = {"HEADRACE_STORE__URL": f"sqlite:///{tmp_path}/headrace.db", "HEADRACE_HEADRACE__INGEST_PORT": "0"}
    ran = subprocess.run(
        [sys.executable, "-m", "ops", "ingest"],
        capture_output=True,
        text=True,
        timeout=180,
        env=_environment(**settings),
        cwd=tmp_path,
    )
    assert ran.returncode == 2, ran
    assert "headrace migrate" in ran.stderr.strip().splitlines()[-1]
    assert "Traceback" not in ran.stderr


def test_a_taken_broker_port_is_one_sentence(headrace: Headrace) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        assert_refused(headrace("broker", "--port", port), f"port {port}", "taken")


def test_the_broker_runs_until_sigterm_and_ends_with_zero() -> None:
    port = free_port()
    process = subprocess.Popen(
        [sys.executable, "-m", "ops", "broker", "--port", str(port)],
        stdout=subprocess.PIPE,
        text=True,
        env=_environment(),
    )
    assert process.stdout is not None
    assert any("ready" in line for line in process.stdout)
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=60)
    assert process.returncode == 0


def test_replay_ends_with_one_line_of_json(headrace: Headrace, fresh_broker: LocalBroker) -> None:
    ran = headrace(
        "replay",
        str(movietweetings().interactions),
        *REPLAY,
        "--value-col",
        "rating",
        "--limit",
        "1000",
        "--bootstrap",
        fresh_broker.bootstrap_servers,
    )
    assert ran.returncode == 0, ran.stderr
    report = json.loads(ran.stdout)
    assert (report["num_events"], report["is_complete"]) == (1000, True)
    assert report["first_event_time_ms"] == 1_362_062_307_000


def test_replay_without_a_broker_is_one_sentence(headrace: Headrace) -> None:
    bootstrap = f"127.0.0.1:{free_port()}"
    ran = headrace("replay", str(movietweetings().interactions), *REPLAY, "--bootstrap", bootstrap)
    assert_refused(ran, bootstrap, "does not answer")


def test_replay_refuses_what_ingest_would_refuse_and_what_it_cannot_read(headrace: Headrace) -> None:
    interactions = str(movietweetings().interactions)
    assert_refused(headrace("replay", interactions, *REPLAY, "--action", "stare"), "--action stare", "events.actions")
    assert_refused(headrace("replay", interactions, *REPLAY, "--speed", "fast"), "speed = fast", "1000x")
    assert_refused(headrace("replay", "absent.csv", *REPLAY), "absent.csv")


def test_up_refuses_ports_that_collide_and_a_broker_that_cannot_be_local(headrace: Headrace) -> None:
    assert_refused(headrace("up", "--port", "9100", "--replicas", "3"), "9101", "--replicas")
    assert_refused(
        headrace("up", "--local-broker", HEADRACE_LOG__BOOTSTRAP_SERVERS="kafka:9092"), "kafka:9092", "this machine"
    )


def test_simulate_writes_a_stream_and_the_truth_about_it(headrace: Headrace, tmp_path: Path) -> None:
    file = tmp_path / "made.parquet"
    ran = headrace("simulate", str(file), "--scenario", "recurring", "--changes", "2", "--events", "300", "--seed", "7")
    assert ran.returncode == 0
    said = json.loads(ran.stdout)
    assert [change["first"] for change in said["changes"]] == [100, 200]
    assert json.loads((tmp_path / "made.truth.json").read_text())["changes"] == said["changes"]
    assert file.is_file()
    assert f"headrace replay {file} --user-col user_id" in ran.stderr
    assert_refused(headrace("simulate", str(tmp_path / "made.csv")), "parquet")
    assert_refused(headrace("simulate", str(file), "--events", "0"), "num_events = 0")
