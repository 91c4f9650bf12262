"""A tiny HTTP server for daemons that have no web API: alive, ready, metrics, status. For machines on the inside.

It runs in its own thread and only calls what it is given, so a busy event loop does not make a daemon look dead.
"""

from __future__ import annotations

import json
import logging
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from typing import Any, Final, Self

from ops.errors import PortTakenError

logger = logging.getLogger(__name__)

_TEXT: Final = "text/plain; charset=utf-8"
_REQUEST_TIMEOUT_S: Final = 5.0


@dataclass(frozen=True, slots=True)
class Readiness:
    """Whether a daemon can do its work now, and if not, why."""

    is_ready: bool
    reason: str = ""


@dataclass(frozen=True, kw_only=True, slots=True)
class Probes:
    """What the four routes answer; each is called from the server's threads."""

    is_alive: Callable[[], bool]
    """False when only a restart can help: the daemon's main loop has ended or hangs."""

    readiness: Callable[[], Readiness]
    """False while something it needs (broker, database) is away."""

    metrics: Callable[[], bytes]
    """Prometheus text."""

    status: Callable[[], Mapping[str, Any]]
    """Whatever a person or the demo wants to see, as plain values."""


class ProbeServer:
    """`GET /livez /readyz /metrics /status` on one port."""

    def __init__(self, probes: Probes, *, port: int, host: str = "127.0.0.1") -> None:
        self._probes = probes
        self._host = host
        self._port = port
        self._server: ThreadingHTTPServer | None = None
        self._thread: threading.Thread | None = None

    @property
    def port(self) -> int:
        """The port in use; with port 0, known after `start()`."""
        return self._port

    def start(self) -> None:
        """Listen; raises PortTakenError."""
        try:
            server = ThreadingHTTPServer((self._host, self._port), _handler(self._probes))
        except OSError as error:
            raise PortTakenError(
                f"port {self._port} on {self._host}, meant for /livez and /metrics, cannot be used ({error.strerror}): "
                "stop the process that has it or choose another port"
            ) from error
        server.daemon_threads = True
        self._port = server.server_address[1]
        self._server = server
        self._thread = threading.Thread(target=server.serve_forever, name="probes", args=(0.1,), daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Stop listening; does nothing when not started."""
        if self._server is not None and self._thread is not None:
            self._server.shutdown()
            self._server.server_close()
            self._thread.join()
            self._server = self._thread = None

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.stop()


def answer(probes: Probes, path: str) -> tuple[int, tuple[str, bytes]]:
    """HTTP status, and (content type, body), for a path."""
    match path.partition("?")[0]:
        case "/livez":
            return (200, (_TEXT, b"alive\n")) if probes.is_alive() else (503, (_TEXT, b"the main loop has stopped\n"))
        case "/readyz":
            readiness = probes.readiness()
            text = "ready" if readiness.is_ready else f"not ready: {readiness.reason}"
            return 200 if readiness.is_ready else 503, (_TEXT, f"{text}\n".encode())
        case "/metrics":
            return 200, ("text/plain; version=0.0.4; charset=utf-8", probes.metrics())
        case "/status":
            return 200, ("application/json", json.dumps(probes.status(), default=str).encode() + b"\n")
        case _:
            return 404, (_TEXT, b"known paths: /livez /readyz /metrics /status\n")


def _handler(probes: Probes) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        timeout = _REQUEST_TIMEOUT_S  # a client that connects and stays silent holds a thread no longer than this

        def do_GET(self) -> None:
            try:
                status, (content_type, body) = answer(probes, self.path)
            except Exception:
                logger.exception("answering %s failed", self.path)
                status, (content_type, body) = 500, (_TEXT, b"failed; see the daemon's log\n")
            self.send_response(status)
            self.send_header("Content-Type", content_type)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *args: Any) -> None:  # noqa: A002 - the parent's name
            logger.debug(format, *args)

    return Handler
