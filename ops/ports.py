"""Finds TCP ports for processes that are started a moment later."""

from __future__ import annotations

import random
import socket
from pathlib import Path

from ops.errors import PortTakenError

_FIRST = 20_000
_EPHEMERAL_RANGE = Path("/proc/sys/net/ipv4/ip_local_port_range")
_FIRST_EPHEMERAL = 32_768  # Linux's default; macOS and Windows begin at 49,152
_ATTEMPTS_MAX = 1_000

# The operating system's randomness: processes started together, and tests that seed `random`, must not draw alike.
_random = random.SystemRandom()
_given: set[int] = set()


def free_port(host: str = "127.0.0.1", *, num: int = 1) -> int:
    """A TCP port nobody listens on right now; with `num`, the first of as many in a row. No port is given twice.

    It lies below the range from which the kernel takes ports for outgoing connections and for `bind` to port 0. A port
    from that range, free at our look, may be somebody's client socket when the process it was meant for listens.
    """
    for _ in range(_ATTEMPTS_MAX):
        first = _random.randrange(_FIRST, _first_ephemeral() - num)
        ports = range(first, first + num)
        if _given.isdisjoint(ports) and all(_is_free(host, port) for port in ports):
            _given.update(ports)
            return first
    raise PortTakenError(f"no free port found on {host} between {_FIRST} and {_first_ephemeral()}")


def require_free_port(host: str, port: int) -> None:
    """Raise PortTakenError when somebody listens on `host:port`."""
    if not _is_free(host, port):
        raise PortTakenError(port_taken(host, port))


def port_taken(host: str, port: int) -> str:
    """What to tell somebody whose port another process has."""
    return f"port {port} on {host} is taken by another process: stop that process or choose another port"


def _is_free(host: str, port: int) -> bool:
    with socket.socket() as probe:
        # Like servers do: connections of an earlier process that linger in TIME_WAIT do not count as listening.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError:
            return False
    return True


def _first_ephemeral() -> int:
    try:
        first = int(_EPHEMERAL_RANGE.read_text().split()[0])
    except OSError:
        return _FIRST_EPHEMERAL
    # Where the range was widened to nearly everything there is nothing below it to prefer.
    return first if first > _FIRST else _FIRST_EPHEMERAL
