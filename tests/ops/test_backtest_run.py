"""`headrace backtest run` as a process: killed, gone on with, refused."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import polars as pl
import pytest

from tests.backtest.conftest import table_bytes, walks
from tests.ops.command_line import Headrace, assert_refused

CONFIG = """
[headrace]
data_dir = "{root}/var"
[source]
format = "parquet"
paths = ["{root}/log.parquet"]
time_unit = "ms"
default_action = "click"
[model]
embedding_dim = 8
num_layers = 1
num_heads = 1
attention_dim = 4
hidden_dim = 4
max_len = 6
[trainer]
batch_interactions = 16
[backtest]
name = "walks"
publish_every = ["batch", "40s", "never"]
weights_lag = ["20s"]
poll_events = 100
checkpoint_events = 300
keep_weights_every = "100s"
{more}
"""


def configured(root: Path, num_events: int, *, more: str = "") -> Path:
    """A log and a configuration for it."""
    log = walks(num_events)
    columns = {"user_id": log.user_id, "item_id": log.item_id, "event_time": log.time_ms}
    pl.DataFrame(columns).write_parquet(root / "log.parquet")
    path = root / "run.toml"
    path.write_text(CONFIG.format(root=root, more=more))
    return path


def test_a_run_that_was_killed_goes_on_to_the_bytes_of_one_that_was_not(tmp_path: Path, headrace: Headrace) -> None:
    config = configured(tmp_path, 2_000)
    killed, whole = tmp_path / "killed", tmp_path / "whole"
    command = [sys.executable, "-m", "ops", "backtest", "run", str(config), "--out"]
    with subprocess.Popen([*command, str(killed)], stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL) as process:
        deadline_s = time.monotonic() + 120
        while len(list(killed.glob("checkpoints/c*"))) == 0 and time.monotonic() < deadline_s:
            time.sleep(0.01)
        os.kill(process.pid, signal.SIGKILL)
    assert process.returncode == -signal.SIGKILL
    assert not json.loads((killed / "run.json").read_text())["is_complete"]
    for root in (killed, whole):
        ran = headrace("backtest", "run", str(config), "--out", str(root))
        assert ran.returncode == 0, ran.stderr
        assert "online-40s" in ran.stdout
    assert table_bytes(killed) == table_bytes(whole)
    stored = [json.loads((root / "run.json").read_text()) for root in (killed, whole)]
    for name in ("fingerprints", "metrics", "counts", "num_evaluated", "config", "is_complete"):
        assert stored[0][name] == stored[1][name], name
    assert stored[0]["is_complete"]


def test_an_interrupted_run_says_how_to_go_on(tmp_path: Path) -> None:
    config = configured(tmp_path, 4_000)
    command = [sys.executable, "-m", "ops", "backtest", "run", str(config), "--out", str(tmp_path / "run")]
    with subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True) as process:
        deadline_s = time.monotonic() + 120
        while not list((tmp_path / "run").glob("checkpoints/c*")) and time.monotonic() < deadline_s:
            time.sleep(0.01)
        process.send_signal(signal.SIGINT)
        assert process.stderr is not None
        said = process.stderr.read()
    assert process.returncode == 130, said
    assert "the same command goes on" in said


def test_several_seeds_are_told_with_mean_and_spread(tmp_path: Path, headrace: Headrace) -> None:
    config = configured(tmp_path, 400, more="seeds = [1, 2, 3]")
    ran = headrace("backtest", "run", str(config), "--out", str(tmp_path / "sweep"))
    assert ran.returncode == 0, ran.stderr
    sweep = json.loads((tmp_path / "sweep" / "sweep.json").read_text())
    mrr = sweep["arms"]["online-batch"]["mrr"]
    assert sweep["seeds"] == [1, 2, 3]
    assert mrr["mean"] == pytest.approx(np.mean(mrr["values"]))
    assert mrr["sd"] > 0
    assert mrr["sd"] == pytest.approx(np.std(mrr["values"], ddof=1))
    # No seed enters what the stream alone decides.
    assert sweep["arms"]["popularity"]["mrr"]["sd"] == 0


def test_a_folder_with_another_run_is_not_overwritten(tmp_path: Path, headrace: Headrace) -> None:
    config = configured(tmp_path, 200)
    assert headrace("backtest", "run", str(config), "--out", str(tmp_path / "run")).returncode == 0
    config.write_text(config.read_text().replace("max_len = 6", "max_len = 5"))
    assert_refused(
        headrace("backtest", "run", str(config), "--out", str(tmp_path / "run")), "model.max_len", "--restart"
    )


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ('late = "soon"', ["backtest.late", "10m"]),
        ('batch_wait = "5"', ["backtest.batch_wait"]),
        ("seeds = []", ["backtest.seeds"]),
        (
            '[[backtest.arms]]\nname = "x"\n[backtest.arms.settings.model]\nmax_len = 3',
            ["model.max_len", "same for all"],
        ),
        ('[[backtest.arms]]\nname = "x"\n[backtest.arms.settings.model]\ndepth = 3', ["model.depth", "does not exist"]),
        ("[arrivals]\ndelay_ms = 10", ["backtest.late"]),
        ('[[backtest.arms]]\nname = "online-batch"', ["named twice"]),
    ],
)
def test_what_cannot_be_meant_is_one_sentence(tmp_path: Path, headrace: Headrace, more: str, words: list[str]) -> None:
    config = configured(tmp_path, 50, more=more)
    assert_refused(headrace("backtest", "run", str(config), "--out", str(tmp_path / "run")), *words)


def test_a_replay_equals_what_broker_and_daemons_make_of_the_same_log(tmp_path: Path, headrace: Headrace) -> None:
    config = configured(tmp_path, 700)
    ran = headrace("backtest", "run", str(config), "--out", str(tmp_path / "run"), "--through-broker")
    assert ran.returncode == 0, ran.stderr
    for name in ("histories", "weights", "metrics"):
        assert f"{name} through the broker: equal" in ran.stderr


def test_a_replay_that_differs_from_the_daemons_is_told(tmp_path: Path, headrace: Headrace) -> None:
    config = configured(tmp_path, 300)
    assert headrace("backtest", "run", str(config), "--out", str(tmp_path / "run")).returncode == 0
    path = tmp_path / "run" / "run.json"
    stored = json.loads(path.read_text())
    stored["fingerprints"]["weights"] = "0" * 64
    path.write_text(json.dumps(stored))
    ran = headrace("backtest", "run", str(config), "--out", str(tmp_path / "run"), "--through-broker")
    assert ran.returncode == 1
    assert "weights through the broker: NOT EQUAL" in ran.stderr


def test_a_moment_of_a_run_is_shown(tmp_path: Path, headrace: Headrace) -> None:
    config = configured(tmp_path, 600)
    run = str(tmp_path / "run")
    assert headrace("backtest", "run", str(config), "--out", run).returncode == 0
    moment = "2023-11-14T22:20:00"
    shown = headrace("backtest", "at", moment, "--user", "3", "--run", run)
    assert shown.returncode == 0, shown.stderr
    assert "weights: version" in shown.stdout
    assert "online-40s: publication" in shown.stdout
    found = json.loads(headrace("backtest", "at", moment, "--user", "3", "--run", run, "--json").stdout)
    assert len(found["recommended"]) == 10
    assert_refused(headrace("backtest", "at", "noon", "--user", "3", "--run", run), "2017-10-05T12:00")
    assert_refused(headrace("backtest", "at", moment, "--user", "3", "--run", str(tmp_path)), "no run")
