"""`headrace up`: which processes, in which order, on which ports, and what it does to a database."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from feature_store import schema
from feature_store.errors import SchemaRevisionError
from ops.errors import SettingsError
from ops.settings import Settings, load
from ops.up import UpOptions, addresses, children, local_broker_address, prepare_database, serving_ports


def _settings(tmp_path: Path, **environment: str) -> Settings:
    (tmp_path / "headrace.toml").touch()
    url = f"sqlite:///{tmp_path}/data/headrace.db"
    return load(tmp_path / "headrace.toml", environment={"HEADRACE_STORE__URL": url, **environment})


def test_it_starts_ingest_trainer_and_as_many_workers_as_asked_for(tmp_path: Path) -> None:
    started = children(_settings(tmp_path), UpOptions(num_replicas=2, first_port=7000))
    assert [child.name for child in started] == ["ingest", "trainer", "serving-7000", "serving-7001"]
    assert [child.command[-1] for child in started] == ["ingest", "train", "7000", "7001"]


def test_the_upstream_daemon_is_started_if_it_is_on(tmp_path: Path) -> None:
    llatte = {"HEADRACE_RANKING__TASKS": '["rating"]', "HEADRACE_RANKING__KIND": "llatte"}
    settings = _settings(tmp_path, HEADRACE_UPSTREAM_DAEMON__IS_ON="true", **llatte)
    started = children(settings, UpOptions())
    assert [child.name for child in started] == ["ingest", "trainer", "upstream", "serving-8080"]
    assert started[2].command[-1] == "upstream"
    assert "upstream http://127.0.0.1:9103/status" in addresses(settings, [8080])
    with pytest.raises(SettingsError, match=r"headrace\.upstream_port = 9103 is also the port"):
        serving_ports(settings, UpOptions(first_port=9103))


def test_the_local_broker_is_the_first_to_start_and_so_the_last_to_stop(tmp_path: Path) -> None:
    settings = _settings(tmp_path, HEADRACE_LOG__BOOTSTRAP_SERVERS="localhost:9192")
    started = children(settings, UpOptions(has_local_broker=True))
    assert started[0].command[-5:] == ("broker", "--host", "127.0.0.1", "--port", "9192")
    assert [child.name for child in started] == ["broker", "ingest", "trainer", "serving-8080"]


def test_every_start_of_the_local_broker_is_another_log(tmp_path: Path) -> None:
    settings = _settings(tmp_path, HEADRACE_LOG__LOG_ID="trial")
    first, again = (children(settings, UpOptions(has_local_broker=True)) for _ in range(2))
    names = [child.environment["HEADRACE_LOG__LOG_ID"] for child in first]
    assert len(set(names)) == 1
    assert names[0].startswith("trial-")
    time.sleep(0.002)
    later = children(settings, UpOptions(has_local_broker=True))
    assert later[0].environment["HEADRACE_LOG__LOG_ID"] > again[0].environment["HEADRACE_LOG__LOG_ID"]


def test_the_children_read_the_same_settings_file(tmp_path: Path) -> None:
    options = UpOptions(config_path=tmp_path / "headrace.toml")
    for child in children(_settings(tmp_path), options):
        assert child.environment == {"HEADRACE_CONFIG": str(tmp_path / "headrace.toml")}


def test_addresses_name_every_port(tmp_path: Path) -> None:
    settings = _settings(tmp_path, HEADRACE_HEADRACE__INGEST_PORT="7101")
    text = "\n".join(addresses(settings, serving_ports(settings, UpOptions(num_replicas=2))))
    assert "http://127.0.0.1:8080" in text
    assert "http://127.0.0.1:8081" in text
    assert "http://127.0.0.1:7101/status" in text


def test_a_worker_on_a_probe_port_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="headrace.trainer_port = 7001"):
        serving_ports(
            _settings(tmp_path, HEADRACE_HEADRACE__TRAINER_PORT="7001"), UpOptions(num_replicas=2, first_port=7000)
        )


@pytest.mark.parametrize("servers", ["kafka:9092", "127.0.0.1:9092,127.0.0.1:9093", "127.0.0.1"])
def test_a_local_broker_elsewhere_is_refused(servers: str) -> None:
    with pytest.raises(SettingsError, match="log.bootstrap_servers"):
        local_broker_address(servers)


def test_an_empty_database_gets_its_schema_once_and_an_older_one_is_left_alone(tmp_path: Path) -> None:
    settings = _settings(tmp_path)
    url = f"sqlite:///{tmp_path}/data/headrace.db"
    assert prepare_database(settings)
    schema.check(url)
    assert not prepare_database(settings)
    schema.downgrade(url, "base")
    with pytest.raises(SchemaRevisionError):
        schema.check(url)
