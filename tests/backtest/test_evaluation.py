"""An evaluation says of each arm what counting by hand says, slice by slice, and compares arms on the same queries."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import polars as pl
import pytest

from backtest.bootstrap import BootstrapConfig, Estimate
from backtest.errors import RunFolderError
from backtest.evaluation import GROUPS, METRICS, Evaluation, EvaluationConfig, evaluate
from backtest.run_files import RunFolder, RunWriter
from online_trainer.prequential import ALL, ITEM_KINDS, USER_KINDS, RankMetrics
from tests.backtest.made_run import NUM_ITEMS, SPANS, make_run

QUICK = EvaluationConfig(bootstrap=BootstrapConfig(num_resamples=300))


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    return make_run(tmp_path_factory.mktemp("run"))


@pytest.fixture(scope="module")
def evaluation(run: RunFolder) -> Evaluation:
    return evaluate(run, QUICK)


@pytest.mark.parametrize("group", GROUPS)
def test_every_slice_has_the_means_of_its_own_queries(run: RunFolder, evaluation: Evaluation, group: str) -> None:
    queries = run.queries().collect()
    kinds = {name: queries["item_kind"] == at for at, name in enumerate(ITEM_KINDS)}
    kinds |= {name: queries["user_kind"] == at for at, name in enumerate(USER_KINDS)}
    inside = np.ones(queries.height, bool) if group == ALL else kinds[group].to_numpy()
    for arm in evaluation.arms:
        expected = RankMetrics.of_ranks(run.ranks(arm.info.name).collect()["rank"].to_numpy()[inside])
        assert arm.num_queries[group] == expected.count > 0
        for metric, found in arm.metrics[group].items():
            if metric != "auc":
                assert found.mean == pytest.approx(getattr(expected, metric), abs=1e-12)
            assert found.low is not None
            assert found.high is not None
            assert found.mean is not None
            assert found.low <= found.mean <= found.high


def test_differences_are_to_the_freshest_online_arm_and_paired(evaluation: Evaluation) -> None:
    assert evaluation.reference == "online-0"
    assert evaluation.arm("online-0").against_reference == {}
    never = evaluation.arm("online-never")
    difference = never.against_reference["ndcg_at_20"]
    own, theirs = never.metrics[ALL]["ndcg_at_20"], evaluation.arm("online-0").metrics[ALL]["ndcg_at_20"]
    assert own.mean is not None
    assert theirs.mean is not None
    assert difference.mean == pytest.approx(own.mean - theirs.mean)
    assert _width(difference) < _width(own)
    assert difference.high is not None
    assert difference.high < 0


def test_the_reference_is_the_runs_own_model_not_a_variant_that_is_as_fresh(tmp_path: Path) -> None:
    made = make_run(tmp_path, num_queries=400)
    arms = [
        replace(arm, kind="online", publish_every_ms=0, settings={"epochs": 1, "model": {"kind": "sasrec"}})
        if arm.name == "retrained"
        else arm
        for arm in made.manifest.arms
    ]
    variant = RunFolder(made.root, replace(made.manifest, arms=arms))
    assert evaluate(variant, QUICK).reference == "online-0"


def test_another_reference_may_be_asked_for_and_must_exist(run: RunFolder) -> None:
    config = EvaluationConfig(bootstrap=QUICK.bootstrap, reference="popularity")
    found = evaluate(run, config)
    assert found.reference == "popularity"
    gain = found.arm("online-0").against_reference["hr_at_10"]
    assert gain.low is not None
    assert gain.low > 0
    with pytest.raises(ValueError, match="reference = oracle: the run has online-0"):
        evaluate(run, EvaluationConfig(reference="oracle"))


def test_a_freshness_curve_runs_from_the_freshest_to_never(evaluation: Evaluation) -> None:
    assert list(evaluation.ablations) == ["publish_every"]
    points = evaluation.ablations["publish_every"]
    assert [point.age_ms for point in points] == list(SPANS.values())
    means = [point.metrics["ndcg_at_20"].mean for point in points]
    assert means[2:] == sorted(means[2:], key=lambda mean: -(mean or 0))
    assert points[0].against_freshest == {}
    assert (points[-1].against_freshest["ndcg_at_20"].high or 0) < 0


def test_lags_are_measured_against_an_arm_like_theirs_without_any(tmp_path: Path) -> None:
    made = make_run(tmp_path / "run", num_queries=400)
    path = made.root / "run.json"
    manifest = json.loads(path.read_text(encoding="utf-8"))
    late = {"kind": "online", "publish_every_ms": 0, "histories_lag_ms": 60_000, "ablation": "histories_lag"}
    manifest["arms"][5] |= late
    path.write_text(json.dumps(manifest), encoding="utf-8")
    found = evaluate(RunFolder.open(made.root), QUICK).ablations["histories_lag"]
    assert [(point.arm, point.age_ms) for point in found] == [("online-0", 0), ("retrained", 60_000)]
    assert found[1].against_freshest["mrr"].mean is not None


def test_points_of_a_curve_add_up_to_the_whole(evaluation: Evaluation) -> None:
    for arm in evaluation.arms:
        curve = evaluation.curves.filter((pl.col("arm") == arm.info.name) & (pl.col("metric") == "mrr"))
        assert curve["count"].sum() == evaluation.num_queries
        whole = float((curve["mean"] * curve["count"]).sum()) / evaluation.num_queries
        assert whole == pytest.approx(arm.metrics[ALL]["mrr"].mean)
        assert curve["time_ms"].is_sorted()
    assert set(evaluation.curves["metric"].unique()) == set(METRICS)


def test_lists_are_judged_by_what_they_show(run: RunFolder, evaluation: Evaluation) -> None:
    lists = evaluation.arm("online-0").lists
    assert lists is not None
    shown = run.lists("online-0").collect()
    assert lists.num_lists == shown.height
    assert lists.coverage == len(set(shown["item_ids"].explode().to_list())) / NUM_ITEMS
    assert lists.churn_from_reference is None
    assert lists.shown is not None
    assert lists.shown.count == 10 * shown.height
    same = evaluation.arm("online-1h").lists
    assert same is not None
    assert same.churn_from_reference == 0.0
    other = evaluation.arm("popularity").lists
    assert other is not None
    assert other.churn_from_reference is not None
    assert other.churn_from_reference > 0
    assert other.shown is None


def test_resampling_users_is_an_option_with_the_same_means(run: RunFolder, evaluation: Evaluation) -> None:
    by_user = evaluate(run, EvaluationConfig(bootstrap=BootstrapConfig(resample="user", num_resamples=200)))
    for arm in evaluation.arms:
        mean = by_user.arm(arm.info.name).metrics[ALL]["mrr"].mean
        assert mean == pytest.approx(arm.metrics[ALL]["mrr"].mean)


def test_an_evaluation_is_the_same_every_time(run: RunFolder, evaluation: Evaluation) -> None:
    again = evaluate(run, QUICK)
    assert again.arms == evaluation.arms
    assert again.curves.equals(evaluation.curves)


def test_ranks_that_are_not_those_of_the_queries_are_refused(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", num_queries=400, num_parts=1)
    path = tmp_path / "run" / "ranks" / "popularity" / "part-00000.parquet"
    pl.read_parquet(path).head(-1).write_parquet(path)
    with pytest.raises(RunFolderError, match="ranks of arm popularity are not those of the queries"):
        evaluate(run, QUICK)


def test_a_run_that_evaluated_nothing_yet_is_refused(tmp_path: Path) -> None:
    made = make_run(tmp_path / "run", num_queries=400, num_parts=1)
    RunWriter(made.root, num_parts=0)
    with pytest.raises(RunFolderError, match="nothing was evaluated yet"):
        evaluate(RunFolder.open(made.root), QUICK)


def _width(estimate: Estimate) -> float:
    assert estimate.low is not None
    assert estimate.high is not None
    return estimate.high - estimate.low
