"""The study of LLaTTE's two stages runs to its end, goes on where it was, and knows no future."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest

from benchmarks import study_llatte
from benchmarks.study_llatte import BASE, LARGE, flops_of, ratio_of, read_stream


def test_histories_hold_what_had_happened_a_while_before() -> None:
    stream = read_stream(2_000)
    rows = np.arange(1_000, 2_000)
    for stale_ms in (0, 3_600_000):
        places, offsets = stream.histories(rows, max_len=3, stale_ms=stale_ms)
        row_of = np.repeat(rows, np.diff(offsets))
        assert (stream.user[places] == stream.user[row_of]).all()
        assert (stream.time_ms[places] < stream.time_ms[row_of] - stale_ms).all()
        assert np.diff(offsets).max() == 3


def test_larger_networks_cost_more() -> None:
    assert flops_of(LARGE.network(), 100) > 10 * flops_of(BASE.network(), 100)
    assert flops_of(LARGE.network(), 10) < flops_of(LARGE.network(), 100)


def test_there_is_no_ratio_to_a_gain_that_may_be_none() -> None:
    gain = {"gain_percent": 0.5, "standard_error": 0.1}
    assert ratio_of(gain, {"gain_percent": 1.0, "standard_error": 0.2}) == 0.5
    assert ratio_of(gain, {"gain_percent": 0.3, "standard_error": 0.2}) is None
    assert ratio_of(gain, {"gain_percent": -1.0, "standard_error": 0.1}) is None


@pytest.mark.slow
def test_it_runs_to_its_end_and_goes_on_where_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--quick", "--work", str(tmp_path / "work"), "--data", str(tmp_path), "--plots", str(tmp_path)]
    said = []
    for _ in range(2):
        monkeypatch.setattr(sys, "argv", ["study_llatte", *arguments])
        study_llatte.main()
        said.append(capsys.readouterr().out.splitlines())
        (tmp_path / "llatte.png").unlink()
    first, again = (json.loads(lines[-1]) for lines in said)
    assert first == again
    assert any("CPU s" in line for line in said[0])
    assert not any("CPU s" in line for line in said[1])
    assert first["content"] is None  # titles and genres are not there
    assert first["transfer"]["stale"].keys() == study_llatte.STALE_S.keys()
    assert first["scaling"]["fits"].keys() == {"depth", "length", "width"}
    assert all(0.5 < one["ne"] < 2 for one in first["scaling"]["arms"].values())
