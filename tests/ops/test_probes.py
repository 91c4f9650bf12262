"""Probes tell the truth over HTTP while the daemon is busy, and survive a question that fails."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import httpx
import pytest

from ops.errors import PortTakenError
from ops.probes import Probes, ProbeServer, Readiness

AWAY = Readiness(is_ready=False, reason="the broker at kafka:9092 does not answer")


@dataclass
class Daemon:
    alive: bool = True
    ready: Readiness = AWAY
    state: dict[str, Any] = field(default_factory=dict)

    def probes(self) -> Probes:
        return Probes(
            is_alive=lambda: self.alive,
            readiness=lambda: self.ready,
            metrics=lambda: b"headrace_events_total 3\n",
            status=lambda: self.state,
        )


@pytest.fixture
def daemon() -> Daemon:
    return Daemon()


@pytest.fixture
def client(daemon: Daemon) -> Iterator[httpx.Client]:
    with (
        ProbeServer(daemon.probes(), port=0) as server,
        httpx.Client(base_url=f"http://127.0.0.1:{server.port}", timeout=5) as client,
    ):
        yield client


def test_a_daemon_that_waits_for_its_broker_is_alive_but_not_ready_and_says_why(client: httpx.Client) -> None:
    assert client.get("/livez").status_code == 200
    answer = client.get("/readyz")
    assert answer.status_code == 503
    assert answer.text == "not ready: the broker at kafka:9092 does not answer\n"


def test_readiness_follows_the_daemon(client: httpx.Client, daemon: Daemon) -> None:
    daemon.ready = Readiness(is_ready=True)
    assert client.get("/readyz").status_code == 200


def test_a_stopped_main_loop_is_not_alive(client: httpx.Client, daemon: Daemon) -> None:
    daemon.alive = False
    assert client.get("/livez").status_code == 503


def test_metrics_and_status_are_served(client: httpx.Client, daemon: Daemon) -> None:
    daemon.state = {"num_events": 3, "at": Readiness}
    assert client.get("/metrics").text == "headrace_events_total 3\n"
    assert client.get("/status?pretty").json()["num_events"] == 3


def test_an_unknown_path_names_the_known_ones(client: httpx.Client) -> None:
    answer = client.get("/healthz")
    assert answer.status_code == 404
    assert "/readyz" in answer.text


def test_a_question_that_fails_is_logged_and_the_next_one_is_answered(
    client: httpx.Client, daemon: Daemon, caplog: pytest.LogCaptureFixture
) -> None:
    circle: dict[str, Any] = {}
    circle["self"] = circle
    daemon.state = circle
    with caplog.at_level(logging.ERROR):
        assert client.get("/status").status_code == 500
    assert "answering /status failed" in caplog.text
    assert client.get("/livez").status_code == 200


def test_a_taken_port_is_named(daemon: Daemon) -> None:
    with (
        ProbeServer(daemon.probes(), port=0) as first,
        pytest.raises(PortTakenError, match=f"port {first.port} on 127.0.0.1"),
    ):
        ProbeServer(daemon.probes(), port=first.port).start()
