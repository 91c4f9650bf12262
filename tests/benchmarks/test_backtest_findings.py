"""The kept summary says what the run's evaluation says, and names no path."""

from __future__ import annotations

import json
from pathlib import Path

from backtest.bootstrap import BootstrapConfig
from backtest.evaluation import EvaluationConfig, evaluate
from benchmarks.backtest_findings import METRICS, summary
from tests.backtest.made_run import make_run


def test_a_summary_is_json_with_the_reports_figures_and_no_paths(tmp_path: Path) -> None:
    run = make_run(tmp_path, num_queries=600)
    run.manifest.lineage["source"] = {"num_events": 9, "files": [{"path": str(tmp_path / "log.csv"), "sha256": "ab"}]}
    run.manifest.config.update({key: {} for key in ("backtest", "trainer", "items", "model", "loss", "optimizer")})
    run.manifest.lineage.setdefault("versions", {})
    evaluation = evaluate(run, EvaluationConfig(bootstrap=BootstrapConfig(num_resamples=100)))
    found = json.loads(json.dumps(summary(run, evaluation)))
    assert str(tmp_path) not in json.dumps(found)
    assert found["source"]["files"] == [{"file": "log.csv", "sha256": "ab"}]
    for arm in evaluation.arms:
        kept = found["arms"][arm.info.name]
        for metric in METRICS:
            assert kept[metric][0] == round(arm.metrics["all"][metric].mean or 0.0, 5)
        assert bool(kept["difference"]) == (arm.info.name != evaluation.reference)
    assert [point["age_ms"] for point in found["curves"]["publish_every"].values()][-1] is None
    num_points = len(found["over_time"]["time_ms"])
    assert all(len(values) == num_points for values in found["over_time"]["ndcg_at_20"].values())
