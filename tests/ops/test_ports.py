"""Ports for processes that are started a moment later."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest

from ops import ports
from ops.errors import PortTakenError
from ops.ports import free_port, require_free_port


def test_no_port_is_given_twice_nor_one_that_the_kernel_gives_to_clients() -> None:
    given = [free_port() for _ in range(50)]
    assert len(set(given)) == 50
    with socket.socket() as client:
        client.bind(("127.0.0.1", 0))
        assert max(given) < client.getsockname()[1]


def test_several_come_in_a_row(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    # Room for ten ports only, so that a row drawn twice would show.
    narrow = tmp_path / "range"
    narrow.write_text("21010 60999")
    monkeypatch.setattr(ports, "_EPHEMERAL_RANGE", narrow)
    monkeypatch.setattr(ports, "_FIRST", 21_000)
    monkeypatch.setattr(ports, "_ATTEMPTS_MAX", 5)
    first = free_port(num=2)
    require_free_port("127.0.0.1", first + 1)
    rest: set[int] = set()

    def take_all() -> None:
        while True:
            rest.add(free_port())

    with pytest.raises(PortTakenError, match=r"no free port found on 127\.0\.0\.1"):
        take_all()
    assert rest.isdisjoint({first, first + 1})


def test_a_taken_one_is_named() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(PortTakenError, match=f"port {port} on 127.0.0.1 is taken by another process"):
            require_free_port("127.0.0.1", port)
