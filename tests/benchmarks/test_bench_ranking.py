"""The ranking benchmark runs on what ships with headrace, and compares on the same labels."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

REPOSITORY = Path(__file__).parents[2]


def test_a_short_run_measures_head_and_item_means_on_the_same_labels(tmp_path: Path) -> None:
    done = subprocess.run(
        [
            *(sys.executable, "benchmarks/bench_ranking.py", "--events", "3500"),
            *("--only", "interactions", "impressions", "--set", "ranking.task_hidden_dim=8"),
            *("--results", str(tmp_path / "ranking.json")),
        ],
        cwd=REPOSITORY,
        env={"PYTHONPATH": ".", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=True,
    )
    last = json.loads(done.stdout.splitlines()[-1])
    assert json.loads((tmp_path / "ranking.json").read_text()) == last
    rated, shown = last["interactions"], last["impressions"]
    assert rated["lifetime"]["count"] == rated["accounts"]["learned"]
    assert rated["accounts"]["learned"] + rated["accounts"]["unlisted"] == 3500
    assert shown["lifetime"]["count"] == shown["accounts"]["learned"]
    for found in (rated, shown):
        for arm in ("head", "item_mean"):
            assert 0 < found["lifetime"][arm]["ne"] < 2
            assert 0 < found["lifetime"][arm]["auc"] < 1
    assert rated["lifetime"]["item_mean"]["auc"] > 0.6
