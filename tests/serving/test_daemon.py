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


def test_an_address_of_another_machine_is_refused_with_the_setting_that_chooses_it() -> None:
    with pytest.raises(PortTakenError, match=r"port 0 on 192\.0\.2\.1 .* choose another serving\.host"):
        listen(ServingConfig(host="192.0.2.1", port=0))


def test_an_address_of_version_6_is_listened_on() -> None:
    try:
        socket.create_server(("::1", 0), family=socket.AF_INET6).close()
    except OSError:
        pytest.skip("this machine has no IPv6")
    with listen(ServingConfig(host="::1", port=0)) as listener:
        socket.create_connection(listener.getsockname()[:2]).close()
