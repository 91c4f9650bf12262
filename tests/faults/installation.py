"""One headrace for a fault test: a database, a log, and daemons that are started, killed and started again."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from http.client import HTTPConnection, HTTPException
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Self

from feature_store.config import FeatureStoreConfig
from feature_store.store import FeatureStore
from ops.ports import free_port
from stream.kafka import KafkaConfig
from tests.faults.load import SURFACE_KEY, SURFACES

START_S_MAX: Final = 180.0
"""For a machine that many suites share: a start takes 4 s of one core."""

KILLED: Final = -signal.SIGKILL


class Daemon:
    """One daemon process, seen from outside: by its probes, its log, its memory and its exit status."""

    def __init__(self, name: str, port: int, log: Path, process: subprocess.Popen[bytes]) -> None:
        self.name, self.port, self.log, self.process = name, port, log, process

    @property
    def address(self) -> str:
        """Where its probes (and, of a worker, its API) answer."""
        return f"http://127.0.0.1:{self.port}"

    @property
    def is_running(self) -> bool:
        """Whether the process is alive."""
        return self.process.poll() is None

    def get(self, path: str) -> tuple[int, str]:
        """Status and text of an answer; status 0 while nobody answers."""
        # Not httpx: its clients cost 100 ms of CPU each, and these tests ask all the time.
        connection = HTTPConnection("127.0.0.1", self.port, timeout=5)
        try:
            connection.request("GET", path)
            answer = connection.getresponse()
            return answer.status, answer.read().decode()
        except (OSError, HTTPException) as error:
            return 0, f"no answer: {error}"
        finally:
            connection.close()

    def status(self) -> dict[str, Any]:
        """What `/status` says; empty while nobody answers."""
        code, text = self.get("/status")
        answered: dict[str, Any] = json.loads(text) if code == 200 else {}
        return answered

    def readiness(self) -> tuple[bool, str]:
        """Whether `/readyz` says ready, and its words; not ready while nobody answers."""
        code, text = self.get("/readyz")
        return code == 200, text.strip()

    def metric(self, name: str) -> float:
        """Sum of a Prometheus metric over its labels; fails the test if `/metrics` does not have it."""
        lines = self.get("/metrics")[1].splitlines()
        values = [float(line.rsplit(" ", 1)[1]) for line in lines if re.match(rf"{name}(\{{|\s)", line)]
        assert values, f"/metrics of {self.name} has no {name}: {lines}"
        return sum(values)

    def rss_bytes(self) -> int:
        """Resident memory of the process."""
        found = re.search(r"^VmRSS:\s+(\d+) kB", Path(f"/proc/{self.process.pid}/status").read_text(), re.MULTILINE)
        assert found is not None
        return int(found[1]) * 1024

    def said(self) -> str:
        """Its log so far."""
        return self.log.read_text(errors="replace")

    def kill(self) -> None:
        """SIGKILL."""
        self.process.kill()
        self.process.wait()

    def expect_kill(self, fail_point: str, *, timeout_s: float = START_S_MAX) -> None:
        """Wait until a fail point has killed it."""
        try:
            status = self.process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"{self.name} never came to {fail_point}: {self.said()[-3_000:]}") from None
        assert status == KILLED, f"{self.name} at {fail_point}: status {status}: {self.said()[-3_000:]}"

    def catches_sigterm(self) -> bool:
        """Whether the process has come so far that SIGTERM ends it by its own code and not by the kernel."""
        found = re.search(r"^SigCgt:\s+(\w+)", Path(f"/proc/{self.process.pid}/status").read_text(), re.MULTILINE)
        return found is not None and bool(int(found[1], 16) >> (signal.SIGTERM - 1) & 1)

    def stop(self) -> None:
        """SIGTERM, and it has to end cleanly."""
        deadline = time.monotonic() + START_S_MAX
        while self.is_running and not self.catches_sigterm():
            # An interpreter that is still importing has no handlers yet.
            assert time.monotonic() < deadline, f"{self.name} never listened: {self.said()[-3_000:]}"
            time.sleep(0.01)
        self.process.send_signal(signal.SIGTERM)
        try:
            status = self.process.wait(60)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"{self.name} did not stop: {self.said()[-3_000:]}") from None
        assert status == 0, f"{self.name}: status {status}: {self.said()[-3_000:]}"


class Installation:
    """A database, a broker's address, and the daemons that use them. Leaving it kills what still runs."""

    def __init__(
        self,
        root: Path,
        bootstrap_servers: str,
        url: str,
        *,
        num_partitions: int = 1,
        settings: Mapping[str, str] | None = None,
    ) -> None:
        self.root, self.url = root, url
        self.store = FeatureStore(FeatureStoreConfig(url=url))
        self.kafka = KafkaConfig(bootstrap_servers=bootstrap_servers, num_partitions=num_partitions)
        self.daemons: list[Daemon] = []
        self.environment = os.environ | {
            "HEADRACE_HEADRACE__DATA_DIR": str(root),
            "HEADRACE_LOG__BOOTSTRAP_SERVERS": bootstrap_servers,
            "HEADRACE_LOG__NUM_PARTITIONS": str(num_partitions),
            "HEADRACE_STORE__URL": url,
            "HEADRACE_INGEST__SESSION_TIMEOUT_MS": "1000",
            "HEADRACE_INGEST__MAX_BATCH_RECORDS": "100",
            "HEADRACE_EVENTS__SURFACE_KEY": SURFACE_KEY,
            "HEADRACE_EVENTS__SURFACES": json.dumps(SURFACES),
            **(settings or {}),
        }

    def start(self, daemon: str, *, fail_point: str = "", **settings: str) -> Daemon:
        """Start a daemon process; each has its own ports, so that several of a kind can run."""
        port = free_port()
        environment = self.environment | {
            "HEADRACE_HEADRACE__INGEST_PORT": str(port),
            "HEADRACE_HEADRACE__TRAINER_PORT": str(port),
            "HEADRACE_HEADRACE__UPSTREAM_PORT": str(port),
            "HEADRACE_FAIL_POINT": fail_point,
            **settings,
        }
        path = self.root / f"{daemon}-{len(self.daemons)}.log"
        arguments = ["--port", str(port)] if daemon == "serve" else []
        with path.open("wb") as log:
            process = subprocess.Popen(
                [sys.executable, "-m", "ops", daemon, *arguments], env=environment, stdout=log, stderr=log
            )
        self.daemons.append(Daemon(daemon, port, path, process))
        return self.daemons[-1]

    def start_ready(self, daemon: str, **settings: str) -> Daemon:
        """Start a daemon and wait until it says that it is ready."""
        started = self.start(daemon, **settings)
        self.wait(lambda: started.readiness()[0], f"{daemon} becoming ready")
        return started

    def wait_for_a_batch(self, ingest: Daemon) -> None:
        """Wait until an ingest process has committed something."""
        self.wait(lambda: ingest.status().get("batches", 0) > 0, "the first batch")

    def wait(self, condition: Callable[[], bool], what: str, *, timeout_s: float = START_S_MAX) -> None:
        """Wait until `condition` holds; a failure shows what the daemons have logged."""
        deadline = time.monotonic() + timeout_s
        while not condition():
            assert time.monotonic() < deadline, f"{what} did not happen in {timeout_s:g} s; logs: {self.logs()}"
            time.sleep(0.05)

    def logs(self) -> str:
        """The end of what each daemon logged."""
        return "\n".join(f"--- {daemon.log.name}\n{daemon.said()[-3_000:]}" for daemon in self.daemons[-4:])

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        for daemon in self.daemons:
            if daemon.is_running:
                # A stopped process (SIGSTOP) is killed like any other.
                daemon.kill()
        self.store.close()
