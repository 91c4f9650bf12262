"""Where a benchmark ran: goes into every result."""

from __future__ import annotations

import os
import platform
import shutil
import sqlite3
import subprocess
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

_PACKAGES = ("aiokafka", "faust-streaming", "msgspec", "numpy", "psycopg", "sqlalchemy", "torch", "triton")


def environment() -> dict[str, Any]:
    """Commit, machine and versions of what is installed, JSON-ready."""
    return {
        "commit": _commit(),
        "machine": {"cpu": _cpu(), "cores": os.cpu_count(), "system": platform.platform(terse=True)},
        "versions": _versions(),
    }


def _commit() -> str:
    return answer("git", "describe", "--always", "--dirty", "--abbrev=12")


def answer(*command: str) -> str:
    """What a command prints, "unknown" where it is missing or fails."""
    if shutil.which(command[0]) is None:
        return "unknown"
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip() or "unknown"


def _versions() -> dict[str, str]:
    """Packages that are not installed are left out."""
    versions = {"python": platform.python_version(), "sqlite": sqlite3.sqlite_version}
    for name in _PACKAGES:
        with suppress(PackageNotFoundError):
            versions[name] = version(name)
    return versions


def _cpu() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []:
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.machine()
