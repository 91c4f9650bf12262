"""The supervisor with real processes: crashes are restarted with growing waits, stops are orderly and bounded."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from ops.errors import SupervisionError
from ops.supervisor import SUPERVISOR_VARIABLE, Child, ChildStatus, Supervisor, SupervisorConfig, backoff_s

FAST = SupervisorConfig(backoff_first_s=0.02, backoff_max_s=0.1, stop_timeout_s=3.0)
SLEEPS = "exec sleep 60"
IGNORES_SIGTERM = "trap '' TERM; echo deaf; while true; do sleep 0.05; done"


def _shell(name: str, script: str) -> Child:
    return Child(name=name, command=("/bin/sh", "-c", script))


def _wait_for(condition: Callable[[], bool], timeout_s: float = 10.0) -> None:
    deadline_s = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline_s, "waited in vain"
        time.sleep(0.01)


def _only(supervisor: Supervisor) -> ChildStatus:
    (status,) = supervisor.status()
    return status


def _is_running(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def test_a_killed_child_is_started_again() -> None:
    with Supervisor([_shell("sleeper", SLEEPS)], FAST) as supervisor:
        first = _only(supervisor).pid
        supervisor.send_signal("sleeper", signal.SIGKILL)
        _wait_for(lambda: _only(supervisor).num_starts == 2)
        status = _only(supervisor)
        assert status.state == "running"
        assert status.pid != first
        assert status.last_exit == -signal.SIGKILL
    assert _only(supervisor).state == "stopped"


def test_a_child_that_ends_by_itself_is_started_again_even_without_an_error() -> None:
    with Supervisor([_shell("short", "exit 0")], FAST) as supervisor:
        _wait_for(lambda: _only(supervisor).num_starts >= 3)
        assert _only(supervisor).last_exit == 0


def test_waits_double_up_to_the_limit() -> None:
    config = SupervisorConfig(backoff_first_s=0.5, backoff_max_s=3.0)
    assert [backoff_s(crashes, config) for crashes in (1, 2, 3, 4, 5, 10_000)] == [0.5, 1.0, 2.0, 3.0, 3.0, 3.0]


def test_a_crashing_child_waits_longer_each_time(tmp_path: Path) -> None:
    starts = tmp_path / "starts"
    script = f"{sys.executable} -S -c 'import time; print(time.monotonic())' >> {starts}; exit 1"
    with Supervisor([_shell("looper", script)], SupervisorConfig(backoff_first_s=0.2, backoff_max_s=10)) as supervisor:
        _wait_for(lambda: starts.exists() and len(starts.read_text().split()) >= 3)
        assert _only(supervisor).last_exit == 1
    first, second, third = (float(text) for text in starts.read_text().split()[:3])
    assert second - first >= 0.2
    assert third - second >= 0.4


def test_a_child_that_ran_well_starts_over_with_the_shortest_wait() -> None:
    config = SupervisorConfig(backoff_first_s=0.05, backoff_max_s=60, healthy_after_s=0.0)
    with Supervisor([_shell("short", "exit 1")], config) as supervisor:
        _wait_for(lambda: _only(supervisor).num_starts >= 8, timeout_s=5)  # doubling would take 6.4 s


def test_children_stop_in_reverse_start_order(tmp_path: Path) -> None:
    order = tmp_path / "order"
    script = "trap 'sleep 0.1; echo {name} >> {order}; exit 0' TERM; echo up; while true; do sleep 0.02; done"
    names = ["ingest", "trainer", "serving"]
    lines: list[str] = []
    children = [_shell(name, script.format(name=name, order=order)) for name in names]
    with Supervisor(children, FAST, write_line=lines.append) as supervisor:
        _wait_for(lambda: len(lines) == 3)
    assert order.read_text().split() == names[::-1]
    assert [status.last_exit for status in supervisor.status()] == [0, 0, 0]


def test_a_child_deaf_to_sigterm_is_killed_at_the_deadline_and_the_others_still_drain(tmp_path: Path) -> None:
    drained = tmp_path / "drained"
    drains = f"trap 'echo yes > {drained}; exit 0' TERM; echo up; while true; do sleep 0.02; done"
    lines: list[str] = []
    config = SupervisorConfig(stop_timeout_s=1.0)
    with Supervisor(
        [_shell("good", drains), _shell("deaf", IGNORES_SIGTERM)], config, write_line=lines.append
    ) as supervisor:
        _wait_for(lambda: len(lines) == 2)
        start_s = time.monotonic()
    stopped_in_s = time.monotonic() - start_s
    good, deaf = supervisor.status()
    assert 0.9 < stopped_in_s < 2.5
    assert (good.last_exit, deaf.last_exit) == (0, -signal.SIGKILL)
    assert drained.exists()


def test_a_child_waiting_for_its_restart_is_not_started_by_a_stop() -> None:
    config = SupervisorConfig(backoff_first_s=60, backoff_max_s=60)
    with Supervisor([_shell("looper", "exit 7")], config) as supervisor:
        _wait_for(lambda: _only(supervisor).state == "waiting")
        restart_in_s = _only(supervisor).restart_in_s
        assert restart_in_s is not None
        assert 50 < restart_in_s <= 60
    status = _only(supervisor)
    assert (status.state, status.num_starts, status.last_exit) == ("stopped", 1, 7)


def test_a_child_that_refuses_to_start_is_not_retried_and_is_quoted() -> None:
    with Supervisor(
        [_shell("serving", "echo port 8000 is taken >&2; exit 2")], FAST, write_line=lambda _: None
    ) as supervisor:
        _wait_for(lambda: _only(supervisor).state == "refused")
        time.sleep(0.1)
        assert _only(supervisor).num_starts == 1
        with pytest.raises(SupervisionError, match="serving cannot start: port 8000 is taken"):
            supervisor.raise_if_refused()


def test_status_two_later_on_is_a_crash_like_any_other(tmp_path: Path) -> None:
    flag = tmp_path / "flag"
    script = f"if [ -e {flag} ]; then exit 2; fi; touch {flag}; exit 1"
    with Supervisor([_shell("twice", script)], FAST) as supervisor:
        _wait_for(lambda: _only(supervisor).num_starts >= 4)


def test_a_command_that_does_not_exist_is_named_and_nothing_is_left_running(tmp_path: Path) -> None:
    pid_file = tmp_path / "pid"
    children = [
        _shell("first", f"echo $$ > {pid_file}.new; mv {pid_file}.new {pid_file}; {SLEEPS}"),
        Child(name="second", command=("/nowhere/headrace",)),
    ]
    supervisor = Supervisor(children, FAST)
    with pytest.raises(SupervisionError, match="second cannot be started"):
        supervisor.start()
    assert not pid_file.exists() or not _is_running(int(pid_file.read_text()))


def test_output_carries_the_name_of_the_child() -> None:
    lines: list[str] = []
    child = _shell("ingest", f"echo to stdout; echo to stderr >&2; {SLEEPS}")
    with Supervisor([child], FAST, write_line=lines.append) as supervisor:
        _wait_for(lambda: len(lines) == 2)
        assert sorted(lines) == ["ingest | to stderr", "ingest | to stdout"]
        assert set(_only(supervisor).last_lines) == {"to stdout", "to stderr"}


def test_logs_go_to_one_file_per_child_and_have_a_limit(tmp_path: Path) -> None:
    config = SupervisorConfig(log_dir=tmp_path / "logs", log_max_bytes=1_000)
    script = f"i=0; while [ $i -lt 300 ]; do echo line $i; i=$((i+1)); done; echo end; {SLEEPS}"
    with Supervisor([_shell("trainer", script)], config) as supervisor:
        _wait_for(lambda: "end" in _only(supervisor).last_lines)
    current, older = tmp_path / "logs" / "trainer.log", tmp_path / "logs" / "trainer.log.1"
    assert current.read_text().endswith("line 299\nend\n")
    assert current.stat().st_size <= 1_000
    assert older.stat().st_size <= 1_000


@pytest.mark.parametrize("full", ["file", "folder"])
def test_a_disk_that_takes_no_log_silences_no_child(tmp_path: Path, full: str) -> None:
    logs, lines = tmp_path / "logs", list[str]()
    if full == "file":
        logs.mkdir()
        (logs / "trainer.log").symlink_to("/dev/full")
    else:
        logs.write_text("in the way")
    # More than a pipe holds: if nobody reads, the child never comes to its end.
    script = f"head -c 300000 /dev/zero | tr '\\0' x | fold -w 99; echo; echo end; {SLEEPS}"
    with Supervisor([_shell("trainer", script)], SupervisorConfig(log_dir=logs), write_line=lines.append) as supervisor:
        _wait_for(lambda: "end" in _only(supervisor).last_lines)
    assert ("trainer | end" in lines) == (full == "folder")


SUPERVISED = """
import sys
from ops.errors import SupervisionError
from ops.supervisor import Child, Supervisor, SupervisorConfig
child = Child(name="child", command=("/bin/sh", "-c", "echo pid $$; " + sys.argv[1]))
config = SupervisorConfig(stop_timeout_s=float(sys.argv[2]))
try:
    Supervisor([child], config, write_line=lambda line: print(line, flush=True)).run()
