"""The process around an inference worker: listen, serve, and drain when told to stop."""

from __future__ import annotations

import asyncio
import errno
import gc
import logging
import math
import signal
import socket
import ssl
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import uvicorn
from starlette.datastructures import MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from serving.access import require_guarded, tls_context
from serving.api import build_api
from serving.config import ServingConfig
from serving.errors import PortTakenError
from serving.parts import ServingParts
from serving.worker import FLUSH_S, ServingWorker

logger = logging.getLogger(__name__)


def run_worker(parts: ServingParts) -> int:
    """Serve until SIGTERM or SIGINT, drain, and return the process's exit code.

    Raises PortTakenError, or ListenRefusedError for settings of access that nobody can have meant.
    """
    torch.set_num_threads(parts.config.num_threads)
    require_guarded(parts.access, parts.config.host)
    tls = tls_context(parts.access)
    listener = listen(parts.config)
    try:
        return asyncio.run(_serve(parts, listener, tls))
    finally:
        listener.close()


def listen(config: ServingConfig) -> socket.socket:
    """The socket that takes connections; PortTakenError if there can be none."""
    try:
        family = socket.AF_INET6 if ":" in config.host else socket.AF_INET
        listener = socket.create_server((config.host, config.port), family=family, backlog=2048)
    except OSError as error:
        # Of a socket.gaierror, errno is another number.
        is_port = error.errno in (errno.EADDRINUSE, errno.EACCES) and not isinstance(error, socket.gaierror)
        setting = "serving.port" if is_port else "serving.host, an address of this machine"
        raise PortTakenError(
            f"port {config.port} on {config.host} cannot be used ({error.strerror}): choose another {setting}"
        ) from error
    # Connections inherit it. The event loop sets it only for sockets it made itself; without it an answer, written as
    # head and body, waits until the caller acknowledges its head: 40 ms on a connection that is kept.
    listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return listener


class _Server(uvicorn.Server):
    """Leaves signals to us: uvicorn would stop listening at once, before any load balancer knows."""

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Capture none."""
        yield


class _ClosingWhenLeaving:
    """Has each connection closed after its answer once the worker is leaving, so that its next request goes elsewhere.

    A connection that is kept and then closed by us can cross with a request on its way.
    """

    def __init__(self, app: ASGIApp, worker: ServingWorker) -> None:
        self._app, self._worker = app, worker

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass on; see ASGI."""

        async def send_closing(message: Message) -> None:
            if message["type"] == "http.response.start" and self._worker.is_leaving:
                MutableHeaders(scope=message)["connection"] = "close"
            await send(message)

        await self._app(scope, receive, send_closing)


async def _serve(parts: ServingParts, listener: socket.socket, tls: ssl.SSLContext | None) -> int:
    worker = ServingWorker(parts)
    server = _Server(
        uvicorn.Config(
            _ClosingWhenLeaving(build_api(worker), worker),
            http="httptools",
            lifespan="off",
            access_log=False,
            log_config=None,
            server_header=False,
            ssl_context_factory=None if tls is None else lambda *_: tls,
            timeout_keep_alive=parts.config.keep_alive_s,
            timeout_graceful_shutdown=math.ceil(parts.config.drain_timeout_ms / 1000),
        )
    )
    told = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, told.set)
    await worker.start()
    # What is there by now stays. A full collection over all that torch has loaded takes 100 ms and more, in which
    # nobody is answered; from here on it looks at what came since.
    gc.collect()
    gc.freeze()
    host, port = listener.getsockname()[:2]
    shown = f"[{host}]" if ":" in host else host
    logger.info("serving on %s://%s:%d", "http" if tls is None else "https", shown, port)
    watching = [
        asyncio.create_task(_exit_when_failed(worker, server)),
        asyncio.create_task(_exit_when_told(told, worker, server)),
    ]
    await server.serve(sockets=[listener])
    for task in watching:
        task.cancel()
    # The server has waited for the requests in flight.
    await worker.stop(drain_s=FLUSH_S)
    return 0 if worker.failure is None else 1


async def _exit_when_told(told: asyncio.Event, worker: ServingWorker, server: uvicorn.Server) -> None:
    """Step 1: not ready any more. Step 2: time to notice. Step 3: accept nothing new, answer what was accepted."""
    await told.wait()
    worker.leave()
    await asyncio.sleep(worker.config.drain_notice_ms / 1000)
    server.should_exit = True


async def _exit_when_failed(worker: ServingWorker, server: uvicorn.Server) -> None:
    await worker.wait_until_failed()
    server.should_exit = True
