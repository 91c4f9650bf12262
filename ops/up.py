"""`headrace up`: which processes make a whole headrace on one machine."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from feature_store import schema
from feature_store.config import FeatureStoreConfig
from online_trainer.upstream_settings import UpstreamDaemonConfig
from ops.config import HeadraceConfig
from ops.errors import SettingsError
from ops.settings import FILE_VARIABLE, Settings, variable_of
from ops.supervisor import Child
from serving.access_config import AccessConfig
from serving.config import ServingConfig
from stream.clock import WallClock
from stream.kafka import KafkaConfig


@dataclass(frozen=True, kw_only=True, slots=True)
class UpOptions:
    """What is started."""

    num_replicas: int = 1
    """Inference workers, on consecutive ports."""

    first_port: int | None = None
    """Port of the first of them; without it, `serving.port`."""

    has_local_broker: bool = False
    """Start the in-memory broker too, where `log.bootstrap_servers` says."""

    config_path: Path | None = None
    """Settings file that the children are to read."""


def children(settings: Settings, options: UpOptions) -> list[Child]:
    """The processes in start order. Raises SettingsError when the local broker cannot be where clients look for it."""
    environment = _environment(options)
    if options.has_local_broker:
        # Its log is in memory: what it brings after a start is another log, and stored positions mean nothing there.
        name = settings.get(KafkaConfig).log_id
        environment[variable_of("log", "log_id")] = f"{name}-{WallClock().now_ms()}"

    broker = []
    if options.has_local_broker:
        host, port = local_broker_address(settings.get(KafkaConfig).bootstrap_servers)
        broker = [_child("broker", environment, "broker", "--host", host, "--port", str(port))]
    daemons = [_child("ingest", environment, "ingest"), _child("trainer", environment, "train")]
    if settings.get(UpstreamDaemonConfig).is_on:
        daemons.append(_child("upstream", environment, "upstream"))
    return [*broker, *daemons, *_workers(settings, options, environment)]


def workers(settings: Settings, options: UpOptions) -> list[Child]:
    """Only the inference workers. Raises SettingsError."""
    return _workers(settings, options, _environment(options))


def _workers(settings: Settings, options: UpOptions, environment: Mapping[str, str]) -> list[Child]:
    ports = serving_ports(settings, options)
    return [_child(f"serving-{port}", environment, "serve", "--port", str(port)) for port in ports]


def _environment(options: UpOptions) -> dict[str, str]:
    return {} if options.config_path is None else {FILE_VARIABLE: str(options.config_path.resolve())}


def _child(name: str, environment: Mapping[str, str], *arguments: str) -> Child:
    # -u: a crash must not take the last log lines with it.
    return Child(name=name, command=(sys.executable, "-u", "-m", "ops", *arguments), environment=environment)


def serving_ports(settings: Settings, options: UpOptions) -> list[int]:
    """Ports of the inference workers. Raises SettingsError when they run into those of the probes."""
    first = settings.get(ServingConfig).port if options.first_port is None else options.first_port
    if first == 0 and options.num_replicas > 1:
        raise SettingsError("port 0 takes any free one, and several workers need consecutive ports: name the first")
    ports = list(range(first, first + options.num_replicas))
    config = settings.get(HeadraceConfig)
    for name in ("ingest_port", "trainer_port", "upstream_port"):
        if getattr(config, name) in ports:
            raise SettingsError(
                f"headrace.{name} = {getattr(config, name)} is also the port of an inference worker: "
                "change it, serving.port, or --replicas"
            )
    return ports


def local_broker_address(bootstrap_servers: str) -> tuple[str, int]:
    """Host and port for the local broker; raises SettingsError when that is not one address of this machine."""
    host, _, port = bootstrap_servers.partition(":")
    if "," in bootstrap_servers or not port.isdigit() or host not in {"127.0.0.1", "localhost"}:
        raise SettingsError(
            f"log.bootstrap_servers = {bootstrap_servers}: the local broker needs one address of this machine there, "
            "such as 127.0.0.1:9092"
        )
    return "127.0.0.1", int(port)


def prepare_database(settings: Settings) -> bool:
    """Build the schema in a database that has none; whether that was needed.

    An existing schema is never changed here: that is `headrace migrate`'s, when its operator chooses.
    Raises SchemaRevisionError when the existing schema is not this code's, StoreUnavailableError.
    """
    url = settings.get(FeatureStoreConfig).url
    path = sqlite_path(url)
    is_new = path is not None and not path.exists()
    if is_new or schema.current(url) is None:
        schema.migrate(url)
        return True
    return False


def sqlite_path(url: str) -> Path | None:
    """The database file of a SQLite URL; None for a server."""
    prefix = "sqlite:///"
    return Path(url.removeprefix(prefix).partition("?")[0]) if url.startswith(prefix) else None


def addresses(settings: Settings, ports: Sequence[int]) -> list[str]:
    """What a person wants to know once everything starts: one line per address."""
    config = settings.get(HeadraceConfig)
    host = settings.get(ServingConfig).host
    scheme = "https" if settings.get(AccessConfig).tls_certfile else "http"
    lines = [
        *(f"serving  {scheme}://{host}:{port}" for port in ports),
        f"ingest   http://{config.probe_host}:{config.ingest_port}/status",
        f"trainer  http://{config.probe_host}:{config.trainer_port}/status",
    ]
    if settings.get(UpstreamDaemonConfig).is_on:
        lines.append(f"upstream http://{config.probe_host}:{config.upstream_port}/status")
    return lines
