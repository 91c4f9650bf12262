"""Settings that belong to no room: where data lives, live or replay, how much is logged."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal


@dataclass(frozen=True, kw_only=True, slots=True)
class HeadraceConfig:
    """The installation as a whole."""

    data_dir: Path = Path("var")
    """Folder for everything headrace writes besides the database: snapshots, checkpoints, logs of child processes."""

    snapshot_root: str = ""
    """Where snapshots are stored: a folder, or a URL (`file:///…`, `s3://bucket/prefix`, `gs://bucket/prefix`) that
    trainer and workers reach; empty: `snapshots` in `data_dir`. Credentials come from the environment."""

    mode: Literal["live", "replay"] = "live"
    """`live`: now is the machine's clock. `replay`: now is the highest event time seen, and telemetry says so."""

    model: str = "default"
    """Name of the model that is trained and served; snapshots of different models never mix."""

    log_level: Literal["debug", "info", "warning", "error"] = "info"
    """Least severe log line that is written."""

    probe_host: str = "127.0.0.1"
    """Address on which ingest, trainer and upstream daemon answer /livez, /readyz, /metrics and /status; 0.0.0.0 in a
    container."""

    ingest_port: int = 9101
    """Port of the ingest worker's probes; 0 takes any free one."""

    trainer_port: int = 9102
    """Port of the trainer's probes; 0 takes any free one."""

    upstream_port: int = 9103
    """Port of the upstream daemon's probes; 0 takes any free one."""

    @property
    def quarantine_dir(self) -> Path:
        """Where the trainer keeps batches that it has set aside."""
        return self.data_dir / "quarantine" / self.model

    def __post_init__(self) -> None:
        for name in ("ingest_port", "trainer_port", "upstream_port"):
            if not 0 <= getattr(self, name) <= 65535:
                raise ValueError(f"headrace.{name} = {getattr(self, name)}: must lie between 0 and 65535")
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_-]{0,63}", self.model):
            raise ValueError(
                f"headrace.model = {self.model!r}: it names a folder, so use 1 to 64 letters, digits, '-' and '_'"
            )

    @property
    def snapshot_location(self) -> str | Path:
        """Folder or URL of the snapshots."""
        return self.snapshot_root or self.data_dir / "snapshots"
