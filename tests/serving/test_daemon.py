"""How an inference worker listens."""

from __future__ import annotations

import socket

import pytest

from serving.config import ServingConfig
from serving.daemon import listen
from serving.errors import PortTakenError


def test_no_part_of_an_answer_waits_for_an_acknowledgement_of_the_part_before() -> None:
    with listen(ServingConfig(port=0)) as listener, socket.create_connection(listener.getsockname()):
        connection, _ = listener.accept()
        with connection:
            assert connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)


def test_a_port_that_is_taken_is_refused_with_the_setting_that_chooses_it() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(PortTakenError, match=f"port {port} on 127.0.0.1 .* choose another serving.port"):
            listen(ServingConfig(port=port))
