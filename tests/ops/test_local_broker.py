"""The local broker is a real process: up in milliseconds, gone when told, and clear about what is in its way."""

from __future__ import annotations

import os
import socket
from pathlib import Path

import pytest
from aiokafka import AIOKafkaConsumer, AIOKafkaProducer, TopicPartition

from ops.errors import BrokerBinaryMissingError, LocalBrokerError, PortTakenError
from ops.local_broker import LocalBroker, LocalBrokerConfig
from ops.ports import free_port, require_free_port


async def _write_and_read_back(bootstrap_servers: str) -> bytes | None:
    producer = AIOKafkaProducer(bootstrap_servers=bootstrap_servers)
    await producer.start()
    try:
        await producer.send_and_wait("items", b"hello", partition=0)
    finally:
        await producer.stop()
    consumer = AIOKafkaConsumer(bootstrap_servers=bootstrap_servers, auto_offset_reset="earliest")
    await consumer.start()
    try:
        partition = TopicPartition("items", 0)
        consumer.assign([partition])
        await consumer.seek_to_beginning(partition)
        record = await consumer.getone()
        value: bytes | None = record.value
        return value
    finally:
        await consumer.stop()


async def test_a_record_written_to_the_broker_is_read_back(fresh_broker: LocalBroker) -> None:
    assert await _write_and_read_back(fresh_broker.bootstrap_servers) == b"hello"


def test_the_shared_broker_and_a_fresh_one_run_side_by_side(broker: LocalBroker, fresh_broker: LocalBroker) -> None:
    assert broker.is_running
    assert fresh_broker.is_running
    assert broker.port != fresh_broker.port


async def test_it_comes_back_on_the_same_port_with_an_empty_log() -> None:
    broker = LocalBroker(LocalBrokerConfig(port=0))
    broker.start()
    try:
        port, pid = broker.port, broker.pid
        await _write_and_read_back(broker.bootstrap_servers)
        broker.kill()
        assert not broker.is_running
        broker.start()
        assert broker.port == port
        assert broker.pid != pid
    finally:
        broker.stop()
    require_free_port("127.0.0.1", port)


def test_a_taken_port_is_named_in_one_sentence() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(PortTakenError, match=f"port {port} on 127.0.0.1 is taken"):
            LocalBroker(LocalBrokerConfig(port=port)).start()


def test_a_missing_binary_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HEADRACE_TANSU_BIN", str(tmp_path / "nothing"))
    with pytest.raises(BrokerBinaryMissingError, match="is not an executable file"):
        LocalBroker(LocalBrokerConfig(port=0)).start()


def _script(tmp_path: Path, text: str) -> str:
    path = tmp_path / "broker"
    path.write_text(text)
    path.chmod(0o755)
    return str(path)


def test_a_broker_that_dies_while_starting_says_its_last_words(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HEADRACE_TANSU_BIN", _script(tmp_path, "#!/bin/sh\necho no memory left\nexit 3\n"))
    with pytest.raises(LocalBrokerError, match=r"status 3 while starting: no memory left"):
        LocalBroker(LocalBrokerConfig(port=0)).start()


def test_a_broker_that_never_listens_is_given_up_and_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pid_file = tmp_path / "pid"
    script = f"#!/bin/sh\necho $$ > {pid_file}\necho ready in 1ms\nexec sleep 60\n"
    monkeypatch.setenv("HEADRACE_TANSU_BIN", _script(tmp_path, script))
    with pytest.raises(LocalBrokerError, match=r"did not accept connections .* within 0.3 s"):
        LocalBroker(LocalBrokerConfig(port=0, start_timeout_s=0.3)).start()
    with pytest.raises(ProcessLookupError):
        os.kill(int(pid_file.read_text()), 0)


def test_a_port_outside_the_range_is_refused() -> None:
    with pytest.raises(ValueError, match="port = 70000"):
        LocalBrokerConfig(port=70_000)


def test_its_output_goes_to_the_file_named(tmp_path: Path) -> None:
    log_path = tmp_path / "logs" / "broker.log"
    with LocalBroker(LocalBrokerConfig(port=free_port(), log_path=log_path)):
        pass
    assert "listening on" in log_path.read_text()
