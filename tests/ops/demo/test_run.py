"""A short demo from end to end, and Ctrl-C in the middle of one, as processes."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

_SHORT_RUN = (
    "import sys; from pathlib import Path; from ops.demo import run as demo; "
    "sys.exit(demo.run(minutes=0.7, num_events=3000, {}))"
)


def _start(data_dir: Path, options: str = "") -> subprocess.Popen[str]:
    program = _SHORT_RUN.format(f"data_dir=Path({str(data_dir)!r}), {options}")
    return subprocess.Popen(
        [sys.executable, "-u", "-c", program], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def _left_running(data_dir: Path) -> list[str]:
    """Processes of the run, found by the settings file in their environment or the broker's log among their files."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            environment = (process / "environ").read_bytes()
            opened = [str(handle.readlink()) for handle in (process / "fd").iterdir()]
        except OSError:
            continue
        if str(data_dir).encode() in environment or any(str(data_dir) in name for name in opened):
            found.append((process / "cmdline").read_bytes().replace(b"\0", b" ").decode())
    return found


@pytest.mark.timeout(600)
def test_a_short_demo_ends_with_everything_proven_and_nothing_left_running(tmp_path: Path) -> None:
    demo = _start(tmp_path / "demo")
    output, _ = demo.communicate(timeout=380)
    assert demo.returncode == 0, output
    assert "Traceback" not in output
    assert "\x1b" not in output
    summary = json.loads((tmp_path / "demo" / "summary.json").read_text())
    assert summary["is_ok"] is True
    assert summary["change"]["seconds"] > 0
    assert summary["freshness_from_append"]["F4"]["coverage"] == 1.0
    assert (tmp_path / "demo" / "curves.png").stat().st_size > 10_000
    assert _left_running(tmp_path) == []


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("after", ["titles", "replaying"])
def test_ctrl_c_at_any_time_stops_everything_within_ten_seconds(tmp_path: Path, after: str) -> None:
    demo = _start(tmp_path / "demo")
    assert demo.stdout is not None
    for line in demo.stdout:
        if after in line:
            break
    began_s = time.monotonic()
    demo.send_signal(signal.SIGINT)
    output, _ = demo.communicate(timeout=60)
    assert time.monotonic() - began_s < 12  # ten seconds, and the end of the process itself
    assert demo.returncode == 130
    assert "nothing is left running" in output
    assert "Traceback" not in output
    assert _left_running(tmp_path) == []
