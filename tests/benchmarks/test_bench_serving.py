"""`make bench-serving` measures what it says: real processes, no errors, nothing mixed, and it would notice."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.bench_serving import histogram
from benchmarks.serving_load import Seen, same

ROOT = Path(__file__).parents[2]


@pytest.mark.timeout(600)
def test_the_whole_benchmark_runs_and_swaps_harm_nobody(tmp_path: Path) -> None:
    ran = subprocess.run(
        [sys.executable, "benchmarks/bench_serving.py", "--quick", "--results", str(tmp_path / "found.json")],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )
    assert ran.returncode == 0, ran.stderr
    found = json.loads(ran.stdout.splitlines()[-1])
    assert found["benchmark"] == "serving"
    assert json.loads((tmp_path / "found.json").read_text()) == found
    for phase in found["phases"].values():
        assert phase["requests"] >= 40
        assert (phase["errors"], phase["mixed"]) == (0, 0), phase
        assert phase["compared"] > 0
    assert found["phases"]["no swaps"]["swaps"] == 0
    assert found["phases"]["storm"]["swaps"] >= 2
    assert sum(found["pause_histogram"].values()) == sum(phase["swaps"] for phase in found["phases"].values())
    assert found["rss_mib"]["steady"] > 100


def test_an_answer_of_other_weights_is_noticed_and_a_tie_is_not() -> None:
    one = {1: 2.0, 2: 1.0, 3: 0.5}
    assert same(one, {1: 2.0, 2: 1.00001, 4: 0.5})
    assert not same(one, {1: 2.0, 2: 1.1, 3: 0.5})
    assert not same(one, {1: 2.0, 2: 1.0})
    seen = Seen()
    for score in (2.0, 2.0, 2.5):
        body = {"fallback": False, "snapshot_version": 7, "items": [{"item_id": 1, "score": score}]}
        seen.answered(3, 0.0, 200, json.dumps(body).encode())
    assert (seen.num_compared, seen.num_mixed) == (2, 1)


def test_every_pause_is_in_one_class_of_the_histogram() -> None:
    assert histogram([0.2, 0.7, 0.9, 3.0, 500.0]) == {
        "<= 0.5": 1, "<= 1": 2, "<= 2": 0, "<= 5": 1, "<= 10": 0, "<= 20": 0, "<= 50": 0, "<= 100": 0, "> 100": 1,
    }  # fmt: skip
