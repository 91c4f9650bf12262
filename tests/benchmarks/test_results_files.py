"""Benchmarks run to their end, and write to `--results` what their last line says."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(
    "command",
    [
        ("bench_recommend", "--only", "search", "--items", "2000"),
        ("bench_long_histories", "--length", "64", "--layers", "2", "--seconds", "0.01"),
        pytest.param(("bench_guards", "--events", "4000", "--every", "500", "--answers", "40"), marks=pytest.mark.slow),
    ],
)
def test_the_file_holds_what_the_last_line_says(command: tuple[str, ...], tmp_path: Path) -> None:
    name, *arguments = command
    ran = subprocess.run(
        [sys.executable, "-m", f"benchmarks.{name}", *arguments, "--results", str(tmp_path / "found.json")],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=110,
        check=False,
    )
    assert ran.returncode == 0, ran.stderr
    said = json.loads(ran.stdout.splitlines()[-1])
    assert said["benchmark"] == name.removeprefix("bench_")
    assert json.loads((tmp_path / "found.json").read_text()) == said
