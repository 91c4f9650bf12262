"""`headrace backtest report` and `compare`: what a run shows, and two runs side by side."""

# No `from __future__ import annotations`: typer reads the annotations of commands at run time.

import json
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from ops.command_line import say
from ops.errors import OpsError


class ResampleName(StrEnum):
    """What a block of the bootstrap is."""

    TIME = "time"
    USER = "user"


class MetricName(StrEnum):
    """What is compared."""

    NDCG_20 = "ndcg_at_20"
    NDCG_10 = "ndcg_at_10"
    HR_1 = "hr_at_1"
    HR_10 = "hr_at_10"
    HR_20 = "hr_at_20"
    HR_50 = "hr_at_50"
    MRR = "mrr"
    AUC = "auc"


ResampleOption = Annotated[ResampleName, typer.Option("--resample", help="Intervals by spans of time, or by users.")]
BlocksOption = Annotated[int, typer.Option("--blocks", help="Spans of equal time that are resampled.")]
ResamplesOption = Annotated[int, typer.Option("--resamples", help="How many.")]
SeedOption = Annotated[int, typer.Option("--seed", help="The same seed gives the same intervals.")]


def backtest_report(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="Folder of a run.")],
    out: Annotated[Path | None, typer.Option("--out", help="Folder of the report; RUN/report.")] = None,
    reference: Annotated[
        str | None, typer.Option(help="Arm to compare with; the freshest online one of the run's model.")
    ] = None,
    resample: ResampleOption = ResampleName.TIME,
    blocks: BlocksOption = 100,
    resamples: ResamplesOption = 2_000,
    seed: SeedOption = 0,
) -> None:
    """Write what a run shows: one HTML page that opens anywhere, JSON and Parquet. Prints the findings."""
    from backtest.evaluation import EvaluationConfig
    from backtest.report import write_report
    from backtest.run_files import RunFolder

    folder = RunFolder.open(run)
    try:
        config = EvaluationConfig(reference=reference, bootstrap=_bootstrap(resample, blocks, resamples, seed))
        files = write_report(folder, out or run / "report", config)
    except ValueError as error:
        raise OpsError(str(error)) from error
    for sentence in json.loads(files.json.read_text(encoding="utf-8"))["findings"]:
        print(sentence)
    say(f"headrace: wrote {files.html}, and {files.json.name}, {files.arms.name}, {files.curves.name} beside it")


def backtest_compare(
    first: Annotated[Path, typer.Argument(metavar="A", help="Folder of a run.")],
    second: Annotated[Path, typer.Argument(metavar="B", help="Folder of another.")],
    metric: Annotated[MetricName, typer.Option(help="What is printed; --json has all.")] = MetricName.NDCG_20,
    resample: ResampleOption = ResampleName.TIME,
    blocks: BlocksOption = 100,
    resamples: ResamplesOption = 2_000,
    seed: SeedOption = 0,
    *,
    as_json: Annotated[bool, typer.Option("--json", help="Machine-readable.")] = False,
) -> None:
    """Compare two runs arm by arm, with intervals, and list what differs in how they were made."""
    import dataclasses

    from backtest.comparison import compare
    from backtest.report_words import comparison_text
    from backtest.run_files import RunFolder

    try:
        config = _bootstrap(resample, blocks, resamples, seed)
    except ValueError as error:
        raise OpsError(str(error)) from error
    found = compare(RunFolder.open(first), RunFolder.open(second), config)
    print(json.dumps(dataclasses.asdict(found), indent=2) if as_json else comparison_text(found, metric.value))


def _bootstrap(resample: ResampleName, blocks: int, resamples: int, seed: int) -> Any:
    from backtest.bootstrap import BootstrapConfig

    return BootstrapConfig(resample=resample.value, num_blocks=blocks, num_resamples=resamples, seed=seed)
