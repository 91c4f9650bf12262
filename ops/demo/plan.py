"""Before the demo starts: what can be checked, where things go, which processes run with which settings."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import sys
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, Final

from backtest.datasets import Dataset, Title, movietweetings, movietweetings_titles
from ops.errors import OpsError, PortTakenError
from ops.local_broker import find_binary
from ops.ports import free_port, require_free_port
from ops.settings import FILE_VARIABLE, Settings, load, variable_of
from ops.settings_template import toml_value
from ops.supervisor import Child

HOST: Final = "127.0.0.1"
SERVING_NAMES: Final = ("serving-a", "serving-b")
_MARKER: Final = ".headrace-demo"
_PREFERRED_PORTS: Final = (8080, 8090)
_OVERHEAD_S: Final = 30.0
"""What starting, the change at the end, checks and report take on two cores, roughly."""


class DemoError(OpsError):
    """The demo cannot start or has failed; the message is one sentence for the person at the terminal."""


@dataclass(frozen=True, kw_only=True, slots=True)
class DemoOptions:
    """What the caller may choose."""

    data_dir: Path = Path("var/demo")
    """Folder of the demo; its `run` and `logs` are replaced by every run."""

    keep_running: bool = False
    """Leave everything up at the end, until Ctrl-C."""

    minutes: float = 3.75
    """About how long the whole demo takes: the recorded half year is replayed in what starting and checking leave."""

    json_out: Path | None = None
    """Write the summary here as well."""

    num_events: int | None = None
    """Replay only so many events from the beginning of the stream; None: all of it."""

    has_upstream: bool = False
    """Run the upstream daemon as well: vectors of users, and the ranker that reads them."""

    requests_per_s: float = 4.0
    """Background requests to each inference worker."""

    free_bytes_min: int = 1 << 30
    """Free disk space to start with: database, snapshots, checkpoints and logs of one run take about a quarter."""

    def __post_init__(self) -> None:
        if not 0.6 <= self.minutes <= 600.0:
            raise DemoError(f"--minutes {self.minutes:g}: must lie between 0.6 and 600")
        if self.num_events is not None and self.num_events < 1000:
            raise DemoError(f"num_events = {self.num_events}: must be at least 1000, or nobody has a history")
        if not 0.1 <= self.requests_per_s <= 100.0:
            raise DemoError(f"requests_per_s = {self.requests_per_s:g}: must lie between 0.1 and 100")

    @property
    def replay_s(self) -> float:
        """Seconds in which the recorded stream is replayed."""
        return self.minutes * 60.0 - _OVERHEAD_S

    @property
    def run_dir(self) -> Path:
        """Database, snapshots, checkpoints and settings of this run."""
        return self.data_dir / "run"

    @property
    def log_dir(self) -> Path:
        """One log file a process."""
        return self.data_dir / "logs"

    @property
    def summary_path(self) -> Path:
        """All figures of the newest finished run."""
        return self.data_dir / "summary.json"

    @property
    def curves_path(self) -> Path:
        """The curves of the newest finished run."""
        return self.data_dir / "curves.png"


@dataclass(frozen=True, kw_only=True, slots=True)
class Ports:
    """Where each process listens, all on this machine."""

    broker: int
    ingest: int
    trainer: int
    serving: tuple[int, ...]
    upstream: int

    def serving_urls(self) -> list[str]:
        """Base address of each inference worker."""
        return [f"http://{HOST}:{port}" for port in self.serving]


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """Everything decided before the first process starts."""

    options: DemoOptions
    ports: Ports
    settings: Settings
    children: tuple[Child, ...]
    dataset: Dataset
    titles: Mapping[int, Title]


def choose_ports() -> Ports:
    """Stable ports for the inference workers where they are free, any free ones otherwise and for the rest."""
    taken: set[int] = set()

    def unused(preferred: int = 0) -> int:
        port = preferred
        if preferred:
            try:
                require_free_port(HOST, preferred)
            except PortTakenError:
                port = 0
        while port == 0 or port in taken:
            port = free_port(HOST)
        taken.add(port)
        return port

    serving = tuple(unused(preferred) for preferred in _PREFERRED_PORTS)
    return Ports(serving=serving, broker=unused(), ingest=unused(), trainer=unused(), upstream=unused())


def tables(options: DemoOptions, ports: Ports, log_id: str) -> dict[str, dict[str, Any]]:
    """The settings in which the demo differs from the defaults, by table and key."""
    run_dir = options.run_dir.resolve()
    return (_UPSTREAM if options.has_upstream else {}) | {
        "headrace": {
            "mode": "replay",
            "model": "default",
            "data_dir": str(run_dir),
            "probe_host": HOST,
            "ingest_port": ports.ingest,
            "trainer_port": ports.trainer,
            "upstream_port": ports.upstream,
        },
        # A log id of its own: the local broker forgets its log when it stops, so positions of another run mean nothing.
        # One ingest worker needs no more than two partitions; each one more is another small transaction a poll.
        "log": {
            "bootstrap_servers": f"{HOST}:{ports.broker}",
            "log_id": log_id,
            "num_partitions": 2,
            "security_protocol": "PLAINTEXT",
        },
        "store": {"url": f"sqlite:///{run_dir / 'headrace.db'}"},
        # The local broker holds a group join for half the session timeout.
        "ingest": {"session_timeout_ms": 3_000},
        # Two cores are shared by all processes: more threads would only wait for each other.
        "trainer": {"num_threads": 1},
        # A machine that is busy with other work makes answers late; the demo shows how late, rather than refusing them.
        "serving": {"host": HOST, "num_threads": 1, "request_timeout_ms": 5_000},
    }


UPSTREAM_TASK: Final = "value>=8"
"""A rating of 8 of 10 or more is what is worth predicting here."""
_UPSTREAM: Final[dict[str, dict[str, Any]]] = {
    # Nobody takes what the demo's answers show, so there are no labels to learn from.
    "ranking": {"tasks": [UPSTREAM_TASK], "kind": "llatte", "learn_from": "interactions"},
    # Two cores are shared by all: a small network, and a small share of the time for learning.
    "upstream": {"width": 64, "num_layers": 2, "max_len": 256},
    "upstream_daemon": {
        "is_on": True,
        "debounce_ms": 2_000,
        "learn_share": 0.1,
        "first_version_interactions": 1_000,
        "version_interactions": 5_000,
        "version_interval_s": 60.0,
    },
}
"""What `--upstream` adds to the settings."""


def children_of(
    config_path: Path, ports: Ports, environment: Mapping[str, str], *, has_upstream: bool = False
) -> tuple[Child, ...]:
    """The supervised processes, in start order."""

    def child(name: str, *arguments: str) -> Child:
        command = (sys.executable, "-u", "-m", "ops", *arguments)
        return Child(name=name, command=command, environment={**environment, FILE_VARIABLE: str(config_path)})

    serving = [
        child(name, "serve", "--port", str(port)) for name, port in zip(SERVING_NAMES, ports.serving, strict=True)
    ]
    upstream = [child("upstream", "upstream")] if has_upstream else []
    return (child("ingest", "ingest"), child("trainer", "train"), *upstream, *serving)


def prepare(options: DemoOptions, changes: Mapping[str, Mapping[str, Any]] = MappingProxyType({})) -> Plan:
    """Check what can be checked, replace the run directory, write the settings. Raises DemoError or BacktestError.

    `changes`, by table and key, win over the demo's settings. Call inside `sole_use`.
    """
    dataset, titles = movietweetings(), movietweetings_titles()
    find_binary()
    _require_space(options)
    for folder in (options.run_dir, options.log_dir):
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
    if options.summary_path.exists():
        options.summary_path.replace(options.summary_path.with_name("summary.previous.json"))
    ports = choose_ports()
    changed = tables(options, ports, log_id=f"demo-{uuid.uuid4().hex[:12]}")
    for table, keys in changes.items():
        changed[table] = {**changed.get(table, {}), **keys}
    config_path = options.run_dir.resolve() / "headrace.toml"
    config_path.write_text(_toml(changed), encoding="utf-8")
    # Also as variables, which win over those of the caller: the demo must never reach for somebody's real broker.
    environment = {
        variable_of(table, key): value if isinstance(value, str) else json.dumps(value)
        for table, keys in changed.items()
        for key, value in keys.items()
    }
    environment |= {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
    return Plan(
        options=options,
        ports=ports,
        settings=load(config_path, environment={**os.environ, **environment}),
        children=children_of(config_path, ports, environment, has_upstream=options.has_upstream),
        dataset=dataset,
        titles=titles,
    )


@contextmanager
def sole_use(options: DemoOptions) -> Iterator[None]:
    """Hold the demo's folder; raises DemoError when it cannot be used, is not ours, or another demo runs in it."""
    folder = options.data_dir
    marker = folder / _MARKER
    if folder.is_dir() and any(folder.iterdir()) and not marker.exists():
        raise DemoError(
            f"{folder} holds files that are not the demo's, which replaces what it finds: "
            "choose another folder with --data-dir"
        )
    try:
        folder.mkdir(parents=True, exist_ok=True)
        handle = marker.open("w")
    except OSError as error:
        raise DemoError(f"{folder} cannot be written ({error.strerror}): choose a folder with --data-dir") from error
    with handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise DemoError(f"another demo runs in {folder}: stop it, or choose a folder with --data-dir") from error
        yield


def _require_space(options: DemoOptions) -> None:
    free = shutil.disk_usage(options.data_dir).free
    if free < options.free_bytes_min:
        raise DemoError(
            f"{options.data_dir.resolve()} has {free / 1e9:.1f} GB free and the demo needs "
            f"{options.free_bytes_min / 1e9:.1f} GB: free some, or choose a folder on another disk with --data-dir"
        )


def _toml(changed: Mapping[str, Mapping[str, Any]]) -> str:
    lines = ["# Settings of this run of the demo: `headrace … --config` with this file reaches its processes."]
    for table, keys in changed.items():
        lines += ["", f"[{table}]", *(f"{key} = {toml_value(value)}" for key, value in keys.items())]
    return "\n".join(lines) + "\n"
