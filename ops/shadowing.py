"""`headrace snapshots shadow`: compares a version with the one in service at one worker, for a while."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ops.errors import OpsError
from serving.calling import ClientConfig
from serving.client import Client, shadow, start_shadow, stop_shadow

_LINES = (
    ("requests compared", "num_compared", "{:,}"),
    ("without time for them", "num_skipped", "{:,}"),
    ("answered by one of them only", "num_fallback_differs", "{:,}"),
    ("items among the first 10 of both", "overlap_at_10", "{:.1%}"),
    ("same first item", "same_first", "{:.1%}"),
    ("rank correlation (Spearman)", "rank_correlation", "{:.3f}"),
    ("scores moved by", "score_shift", "{:+.4f}"),
    ("distance of the scores (KS)", "score_distance", "{:.3f}"),
    ("that could not be answered again", "num_failed", "{:,}"),
    ("memory meanwhile, bytes", "memory_bytes", "{:,}"),
)


@dataclass(frozen=True, kw_only=True, slots=True)
class ShadowRun:
    """What to compare, and for how long."""

    version: int
    share: float
    seconds: float


def run_shadow(config: ClientConfig, run: ShadowRun) -> dict[str, Any]:
    """Start, wait, read the report, stop, whatever happens in between. Raises ClientError or OpsError."""
    with Client(config) as client:
        client.call(start_shadow(run.version, share=run.share))
        try:
            time.sleep(run.seconds)
            report = client.call(shadow()).shadow
        finally:
            client.call(stop_shadow())
    if report is None or report["version"] != run.version:
        raise OpsError(
            f"{config.url}: somebody else stopped the comparison with version {run.version}, or began another"
        )
    return report


def report_text(report: Mapping[str, Any]) -> str:
    """A report for a person."""
    lines = [f"version {report['version']} beside version {report['against']}, share {report['share']:g}"]
    width = max(len(label) for label, _, _ in _LINES)
    for label, name, form in _LINES:
        value = "-" if report[name] is None else form.format(report[name])
        lines.append(f"{label:<{width}}  {value}")
    return "\n".join(lines)