except SupervisionError as error:
    print(error, flush=True)
    sys.exit(2)
"""


def _supervised(script: str, stop_timeout_s: float = 5.0) -> tuple[subprocess.Popen[str], int]:
    process = subprocess.Popen(
        [sys.executable, "-c", SUPERVISED, script, str(stop_timeout_s)], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    return process, int(process.stdout.readline().removeprefix("child | pid "))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_to_the_supervisor_stops_the_children_and_ends_it_with_zero(number: signal.Signals) -> None:
    process, pid = _supervised(SLEEPS)
    process.send_signal(number)
    process.communicate(timeout=30)
    assert process.returncode == 0
    assert not _is_running(pid)


def test_a_second_signal_does_not_wait_for_the_deadline() -> None:
    process, pid = _supervised(IGNORES_SIGTERM, stop_timeout_s=60)
    assert process.stdout is not None
    assert "deaf" in process.stdout.readline()
    process.send_signal(signal.SIGINT)
    time.sleep(0.3)
    assert process.poll() is None
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=30)
    assert not _is_running(pid)


def test_the_supervisor_ends_when_a_child_refuses_to_start() -> None:
    process, _ = _supervised("sleep 0.2; echo no such table: interaction; exit 2")
    output, _ = process.communicate(timeout=30)
    assert process.returncode == 2
    assert "child cannot start: no such table: interaction" in output


@pytest.mark.kill
def test_a_child_stops_itself_when_its_supervisor_was_killed(tmp_path: Path) -> None:
    log = tmp_path / "log"
    code = (
        "import os, time, signal, sys; from ops.supervisor import stop_when_orphaned; "
        "signal.signal(signal.SIGTERM, lambda *_: sys.exit(0)); "
        f"stop_when_orphaned(os.environ, poll_s=0.05); open('{log}', 'w').close(); time.sleep(60)"
    )
    process, pid = _supervised(f'exec {sys.executable} -c "{code}"')
    _wait_for(log.exists)
    process.kill()
    process.communicate(timeout=30)
    _wait_for(lambda: not _is_running(pid))


def test_a_daemon_started_by_hand_has_no_supervisor_to_miss() -> None:
    code = "import os; from ops.supervisor import stop_when_orphaned; stop_when_orphaned({}, poll_s=0.01); print('ok')"
    environment = {name: value for name, value in os.environ.items() if name != SUPERVISOR_VARIABLE}
    ran = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=30)
    assert ran.stdout == "ok\n"
