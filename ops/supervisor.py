"""Runs headrace's daemons as child processes: started in order, restarted when they crash, stopped in reverse order.

A crash is answered by a start after a back-off that doubles up to a limit; a child that has run well for a while
starts over with the shortest wait. One thing is not retried: a child that refuses to start at all with exit status 2
(settings, port), because only a person can mend that.
"""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType, TracebackType
from typing import Final, Literal, Self

from ops.errors import SupervisionError

logger = logging.getLogger(__name__)

SUPERVISOR_VARIABLE: Final = "HEADRACE_SUPERVISOR_PID"
REFUSED_STATUS: Final = 2
"""Exit status of a daemon that cannot start as it is set up."""
_POLL_S: Final = 0.02
_LINE_MAX_BYTES: Final = 65_536
_LAST_LINES: Final = 5


@dataclass(frozen=True, kw_only=True, slots=True)
class Child:
    """A process to keep running."""

    name: str
    command: tuple[str, ...]
    environment: Mapping[str, str] = field(default_factory=dict)
    """Added to our own environment."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SupervisorConfig:
    """How children are kept running."""

    backoff_first_s: float = 0.5
    """Wait before the first restart; doubles with every crash in a row."""

    backoff_max_s: float = 30.0
    """Longest wait before a restart: how late a repaired cause (disk, network) is noticed."""

    healthy_after_s: float = 30.0
    """A child that ran this long starts over with the shortest wait."""

    stop_timeout_s: float = 10.0
    """Time for all children together to drain; what still runs then gets SIGKILL."""

    log_dir: Path | None = None
    """Folder for one log file per child; without it, lines go to `write_line` with the child's name in front."""

    log_max_bytes: int = 16_777_216
    """A log file of this size is moved to `<name>.log.1`, replacing the one before."""

    def __post_init__(self) -> None:
        if not 0 < self.backoff_first_s <= self.backoff_max_s:
            raise ValueError(f"backoff_first_s = {self.backoff_first_s}: must lie in 0..backoff_max_s")
        if self.stop_timeout_s <= 0:
            raise ValueError(f"stop_timeout_s = {self.stop_timeout_s}: must be positive")


@dataclass(frozen=True, slots=True)
class ChildStatus:
    """What a child does right now."""

    name: str
    state: Literal["running", "waiting", "stopped", "refused"]
    """`waiting`: crashed, to be started again. `refused`: exit status 2 before it ever ran well."""

    pid: int | None
    num_starts: int
    last_exit: int | None
    """Exit status of the process before; negative: the signal that ended it."""

    restart_in_s: float | None
    last_lines: tuple[str, ...]


