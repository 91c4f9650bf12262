"""Writes what a run shows: a page to read, JSON and Parquet to go on with."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import polars as pl

from backtest.bootstrap import Estimate
from backtest.errors import RunFolderError
from backtest.evaluation import Evaluation, EvaluationConfig, evaluate
from backtest.report_page import page
from backtest.report_tables import MAIN_METRIC
from backtest.report_words import findings
from backtest.run_files import RunFolder

REPORT_SCHEMA: Final = 1
"""Of report.json."""
_NO_DIFFERENCE: Final = Estimate(None)


@dataclass(frozen=True, kw_only=True, slots=True)
class ReportFiles:
    """Where the report is."""

    html: Path
    json: Path
    arms: Path
    curves: Path


def write_report(run: RunFolder, out: Path, config: EvaluationConfig) -> ReportFiles:
    """Evaluate a run and write report.html, report.json, arms.parquet and curves.parquet.

    The same run gives the same bytes. Raises RunFolderError, and ValueError for a reference that there is not.
    """
    evaluation = evaluate(run, config)
    files = ReportFiles(
        html=out / "report.html", json=out / "report.json", arms=out / "arms.parquet", curves=out / "curves.parquet"
    )
    try:
        out.mkdir(parents=True, exist_ok=True)
        arms_table(evaluation).write_parquet(files.arms)
        evaluation.curves.write_parquet(files.curves)
        text = json.dumps(report_json(run, evaluation, config), indent=1, ensure_ascii=False)
        files.json.write_text(text + "\n", encoding="utf-8")
        files.html.write_text(page(run, evaluation, config), encoding="utf-8")
    except OSError as error:
        raise RunFolderError(f"{out} cannot be written: {error}") from error
    return files


def report_json(run: RunFolder, evaluation: Evaluation, config: EvaluationConfig) -> dict[str, Any]:
    """All of the page but the curves over time, which are in curves.parquet."""
    manifest = dataclasses.asdict(run.manifest)
    return {
        "schema": REPORT_SCHEMA,
        "run": {name: value for name, value in manifest.items() if name not in {"arms", "costs", "schema"}},
        "evaluation": dataclasses.asdict(config),
        "reference": evaluation.reference,
        "num_queries": evaluation.num_queries,
        "findings": list(findings(evaluation, MAIN_METRIC)),
        "arms": [dataclasses.asdict(arm) for arm in evaluation.arms],
        "ablations": {
            kind: [dataclasses.asdict(point) for point in points] for kind, points in evaluation.ablations.items()
        },
        "drift": run.drift().collect().to_dicts(),
        "shared_costs": manifest["costs"].get("shared"),
    }


def arms_table(evaluation: Evaluation) -> pl.DataFrame:
    """A row an arm, group and metric: count, mean, low, high, and of all queries the difference to the reference."""
    rows = [
        {
            "arm": arm.info.name,
            "group": group,
            "metric": metric,
            "count": arm.num_queries[group],
            **dataclasses.asdict(estimate),
            **{
                f"difference_{name}": value
                for name, value in dataclasses.asdict(
                    arm.against_reference[metric] if group == "all" and arm.against_reference else _NO_DIFFERENCE
                ).items()
            },
        }
        for arm in evaluation.arms
        for group, of_group in arm.metrics.items()
        for metric, estimate in of_group.items()
    ]
    return pl.DataFrame(rows, infer_schema_length=None)
