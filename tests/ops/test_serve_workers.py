"""`headrace serve --workers`: independent processes, restarted when they crash, stopped together."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest

from feature_store.schema import migrate
from ops.errors import SettingsError
from ops.ports import free_port
from ops.settings import load
from ops.up import UpOptions, workers

START_S_MAX = 90.0


def test_workers_are_on_consecutive_ports_and_read_the_same_settings(tmp_path: Path) -> None:
    settings_file = tmp_path / "headrace.toml"
    settings_file.touch()
    options = UpOptions(num_replicas=3, first_port=7000, config_path=settings_file)
    started = workers(load(settings_file, environment={}), options)
    assert [child.name for child in started] == ["serving-7000", "serving-7001", "serving-7002"]
    assert [child.command[-3:] for child in started] == [("serve", "--port", str(port)) for port in (7000, 7001, 7002)]
    assert all(child.environment == {"HEADRACE_CONFIG": str(settings_file)} for child in started)


def test_several_workers_need_a_port_that_is_named(tmp_path: Path) -> None:
    (tmp_path / "headrace.toml").touch()
    settings = load(tmp_path / "headrace.toml", environment={"HEADRACE_SERVING__PORT": "0"})
    with pytest.raises(SettingsError, match="name the first"):
        workers(settings, UpOptions(num_replicas=2))
    assert len(workers(settings, UpOptions())) == 1


@pytest.mark.kill
def test_a_worker_that_is_killed_comes_back_while_the_other_answers(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path / 'store.db'}"
    migrate(url)
    port = free_port(num=2)
    environment = {name: value for name, value in os.environ.items() if not name.startswith("HEADRACE_")} | {
        "HEADRACE_HEADRACE__DATA_DIR": str(tmp_path),
        "HEADRACE_STORE__URL": url,
        "HEADRACE_LOG__BOOTSTRAP_SERVERS": "127.0.0.1:9",
    }
    log = (tmp_path / "serve.log").open("wb")
    running = subprocess.Popen(
        [sys.executable, "-m", "ops", "serve", "--workers", "2", "--port", str(port)],
        env=environment,
        stdout=log,
        stderr=log,
    )
    try:
        first, second = (wait_for(lambda at=at: status(at), log) for at in (port, port + 1))  # type: ignore[misc]
        assert {first["replica"], second["replica"]} == {f"{socket.gethostname()}:{at}" for at in (port, port + 1)}
        os.kill(pid_on(port + 1), signal.SIGKILL)
        assert ask(port)["fallback_reason"] == "no_weights"
        wait_for(lambda: status(port + 1), log)
        assert ask(port + 1)["fallback_reason"] == "no_weights"
        assert_each_metric_once(port)
        running.send_signal(signal.SIGTERM)
        assert running.wait(30) == 0, Path(log.name).read_text()
        for at in (port, port + 1):
            assert status(at) is None
    finally:
        if running.poll() is None:
            running.kill()
        log.close()


def status(port: int) -> dict[str, Any] | None:
    try:
        answer: dict[str, Any] = httpx.get(f"http://127.0.0.1:{port}/status", timeout=5).json()
    except httpx.TransportError:
        return None
    return answer


def ask(port: int) -> dict[str, Any]:
    response = httpx.post(f"http://127.0.0.1:{port}/v1/recommend", json={"user_id": 7}, timeout=30)
    assert response.status_code == 200, response.text
    answer: dict[str, Any] = response.json()
    return answer


def assert_each_metric_once(port: int) -> None:
    """Nobody else measures what we do: FastAPI would, under the same name."""
    told = httpx.get(f"http://127.0.0.1:{port}/metrics", timeout=30).text
    types = [line for line in told.splitlines() if line.startswith("# TYPE")]
    assert any("http_server_request_duration" in line for line in types)
    assert len(types) == len(set(types))
    assert 'otel_scope_name="fastapi"' not in told


def wait_for(read: Callable[[], Any], log: Any) -> Any:
    deadline_s = time.monotonic() + START_S_MAX
    while (found := read()) is None:
        assert time.monotonic() < deadline_s, Path(log.name).read_text()
        time.sleep(0.1)
    return found


def pid_on(port: int) -> int:
    """The process that was started to listen on a port."""
    for folder in Path("/proc").iterdir():
        try:
            command = (folder / "cmdline").read_bytes().split(b"\0")
        except OSError:
            continue
        if command[-4:-1] == [b"serve", b"--port", str(port).encode()]:
            return int(folder.name)
    raise AssertionError(f"no worker for port {port}")