class Supervisor:
    """Keeps children running from `start()` to `stop()`; a thread watches them."""

    def __init__(
        self,
        children: Sequence[Child],
        config: SupervisorConfig | None = None,
        *,
        write_line: Callable[[str], None] = print,
    ) -> None:
        assert len({child.name for child in children}) == len(children), "children need different names"
        self._config = config or SupervisorConfig()
        self._runs = [_Run(child, self._config, write_line) for child in children]
        self._lock = threading.Lock()
        self._is_stopping = threading.Event()
        self._refused = threading.Event()
        self._watcher: threading.Thread | None = None

    def start(self) -> None:
        """Start all children, in order; raises SupervisionError when a command cannot be executed."""
        assert self._watcher is None, "started already"
        self._is_stopping.clear()
        try:
            for run in self._runs:
                run.start()
        except SupervisionError:
            self._drain()
            raise
        self._watcher = threading.Thread(target=self._watch, name="supervisor", daemon=True)
        self._watcher.start()

    def stop(self) -> None:
        """SIGTERM to the children in reverse start order, each after the one before has ended or had its share of
        `stop_timeout_s`; SIGKILL to what is left at the end of it. Does nothing when not started.
        """
        self._is_stopping.set()
        if self._watcher is not None:
            self._watcher.join()
            self._watcher = None
        self._drain()

    def status(self) -> list[ChildStatus]:
        """One entry per child, in start order."""
        with self._lock:
            return [run.status() for run in self._runs]

    def send_signal(self, name: str, number: signal.Signals) -> None:
        """Send a signal to a running child: how the demo and the tests play a crash."""
        with self._lock:
            next(run for run in self._runs if run.child.name == name).send_signal(number)

    def raise_if_refused(self) -> None:
        """Raise SupervisionError when a child refused to start as it is set up."""
        for one in self.status():
            if one.state == "refused":
                words = one.last_lines[-1] if one.last_lines else "it gave no reason"
                raise SupervisionError(f"{one.name} cannot start: {words}")

    def run(self) -> None:
        """Start the children and keep them running until SIGTERM or SIGINT, then stop them; main thread only.

        A second signal ends the draining at once. Raises SupervisionError when a child refuses to start.
        """
        asked = threading.Event()

        def on_signal(_number: int, _frame: FrameType | None) -> None:
            if asked.is_set():
                self._kill_all()
            asked.set()

        # Handlers first: a signal that comes while children start must not leave them behind.
        previous = {number: signal.signal(number, on_signal) for number in (signal.SIGTERM, signal.SIGINT)}
        try:
            self.start()
            while not asked.wait(0.1) and not self._refused.is_set():
                pass
        finally:
            self.stop()
            for number, handler in previous.items():
                signal.signal(number, handler)
        self.raise_if_refused()

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.stop()

    def _watch(self) -> None:
        while not self._is_stopping.wait(_POLL_S):
            with self._lock:
                for run in self._runs:
                    run.check()
                    if run.is_refused:
                        self._refused.set()

    def _drain(self) -> None:
        deadline_s = time.monotonic() + self._config.stop_timeout_s
        for index in range(len(self._runs) - 1, -1, -1):
            run = self._runs[index]
            run.send_signal(signal.SIGTERM)
            # Whoever does not use up its share leaves it to those that stop after it.
            run.wait((deadline_s - time.monotonic()) / (index + 1))
        for run in self._runs:
            run.wait(deadline_s - time.monotonic())
        self._kill_all()
        for run in self._runs:
            run.finish()

    def _kill_all(self) -> None:
        for run in self._runs:
            run.send_signal(signal.SIGKILL)


class _Run:
    """The runs of one child, one after the other."""

    def __init__(self, child: Child, config: SupervisorConfig, write_line: Callable[[str], None]) -> None:
        self.child = child
        self.is_refused = False
        self._config = config
        self._write_line = write_line
        self._process: subprocess.Popen[bytes] | None = None
        self._reader: threading.Thread | None = None
        self._last_lines: deque[str] = deque(maxlen=_LAST_LINES)
        self._num_starts = 0
        self._num_crashes_in_a_row = 0
        self._started_s = 0.0
        self._restart_s: float | None = None
        self._last_exit: int | None = None

    def start(self) -> None:
        environment = {**os.environ, **self.child.environment, SUPERVISOR_VARIABLE: str(os.getpid())}
        try:
            self._process = subprocess.Popen(
                self.child.command,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                env=environment,
                start_new_session=True,  # Ctrl-C reaches us alone; we decide the order
            )
        except OSError as error:
            raise SupervisionError(f"{self.child.name} cannot be started: {error}") from error
        self._num_starts += 1
        self._started_s = time.monotonic()
        self._restart_s = None
        self._reader = threading.Thread(target=self._read, args=(self._process,), daemon=True)
        self._reader.start()

    def check(self) -> None:
        """Notice the end of the process, and start it again when its wait is over."""
        now_s = time.monotonic()
        if self._process is not None and self._process.poll() is not None:
            ran_s = now_s - self._started_s
            self.finish()
            if self._last_exit == REFUSED_STATUS and self._num_starts == 1:
                self.is_refused = True
                return
            if ran_s >= self._config.healthy_after_s:
                self._num_crashes_in_a_row = 0
            self._num_crashes_in_a_row += 1
            wait_s = backoff_s(self._num_crashes_in_a_row, self._config)
            self._restart_s = now_s + wait_s
            logger.warning(
                "%s ended with status %s after %.1f s; starting it again in %.1f s",
                self.child.name,
                self._last_exit,
                ran_s,
                wait_s,
            )
        elif self._process is None and self._restart_s is not None and now_s >= self._restart_s:
            try:
                self.start()
            except SupervisionError as error:
                self._num_crashes_in_a_row += 1
                self._restart_s = now_s + backoff_s(self._num_crashes_in_a_row, self._config)
                logger.warning("%s", error)

    def send_signal(self, number: signal.Signals) -> None:
        if self._process is not None and self._process.poll() is None:
            self._process.send_signal(number)

    def wait(self, timeout_s: float) -> None:
        if self._process is not None:
            try:
                self._process.wait(max(timeout_s, 0.0))
            except subprocess.TimeoutExpired:
                return

    def finish(self) -> None:
        """Reap the ended process and the last of its output."""
        self._restart_s = None
        if self._process is None or self._reader is None:
            return
        self._last_exit = self._process.wait()
        self._reader.join(1.0)  # a grandchild may hold the pipe open; its output is not worth waiting for
        self._process = self._reader = None

    def status(self) -> ChildStatus:
        state: Literal["running", "waiting", "stopped", "refused"]
        if self._process is not None:
            state = "running"
        elif self.is_refused:
            state = "refused"
        else:
            state = "stopped" if self._restart_s is None else "waiting"
        return ChildStatus(
            name=self.child.name,
            state=state,
            pid=self._process.pid if self._process is not None else None,
            num_starts=self._num_starts,
            last_exit=self._last_exit,
            restart_in_s=None if self._restart_s is None else max(0.0, self._restart_s - time.monotonic()),
            last_lines=tuple(self._last_lines),
        )

    def _log_file(self) -> _RotatingFile | None:
        """None where lines go to `write_line`, also because there can be no file."""
        if self._config.log_dir is None:
            return None
        try:
            return _RotatingFile(self._config, self.child.name)
        except OSError as error:
            logger.error("%s has no log file: %s", self.child.name, error)  # noqa: TRY400 - the sentence says it all
            return None

    def _read(self, process: subprocess.Popen[bytes]) -> None:
        assert process.stdout is not None
        log = self._log_file()
        with process.stdout as output:
            while line := output.readline(_LINE_MAX_BYTES):
                text = line.decode(errors="replace").rstrip("\n")
                if text:
                    self._last_lines.append(text)
                if log is not None:
                    log.write(line)
                else:
                    self._write_line(f"{self.child.name} | {text}")
        if log is not None:
            log.close()


