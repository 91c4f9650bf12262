"""Ingest, trainer and upstream daemon as processes: what they say while something is away, and that they stop."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from feature_store.schema import migrate
from ops.ports import free_port
from tests.faults.installation import START_S_MAX, Installation

RANKED = {"HEADRACE_RANKING__TASKS": '["rating"]'}
"""Nobody starts an upstream daemon without a task."""


class Daemon:
    """One daemon process with its own settings."""

    def __init__(self, name: str, root: Path, **settings: str) -> None:
        self.port = free_port()
        environment = os.environ | {
            "HEADRACE_HEADRACE__DATA_DIR": str(root),
            "HEADRACE_HEADRACE__INGEST_PORT": str(self.port),
            "HEADRACE_HEADRACE__TRAINER_PORT": str(self.port),
            "HEADRACE_HEADRACE__UPSTREAM_PORT": str(self.port),
            **settings,
        }
        self.log = root / f"{name}.log"
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "ops", name], env=environment, stdout=log, stderr=log
            )

    def not_ready_because(self, *words: str) -> None:
        """Wait until /readyz is 503 with these words."""
        deadline, text = time.monotonic() + START_S_MAX, ""
        while time.monotonic() < deadline:
            assert self.process.poll() is None, self.log.read_text()
            try:
                answer = httpx.get(f"http://127.0.0.1:{self.port}/readyz", timeout=5)
            except httpx.TransportError:
                continue
            text = answer.text
            if answer.status_code == 503 and all(word in text for word in words):
                return
            time.sleep(0.05)
        pytest.fail(f"/readyz says {text!r}; log: {self.log.read_text()}")

    def stops_when_told_to(self) -> None:
        self.process.send_signal(signal.SIGTERM)
        assert self.process.wait(60) == 0, self.log.read_text()


@pytest.fixture
def daemons() -> Iterator[list[Daemon]]:
    started: list[Daemon] = []
    yield started
    for daemon in started:
        if daemon.process.poll() is None:
            daemon.process.kill()
            daemon.process.wait()


def test_without_a_broker_they_wait_and_say_so(tmp_path: Path, daemons: list[Daemon]) -> None:
    url = f"sqlite:///{tmp_path}/store.db"
    migrate(url)
    away = {"HEADRACE_LOG__BOOTSTRAP_SERVERS": "127.0.0.1:9", "HEADRACE_STORE__URL": url, **RANKED}
    daemons += [Daemon(name, tmp_path, **away) for name in ("ingest", "train", "upstream")]
    for daemon in daemons:
        daemon.not_ready_because("the broker at 127.0.0.1:9 does not answer")
        daemon.stops_when_told_to()
        assert "trying again in" in daemon.log.read_text()
        assert "Traceback" not in daemon.log.read_text()


def test_without_a_database_they_wait_and_say_so(tmp_path: Path, daemons: list[Daemon]) -> None:
    away = {"HEADRACE_STORE__URL": "postgresql://nobody@127.0.0.1:9/nothing", **RANKED}
    daemons += [Daemon(name, tmp_path, **away) for name in ("ingest", "train", "upstream")]
    for daemon in daemons:
        daemon.not_ready_because("127.0.0.1:9", "check store.url")
        daemon.stops_when_told_to()
        assert "trying again in" in daemon.log.read_text()
        assert "Traceback" not in daemon.log.read_text()


@pytest.mark.parametrize("name", ["ingest", "train", "upstream", "serve"])
def test_told_to_stop_while_it_starts_it_ends_cleanly(tmp_path: Path, name: str) -> None:
    url = f"sqlite:///{tmp_path}/store.db"
    migrate(url)
    with Installation(tmp_path, "127.0.0.1:9", url, settings=RANKED) as installation:
        daemon = installation.start(name)
        daemon.stop()  # as soon as it listens
        assert "Traceback" not in daemon.said()


@pytest.mark.parametrize(
    ("name", "settings", "says"),
    [
        (
            "train",
            {"HEADRACE_MODEL__MAX_LEN": "512"},
            "hot.max_len = 512: a step reads one interaction more than the model",
        ),
        (
            "serve",
            {"HEADRACE_MODEL__TRANSDUCERS": '[{"name": "deeds", "actions": ["buy"]}]'},
            "model.transducers: deeds reads buy; declared in events.actions are",
        ),
        ("upstream", {}, "ranking.tasks is empty: the upstream user model serves the ranker"),
        (
            "upstream",
            {"HEADRACE_UPSTREAM__CONTENT": "true", "HEADRACE_ITEMS__CONTENT_ITEMS": "0"},
            "upstream.content is on and items.content_items is 0",
        ),
    ],
)
def test_a_model_that_could_never_learn_is_refused_at_start(
    tmp_path: Path, name: str, settings: dict[str, str], says: str
) -> None:
    run = subprocess.run(
        [sys.executable, "-m", "ops", name],
        env=os.environ | {"HEADRACE_HEADRACE__DATA_DIR": str(tmp_path), **settings},
        capture_output=True,
        text=True,
        timeout=START_S_MAX,
        check=False,
    )
    assert run.returncode == 2, run.stderr
    assert says in run.stderr.replace("\n", " ")


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"HEADRACE_MODEL__MAX_ITEMS": "100"}, "model.max_items is 100; the items of a step"),
        ({}, "none of the 1 checkpoints in"),
    ],
)
def test_a_trainer_that_cannot_begin_says_why_in_one_sentence(
    tmp_path: Path, daemons: list[Daemon], settings: dict[str, str], says: str
) -> None:
    url = f"sqlite:///{tmp_path}/store.db"
    migrate(url)
    if not settings:
        (tmp_path / "checkpoints" / "default" / "c0000000001").mkdir(parents=True)
    daemons.append(Daemon("train", tmp_path, HEADRACE_STORE__URL=url, **settings))
    assert daemons[0].process.wait(START_S_MAX) == 2
    assert says in daemons[0].log.read_text().replace("\n", " ")
    assert "Traceback" not in daemons[0].log.read_text()


def test_a_database_without_schema_is_refused_with_the_remedy(tmp_path: Path, daemons: list[Daemon]) -> None:
    daemons.append(Daemon("train", tmp_path, HEADRACE_STORE__URL=f"sqlite:///{tmp_path}/new.db"))
    assert daemons[0].process.wait(START_S_MAX) == 2
    assert "run `headrace migrate`" in daemons[0].log.read_text()
    assert "Traceback" not in daemons[0].log.read_text()
