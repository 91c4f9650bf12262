"""Making a recording of a log: events per CPU second and peak memory, by the length of the log.

    python benchmarks/bench_import.py [--events 2000000 10000000] [--arms recording recording-sorted csv in-memory]

A log of random users, items (Zipf) and times, in one Parquet file (by default of one row group, which is
the worst there is: --row-group) or one CSV file. Arms: *recording*
imports a log in random order, *recording-sorted* one in order of time, *csv* one in order from text; *in-memory* is the
ordinary way: read all, sort, write, with nothing checked and repeats not looked for. Every arm is a process of its own;
the time to make the log is not counted. Memory is the peak of the process. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from backtest.formats import files_of
from backtest.importing import import_files
from backtest.intake import ImportConfig
from benchmarks.environment import environment

ARMS = ("recording", "recording-sorted", "csv", "in-memory")
SPAN_MS = 20_000_000_000
START_MS = 1_600_000_000_000


def main() -> None:
    options = _options()
    if options.one:
        print(json.dumps(_import(options.one, Path(options.log))))
        return
    print(f"{'events':>12} {'arm':18} {'events / CPU s':>15} {'CPU s':>8} {'peak MB':>8}")
    rows = [
        _run(arm, num_events, options.row_group or num_events) for num_events in options.events for arm in options.arms
    ]
    print(json.dumps({"benchmark": "import", "rows": rows, **environment()}))


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Logs into recordings.")
    parser.add_argument("--events", nargs="+", type=int, default=[2_000_000, 10_000_000])
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS))
    parser.add_argument("--row-group", type=int, default=0, help="rows of a row group of Parquet; 0: all are one")
    parser.add_argument("--one", choices=ARMS, help=argparse.SUPPRESS)
    parser.add_argument("--log", help=argparse.SUPPRESS)
    return parser.parse_args()


def _run(arm: str, num_events: int, row_group: int) -> dict[str, Any]:
    with tempfile.TemporaryDirectory(prefix="headrace-") as folder:
        log = _write_log(Path(folder), arm, num_events, row_group)
        command = [sys.executable, __file__, "--one", arm, "--log", str(log)]
        environ = os.environ | {"POLARS_MAX_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[1])}
        done = subprocess.run(command, capture_output=True, text=True, check=True, env=environ)
        found: dict[str, Any] = json.loads(done.stdout)
    assert found["events"] == num_events, found
    row = {"arm": arm, "row_group": row_group, **found}
    print(
        f"{num_events:12,} {arm:18} {num_events / found['cpu_s']:15,.0f} {found['cpu_s']:8.1f} {found['peak_mb']:8.0f}",
        flush=True,
    )
    return row


def _write_log(folder: Path, arm: str, num_events: int, row_group: int) -> Path:
    rng = np.random.default_rng(0)
    times = rng.integers(START_MS, START_MS + SPAN_MS, num_events)
    frame = pl.DataFrame(
        {
            "user_id": rng.integers(0, max(num_events // 10, 1), num_events),
            "item_id": rng.zipf(1.3, num_events) % 500_000,
            "event_time": np.sort(times) if arm in {"recording-sorted", "csv"} else times,
            "value": rng.random(num_events).astype(np.float32),
        }
    )
    log = folder / ("log.csv" if arm == "csv" else "log.parquet")
    if arm == "csv":
        frame.write_csv(log)
    else:
        frame.write_parquet(log, row_group_size=row_group)
    return log


def _import(arm: str, log: Path) -> dict[str, Any]:
    began_s = time.process_time()
    if arm == "in-memory":
        frame = pl.read_parquet(log).with_row_index().sort("event_time", "index")
        frame.write_parquet(log.with_name("sorted.parquet"))
        num_events = frame.height
    else:
        files = files_of("csv" if arm == "csv" else "parquet", [log], time_unit="ms", value="value")
        num_events = len(import_files(files, log.with_name("recording"), ImportConfig(), name="log"))
    return {
        "events": num_events,
        "cpu_s": round(time.process_time() - began_s, 2),
        "peak_mb": _peak_mb(),
        "log_mb": round(log.stat().st_size / 1e6, 1),
    }


def _peak_mb() -> int:
    """Of this program alone: the peak that getrusage tells is at least that of the process that started it."""
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return round(next(int(line.split()[1]) for line in lines if line.startswith("VmHWM:")) / 1024)


if __name__ == "__main__":
    main()
