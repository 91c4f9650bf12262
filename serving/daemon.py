"""The process around an inference worker: listen, serve, and drain when told to stop."""

from __future__ import annotations

import asyncio
import logging
import math
import signal
import socket
import ssl

import torch
import uvicorn

from serving.access import require_guarded, tls_context
from serving.api import build_api
from serving.config import ServingConfig
from serving.errors import PortTakenError
from serving.worker import FLUSH_S, ServingParts, ServingWorker

logger = logging.getLogger(__name__)


def run_worker(parts: ServingParts) -> int:
    """Serve until SIGTERM or SIGINT, drain, and return the process's exit code.

    Raises PortTakenError, or ListenRefusedError for settings of access that nobody can have meant.
    """
    torch.set_num_threads(parts.config.num_threads)
    require_guarded(parts.access, parts.config.host)
    tls = tls_context(parts.access)
    listener = _listen(parts.config)
    try:
        return asyncio.run(_serve(parts, listener, tls))
    finally:
        listener.close()


def _listen(config: ServingConfig) -> socket.socket:
    try:
        return socket.create_server((config.host, config.port), backlog=2048)
    except OSError as error:
        raise PortTakenError(
            f"port {config.port} on {config.host} cannot be used ({error.strerror}): choose another serving.port"
        ) from error


async def _serve(parts: ServingParts, listener: socket.socket, tls: ssl.SSLContext | None) -> int:
    worker = ServingWorker(parts)
    server = uvicorn.Server(
        uvicorn.Config(
            build_api(worker),
            lifespan="off",
            access_log=False,
            log_config=None,
            server_header=False,
            ssl_context_factory=None if tls is None else lambda *_: tls,
            timeout_graceful_shutdown=math.ceil(parts.config.drain_timeout_ms / 1000),
        )
    )
    # uvicorn raises the signal again once it has stopped; with handlers of our own that does not end the process.
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, lambda: setattr(server, "should_exit", True))
    await worker.start()
    host, port = listener.getsockname()[:2]
    logger.info("serving on %s://%s:%d", "http" if tls is None else "https", host, port)
    failed = asyncio.create_task(_exit_when_failed(worker, server))
    await server.serve(sockets=[listener])
    failed.cancel()
    # The server has waited for the requests in flight.
    await worker.stop(drain_s=FLUSH_S)
    return 0 if worker.failure is None else 1


async def _exit_when_failed(worker: ServingWorker, server: uvicorn.Server) -> None:
    await worker.wait_until_failed()
    server.should_exit = True