class _RotatingFile:
    """A log file with a limit. What a full disk does not take is lost; a child whose output nobody reads would hang."""

    def __init__(self, config: SupervisorConfig, name: str) -> None:
        assert config.log_dir is not None
        config.log_dir.mkdir(parents=True, exist_ok=True)
        self._path = config.log_dir / f"{name}.log"
        self._max_bytes = config.log_max_bytes
        self._file = self._path.open("ab", buffering=0)
        self._num_bytes = self._file.tell()
        self._is_failing = False

    def write(self, line: bytes) -> None:
        try:
            self._write(line)
        except OSError as error:
            if not self._is_failing:
                logger.error("%s takes no lines: %s", self._path, error)  # noqa: TRY400 - the sentence says it all
            self._is_failing = True
        else:
            self._is_failing = False

    def _write(self, line: bytes) -> None:
        if self._num_bytes + len(line) > self._max_bytes and self._num_bytes > 0:
            if self._path.exists():
                self._path.replace(self._path.with_suffix(".log.1"))
            fresh = self._path.open("ab", buffering=0)
            self._file.close()
            self._file, self._num_bytes = fresh, 0
        self._file.write(line)
        self._num_bytes += len(line)

    def close(self) -> None:
        self._file.close()


def backoff_s(num_crashes_in_a_row: int, config: SupervisorConfig) -> float:
    """Wait before the next start after so many crashes in a row (≥ 1): doubles up to the limit, no jitter."""
    assert num_crashes_in_a_row >= 1
    doublings = min(num_crashes_in_a_row - 1, 60)
    return float(min(config.backoff_first_s * 2.0**doublings, config.backoff_max_s))


def stop_when_orphaned(environment: Mapping[str, str], *, poll_s: float = 1.0) -> None:
    """In a child: send ourselves SIGTERM when the supervisor is gone (killed, so it could not stop us).

    Without a supervisor (a daemon started by hand) this does nothing.
    """
    supervisor = environment.get(SUPERVISOR_VARIABLE)
    if supervisor is None:
        return

    def watch() -> None:
        while os.getppid() == int(supervisor):
            time.sleep(poll_s)
        logger.warning("the supervisor is gone: stopping")
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=watch, name="orphan-watch", daemon=True).start()
