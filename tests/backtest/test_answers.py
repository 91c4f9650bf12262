"""What was spent on whom adds up to what was spent."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from backtest.answers import Answers
from backtest.run_files import RunWriter


def _work(seconds: float) -> None:
    end_s = time.process_time() + seconds
    while time.process_time() < end_s:
        pass


def test_time_within_a_block_of_others_is_theirs(tmp_path: Path) -> None:
    answers = Answers(RunWriter(tmp_path))
    started_s = time.process_time()
    with answers.spending(["training"]):
        _work(0.05)
        with answers.spending(["one", "other"]):
            _work(0.1)
        _work(0.05)
    whole_s = time.process_time() - started_s
    costs = answers.costs()
    assert costs["one"].cpu_s == costs["other"].cpu_s == pytest.approx(0.05, abs=0.02)
    assert sum(cost.cpu_s for cost in costs.values()) == pytest.approx(whole_s, abs=0.005)
