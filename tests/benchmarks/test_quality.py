"""The quality benchmark runs on what ships with headrace, from the command line to the picture."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

REPOSITORY = Path(__file__).parents[2]


def test_a_short_run_writes_its_figures_and_says_what_is_not_there(tmp_path: Path) -> None:
    done = subprocess.run(
        [
            *(sys.executable, "benchmarks/quality.py", "--limit", "3000", "--globo", str(tmp_path / "none.parquet")),
            *("--set", "model.embedding_dim=16", "--results", str(tmp_path / "quality.json")),
        ],
        cwd=REPOSITORY,
        env={"PYTHONPATH": ".", "MPLCONFIGDIR": str(tmp_path), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert "globo-news: " in done.stdout
    assert "left out (--globo)" in done.stdout
    last = json.loads(done.stdout.splitlines()[-1])
    found = last["streams"]["movietweetings"]
    assert found["events"] == 3000
    assert 0 < found["arms"]["popularity"]["whole"]["hr_at_10"] < 1
    whole, second = found["arms"]["model"]["whole"]["mrr"], found["arms"]["model"]["second_half"]["mrr"]
    written = json.loads((tmp_path / "quality.json").read_text())
    curve = written["streams"]["movietweetings"]["curve"]
    assert len(curve) > 20
    assert curve[-1]["model.lifetime.mrr"] == whole != second
    assert (tmp_path / "quality.png").stat().st_size > 10_000
