"""What runs of `headrace backtest run` show, as JSON small enough to keep: what docs/findings.md quotes.

    python benchmarks/backtest_findings.py runs/movietweetings --results benchmarks/results/findings-movietweetings.json

The folder of a run, or of a sweep over seeds: then the first seed's run, with mean and standard deviation over all of
them beside it. Arms with intervals and differences as in the report, the freshness curves, costs, and how the main arms
did as the stream went on. Paths are left out, files are named with their sha256. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, Final

import polars as pl

from backtest.bootstrap import Estimate
from backtest.evaluation import ArmEvaluation, Evaluation, EvaluationConfig, evaluate
from backtest.report_tables import MAIN_METRIC
from backtest.report_words import findings
from backtest.run import SWEEP
from backtest.run_files import RunFolder
from online_trainer.prequential import ALL, ITEM_KINDS, USER_KINDS

METRICS: Final = (MAIN_METRIC, "hr_at_10", "mrr")
_DIGITS: Final = 5
_TABLES: Final = ("backtest", "trainer", "items", "model", "loss", "optimizer")
"""Of the configuration: what decides how the arms learn."""


def main() -> None:
    options = _options()
    sweep = _sweep(options.run)
    folder = options.run if sweep is None else options.run / f"seed-{sweep['seeds'][0]}"
    run = RunFolder.open(folder)
    result = summary(run, evaluate(run, EvaluationConfig()), sweep)
    if options.results:
        options.results.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    for sentence in result["findings"]:
        print(sentence)
    print(json.dumps(result))


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="What a run shows, as small JSON.")
    parser.add_argument("run", type=Path, help="folder of a run, or of a sweep over seeds")
    parser.add_argument("--results", type=Path, help="JSON file to write")
    return parser.parse_args()


def _sweep(folder: Path) -> dict[str, Any] | None:
    path = folder / SWEEP
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None


def summary(run: RunFolder, evaluation: Evaluation, sweep: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """JSON-ready; `sweep` as in sweep.json."""
    manifest = run.manifest
    return {
        "benchmark": "backtest-findings",
        "name": manifest.name,
        "is_complete": manifest.is_complete,
        "source": _source(manifest.lineage["source"]),
        "config": {table: manifest.config[table] for table in _TABLES},
        "seed": manifest.seed,
        "num_events": int(run.queries().select(pl.col("event").max()).collect().item()) + 1,
        "num_queries": evaluation.num_queries,
        "evaluated_from_ms": manifest.evaluated_from_ms,
        "last_event_time_ms": manifest.last_event_time_ms,
        "cpu_s": manifest.cpu_s,
        "shared_cpu_s": manifest.costs["shared"].cpu_s if "shared" in manifest.costs else None,
        "reference": evaluation.reference,
        "findings": list(findings(evaluation, MAIN_METRIC)),
        "arms": {arm.info.name: _arm(arm) for arm in evaluation.arms},
        "curves": {
            kind: {
                point.arm: {
                    "age_ms": point.age_ms,
                    **_estimates(point.metrics),
                    "loss": _estimates(point.against_freshest),
                }
                for point in points
            }
            for kind, points in evaluation.ablations.items()
        },
        "over_time": _over_time(evaluation),
        **({} if sweep is None else {"seeds": _seeds(sweep)}),
        "versions": manifest.lineage["versions"],
    }


def _source(source: Mapping[str, Any]) -> dict[str, Any]:
    files = [{"file": Path(one["path"]).name, "sha256": one["sha256"]} for one in source["files"]]
    return {"num_events": source["num_events"], "files": files}


def _arm(arm: ArmEvaluation) -> dict[str, Any]:
    kinds = (*ITEM_KINDS, *USER_KINDS)
    return {
        "title": arm.info.title,
        **_estimates(arm.metrics[ALL]),
        "difference": _estimates(arm.against_reference),
        "by_kind": {kind: _rounded(arm.metrics[kind][MAIN_METRIC]) for kind in kinds},
        "num_queries": arm.num_queries,
        "weights_age_p50_ms": arm.weights_age_p50_ms,
        "weights_age_p95_ms": arm.weights_age_p95_ms,
        **asdict(arm.costs),
    }


def _estimates(metrics: Mapping[str, Estimate]) -> dict[str, list[float | None]]:
    """Metric → mean, low, high."""
    return {name: _rounded(metrics[name]) for name in METRICS if name in metrics}


def _rounded(estimate: Estimate) -> list[float | None]:
    return [None if value is None else round(value, _DIGITS) for value in (estimate.mean, estimate.low, estimate.high)]


def _over_time(evaluation: Evaluation) -> dict[str, Any]:
    """The main metric in spans of equal time, of the arms that are no lags."""
    own = evaluation.curves.filter(pl.col("metric") == MAIN_METRIC)
    names = [arm.info.name for arm in evaluation.arms if arm.info.ablation in {None, "publish_every"}]
    by_arm = {name: own.filter(pl.col("arm") == name).sort("time_ms") for name in names}
    first = by_arm[names[0]]
    return {
        "time_ms": first["time_ms"].to_list(),
        "count": first["count"].to_list(),
        MAIN_METRIC: {name: frame["mean"].round(4).to_list() for name, frame in by_arm.items()},
    }


def _seeds(sweep: Mapping[str, Any]) -> dict[str, Any]:
    """Seeds, and per arm and metric mean, standard deviation and the values."""
    return {
        "seeds": sweep["seeds"],
        "arms": {
            name: {
                metric: {
                    "mean": round(found[metric]["mean"], _DIGITS),
                    "sd": round(found[metric]["sd"], _DIGITS),
                    "values": [round(value, _DIGITS) for value in found[metric]["values"]],
                }
                for metric in METRICS
                if metric in found
            }
            for name, found in sweep["arms"].items()
        },
    }


if __name__ == "__main__":
    main()
