"""Two runs are compared query by query where they asked the same, and what differs in how they were made is listed."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from backtest.bootstrap import BootstrapConfig, Estimate
from backtest.comparison import Setting, compare
from backtest.errors import RunFolderError
from backtest.report_words import comparison_text
from backtest.run_files import RunFolder
from tests.backtest.made_run import make_run

CONFIG = BootstrapConfig(num_resamples=300)


def _changed(run: RunFolder, **changes: Any) -> RunFolder:
    path = run.root / "run.json"
    path.write_text(json.dumps({**json.loads(path.read_text(encoding="utf-8")), **changes}), encoding="utf-8")
    return RunFolder.open(run.root)


def _width(estimate: Estimate) -> float:
    assert estimate.low is not None
    assert estimate.high is not None
    return estimate.high - estimate.low


def test_equal_runs_do_not_differ_at_all(tmp_path: Path) -> None:
    found = compare(make_run(tmp_path / "a"), make_run(tmp_path / "b"), CONFIG)
    assert found.is_paired
    assert found.settings == []
    assert {tuple(dataclasses.astuple(arm.difference["mrr"])) for arm in found.arms} == {(0.0, 0.0, 0.0)}


def test_an_arm_that_was_lifted_is_better_and_the_others_are_not(tmp_path: Path) -> None:
    found = compare(make_run(tmp_path / "a"), make_run(tmp_path / "b", lift=0.05), CONFIG)
    lifted, *others = found.arms
    assert (lifted.difference["hr_at_20"].low or 0) > 0
    assert [arm.difference["hr_at_20"].mean for arm in others] == [0.0] * len(others)
    text = comparison_text(found, "hr_at_20")
    assert "the same 4,000 queries, paired" in text
    assert [line.endswith("B is better") for line in text.splitlines() if line.startswith("online-")] == [
        True, False, False, False, False,
    ]  # fmt: skip


def test_runs_that_asked_other_queries_are_independent_samples(tmp_path: Path) -> None:
    first = make_run(tmp_path / "a", seed=0)
    paired = compare(first, make_run(tmp_path / "b", lift=0.02), CONFIG).arms[0].difference["ndcg_at_20"]
    found = compare(first, make_run(tmp_path / "c", seed=1), CONFIG)
    assert not found.is_paired
    assert _width(found.arms[0].difference["ndcg_at_20"]) > 2 * _width(paired)
    assert "independent samples" in comparison_text(found, "mrr")


def test_what_differs_in_how_they_were_made_is_listed(tmp_path: Path) -> None:
    first, second = make_run(tmp_path / "a"), make_run(tmp_path / "b")
    config = {"backtest": first.manifest.config["backtest"], "trainer": {"batch_tokens": 4096}}
    second = _changed(second, config=config, seed=7)
    found = compare(first, second, CONFIG)
    assert found.settings == [
        Setting(name="seed", first=0, second=7),
        Setting(name="trainer.batch_tokens", first=2048, second=4096),
    ]
    assert "trainer.batch_tokens: 2048 in A, 4096 in B" in comparison_text(found, "mrr")


def test_arms_of_one_run_alone_are_named_and_runs_without_a_common_one_refused(tmp_path: Path) -> None:
    first, second = make_run(tmp_path / "a"), make_run(tmp_path / "b")
    arms = json.loads((second.root / "run.json").read_text(encoding="utf-8"))["arms"]
    found = compare(first, _changed(second, arms=arms[:2]), CONFIG)
    assert (len(found.arms), len(found.only_first), found.only_second) == (2, 6, [])
    other = _changed(second, arms=[{**arms[0], "name": "else"}])
    with pytest.raises(RunFolderError, match="no arm in common: online-0, .* against else"):
        compare(first, other, CONFIG)
