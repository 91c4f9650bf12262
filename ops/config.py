"""Settings that belong to no room: where data lives, live or replay, how much is logged."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal


@dataclass(frozen=True, kw_only=True, slots=True)
class HeadraceConfig:
    """The installation as a whole."""

    data_dir: Path = Path("var")
    """Folder for everything headrace writes besides the database: snapshots, checkpoints, logs of child processes."""

    mode: Literal["live", "replay"] = "live"
    """`live`: now is the machine's clock. `replay`: now is the highest event time seen, and telemetry says so."""

    model: str = "default"
    """Name of the model that is trained and served; snapshots of different models never mix."""

    log_level: Literal["debug", "info", "warning", "error"] = "info"
    """Least severe log line that is written."""

    def __post_init__(self) -> None:
        if not self.model or any(not (letter.isalnum() or letter in "-_.") for letter in self.model):
            raise ValueError(
                f"headrace.model = {self.model!r}: it names a folder, so use letters, digits, '-', '_' and '.' only"
            )
